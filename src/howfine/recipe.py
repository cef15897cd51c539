"""Recipe: a method, a readout and training settings, as a frozen record or a YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from howfine import fingerprint, plugins
from howfine.codec import PRECISIONS
from howfine.errors import SettingError, near
from howfine.method import Method, methods
from howfine.readout import Readout, readouts
from howfine.task import Task
from howfine.text import mapping, one, parsed, text_of
from howfine.training import Training


@dataclass(frozen=True)
class Recipe:
    """What a run is made of: the same record and seed give the same bytes on one machine."""

    name: str
    method: Method
    readout: Readout
    training: Training = field(default_factory=Training)
    # Precision of stored values: fp32, fp16, bf16, int8, int6, int4, int3, int2 or sign.
    store: str = "fp32"
    # Settings a study varies, with the values it tries: the size knob.
    knob: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # What the fit starts from: the phase before it, or a delta file or checkpoint folder; none for
    # the base.
    start: Recipe | str | None = None
    # Delta files whose regions are kept out: their entries stay the base's.
    outside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.outside and not self.method.keeps_out:
            raise SettingError(
                f"recipe {self.name}: its method can't keep out of single entries and takes no "
                "'outside'; leave it out, or choose a method that changes entries"
            )
        if self.store not in PRECISIONS:
            near_one = near(str(self.store), PRECISIONS)
            raise SettingError(f"recipe {self.name}, store {self.store!r} is unknown. {near_one}")

    @classmethod
    def load(cls, name: str | Path) -> Recipe:
        """A recipe that ships with howfine by name, a YAML file by path, or a method.

        A method without a recipe of its own runs at its defaults; where some of its settings have
        none, with those of its example.
        """
        text = _shipped().get(str(name))
        if text is None and Path(name).suffix in (".yaml", ".yml"):
            if not Path(name).is_file():
                raise SettingError(f"recipe file {name} does not exist; give another path")
            text = text_of(Path(name))
        if text is not None:
            return cls.parse(Path(name).stem, parsed(text, f"recipe {name}"))
        if str(name) in methods():
            return cls(str(name), _at_defaults(str(name)), default_readout())
        known = {*_shipped(), *methods()}
        raise SettingError(f"recipe {str(name)!r} is unknown. {near(str(name), known)}")

    @classmethod
    def parse(cls, name: str, raw: Any) -> Recipe:
        """A recipe from a YAML file's content; unknown keys are errors with the near name."""
        known = ("about", "method", "readout", "training", "store", "knob", "start", "outside")
        if not isinstance(raw, dict) or "method" not in raw:
            raise SettingError(
                f"recipe {name}: expected a mapping with a 'method', such as 'method: mask'"
            )
        for key in raw:
            if key not in known:
                raise SettingError(f"recipe {name} has no key {key!r}. {near(str(key), known)}")
        method_name, method_settings = one(raw["method"], f"recipe {name}, method")
        readout = _readout(raw["readout"], name) if "readout" in raw else default_readout()
        return cls(
            name=name,
            method=plugins.build(f"recipe {name}, method", methods(), method_name, method_settings),
            readout=readout,
            training=plugins.checked(
                Training,
                mapping(raw.get("training"), f"recipe {name}, training"),
                f"recipe {name}",
            ),
            store=str(raw.get("store", "fp32")),
            knob=_knob(raw.get("knob"), f"recipe {name}, knob"),
            start=_start(raw.get("start"), name, readout),
            outside=_outside(raw.get("outside", ())),
        )

    def of_task(self, task: Task) -> Recipe:
        """The same recipe with nothing left for the task's examples to say, in all its phases."""
        told = self.readout.of_task(task)
        if told == self.readout:
            return self
        return dataclasses.replace(_reading(self, told), knob=self.knob)

    def override(self, /, **settings: Any) -> Recipe:
        """The same recipe with settings changed, each where it lives: training, method, readout.

        Those of one part are changed together: only the outcome must be a valid combination. A
        `readout` by name takes the place of the recipe's own, in all its phases.
        """
        if "readout" in settings:
            other = _readout(settings.pop("readout"), self.name)
            found = dataclasses.replace(_reading(self, other), knob=self.knob)
            return found.override(**settings)
        parts: dict[str, dict[str, Any]] = {}
        for key, value in settings.items():
            part, name = self._home(key)
            parts.setdefault(part, {})[name] = value
        found = self
        if "start" in parts:
            start = _start(parts.pop("start")["start"], self.name, self.readout)
            found = dataclasses.replace(found, start=start)
        if "before" in parts and not isinstance(found.start, Recipe):
            raise SettingError(
                f"recipe {self.name}: start_{next(iter(parts['before']))} is a setting of a phase "
                f"before, and the start is {found.start or 'the base'}; leave it out"
            )
        if isinstance(found.start, Recipe):
            # Phases share a readout; what else an earlier one is told begins with "start".
            before = parts.pop("before", {}) | parts.get("readout", {})
            found = dataclasses.replace(found, start=found.start.override(**before))
        for part, changed in parts.items():
            if part == "store":
                found = dataclasses.replace(found, **changed)
                continue
            if part == "outside":
                found = dataclasses.replace(found, outside=_outside(changed[part]))
                continue
            holder = getattr(found, part)
            whole = {f.name: getattr(holder, f.name) for f in dataclasses.fields(holder)} | changed
            made = plugins.checked(type(holder), whole, f"recipe {self.name}, {part}")
            found = dataclasses.replace(found, **{part: made})
        return found

    def setting(self, key: str) -> Any:
        """What a setting is, checked and converted, by the name that `override` takes."""
        if key == "readout":
            return self.readout
        part, name = self._home(key)
        if part == "before":
            assert isinstance(self.start, Recipe)  # _home's condition for it
            return self.start.setting(name)
        return getattr(self, part) if part == name else getattr(getattr(self, part), name)

    def _home(self, key: str) -> tuple[str, str]:
        """The part of a recipe that a setting belongs to, and its name there.

        "store", "start" and "outside" are their own; "start_epochs" are epochs of the phase before.
        """
        known = {"store": "store", "start": "start"}
        if self.method.keeps_out:
            known["outside"] = "outside"
        if isinstance(self.start, Recipe) and key.startswith("start_"):
            return "before", key.removeprefix("start_")
        for part in ("readout", "method", "training"):
            known |= dict.fromkeys((f.name for f in dataclasses.fields(getattr(self, part))), part)
        part, _, name = key.partition("_")
        beside = part in ("readout", "method") and dataclasses.fields(getattr(self, part))
        if key not in known and beside and name in (each.name for each in beside):
            return part, name  # where both have a setting of one name, this says whose it is
        if key not in known:
            hint = near(key, [*known, "readout"])
            raise SettingError(f"recipe {self.name} has no setting {key!r}. {hint}")
        return known[key], key

    def as_dict(self) -> dict[str, Any]:
        """The record a study stores: settings that differ from their defaults."""
        method_name = plugins.name_of("methods", Method, self.method)
        readout_name = plugins.name_of("readouts", Readout, self.readout)
        return {
            "recipe": self.name,
            "method": {method_name: plugins.settings_of(self.method)},
            "readout": {readout_name: plugins.settings_of(self.readout)},
            "training": plugins.settings_of(self.training),
            "store": self.store,
            **({} if self.start is None else {"start": self._start_as_dict()}),
            **({"outside": list(map(_with_content, self.outside))} if self.outside else {}),
        }

    def _start_as_dict(self) -> Any:
        if isinstance(self.start, Recipe):
            record = self.start.as_dict()
            return {key: value for key, value in record.items() if key != "recipe"}
        return None if self.start is None else _with_content(self.start)


