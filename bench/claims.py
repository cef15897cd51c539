"""Runs for a paper's claims: cells (a recipe with settings) on tasks with seeds, and the page.

What `warp.py`, `perfect.py`, `prefix_tuning.py` and `unimc.py` share: a ledger with one line a run,
a table, a verdict for each claim.
"""

# long: running, figures and verdicts are what every page of claims needs together.
from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from howfine.base import Base
from howfine.checks import CLASSIFICATION, GENERATION
from howfine.container import write_atomically
from howfine.delta import SUFFIX
from howfine.errors import HowfineError
from howfine.evaluate import evaluate
from howfine.ledger import Ledger, Record, pack_predictions
from howfine.metrics import METRICS
from howfine.recipe import Recipe
from howfine.task import DATA_VARIABLE, Task
from howfine.tune import tune

ROOT = Path(__file__).parent.parent
# Metrics that are not shares of 1.
WRITTEN = {name for name, metric in METRICS.items() if metric.kind == GENERATION}


@dataclass(frozen=True)
class Cell:
    """A recipe with settings."""

    name: str
    recipe: str | Recipe
    settings: Mapping[str, Any] = field(default_factory=dict)

    def made(self, **common: Any) -> Recipe:
        found = Recipe.load(self.recipe) if isinstance(self.recipe, str) else self.recipe
        return found.override(**{**common, **self.settings})


def arguments(about: str, minutes: float = 90.0) -> argparse.ArgumentParser:
    """The options that all these benches have."""
    parser = argparse.ArgumentParser(description=about)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", default=os.environ.get(DATA_VARIABLE))
    parser.add_argument("--base", required=True, help="a language model")
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", action="store_true", help="write the page, run nothing")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="number format of trainings; each row says its own",
    )
    return parser


def main(
    about: str,
    ledger: Path,
    run: Callable[[Bench], None],
    page: Callable[[Results], None],
    more: Callable[[argparse.ArgumentParser], Any] = lambda parser: None,
) -> None:
    """Run what the ledger lacks while there is time, then write the page of all it has.

    `more` adds options of a bench's own.
    """
    parser = arguments(about)
    more(parser)
    options = parser.parse_args()
    if not options.page:
        try:
            run(Bench(ledger, options))
        except TimeUp:
            print("time is up; call again to go on")
    page(Results(Ledger(ledger).records()))


class TimeUp(Exception):
    """The minutes are over; the ledger holds what was done."""


