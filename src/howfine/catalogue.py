"""The catalogue of methods and recipes: summaries, and settings with their help and defaults."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from howfine import plugins, recipe
from howfine.errors import SettingError, near
from howfine.method import Method
from howfine.recipe import Recipe

Entry = dict[str, Any]


def catalogue(name: str | None = None) -> list[Entry]:
    """Every method with its recipes; or the method or recipe named, with all that can be set.

    Raises SettingError with the near name.
    """
    examples = plugins.examples("methods", Method)
    if name is None:
        return [_method(key, type(example)) for key, example in examples.items()]
    if name in examples:
        found = Recipe.load(name)  # the recipe of that name, if there is one: what tune runs
        entry = _method(name, type(examples[name])) | {"settings": _settings(found.method)}
        return [entry | _run_settings(found)]
    if name not in recipe.recipes():
        known = {*examples, *recipe.recipes()}
        raise SettingError(f"method or recipe {name!r} is unknown. {near(name, known)}")
    found = Recipe.load(name)
    entry = {"name": name, "summary": recipe.about(name), "settings": _settings(found.method)}
    return [entry | _run_settings(found)]


def _method(name: str, cls: type[Method]) -> Entry:
    about = inspect.getdoc(inspect.getmodule(cls)) or ""
    return {
        "name": name,
        "summary": " ".join(about.split("\n\n")[0].split()),
        "about": about,
        "recipes": {
            other: recipe.about(other)
            for other in recipe.recipes()
            if type(Recipe.load(other).method) is cls and recipe.about(other)
        },
        "settings": _settings(cls),
    }


def _run_settings(found: Recipe) -> Entry:
    """What `tune` takes beside the method's own settings."""
    start = found.start.name if isinstance(found.start, Recipe) else found.start
    helps = setting_help(Recipe)
    own = [
        {"name": name, "type": "str", "default": default, "help": helps[name]}
        for name, default in (("store", found.store), ("start", start))
    ]
    return {"readout": _settings(found.readout), "training": [*_settings(found.training), *own]}


def _settings(of: Any) -> list[Entry]:
    """Settings of a dataclass at its defaults, or of an instance at its values."""
    cls = of if isinstance(of, type) else type(of)
    helps = setting_help(cls)
    return [
        {
            "name": field.name,
            "type": str(field.type),
            "default": plugins.default_of(field) if of is cls else getattr(of, field.name),
            "help": helps.get(field.name, ""),
        }
        for field in dataclasses.fields(cls)
    ]


def setting_help(cls: type) -> dict[str, str]:
    """The comment lines above each field of a dataclass: its help, said once."""
    found: dict[str, str] = {}
    comment: list[str] = []
    for line in inspect.getsource(cls).splitlines():
        text = line.strip()
        if text.startswith("#"):
            comment.append(text.lstrip("# "))
            continue
        match = re.match(r"(\w+)\s*:", text)
        if match and comment:
            found[match.group(1)] = " ".join(comment)
        comment = []
    return found
