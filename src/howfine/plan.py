"""Plan: what a study compares, and the runs that come of it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from howfine import plugins
from howfine.base import Base
from howfine.errors import SettingError, near
from howfine.recipe import Recipe
from howfine.task import Task


@dataclass(frozen=True)
class Plan:
    """What a study compares."""

    # Recipe whose score is the ceiling.
    ceiling: str
    # Recipe whose score is the floor.
    floor: str
    # Recipes in between, each over its knob.
    recipes: tuple[str, ...] = ()
    # Seeds of every run.
    seeds: tuple[int, ...] = (0, 1, 2)
    # Share of the ceiling's score that may be lost.
    margin: float = 0.01
    # Settings that every recipe gets, such as {"epochs": 2}.
    settings: dict[str, Any] | None = None
    # Knobs of a recipe in place of its own: for each setting, its values.
    knobs: dict[str, dict[str, list[Any]]] | None = None
    # Rounds in which each recipe is run at one more value of its size, by bisection.
    refine: int = 0

    def __post_init__(self) -> None:
        if type(self.refine) is not int or self.refine < 0:
            raise SettingError(
                f"plan refine: found {self.refine!r}, expected a whole number of rounds, from 0"
            )
        self._check_seeds()
        number = isinstance(self.margin, int | float) and not isinstance(self.margin, bool)
        if not number or not 0 <= self.margin < 1:
            raise SettingError(
                f"plan margin: found {self.margin!r}, expected a share of the ceiling's score, "
                "from 0 to below 1"
            )
        self._check_knobs()

    def _check_seeds(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise SettingError(
                f"plan seeds: found {list(self.seeds)}, expected one at least, each once"
            )
        if odd := [seed for seed in self.seeds if type(seed) is not int or not 0 <= seed < 2**32]:
            raise SettingError(f"plan seeds: found {odd[0]!r}, expected whole numbers from 0")

    def _check_knobs(self) -> None:
        for name, knob in (self.knobs or {}).items():
            if name not in self.recipes:
                hint = near(name, self.recipes)
                raise SettingError(f"plan knobs: {name!r} is none of the plan's recipes. {hint}")
            if not isinstance(knob, Mapping):
                raise SettingError(
                    f"plan knobs, {name}: found {knob!r}, expected values for each setting, such "
                    "as {'epochs': [1, 2]}"
                )
            single = [s for s, values in knob.items() if not isinstance(values, list | tuple)]
            if single:
                raise SettingError(
                    f"plan knobs, {name}, {single[0]}: found {knob[single[0]]!r}, expected a list "
                    "of values; put it in brackets"
                )
            if empty := [setting for setting, values in knob.items() if not values]:
                raise SettingError(
                    f"plan knobs, {name}, {empty[0]}: found no values, expected one at least; "
                    "leave the setting out for the recipe's own value"
                )

    @property
    def kind(self) -> str:
        """The kind of base that all its recipes can read: a body, if none asks for more."""
        names = (self.ceiling, self.floor, *self.recipes)
        told = {k: v for k, v in (self.settings or {}).items() if k == "readout"}
        kinds = {Recipe.load(name).override(**told).readout.kind for name in names} - {"body"}
        if len(kinds) > 1:
            raise SettingError(
                f"plan: its recipes' readouts need bases of kinds {' and '.join(sorted(kinds))}, "
                "expected one; name one readout for all of them in settings"
            )
        return kinds.pop() if kinds else "body"

    @classmethod
    def load(cls, name: str | Path = "default") -> Plan:
        """A plan that ships with howfine by name, or a YAML file."""
        shipped = {
            item.name.removesuffix(".yaml"): item
            for item in (resources.files("howfine") / "recipes" / "plans").iterdir()
        }
        if str(name) in shipped:
            raw = yaml.safe_load(shipped[str(name)].read_text())
        elif Path(name).is_file():
            raw = _read(Path(name))
        else:
            raise SettingError(f"plan {str(name)!r} is unknown. {near(str(name), shipped)}")
        if not isinstance(raw, dict):
            raise SettingError(
                f"plan {name}: expected 'ceiling', 'floor', 'recipes'; found {raw!r}. "
                "the plans that ship with howfine show the form"
            )
        raw.pop("about", None)
        return plugins.checked(cls, raw, f"plan {name}")


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise SettingError(f"plan {path} can't be read: {reason}; mend the YAML") from error


@dataclass(frozen=True)
class Run:
    """One cell of a study."""

    recipe: Recipe
    role: str  # ceiling | floor | candidate
    settings: tuple[tuple[str, Any], ...]  # what the knob set
    seed: int
    key: str
    named: str  # the recipe, as the plan names it


def knob_of(plan: Plan, name: str) -> dict[str, list[Any]]:
    """What one of a plan's recipes is run over: for each setting, its values."""
    knob: Mapping[str, Sequence[Any]] = (plan.knobs or {}).get(name, Recipe.load(name).knob)
    return {setting: list(values) for setting, values in knob.items()}


def runs_of(plan: Plan, base: Base, task: Task) -> list[Run]:
    """Every run of a plan, in a fixed order, with keys that name base, task, record and seed."""
    roles = [("ceiling", plan.ceiling), ("floor", plan.floor)]
    roles += [("candidate", name) for name in plan.recipes]
    runs = []
    for role, name in roles:
        recipe = Recipe.load(name).override(**(plan.settings or {}))
        knob = knob_of(plan, name) if role == "candidate" else {}
        for values in itertools.product(*knob.values()):
            settings = tuple(zip(knob, values, strict=True))
            made = recipe.override(**dict(settings))
            run = Run(made, role, settings, 0, "", name)
            runs += [_seeded(run, seed, base, task) for seed in plan.seeds]
    _check_names(runs)
    # A recipe named twice is one run; the first role counts, so that a ceiling stays one.
    unique: dict[str, Run] = {}
    for run in runs:
        unique.setdefault(run.key, run)
    return list(unique.values())


def _check_names(runs: Sequence[Run]) -> None:
    """Raises SettingError for two recipes of one name: records, and the report, go by it."""
    first: dict[str, str] = {}
    for run in runs:
        two = [first.setdefault(run.recipe.name, run.named), run.named]
        if _place(two[0]) == _place(two[1]):
            continue
        which = "the file" if run.recipe.name in map(str, two) else "one of the files"
        raise SettingError(
            f"plan: {two[0]} and {two[1]} are both called {run.recipe.name!r}, which their "
            f"records go by; rename {which}"
        )


def _place(named: str | Path) -> str:
    """A recipe file's whole path, however it is spelled; the name of one that is no file."""
    path = Path(named)
    return str(path.resolve() if path.suffix in (".yaml", ".yml") else named)


def _seeded(run: Run, seed: int, base: Base, task: Task) -> Run:
    """A run of a seed, with its key."""
    recipe = run.recipe
    record = {**recipe.as_dict(), "seed": seed, "base": base.fingerprint, "task": task.fingerprint}
    record |= {"dtype": str(base.dtype), "metric": task.metric}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()
    return dataclasses.replace(run, seed=seed, key=f"{recipe.name}-{digest[:10]}-s{seed}")