def recipes() -> list[str]:
    """Names of the recipes that ship with howfine, and of methods that have none of their own."""
    return sorted({*_shipped(), *methods()})


def about(name: str) -> str:
    """What a recipe that ships with howfine says of itself; "" for a method without one."""
    text = _shipped().get(name)
    return str(parsed(text, f"recipe {name}").get("about", "")) if text else ""


def _at_defaults(name: str) -> Method:
    cls = methods()[name]
    needed = [
        field
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    return plugins.examples("methods", Method)[name] if needed else cls()


def default_readout() -> Readout:
    """The first readout that needs no more than a base's body."""
    body = [cls for _, cls in sorted(readouts().items()) if cls.kind == "body"]
    return body[0]()


def _shipped() -> dict[str, str]:
    folder = resources.files("howfine") / "recipes"
    return {
        item.name.removesuffix(".yaml"): item.read_text()
        for item in folder.iterdir()
        if item.name.endswith(".yaml")
    }


def _start(raw: Any, name: str, readout: Readout) -> Recipe | str | None:
    """The phase before, inline or a recipe's name, with the same readout; a path; or none."""
    raw = None if raw == "none" else raw
    if isinstance(raw, Path) or (isinstance(raw, str) and raw not in recipes()):
        return str(raw)
    if raw is None or isinstance(raw, Recipe):
        found = raw
    else:
        found = Recipe.load(raw) if isinstance(raw, str) else Recipe.parse(f"{name}, start", raw)
    return found and _reading(found, readout)


def _readout(raw: Any, name: str) -> Readout:
    """A readout by name, as it is unless settings stand beside it; or one as it was made."""
    if isinstance(raw, Readout):
        return raw
    found, settings = one(raw, f"recipe {name}, readout")
    return plugins.build(f"recipe {name}, readout", readouts(), found, settings)


def _reading(recipe: Recipe, readout: Readout) -> Recipe:
    """A phase and those before it with another readout."""
    start = recipe.start
    if isinstance(start, Recipe):
        start = _reading(start, readout)
    return dataclasses.replace(recipe, readout=readout, start=start, knob={})


def _with_content(path: str) -> dict[str, str]:
    """A file or folder that a fit depends on: what it holds counts, not only its name."""
    return {"path": path, "sha256": fingerprint.of_path(Path(path))}


def _outside(raw: Any) -> tuple[str, ...]:
    """Paths of delta files: a list, or a text with commas."""
    items = raw.split(",") if isinstance(raw, str) else raw
    if not isinstance(items, list | tuple):
        raise SettingError(f"outside: found {raw!r}, expected paths of delta files")
    return tuple(str(item).strip() for item in items if str(item).strip())


def _knob(raw: Any, where: str) -> dict[str, tuple[Any, ...]]:
    knob = mapping(raw, where)
    for key, values in knob.items():
        if not isinstance(values, list) or not values:
            raise SettingError(f"{where}, {key}: expected a list of values, found {values!r}")
    return {key: tuple(values) for key, values in knob.items()}
