"""Plan: what a study compares, and the runs that come of it."""

from __future__ import annotations

import hashlib
import itertools
import json
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
    # Settings that every recipe gets where it has them, such as {"epochs": 2}.
    settings: dict[str, Any] | None = None
    # Test the knobs only of these settings; None for the recipe's own.
    knobs: dict[str, dict[str, list[Any]]] | None = None

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


def runs_of(plan: Plan, base: Base, task: Task) -> list[Run]:
    """Every run of a plan, in a fixed order, with keys that name base, task, record and seed."""
    roles = [("ceiling", plan.ceiling), ("floor", plan.floor)]
    roles += [("candidate", name) for name in plan.recipes]
    runs = []
    for role, name in roles:
        recipe = Recipe.load(name)
        for key, value in (plan.settings or {}).items():
            recipe = recipe.override(**{key: value})
        knob = (plan.knobs or {}).get(name, recipe.knob) if role == "candidate" else {}
        for values in itertools.product(*knob.values()):
            settings = tuple(zip(knob, values, strict=True))
            made = recipe.override(**dict(settings))
            runs += [_run(made, role, settings, seed, base, task) for seed in plan.seeds]
    # A recipe named twice is one run; the first role counts, so that a ceiling stays one.
    unique: dict[str, Run] = {}
    for run in runs:
        unique.setdefault(run.key, run)
    return list(unique.values())


def _run(recipe: Recipe, role: str, settings: Any, seed: int, base: Base, task: Task) -> Run:
    record = {**recipe.as_dict(), "seed": seed, "base": base.fingerprint, "task": task.fingerprint}
    record |= {"dtype": str(base.dtype), "metric": task.metric}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()
    return Run(recipe, role, settings, seed, f"{recipe.name}-{digest[:10]}-s{seed}")
