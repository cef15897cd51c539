"""Refine: bisection of each recipe's size, towards its smallest file that still does the task.

The next value lies between the smallest that holds and the next smaller one that does not. It
follows from stored records alone, so that every worker of a study, and a later call, finds the
same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from howfine.ledger import Record
from howfine.plan import Plan, Run, knob_of
from howfine.recipe import Recipe


def finer(plan: Plan, runs: Sequence[Run], records: Sequence[Record]) -> Plan:
    """The plan with one more value of each recipe's size, from its runs and their records.

    A value holds where no seed failed and the mean dev score is within the margin of the ceiling's.
    A recipe stays as it is where it varies no setting of numbers above 0, or several settings,
    where all of its values hold or none does, and where no value is left in between.
    """
    done = [record for record in records if "error" not in record]
    ceiling = [record["dev_score"] for record in done if record["role"] == "ceiling"]
    if not ceiling:
        return plan
    best, knobs = statistics.fmean(ceiling), dict(plan.knobs or {})
    least = best - plan.margin * abs(best)
    for name in plan.recipes:
        knob = knob_of(plan, name)
        if (size := _size(plan, name, knob)) is None:
            continue
        varied, values = size
        rows = [[r for r in done if r["key"] in _keys(runs, name, varied, v)] for v in knob[varied]]
        middle = _between(values, rows, least, len(plan.seeds))
        if middle is not None:
            knobs[name] = {**knob, varied: [*knob[varied], middle]}
    return replace(plan, knobs=knobs or None)


def unrefined(plan: Plan) -> list[str]:
    """Recipes that vary something, but no one setting of numbers above 0."""
    knobs = {name: knob_of(plan, name) for name in plan.recipes}
    varies = {name for name, knob in knobs.items() if any(len(own) > 1 for own in knob.values())}
    return [n for n in knobs if n in varies and _size(plan, n, knobs[n]) is None]


def _size(
    plan: Plan, name: str, knob: Mapping[str, Sequence[Any]]
) -> tuple[str, list[int | float]] | None:
    """(the one setting that is varied, its values), if those are numbers above 0.

    Values are as the recipe holds them: of a whole setting whole, however they are spelled. YAML
    reads 1e-3, which has no point, as a text.
    """
    varied = [setting for setting, values in knob.items() if len(values) > 1]
    if len(varied) != 1:
        return None
    recipe = Recipe.load(name).override(**(plan.settings or {}))
    beside = {setting: values[0] for setting, values in knob.items() if len(values) == 1}
    values = [
        recipe.override(**beside, **{varied[0]: value}).setting(varied[0])
        for value in knob[varied[0]]
    ]
    fit = all(type(value) in (int, float) and 0 < value < math.inf for value in values)
    return (varied[0], values) if fit else None


def _keys(runs: Sequence[Run], name: str, setting: str, value: Any) -> set[str]:
    own = (run for run in runs if run.role == "candidate" and run.named == name)
    return {run.key for run in own if dict(run.settings)[setting] == value}


def _between(
    values: Sequence[int | float], rows: Sequence[list[Record]], least: float, seeds: int
) -> float | None:
    """The middle, on a log scale, of the smallest file's value that holds and the one below it."""
    tried = sorted(
        (statistics.fmean(r["bytes"] for r in own), value, own)
        for value, own in zip(values, rows, strict=True)
        if own
    )
    holds = [
        len(own) == seeds and statistics.fmean(r["dev_score"] for r in own) >= least
        for _, _, own in tried
    ]
    if not any(holds) or holds[0]:
        return None
    low, high = (tried[holds.index(True) + step][1] for step in (-1, 0))
    middle = math.sqrt(low * high)
    whole = isinstance(low, int) and isinstance(high, int)
    middle = round(middle) if whole else float(f"{middle:.3g}")
    return None if middle in values else middle
