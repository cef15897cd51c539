"""The smallest file that keeps 99 % of full fine-tuning's score: howfine's recipes and PEFT's.

    python bench/frontier.py --data DIR [--tasks sst2,cola] [--entries full,lora-r1-qv]
                             [--minutes 90] [--part 0/2] [--page]

Each entry tries three learning rates with seed 0 on one task, judged on held-out rows of train; the
best one is run on all tasks with all seeds. Full fine-tuning, which all are held against, tries
them on every task. Where an entry's first seed is far below the target, its other seeds are left
out, and so are entries that another one of their kind makes needless (`entries.LADDERS`). Runs what
the ledgers under bench/ledgers lack, one line a finished run, and stops between two runs when the
time is up. Call it again to go on. `--part i/n` takes every n-th entry and writes a ledger of its
own, so that n processes may run beside each other. `--page` writes docs/results/frontier.md from
all ledgers and runs nothing. An error is recorded, not tried again; `--retry` does.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import frontier_page
import frontier_results
import numpy as np
import peers
import torch
from entries import ENTRIES, RATES, Entry
from frontier_results import TUNED_ON

from howfine import cost
from howfine.base import Base
from howfine.delta import SUFFIX
from howfine.evaluate import evaluate
from howfine.ledger import Ledger, Record, pack_predictions
from howfine.task import DATA_VARIABLE, Task
from howfine.tune import tune

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results" / "frontier.md"


@dataclass(frozen=True)
class Size:
    """Training rows, held-out rows for choosing the rate, and tokens kept of an example."""

    train: int
    heldout: int = 300
    max_length: int = 64


# Sized for two cores. The tasks that a few hundred examples teach nothing have all they can get.
SIZES = {
    TUNED_ON: Size(1000),
    "sst2": Size(1000),
    "cola": Size(7600),
    "mrpc": Size(3300),
    "rte": Size(2100, max_length=128),
}
SEEDS = (0, 1, 2)
COMMON = {"epochs": 3, "batch_size": 32}
# To see that every entry trains, saves, loads and scores; its figures mean nothing.
SMOKE_SIZE, SMOKE = Size(64, heldout=64), {**COMMON, "max_steps": 4}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    ledgers = Path(options.ledgers)
    if not options.page:
        part, parts = map(int, options.part.split("/"))
        path = ledgers / (f"frontier-{part}.jsonl" if parts > 1 else "frontier.jsonl")
        bench = Bench(path, options)
        # A part has all tasks of its entries: rates are chosen on the first of them.
        tasks = sorted(options.tasks.split(","), key=lambda task: task != TUNED_ON)
        mine = options.entries.split(",")[part::parts]
        bench.run([(task, entry) for entry in mine for task in tasks])
    if not options.smoke:
        frontier_page.write(PAGE, records_in(ledgers), list(ENTRIES.values()), SIZES, SEEDS, COMMON)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", default=os.environ.get(DATA_VARIABLE))
    parser.add_argument("--tasks", default=",".join(SIZES))
    parser.add_argument("--entries", default=",".join(ENTRIES))
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--ledgers", default=str(ROOT / "bench" / "ledgers"))
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny runs; give --ledgers, too")
    found = parser.parse_args()
    for given, known in ((found.entries, ENTRIES), (found.tasks, SIZES)):
        if unknown := set(given.split(",")) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if found.smoke and Path(found.ledgers) == ROOT / "bench" / "ledgers":
        parser.error("--smoke needs a --ledgers folder of its own")
    return found


def records_in(folder: Path) -> dict[str, Record]:
    """Every record of every part; where several parts have a key, one that is no error."""
    found: dict[str, Record] = {}
    for path in sorted(folder.glob("frontier*.jsonl")):
        for key, record in Ledger(path).records().items():
            if key not in found or "error" in found[key]:
                found[key] = record
    return found


class TimeUp(Exception):
    """The minutes are over; the ledger holds what was done."""


class Bench:
    """Runs the cells that the ledgers lack."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.ledger, self.options = Ledger(path), options
        self.deadline = time.monotonic() + 60 * options.minutes
        self.base = Base.load(device=options.device)
        self.tasks: dict[str, Task] = {}

    def run(self, cells: list[tuple[str, str]]) -> None:
        """All runs of the cells (task, entry), as far as the time goes."""
        try:
            for task, name in cells:
                for where, rate, seed in self.plan(task, ENTRIES[name]):
                    self.once(where, ENTRIES[name], rate, seed)
        except TimeUp:
            print("time is up; call again to go on")

    def plan(self, task: str, entry: Entry) -> Iterator[tuple[str, float, int]]:
        """The rates with the first seed, then the best of them with the others."""
        rates = RATES[entry.rates]
        if self.options.smoke:
            yield task, rates[1], SEEDS[0]
            return
        if reason := self.results(task).needless(entry.name):
            print(f"{task}/{entry.name}: not needed, {reason}")
            return
        judged_on = frontier_results.judged_on(task, entry)
        yield from ((judged_on, rate, SEEDS[0]) for rate in rates)
        best = frontier_results.best_rate(self.records(), task, entry, SEEDS[0])
        if best is None:
            print(f"{task}/{entry.name}: left out, for no rate of it could be run on {judged_on}")
            return
        yield task, best, SEEDS[0]
        if not self.results(task).hopeless(entry.name):
            yield from ((task, best, seed) for seed in SEEDS[1:])

    def results(self, task: str) -> frontier_results.TaskResults:
        """What is known of a task by now."""
        self.task(task)  # its labels are in the ledger then
        return frontier_results.TaskResults(task, self.records(), ENTRIES.values(), SEEDS)

    def records(self) -> dict[str, Record]:
        """What is done, by whichever part."""
        return records_in(self.ledger.path.parent)

    def once(self, name: str, entry: Entry, rate: float, seed: int) -> None:
        """One run, unless it is recorded."""
        key = frontier_results.key(name, entry.name, rate, seed)
        known = self.records().get(key)
        size = len(self.task(name).splits["train"])
        if known is not None and known["train_size"] != size:
            raise SystemExit(
                f"{key} was run with {known['train_size']:,} training rows, now there are "
                f"{size:,}; move the ledgers away, or name a folder of their own with --ledgers"
            )
        if known is not None and not (self.options.retry and "error" in known):
            return
        if time.monotonic() > self.deadline:
            raise TimeUp
        task, start = self.task(name), time.perf_counter()
        record: Record = {
            "key": key,
            "task": name,
            "entry": entry.name,
            "kind": entry.side,
            "settings": dict(entry.settings),
            "rate": rate,
            "seed": seed,
            "train_size": size,
            "heldout_size": len(task.splits["dev"]),
            "task_fingerprint": task.fingerprint,
            "machine": self.machine(),
            "date": date.today().isoformat(),
        }
        try:
            record |= self.outcome(task, entry, rate, seed)
            words = f"{record['score']:.4f} {record['bytes']:,} B"
        except (
            Exception
        ) as error:  # whatever a peer can't do belongs into the ledger, word for word
            record["error"] = words = f"{type(error).__name__}: {error}"
        record["wall_seconds"] = round(time.perf_counter() - start, 2)
        self.ledger.add(record)
        print(key, words, f"{record['wall_seconds']:.0f} s", flush=True)

    def outcome(self, task: Task, entry: Entry, rate: float, seed: int) -> Record:
        """Train, store, load again and score."""
        size = SMOKE_SIZE if self.options.smoke else SIZES[task.name]
        common = SMOKE if self.options.smoke else COMMON
        precision = self.options.precision
        recipe = entry.recipe(rate, **common, precision=precision, max_length=size.max_length)
        with tempfile.TemporaryDirectory() as folder:
            if entry.side == "peft":
                peer = peers.tune(self.base, task, recipe, Path(folder), seed)
                done: Any = peer
                heldout, test, store = peer.heldout, peer.test, peer.store
                more = {"sizes": peer.sizes, "config_bytes": peer.config_bytes}
                more["parts"] = peer.parts
            else:
                done = tune(self.base, task, recipe, out=Path(folder) / f"x{SUFFIX}", seed=seed)
                test = evaluate(done.delta, self.base, task, split="test")
                heldout, store = done.score, recipe.store
                more = {"parts": account(Path(folder) / f"x{SUFFIX}")}
        return {
            "score": test.value,
            "heldout": heldout.value,
            "metric": test.metric,
            "n": test.n,
            "predictions": pack_predictions(test.predictions),
            "file": f"{'PEFT' if entry.side == 'peft' else 'delta'}, {store}",
            "bytes": done.bytes,
            "seconds": round(done.seconds, 2),
            "steps": done.steps,
            "trainable": done.trainable,
            "precision": precision,
            **more,
        }

    def task(self, name: str) -> Task:
        """The task with its sizes; its labels go into the ledger: the page needs no data."""
        if name not in self.tasks:
            found = Task.load(name, data=self.options.data)
            found = sized(found, SMOKE_SIZE if self.options.smoke else SIZES[name])
            self.tasks[name] = found.subset(test=64) if self.options.smoke else found
        task, key = self.tasks[name], f"{name}/targets"
        if key not in self.records():
            targets = np.array([example.label for example in task.splits["test"]])
            self.ledger.add({"key": key, "task": name, "targets": pack_predictions(targets)})
        return task

    def machine(self) -> str:
        if self.base.device.type == "cuda":
            return torch.cuda.get_device_name(self.base.device)
        return f"{os.cpu_count()} CPU cores ({platform.machine()}), {self.options.threads} thread"


def account(path: Path) -> dict[str, int]:
    """What `howfine inspect` says of a file, in three sums: header, head and change."""
    found = {"header": 0, "head": 0, "change": 0}
    for part in cost.parts(path):
        kind = {"readout": "head", "method": "change"}.get(part.name.partition("/")[0], "header")
        found[kind] += part.bytes
    return found


def sized(task: Task, size: Size) -> Task:
    """So many train rows; dev is rows of train that are not trained on; test stays whole.

    A task's own dev is carved out of train. Where it is too small, unused rows top it up.
    """
    small = task.subset(train=size.train)
    used = {example.texts for example in small.splits["train"]}
    spare = [example for example in task.splits["train"] if example.texts not in used]
    lacking = size.heldout - len(task.splits["dev"])
    if lacking > 0 and spare:
        more = replace(task, splits={**task.splits, "dev": spare}).subset(dev=lacking)
        small = replace(
            small, splits={**small.splits, "dev": [*task.splits["dev"], *more.splits["dev"]]}
        )
    return small.subset(dev=size.heldout)


if __name__ == "__main__":
    main()
