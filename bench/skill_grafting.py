"""Skill grafting's claims on MiniLM: size of regions, calibration, overlap, tasks in a row.

    python bench/skill_grafting.py --data DIR [--tasks sst2,mrpc,qnli] [--minutes 90]
                                   [--page | --smoke]

Each task is fine-tuned once a seed; regions are found in that change and grafted onto the base at
equal sizes, beside controls. Runs what the ledger lacks, a line each, the most telling first, and
stops between two runs when the time is up. Call it again to go on: files of changes are kept under
--work, and made again where they are gone. `--page` writes docs/results/skill-grafting.md and runs
nothing; `--smoke` runs every cell once on 32 rows and two steps, into a ledger of its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import skill_grafting_page
import torch
from skill_grafting_cells import BLOCKS, SETTINGS, SIZES, TEST, Cells, entries_changed
from skill_grafting_optimisers import PENALISED, SGD, chosen
from skill_grafting_several import continual, multi, overlap

from howfine.base import Base
from howfine.delta import Delta
from howfine.errors import HowfineError, SettingError
from howfine.evaluate import evaluate
from howfine.ledger import Ledger, Record
from howfine.task import DATA_VARIABLE

ROOT = Path(__file__).parent.parent
LEDGER = ROOT / "bench" / "ledgers" / "skill-grafting.jsonl"
PAGE = ROOT / "docs" / "results" / "skill-grafting.md"
TASKS = ("sst2", "mrpc", "qnli")
SEEDS = (0, 1, 2)
# Shares of the blocks' entries: the first to be run, the others, and one for the end.
REGION, SMALL, LARGE, TINY = "0.01", "0.001", "0.1", "0.0001"
KINDS = ("learned", "movement", "random")
ALPHAS = ("0.25", "0.5", "0.75")
# A task like another one, beside it; a seed of their own, see `regions` below.
SIMILAR = {"rotten-tomatoes": "sst2", "qqp": "mrpc"}
SIMILAR_SEED = 1
ORDER = ("sst2", "mrpc", "rte")
# Fine-tunings by SGD, and by AdamW with an ℓ1 penalty: all rates, or penalties, with the first
# seed, the others with the one chosen there.
OTHER_TASK, SGD_RATES, PENALTIES = "sst2", ("0.03", "0.1", "0.3"), ("1e-5", "1e-4", "1e-3")
OTHERS = {SGD: SGD_RATES, PENALISED: PENALTIES}
GRAFTS = {
    SGD: (
        *(f"{SGD}:learned@{d}" for d in (REGION, SMALL, LARGE)),
        *(f"{SGD}:pre", f"{SGD}:movement@{REGION}", f"{SGD}:movement@{LARGE}"),
    ),
    PENALISED: (
        *(f"{PENALISED}:learned@{d}" for d in (REGION, SMALL, LARGE)),
        *(f"{PENALISED}:movement@{d}" for d in (REGION, LARGE)),
    ),
}


@dataclass(frozen=True)
class Run:
    """One line of the ledger: a cell of a task, or with `of` something about several tasks."""

    task: str
    cell: str
    seed: int
    of: str = ""

    @property
    def key(self) -> str:
        return f"{self.of or self.task}/{self.cell}/s{self.seed}"


def first_cells() -> list[str]:
    """θ_ft, what it is held against, and the grafts of the two smaller sizes."""
    cells = ["ft", "head", "pre", *(f"{kind}@{REGION}" for kind in KINDS)]
    cells += [f"{kind}@{SMALL}" for kind in KINDS]
    return cells + [f"zero-{kind}@{REGION}" for kind in KINDS[:2]]


def second_cells() -> list[str]:
    """The large size, where all grafts should meet, and what else calibrates."""
    return [*(f"wise@{alpha}" for alpha in ALPHAS), *(f"{kind}@{LARGE}" for kind in KINDS)]


def plan(tasks: list[str]) -> list[Run]:
    """The most telling first: a stop leaves the tail undone."""
    runs = [Run(task, cell, SEEDS[0]) for task in tasks for cell in first_cells()]
    runs += [Run("", REGION, SEEDS[0], "continual")]
    runs += [Run(task, c, seed) for seed in SEEDS[1:] for task in tasks for c in first_cells()]
    runs += [Run(task, cell, SEEDS[0]) for task in tasks for cell in second_cells()]
    similar = [task for task, like in SIMILAR.items() if like in tasks]
    runs += [Run(t, c, SIMILAR_SEED) for t in similar for c in ("ft", "pre", f"learned@{REGION}")]
    runs += [Run("", REGION, 0, "overlap")]
    if OTHER_TASK in tasks:
        runs += [Run(OTHER_TASK, f"{SGD}-{rate}", SEEDS[0]) for rate in SGD_RATES]
        runs += [Run(OTHER_TASK, cell, SEEDS[0]) for cell in GRAFTS[SGD]]
    runs += [Run("", REGION, seed, "continual") for seed in SEEDS[1:]]
    runs += [Run("", REGION, SEEDS[0], "multi")]
    runs += [Run(task, cell, s) for s in SEEDS[1:] for task in tasks for cell in second_cells()]
    if OTHER_TASK in tasks:
        runs += [Run(OTHER_TASK, c, s) for s in SEEDS[1:] for c in (SGD, *GRAFTS[SGD])]
    runs += [Run("", REGION, seed, "multi") for seed in SEEDS[1:]]
    last = [f"retrain@{REGION}", "bitfit"]
    runs += [Run(task, cell, seed) for seed in SEEDS for task in tasks for cell in last]
    tiny = [f"{kind}@{TINY}" for kind in KINDS[:2]]
    runs += [Run(task, cell, seed) for seed in SEEDS for task in tasks for cell in tiny]
    if OTHER_TASK in tasks:
        first = [f"{PENALISED}-{penalty}" for penalty in PENALTIES]
        runs += [Run(OTHER_TASK, c, SEEDS[0]) for c in (*first, *GRAFTS[PENALISED])]
        later = (PENALISED, *GRAFTS[PENALISED])
        runs += [Run(OTHER_TASK, c, seed) for seed in SEEDS[1:] for c in later]
    return runs


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.smoke:
        smoke(options)
        return
    if not options.page:
        Bench(options, LEDGER).run(plan(options.tasks.split(",")))
    skill_grafting_page.write(PAGE, Ledger(LEDGER).records(), SIZES, TEST)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", default=os.environ.get(DATA_VARIABLE))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", default=str(ROOT / "runs" / "skill-grafting"))
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    found = parser.parse_args()
    if unknown := set(found.tasks.split(",")) - set(TASKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(TASKS)}")
    return found


def smoke(options: argparse.Namespace) -> None:
    """Every cell once, of the first seed, and the page; its figures mean nothing."""
    with tempfile.TemporaryDirectory() as folder:
        options.work = folder
        ledger, page = Path(folder) / "smoke.jsonl", Path(folder) / "page.md"
        runs = {}
        for run in plan(options.tasks.split(",")):
            kind = (run.of or run.task in SIMILAR, run.cell if not run.of else run.of)
            key = (run.task if run.task in SIMILAR else "", *kind)
            runs.setdefault(key, run)
        print(f"{len(runs)} cells")
        Bench(options, ledger).run(list(runs.values()))
        skill_grafting_page.write(page, Ledger(ledger).records(), SIZES, TEST)
        print(page.read_text())


class Bench:
    """Runs what the ledger lacks."""

    def __init__(self, options: argparse.Namespace, ledger: Path) -> None:
        self.options, self.ledger = options, Ledger(ledger)
        self.deadline = time.monotonic() + 60 * options.minutes
        self.base = Base.load()
        # Files of other sizes or settings are not taken for these.
        folder = Path(options.work) / SETTINGS
        self.cells = Cells(self.base, folder, options.data, options.smoke)
        self.entries = sum(self.base.parameter(p).numel() for p in self.base.choose(BLOCKS))

    def run(self, runs: list[Run]) -> None:
        """All of them, as far as the time goes."""
        for planned in runs:
            run = self.settled(planned)
            if run.key in self.ledger.records() and run.of != "overlap":
                continue
            if time.monotonic() > self.deadline:
                print("time is up; call again to go on")
                return
            try:
                if (kind := run.cell.partition(":")[0]) in OTHERS:
                    self.cells.chosen[kind] = self.stands_for(kind)
                self.write(run)
            except HowfineError as error:  # not recorded: the next call tries again
                print(run.key, f"failed: {error}", flush=True)

    def settled(self, run: Run) -> Run:
        """With the rate, or the penalty, in the cell's name, where the plan says the chosen one."""
        return replace(run, cell=self.stands_for(run.cell)) if run.cell in OTHERS else run

    def write(self, run: Run) -> None:
        """Measure a run and add its lines to the ledger."""
        start = time.perf_counter()
        for record in self.measured(run):
            record |= {"wall_seconds": round(time.perf_counter() - start, 1)}
            record |= {"machine": f"{os.cpu_count()} CPU cores ({platform.machine()})"}
            self.ledger.add({**record, "date": date.today().isoformat()})
            print(record["key"], record.get("score", ""), record["wall_seconds"], flush=True)

    def measured(self, run: Run) -> Iterator[Record]:
        """The records of a run: one, or of overlaps one a pair that has none yet."""
        several: dict[str, Callable[[], Iterator[Record]]] = {
            "overlap": self.overlaps,
            "continual": lambda: iter([continual(self.cells, ORDER, REGION, run.seed)]),
            "multi": lambda: iter([multi(self.cells, TASKS, REGION, run.seed)]),
        }
        if not run.of:
            yield {"key": run.key, **self.scored(run)}
            return
        for record in several[run.of]():
            yield {"key": run.key, "about": run.of, "seed": run.seed, **record}

    def scored(self, run: Run) -> Record:
        """Accuracy and calibration of a cell's file."""
        task = self.cells.task(run.task)
        path = self.cells.get(run.task, run.cell, run.seed)
        delta = Delta.load(path)
        heated = "dev" if run.cell in ("ft", f"learned@{REGION}") else None
        result = evaluate(delta, self.base, task, split="test", temperature_from=heated)
        assert result.calibration is not None
        count = entries_changed(delta, self.base)
        found: Record = {"task": run.task, "cell": run.cell, "seed": run.seed}
        found |= {"score": result.scores.get("accuracy", result.value), "n": result.n}
        found |= {"ece": result.calibration["ece"], "ece_10": result.calibration["ece_10"]}
        if heated:
            found["tempered"] = result.calibration["temperature"]["ece"]
            found["temperature"] = result.calibration["temperature"]["value"]
        found |= {"dev": float(delta.score.get("value", 0.0))}
        found |= {"entries": count, "density": count / self.entries, "bytes": path.stat().st_size}
        labels = [example.label for example in task.splits["test"]]
        found["majority"] = max(map(labels.count, set(labels))) / len(labels)
        found["rows"] = len(task.splits["train"])
        if run.cell == "ft" or run.cell.startswith((f"{SGD}-", f"{PENALISED}-")):
            fitted = evaluate(delta, self.base, task, split="train")
            found["train_score"] = fitted.scores.get("accuracy", fitted.value)
        if run.cell.startswith(("zero-", "wise@")):
            path.unlink()  # as large as θ_ft, made in a second, and no other cell needs it
        return found

    def stands_for(self, kind: str) -> str:
        """The cell of SGD's fine-tunings, or of the penalised ones, that the others go on from."""
        records = self.ledger.records()
        keys = [Run(OTHER_TASK, f"{kind}-{value}", SEEDS[0]).key for value in OTHERS[kind]]
        done = [records[key] for key in keys if key in records]
        if not done:
            raise SettingError(f"no fine-tuning of {kind} ran, so there is nothing to graft from")
        return chosen(done, kind)

    def overlaps(self) -> Iterator[Record]:
        """Every ordered pair of learned regions of the middle size that are there."""
        cell, records = f"learned@{REGION}", self.ledger.records()
        there = [r for r in records.values() if r.get("cell") == cell]
        names = [(r["task"], r["seed"]) for r in there]
        if all(_pair(a, b) in records for a in names for b in names if a != b):
            return
        files = {name: self.cells.get(name[0], cell, name[1]) for name in names}
        for record in overlap(self.base, files):
            pair = ((record["by"], record["by_seed"]), (record["of"], record["of_seed"]))
            if (key := _pair(*pair)) not in records:
                yield {**record, "key": key}


def _pair(by: tuple[str, int], of: tuple[str, int]) -> str:
    return f"overlap/{by[0]}-s{by[1]}/{of[0]}-s{of[1]}"


if __name__ == "__main__":
    main()
