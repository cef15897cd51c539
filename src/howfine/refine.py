"""Refine: bisection of each recipe's size, towards its smallest file that still does the task.

The next value lies between the smallest that holds and the next smaller one that does not. It
follows from stored records alone, so that every worker of a study, and a later call, finds the
same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from howfine.ledger import Record
from howfine.plan import Plan
from howfine.recipe import Recipe


def finer(plan: Plan, records: Sequence[Record]) -> Plan:
    """The plan with one more value of each recipe's size, from the records of all its runs.

    A value holds where no seed failed and the mean dev score is within the margin of the ceiling's.
    A recipe stays as it is where it varies no setting of numbers above 0, or several settings,
    where all of its values hold or none does, and where no value is left in between.
    """
    done = [record for record in records if "error" not in record]
    ceiling = [record["dev_score"] for record in done if record["role"] == "ceiling"]
    if not ceiling:
        return plan
    best, knobs = statistics.fmean(ceiling), dict(plan.knobs or {})
    for name in plan.recipes:
        recipe = Recipe.load(name)
        knob: dict[str, Any] = {**knobs.get(name, recipe.knob)}
        varied = [setting for setting, values in knob.items() if len(values) > 1]
        if len(varied) != 1 or not all(map(_is_size, knob[varied[0]])):
            continue
        mine = [r for r in done if r["recipe"] == recipe.name and r["role"] == "candidate"]
        rows = [[r for r in mine if r["settings"][varied[0]] == v] for v in knob[varied[0]]]
        least = best - plan.margin * abs(best)
        middle = _between(knob[varied[0]], rows, least, len(plan.seeds))
        if middle is not None:
            knobs[name] = {**knob, varied[0]: [*knob[varied[0]], middle]}
    return replace(plan, knobs=knobs or None)


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _between(
    values: Sequence[float], rows: Sequence[list[Record]], least: float, seeds: int
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
