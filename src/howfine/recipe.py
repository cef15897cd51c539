"""Recipe: a method, a readout and training settings, as a frozen record or a YAML file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from howfine import fingerprint, plugins
from howfine.codec import PRECISIONS
from howfine.errors import SettingError, near
from howfine.method import Method, methods
from howfine.readout import Readout, readouts
from howfine.text import mapping, one, parsed, text_of


@dataclass(frozen=True)
class Training:
    """How a fit is run; the names are transformers' where it has one."""

    # Passes over the training split.
    epochs: float = 3.0
    # Optimiser steps; above 0 it overrides epochs.
    max_steps: int = 0
    # Examples per optimiser step and process.
    batch_size: int = 32
    # Batches added up before an optimiser step.
    gradient_accumulation: int = 1
    # Peak learning rate of the method's parameters; None for the method's own.
    learning_rate: float | None = None
    # Peak learning rate of the readout's head; None for the same where one is named,
    # up to 1e-2 (SGD: 1) beside a method that trains something, else 1e-3.
    readout_learning_rate: float | None = None
    # AdamW's decoupled weight decay.
    weight_decay: float = 0.01
    # Share of the steps that warm up linearly.
    warmup: float = 0.1
    # Learning-rate schedule by transformers' name: linear, cosine, constant, …
    schedule: str = "linear"
    # Gradient norm above which gradients are scaled down; 0 for never.
    max_grad_norm: float = 1.0
    # Number format of the forward and backward pass: fp32, bf16 or fp16 (mixed precision).
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # Evaluations on dev per training that pick the best state; 0 keeps the last state.
    evaluations: int = 0
    # Evaluations without improvement before training stops; 0 for never.
    patience: int = 0
    # Batch examples of similar length (saves padding).
    group_by_length: bool = True
    # Share of the steps, the last ones, taken with values as a file of few bits will hold them.
    rounding: float = 0.3
    # Recompute activations in the backward pass (saves memory, costs time).
    gradient_checkpointing: bool = False
    # adamw, or sgd without momentum.
    optimizer: Literal["adamw", "sgd"] = "adamw"
    # Train in evaluation mode: no dropout, in the base nor in the head.
    eval_mode: bool = False
    # Where to log: none, tensorboard, trackio, … as transformers' report_to.
    report_to: str = "none"

    def __post_init__(self) -> None:
        for name, fits, expected in _RANGES:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and fits(value)):
                raise SettingError(f"training {name}: found {value}, expected {expected}")


_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("epochs", lambda value: value > 0, "more than 0"),
    ("max_steps", lambda value: value >= 0, "0 (so that epochs count) or more"),
    ("batch_size", lambda value: value >= 1, "1 or more"),
    ("gradient_accumulation", lambda value: value >= 1, "1 or more"),
    ("learning_rate", lambda value: value >= 0, "a finite number from 0"),
    ("readout_learning_rate", lambda value: value >= 0, "a finite number from 0"),
    ("weight_decay", lambda value: value >= 0, "a finite number from 0"),
    ("warmup", lambda value: 0 <= value < 1, "a share from 0 to below 1"),
    ("rounding", lambda value: 0 <= value <= 1, "a share from 0 to 1"),
    ("max_grad_norm", lambda value: value >= 0, "0 (for never) or more"),
    ("evaluations", lambda value: value >= 0, "0 (for none) or more"),
    ("patience", lambda value: value >= 0, "0 (for never) or more"),
)


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
    # What the fit starts from: the phase before it, or a delta file or checkpoint folder.
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
        """A recipe that ships with howfine by name, a YAML file by path, or a method's EXAMPLE.

        A method without a recipe of its own runs with its example's settings and the defaults.
        """
        text = _shipped().get(str(name))
        if text is None and Path(name).suffix in (".yaml", ".yml"):
            if not Path(name).is_file():
                raise SettingError(f"recipe file {name} does not exist; give another path")
            text = text_of(Path(name))
        if text is not None:
            return cls.parse(Path(name).stem, parsed(text, f"recipe {name}"))
        if str(name) in methods():
            example = plugins.examples("methods", Method)[str(name)]
            return cls(str(name), example, default_readout())
        known = {*_shipped(), *methods()}
        raise SettingError(f"recipe {str(name)!r} is unknown. {near(str(name), known)}")

    @classmethod
    def parse(cls, name: str, raw: Any) -> Recipe:
        """A recipe from a YAML file's content; unknown keys are errors with the near name."""
        known = ("about", "method", "readout", "training", "store", "knob", "start", "outside")
        if not isinstance(raw, dict) or "method" not in raw:
            raise SettingError(f"recipe {name}: expected a mapping with a 'method'; see docs")
        for key in raw:
            if key not in known:
                raise SettingError(f"recipe {name} has no key {key!r}. {near(str(key), known)}")
        method_name, method_settings = one(raw["method"], f"recipe {name}, method")
        if "readout" in raw:
            readout_name, settings = one(raw["readout"], f"recipe {name}, readout")
            readout = plugins.build(f"recipe {name}, readout", readouts(), readout_name, settings)
        else:
            readout = default_readout()
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

    def override(self, /, **settings: Any) -> Recipe:
        """The same recipe with settings changed, each where it lives: training, method, readout.

        Those of one part are changed together: only the outcome must be a valid combination.
        """
        parts: dict[str, dict[str, Any]] = {}
        for key, value in settings.items():
            part, name = self._home(key)
            parts.setdefault(part, {})[name] = value
        found = self
        if "start" in parts:
            start = _start(parts.pop("start")["start"], self.name, self.readout)
            found = dataclasses.replace(found, start=start)
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
        if key not in known:
            raise SettingError(f"recipe {self.name} has no setting {key!r}. {near(key, known)}")
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
    """The phase before, inline or a recipe's name, with the same readout; or a path."""
    if isinstance(raw, Path) or (isinstance(raw, str) and raw not in recipes()):
        return str(raw)
    if raw is None or isinstance(raw, Recipe):
        found = raw
    else:
        found = Recipe.load(raw) if isinstance(raw, str) else Recipe.parse(f"{name}, start", raw)
    return found and _reading(found, readout)


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
