"""The frontier ledgers, read: which rate was chosen, what an entry's runs give, who keeps 99 %."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev

import numpy as np
from entries import LADDERS, RATES, Entry

from howfine.ledger import Record, unpack_predictions
from howfine.metrics import METRICS, paired_bootstrap

# Share of full fine-tuning's score that is to be kept.
KEPT = 0.99
# With a first seed below this share of it, the other seeds would have to be better than full
# fine-tuning by half a point in a hundred for the mean to keep 99 %.
HOPELESS = 0.96
# Standard deviation over seeds, as a share of the score, up to which a task's verdicts count.
STEADY = 0.05
FULL = "full"
# Where the rates are chosen that all tasks are run with.
TUNED_ON = "rotten-tomatoes"


def key(task: str, entry: str, rate: float, seed: int) -> str:
    """A run's name in the ledger."""
    return f"{task}/{entry}/{rate:g}/s{seed}"


def judged_on(task: str, entry: Entry) -> str:
    """The task on which the rate of an entry is chosen: full fine-tuning's on the task itself."""
    return task if entry.name == FULL else TUNED_ON


def best_rate(records: Mapping[str, Record], task: str, entry: Entry, seed: int) -> float | None:
    """The rate with the best held-out score, the lower of two equals.

    None while one has not been tried, or where all failed.
    """
    where = judged_on(task, entry)
    names = [key(where, entry.name, rate, seed) for rate in RATES[entry.rates]]
    if not all(name in records for name in names):
        return None
    found = [records[name] for name in names if "heldout" in records[name]]
    if not found:
        return None
    return max(found, key=lambda trial: (trial["heldout"], -trial["rate"]))["rate"]


@dataclass(frozen=True)
class Row:
    """An entry's runs on a task at its best rate, one a seed."""

    entry: Entry
    rate: float
    runs: list[Record]
    whole: bool  # all seeds are there

    @property
    def bytes(self) -> float:
        """Mean over seeds."""
        return mean(run["bytes"] for run in self.runs)

    @property
    def score(self) -> float:
        """Mean over seeds."""
        return mean(run["score"] for run in self.runs)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds, 0 of one."""
        return stdev(run["score"] for run in self.runs) if len(self.runs) > 1 else 0.0

    @property
    def predictions(self) -> list[np.ndarray]:
        """Of the test rows, one array a seed."""
        return [unpack_predictions(run["predictions"]) for run in self.runs]


class TaskResults:
    """What the ledgers hold of one task."""

    def __init__(
        self,
        task: str,
        records: Mapping[str, Record],
        entries: Iterable[Entry],
        seeds: Sequence[int],
    ) -> None:
        self.task, self.records, self.seeds = task, records, seeds
        self.targets = unpack_predictions(records[f"{task}/targets"]["targets"])
        found = {entry.name: self._row(entry) for entry in entries}
        self.rows = {name: row for name, row in found.items() if row is not None}
        self.full = self.rows.get(FULL)
        self.metric = (
            METRICS[next(iter(self.rows.values())).runs[0]["metric"]] if self.rows else None
        )

    def _row(self, entry: Entry) -> Row | None:
        """None while a rate has not been tried yet, or where none could be."""
        best = best_rate(self.records, self.task, entry, self.seeds[0])
        if best is None:
            return None
        runs = [self.records.get(key(self.task, entry.name, best, seed)) for seed in self.seeds]
        done = [run for run in runs if run is not None and "score" in run]
        return Row(entry, best, done, len(done) == len(self.seeds)) if done else None

    @cached_property
    def one_answer(self) -> float:
        """The best score of one answer for all rows."""
        assert self.metric is not None
        answers = [np.full_like(self.targets, answer) for answer in np.unique(self.targets)]
        return max(float(self.metric.function(answer, self.targets)) for answer in answers)

    @property
    def comparable(self) -> bool:
        """Whether full fine-tuning is there with all seeds and its score above zero."""
        return self.full is not None and self.full.whole and self.full.score > 0

    @property
    def telling(self) -> bool:
        """Whether keeping 99 % asks for more than one answer for all rows, and for more than luck.

        It is luck where full fine-tuning's own seeds lie far apart.
        """
        if self.full is None or self.full.spread > STEADY * self.full.score:
            return False
        return self.one_answer < KEPT * self.full.score

    def share(self, row: Row) -> float:
        """Of full fine-tuning's score."""
        assert self.full is not None
        return row.score / self.full.score

    def keeps(self, row: Row) -> bool:
        """99 % in the mean over all seeds."""
        return row.whole and self.comparable and self.share(row) >= KEPT

    def hopeless(self, name: str) -> bool:
        """Whether an entry's first seed is too far below to run the others for."""
        row = self.rows.get(name)
        if row is None or not self.comparable or not self.telling or name == FULL:
            return False
        first = [run["score"] for run in row.runs if run["seed"] == self.seeds[0]]
        return bool(first) and first[0] < HOPELESS * self.full.score

    def needless(self, name: str) -> str:
        """Why an entry has no say in who is smallest, by others of its kind; empty if it has."""
        for ladder in LADDERS:
            if name not in ladder:
                continue
            at = ladder.index(name)
            for smaller in ladder[:at]:
                if smaller in self.rows and self.keeps(self.rows[smaller]):
                    return f"{smaller} keeps {KEPT:.0%} with less"
            for larger in ladder[at + 1 :]:
                if self.hopeless(larger):
                    return f"{larger} is far below with more"
        return ""

    def seeds_that_keep(self, row: Row) -> int:
        """Seeds whose score is 99 % at least of full fine-tuning's with the same seed."""
        assert self.full is not None
        full = {run["seed"]: run["score"] for run in self.full.runs}
        return sum(run["score"] >= KEPT * full[run["seed"]] for run in row.runs)

    def chance(self, row: Row) -> float:
        """Share of resampled test rows and seeds in which 99 % is kept, paired by row."""
        assert self.full is not None
        assert self.metric is not None
        sides = row.predictions, self.full.predictions
        return paired_bootstrap(self.metric, *sides, self.targets, margin=1 - KEPT)

    def smallest(self, side: str) -> Row | None:
        """The smallest file of a side that keeps 99 %, full fine-tuning itself left out."""
        rows = [row for name, row in self.rows.items() if name != FULL and self.keeps(row)]
        kept = [row for row in rows if row.entry.side == side]
        return min(kept, key=lambda row: row.bytes, default=None)

    def matching(self, row: Row) -> Row | None:
        """howfine's smallest file that scores as much as a row or more, over the row's seeds."""
        seeds = {run["seed"] for run in row.runs}

        def score(other: Row) -> float | None:
            found = {run["seed"]: run["score"] for run in other.runs}
            return mean(found[seed] for seed in seeds) if seeds <= found.keys() else None

        ours = [o for o in self.rows.values() if o.entry.side == "howfine"]
        kept = [o for o in ours if (found := score(o)) is not None and found >= row.score]
        return min(kept, key=lambda other: other.bytes, default=None)

    def failures(self) -> dict[str, set[str]]:
        """Errors by entry, word for word."""
        found: dict[str, set[str]] = {}
        for record in self.records.values():
            if record["task"] == self.task and "error" in record:
                found.setdefault(record["entry"], set()).add(record["error"])
        return found