class Bench:
    """Runs what a ledger lacks, a line each."""

    def __init__(self, ledger: Path, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        self.ledger, self.options = Ledger(ledger), options
        self.deadline = time.monotonic() + 60 * options.minutes
        self.tasks: dict[str, Task] = {}
        self.bases: dict[str, Base] = {}

    def base(self, kind: str) -> Base:
        if kind not in self.bases:
            self.bases[kind] = Base.load(self.options.base, kind=kind)
        return self.bases[kind]

    def once(self, key: str, run: Callable[[], Record], **facts: Any) -> None:
        """Run and record, unless the ledger has it with the same facts. Raises TimeUp.

        What failed is tried again: it may have been for want of room.
        """
        known = self.ledger.records().get(key, {"error": ""})
        if "error" not in known and all(known.get(name) == facts[name] for name in facts):
            return
        if time.monotonic() > self.deadline:
            raise TimeUp
        start = time.perf_counter()
        try:
            found = run()
        except HowfineError as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        record = {"key": key, **facts, **found, "date": date.today().isoformat()}
        record["machine"] = machine(self.options.threads)
        record["wall_seconds"] = round(time.perf_counter() - start, 1)
        self.ledger.add(record)
        said = record.get("error") or f"{record.get('score', 0):.4f}"
        print(key, said, f"{record['wall_seconds']:.0f} s", flush=True)

    def fit(self, cell: Cell, task: Task, seed: int, **common: Any) -> Record:
        """Train, store, load again, score on test."""
        recipe = cell.made(**{"precision": self.options.precision, **common})
        base = self.base(recipe.readout.kind)
        with tempfile.TemporaryDirectory() as folder:
            done = tune(base, task, recipe, out=Path(folder) / f"x{SUFFIX}", seed=seed)
            test = evaluate(done.delta, base, task, split="test")
        return {
            "score": test.value,
            "scores": test.scores,
            "dev": done.score.value,
            "dev_scores": done.score.scores,
            "metric": test.metric,
            "majority": majority(task),
            "n": test.n,
            "train_size": len(task.splits["train"]),
            "bytes": done.bytes,
            "trainable": done.trainable,
            "steps": done.steps,
            "seconds": round(done.seconds, 1),
            "precision": recipe.training.precision,
            "predictions": pack_predictions(test.predictions),
        }


def majority(task: Task) -> float:
    """The best test score of one answer for all of the rows; 0 where there are no classes."""
    targets = np.array([example.label for example in task.splits["test"]])
    metric = METRICS[task.metric]
    if metric.kind != CLASSIFICATION:
        return 0.0
    answers = (np.full_like(targets, answer) for answer in range(len(task.labels)))
    return max(float(metric.function(answer, targets)) for answer in answers)


def machine(threads: int) -> str:
    """What a run was made on, in words."""
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {threads} thread"


class Results:
    """A ledger's records by task and cell."""

    def __init__(self, records: Mapping[str, Record]) -> None:
        self.records = [record for record in records.values() if "score" in record]
        self.failed = [record for record in records.values() if "error" in record]

    def rows(self, task: str, cell: str) -> list[Record]:
        return [r for r in self.records if r["task"] == task and r["cell"] == cell]

    def scores(self, task: str, cell: str) -> list[float]:
        return [_points(row) for row in self.rows(task, cell)]

    def mean(self, task: str, cell: str) -> float | None:
        found = self.scores(task, cell)
        return mean(found) if found else None

    def both(self, tasks: Iterable[str], *cells: str) -> list[str]:
        """The tasks on which all the cells were run with the same seeds (and splits)."""
        return [
            task
            for task in tasks
            if len({frozenset(map(_run, self.rows(task, cell))) for cell in cells}) == 1
            and self.rows(task, cells[0])
        ]

    def learned(self, tasks: Iterable[str], *cells: str) -> list[str]:
        """Of these tasks those on which any of the cells is above one answer for all.

        By two standard errors of its runs, where it has several. On the others, orders are of what
        none of them has learned.
        """

        def above(task: str, cell: str) -> bool:
            over = [_points(row) - 100 * row["majority"] for row in self.rows(task, cell)]
            return bool(over) and mean(over) > 0 and (len(over) < 2 or decided(over))

        return [task for task in tasks if any(above(task, cell) for cell in cells)]

    def common(self, task: str, *cells: str) -> list[list[float]]:
        """Scores of the cells with the seeds (and splits) that all have; [] without any."""
        rows = [{_run(row): _points(row) for row in self.rows(task, c)} for c in cells]
        seeds = sorted(set.intersection(*map(set, rows)))
        return [[row[seed] for seed in seeds] for row in rows] if seeds else []

    def shared(self, tasks: Iterable[str], *cells: str) -> list[str]:
        """The tasks on which all the cells have a run of the same seed (and split)."""
        return [task for task in tasks if self.common(task, *cells)]

    def runs(self, tasks: Iterable[str], *cells: str) -> list[list[float]]:
        """Each cell's means over the tasks, one for every run that all have on all of them."""
        found = [
            [{_run(row): _points(row) for row in self.rows(task, cell)} for task in tasks]
            for cell in cells
        ]
        every = [set(scores) for of_cell in found for scores in of_cell]
        runs = sorted(set.intersection(*every)) if every else []
        return [[mean(scores[run] for scores in of_cell) for run in runs] for of_cell in found]

    def over(
        self, tasks: Sequence[str], cell: str, of: Callable[[list[float]], float] | None = None
    ) -> float:
        """The mean over tasks of a cell's mean (or worst, or deviation) over its runs."""
        return mean((of or mean)(self.scores(task, cell)) for task in tasks)


def _points(row: Record) -> float:
    """A score as the page shows it: shares in percent, scores of texts as they are."""
    return float(row["score"] if row.get("metric") in WRITTEN else 100 * row["score"])


def _run(row: Record) -> tuple[Any, ...]:
    """What tells the runs of a cell apart."""
    return row.get("split"), row["seed"]


def formats(records: Iterable[Record]) -> str:
    """The number formats of the trainings in words, with how many are in each where they differ.

    Those that don't say theirs were made before rows did, in bf16.
    """
    trained = [row for row in records if "seconds" in row]
    found = Counter(row.get("precision", "bf16") for row in trained)
    said = {form: "bf16 autocast" if form == "bf16" else form for form in found}
    if len(found) < 2:
        return "".join(said.values())
    (most, _), *rest = found.most_common()
    return f"{said[most]} ({', '.join(f'{n} of {len(trained)} in {said[f]}' for f, n in rest)})"


def decided(gaps: Sequence[float]) -> bool:
    """Whether a mean of differences, one a run, is two standard errors from 0."""
    return len(gaps) > 1 and abs(mean(gaps)) > 2 * stdev(gaps) / len(gaps) ** 0.5


def gaps(one: Sequence[float], other: Sequence[float], by: float = 0.0) -> list[float]:
    """By run, how much more than `by` one is above the other."""
    return [a - b - by for a, b in zip(one, other, strict=True)]


# Runs are there, and do not tell: within the noise, or with settings that may not be the best.
OPEN = "open"
# What is said where none of the cells is above one answer for all on any task.
UNLEARNED = "none is above one answer for all"
Verdict = tuple[str, bool | str | None]  # figures in words; None where runs are lacking
Claim = tuple[str, str, Callable[[Results], Verdict]]  # name, statement, check


def table(results: Results, tasks: Sequence[str], cells: Sequence[str]) -> list[str]:
    """A row a cell, a column a task: mean ± deviation (worst) over so many runs."""
    lines = [f"| cell | {' | '.join(tasks)} | trained | bytes |"]
    lines += ["|" + " --- |" * (len(tasks) + 3)]
    most = {row["task"]: 100 * row["majority"] for row in results.records if "majority" in row}
    if most:
        said = [f"{most[task]:.1f}" if task in most else "" for task in tasks]
        lines.append(f"| (one answer for all) | {' | '.join(said)} | | |")
    for cell in cells:
        rows = [row for task in tasks for row in results.rows(task, cell)]
        if not rows:
            continue
        said = [_said(results.scores(task, cell)) for task in tasks]
        numbers = f"{rows[0]['trainable']:,}" if "trainable" in rows[0] else ""
        size = f"{round(mean(row['bytes'] for row in rows)):,}" if "bytes" in rows[0] else ""
        lines.append(f"| {cell} | {' | '.join(said)} | {numbers} | {size} |")
    return lines


def _said(scores: Sequence[float]) -> str:
    if not scores:
        return ""
    spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{mean(scores):.1f}{spread} ({min(scores):.1f}; {len(scores)})"


def verdicts(results: Results, claims: Sequence[Claim]) -> list[str]:
    """A row a claim."""
    lines = ["| claim | says | found | |", "| --- | --- | --- | --- |"]
    for name, statement, check in claims:
        found, held = check(results)
        word = {True: "holds", False: "**does not hold**", None: "not run", OPEN: "open"}[held]
        lines.append(f"| {name} | {statement} | {found} | {word} |")
    return lines


# What a table's figures are.
SHARES = "shares times 100: mean ± deviation (worst; number of runs)"


def write(
    path: Path,
    title: str,
    about: str,
    results: Results,
    parts: Sequence[str],
    figures: str = SHARES,
) -> None:
    """The page: what was run on what, then the parts; `figures` says what those of tables are."""
    dates = sorted({record["date"] for record in results.records}) or ["no day yet"]
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    machines = "; ".join(sorted({record["machine"] for record in results.records})) or "none yet"
    lines = [f"# {title}", "", about, ""]
    lines += [
        f"{len(results.records):,} runs, {when}, on {machines}. Scores are of the delta file,"
    ]
    lines += [f"loaded again, {figures}.", ""]
    for record in results.failed:
        lines += [f"Not made: {record['key']} ({record['error']}).", ""]
    lines += parts
    write_atomically(path, ("\n".join(lines) + "\n").encode())
