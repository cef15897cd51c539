"""What the skill-grafting bench's ledger says: means over runs that can be compared, and sizes."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

from howfine import regions
from howfine.ledger import Record

# Shares of the entries at which grafts are measured; θ_ft itself is the end of each curve.
GRID = ("0.0001", "0.001", "0.01", "0.1")
REGION = "0.01"
# Tasks that stand beside another one only for the overlap of regions.
SIMILAR = {"rotten-tomatoes": "sst2", "qqp": "mrpc"}

# (share of the entries, accuracy) from small to large.
Curve = list[tuple[float, float]]


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

    def curves(
        self, task: str, kinds: Sequence[str], end: str = "ft", also: Sequence[str] = ("head",)
    ) -> tuple[list[Curve], list[float]] | None:
        """A curve for each kind and the accuracies of `also`, all over the same sizes and seeds.

        Sizes that not every seed has are left out, unless fewer than two are left. None where runs
        are lacking.
        """
        sizes = {d: [f"{kind}@{d}" for kind in kinds] for d in GRID}
        begun = [d for d in GRID if all(self._seeds(task, cell) for cell in sizes[d])]
        whole = [
            d
            for d in begun
            if all(self._seeds(task, c) >= self._seeds(task, end) for c in sizes[d])
        ]
        grid = whole if len(whole) > 1 else begun
        cells = [f"{kind}@{d}" for kind in kinds for d in grid]
        means = self.means(task, [*cells, end, *also])
        if means is None or not grid:
            return None
        last = (1.0, means[len(cells)])
        found = [
            [*zip(map(float, grid), means[n * len(grid) : (n + 1) * len(grid)], strict=True), last]
            for n in range(len(kinds))
        ]
        return found, means[len(cells) + 1 :]

    def together(self) -> Record | None:
        """Scores in the model of all tasks, means over seeds, and the shares of the mean gain.

        A seed's own gain may be next to nothing, and its share then anything.
        """
        records = self.about("multi")
        if not records:
            return None
        found: Record = {"tasks": records[0]["tasks"], "seeds": [r["seed"] for r in records]}
        found |= {of: _means([r[of] for r in records]) for of in ("before", "tuned")}
        found["grafted"] = [
            _means(rows) for rows in zip(*(r["grafted"] for r in records), strict=True)
        ]
        found["effect"] = regions.effect(found["grafted"], found["before"], found["tuned"])
        return found

    def _seeds(self, task: str, cell: str) -> set[int]:
        return {row["seed"] for row in self.rows(task, cell)}


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def needed(curve: Curve, target: float) -> float:
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
