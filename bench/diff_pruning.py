"""Diff pruning's claims on MiniLM: orderings, budgets, what projection costs, where changes lie.

    python bench/diff_pruning.py --data DIR [--tasks sst2] [--minutes 90] [--page]

Full fine-tuning, the last layer alone, and the two first stages (gates per entry, and per tensor
too) are fitted once for each seed; their changes are then cut to budgets and trained on. Runs what
the ledger lacks, a line each, and stops between two runs when the time is up. `--page` writes
docs/results/diff-pruning.md and runs nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import diff_pruning_page
import torch
from frontier import Size, sized

from howfine.base import Base
from howfine.delta import SUFFIX, Delta
from howfine.entries import flat_entries
from howfine.errors import HowfineError
from howfine.evaluate import evaluate
from howfine.ledger import Ledger, Record
from howfine.recipe import Recipe
from howfine.task import DATA_VARIABLE, Task
from howfine.tune import tune

ROOT = Path(__file__).parent.parent
LEDGER = ROOT / "bench" / "ledgers" / "diff-pruning.jsonl"
PAGE = ROOT / "docs" / "results" / "diff-pruning.md"
SEEDS = (0, 1, 2)
# Training rows and tokens kept of an example: sized for two cores.
SIZES = {"sst2": (1000, 64), "rotten-tomatoes": (1000, 64), "mrpc": (1000, 64)}
BUDGETS = (0.001, 0.0025, 0.005, 0.01)
MIDDLE = 0.005  # the paper's
# What else is cut: all budgets where they are held against each other, the ends where the paper's
# gap between adaptive and not is looked for.
OTHERS = (("structured", (0.001, 0.0025, 0.01)), ("non-adaptive", (0.001, 0.01)))
# The task on which every cell is run. Gates cost four times the rest of a step here, where a batch
# is small and most of the weights are the embeddings', so the others do without some.
WHOLE = "sst2"
# Penalties of a gate for D10: ten and a hundred times the paper's, which "structured" has.
PENALTIES = (1.25e-6, 1.25e-5)
COMMON = {"epochs": 3, "batch_size": 16, "readout_learning_rate": 2e-3}
FULL_RATE, DIFF_RATE, GATE_PENALTY, LAST_RATE = 1e-4, 2e-4, 1.25e-7, 3e-4


def first_stage(structure: str, penalty: float, density: float = 0.5) -> dict[str, Any]:
    """Gates trained, and all that they leave open up to half of the entries stored."""
    gates = {"where": ["all"], "density": density, "l0": penalty, "structure": structure}
    training = {**COMMON, "learning_rate": DIFF_RATE, "warmup": 0.0}
    return {"method": {"diff": gates}, "training": training}


STARTS: dict[str, dict[str, Any]] = {
    "non-adaptive": {"method": "full", "training": {**COMMON, "learning_rate": FULL_RATE}},
    "unstructured": first_stage("none", GATE_PENALTY),
    "structured": first_stage("tensor", GATE_PENALTY),
}
HIGHER = {"method": "full", "training": {**COMMON, "learning_rate": 3e-4}}
LAST = {
    "method": {"select": {"train": ["all@-1"]}},
    "training": {**COMMON, "learning_rate": LAST_RATE},
}


# A start that has moved fewer entries than its budget is refused, and so has no row; the one of the
# ledger, sst2/structured@0.01/s2, is from before that, and holds what it moved.
def cut(start: str, density: float, trained: bool = True) -> dict[str, Any]:
    """The largest changes of a start, trained on or left as they are."""
    rates = {"learning_rate": DIFF_RATE if trained else 0.0}
    rates |= {} if trained else {"readout_learning_rate": 0.0, "max_steps": 1}
    entries = {"where": ["all"], "by": "movement", "density": density}
    training = {**COMMON, "warmup": 0.0, **rates}
    return {"start": STARTS[start], "method": {"sparse": entries}, "training": training}


def plan(task: str) -> list[tuple[str, dict[str, Any], tuple[int, ...]]]:
    """(name, recipe, seeds), the most telling first: a stop leaves the tail undone."""
    left_out = () if task == WHOLE else ("unstructured", "penalty")
    return [cell for cell in cells() if not cell[0].startswith(left_out)]


def cells() -> list[tuple[str, dict[str, Any], tuple[int, ...]]]:
    """All that is run on one task at least."""
    found = [(name, raw, SEEDS) for name, raw in STARTS.items()]
    found += [(f"{name}@{MIDDLE}", cut(name, MIDDLE), SEEDS) for name in STARTS]
    found += [(f"{name}@{MIDDLE}-cut", cut(name, MIDDLE, False), SEEDS) for name in STARTS]
    found += [("last-layer", LAST, SEEDS), ("full-3e-4", HIGHER, SEEDS)]
    found += [(f"{name}@{b}", cut(name, b), SEEDS) for name, budgets in OTHERS for b in budgets]
    found += [(f"penalty-{p:g}", first_stage("tensor", p), SEEDS[:1]) for p in PENALTIES]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=os.environ.get(DATA_VARIABLE))
    parser.add_argument("--tasks", default=",".join(SIZES))
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", default=str(ROOT / "runs" / "diff-pruning"))
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.page:
        Bench(options).run()
    records = Ledger(LEDGER).records()
    rates = {"differences": DIFF_RATE, "full": FULL_RATE, "last layer": LAST_RATE}
    diff_pruning_page.write(PAGE, records, SIZES, SEEDS, BUDGETS, COMMON, rates)


class Bench:
    """Runs what the ledger lacks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.ledger = options, Ledger(LEDGER)
        self.deadline = time.monotonic() + 60 * options.minutes
        self.base = Base.load()
        self.total = sum(self.base.parameter(path).numel() for path in self.base.paths())

    def run(self) -> None:
        for name in self.options.tasks.split(","):
            rows, length = SIZES[name]
            task = Task.load(name, data=self.options.data)
            task = sized(task, Size(rows, max_length=length))
            for cell, raw, seeds in plan(name):
                for seed in seeds:
                    if time.monotonic() > self.deadline:
                        print("time is up; call again to go on")
                        return
                    self.once(task, cell, {**raw, "readout": _readout(length)}, seed)

    def once(self, task: Task, cell: str, raw: dict[str, Any], seed: int) -> None:
        key = f"{task.name}/{cell}/s{seed}"
        known = self.ledger.records().get(key)
        if known is not None and known["rows"] != len(task.splits["train"]):
            raise SystemExit(f"{key} was run with {known['rows']:,} rows; move {LEDGER} away")
        if known is not None:
            return
        recipe = Recipe.parse(cell, raw)
        starts = Path(self.options.work) / "starts"
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / f"x{SUFFIX}"
            try:
                tuned = tune(self.base, task, recipe, out=out, seed=seed, starts=starts)
            except HowfineError as error:  # such as a start that moved fewer entries; tried again
                print(key, f"not made: {error}", flush=True)
                return
            score = evaluate(tuned.delta, self.base, task, split="test")
            record: Record = {"key": key, "task": task.name, "cell": cell, "seed": seed}
            record |= {"score": score.value, "metric": score.metric, "n": score.n}
            record |= {"bytes": tuned.bytes, "seconds": round(tuned.seconds, 1)}
            record |= {"precision": recipe.training.precision}
            record |= {"rows": len(task.splits["train"]), **self.anatomy(tuned.delta)}
        record |= {"machine": f"{os.cpu_count()} CPU cores ({platform.machine()})"}
        self.ledger.add({**record, "date": date.today().isoformat()})
        print(key, f"{score.value:.4f} {record['density']:.5f} {tuned.seconds:.0f} s", flush=True)

    def anatomy(self, delta: Delta) -> Record:
        """How many entries changed, in how many tensors, and how many of the embeddings'."""
        changed = {}
        for path, tensor in delta.tensors(self.base)[0].items():
            if tensor.is_sparse:
                changed[path] = len(flat_entries(tensor)[0])
            else:
                changed[path] = int((tensor != self.base.original(path)).sum())
        words = [p for p in self.base.paths() if self.base.place(p)[1] == "embedding"]
        words += [p for p in self.base.paths() if ".embeddings." in p and p not in words]
        total = sum(changed.values())
        return {
            "density": total / self.total,
            "untouched": sum(not changed.get(path) for path in self.base.paths()),
            "tensors": len(self.base.paths()),
            "in_embeddings": sum(changed.get(path, 0) for path in words) / max(1, total),
            "embeddings": sum(self.base.parameter(p).numel() for p in words) / self.total,
        }


def _readout(length: int) -> dict[str, Any]:
    return {"classifier": {"max_length": length}}


if __name__ == "__main__":
    main()
