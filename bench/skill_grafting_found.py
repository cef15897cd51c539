"""What the skill-grafting bench's ledger says: means over runs that can be compared, and sizes."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

from howfine.ledger import Record

# Shares of the entries at which grafts are measured; θ_ft itself is the end of each curve.
GRID = ("0.0001", "0.001", "0.01", "0.1")
REGION = "0.01"
# Tasks that stand beside another one only for the overlap of regions.
SIMILAR = {"rotten-tomatoes": "sst2", "qqp": "mrpc"}


class Found:
    """The ledger's records, by task, cell and seed."""

    def __init__(self, records: Mapping[str, Record]) -> None:
        self.records = list(records.values())
        self.cells = {
            (r["task"], r["cell"], r["seed"]): r for r in self.records if "about" not in r
        }
        self.all_tasks = list(dict.fromkeys(task for task, _, _ in self.cells))
        self.tasks = [task for task in self.all_tasks if task not in SIMILAR]

    def about(self, what: str) -> list[Record]:
        """Records of several tasks: overlap, continual, multi."""
        return [r for r in self.records if r.get("about") == what]

    def rows(self, task: str, cell: str) -> list[Record]:
        """Runs of a cell, one a seed."""
        return [r for (t, c, _), r in self.cells.items() if (t, c) == (task, cell)]

    def means(self, task: str, cells: Sequence[str], of: str = "score") -> list[float] | None:
        """A mean for each cell over the seeds that all of them have; None where they share none."""
        seeds = [{r["seed"] for r in self.rows(task, cell)} for cell in cells]
        shared = sorted(set.intersection(*seeds))
        if not shared:
            return None
        return [
            statistics.fmean(float(self.cells[task, cell, seed][of]) for seed in shared)
            for cell in cells
        ]

    def over_tasks(self, cells: Sequence[str], of: str = "score") -> list[float] | None:
        """Means over the main tasks of those means; None where a task lacks a cell."""
        found = [self.means(task, cells, of) for task in self.tasks]
        known = [means for means in found if means is not None]
        if not known or len(known) < len(found):
            return None
        return [statistics.fmean(column) for column in zip(*known, strict=True)]

    def curve(self, task: str, kind: str, end: str = "ft") -> list[tuple[float, float]]:
        """(share of the entries, accuracy) from small to large, over the seeds of all of it."""
        grid = [density for density in GRID if self.rows(task, f"{kind}@{density}")]
        full = [d for d in grid if self._seeds(task, f"{kind}@{d}") >= self._seeds(task, end)]
        grid = full if len(full) > 1 else grid
        means = self.means(task, [*(f"{kind}@{density}" for density in grid), end])
        if means is None or not grid:
            return []
        return [*zip(map(float, grid), means, strict=False), (1.0, means[-1])]

    def _seeds(self, task: str, cell: str) -> set[int]:
        return {row["seed"] for row in self.rows(task, cell)}


def needed(curve: Sequence[tuple[float, float]], target: float) -> float:
    """The share of the entries at which a curve first reaches the target.

    Between two points by the logarithm of the share. The first share where that reaches it.
    """
    if curve[0][1] >= target:
        return curve[0][0]
    for (low, before), (high, after) in itertools.pairwise(curve):
        if after >= target:
            part = (target - before) / (after - before)
            return math.exp(math.log(low) + part * (math.log(high) - math.log(low)))
    return 1.0
