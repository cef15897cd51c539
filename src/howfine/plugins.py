"""The registry is the folder: methods and readouts are found by being files in their package.

A name is a module's stem. A plugin folder is added with the environment variable `HOWFINE_PLUGINS`
(folders separated by the system's path separator, each holding `methods/` or `readouts/`), so a
method of one's own needs no fork.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import pkgutil
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from howfine.errors import SettingError, near

T = TypeVar("T")


def modules(room: str) -> dict[str, types.ModuleType]:
    """Modules of `howfine.<room>` by stem, those of plugin folders included."""
    return _modules(room, os.environ.get("HOWFINE_PLUGINS", ""))


@functools.lru_cache
def _modules(room: str, folders: str) -> dict[str, types.ModuleType]:
    package = importlib.import_module(f"howfine.{room}")
    for folder in filter(None, folders.split(os.pathsep)):
        extra = str(Path(folder) / room)
        if extra not in package.__path__:
            package.__path__.append(extra)
    found = [info.name for path in package.__path__ for info in pkgutil.iter_modules([path])]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise SettingError(
            f"howfine/{room}: {twice} stand in two folders; rename the plugin's file"
        )
    stems = sorted(found)
    return {stem: importlib.import_module(f"howfine.{room}.{stem}") for stem in stems}


def registry(room: str, contract: type[T]) -> dict[str, type[T]]:
    """The one final subclass of `contract` that each module of the room defines, by stem."""
    return {name: type(example) for name, example in examples(room, contract).items()}


def examples(room: str, contract: type[T]) -> dict[str, T]:
    """Each module's EXAMPLE, by stem. Raises SettingError where a file has none."""
    found = {}
    for name, module in modules(room).items():
        example = vars(module).get("EXAMPLE")
        if not isinstance(example, contract):
            raise SettingError(
                f"{module.__file__} has no EXAMPLE that is a {contract.__name__}; "
                "end the file with `EXAMPLE = YourClass(...)`"
            )
        found[name] = example
    return found


def name_of(room: str, contract: type[T], value: T) -> str:
    """The registry name of an instance."""
    for name, cls in registry(room, contract).items():
        if type(value) is cls:
            return name
    raise SettingError(f"{type(value).__name__} stands in no file of howfine/{room}/")


def build(noun: str, known: dict[str, type[T]], name: str, settings: dict[str, Any]) -> T:
    """An instance by name, its settings checked and converted by their type annotations.

    Raises SettingError for an unknown name or setting (with the near one) or a bad value.
    """
    if name not in known:
        raise SettingError(f"{noun} {name!r} is unknown. {near(name, known)}")
    return checked(known[name], settings, f"{noun} {name!r}")


def checked(cls: type[T], settings: dict[str, Any], where: str) -> T:
    """`cls(**settings)` with types converted and checked; errors name `where` and the field."""
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in settings:
        if key not in fields:
            raise SettingError(f"{where} has no setting {key!r}. {near(key, fields)}")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in settings:
            raise SettingError(f"{where} lacks {field.name!r}, which has no default; give one")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in settings.items():
        found = f"{where}, setting {key!r}: found {value!r}, expected {_said(hints[key])}"
        if _is_no_number(value, hints[key]):
            raise SettingError(f"{found}: a number")
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(_split(value, hints[key]))
        except ValidationError as error:
            raise SettingError(f"{found}: {error.errors()[0]['msg']}") from None
    return cls(**values)


def _is_no_number(value: Any, hint: Any) -> bool:
    """Whether `true` or `false` stands where a number does: pydantic would read 1 or 0."""
    if isinstance(value, bool):
        kinds = {hint, *typing.get_args(hint)}
        return bool not in kinds and not kinds.isdisjoint((int, float))
    if isinstance(value, list | tuple):
        return any(_is_no_number(each, kind) for each in value for kind in typing.get_args(hint))
    return False


def _said(hint: Any) -> str:
    """A type as it would be written."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _split(value: Any, hint: Any) -> Any:
    """A text for a tuple setting, as its items: 'K,V' or, where items hold commas, 'K;all@1,2'."""
    if typing.get_origin(hint) is tuple and isinstance(value, str):
        separator = ";" if ";" in value or "@" in value else ","
        return tuple(part.strip() for part in value.split(separator) if part.strip())
    return value


def default_of(field: Any) -> Any:
    """What a dataclass's field is where it is left out; MISSING for one that must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def settings_of(value: Any) -> dict[str, Any]:
    """An instance's settings that differ from their defaults: what a file header stores."""
    changed = {}
    for field in dataclasses.fields(value):
        current = getattr(value, field.name)
        if current != default_of(field):
            changed[field.name] = list(current) if isinstance(current, tuple) else current
    return changed
