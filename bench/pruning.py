"""Structured pruning of MiniLM: algorithms by sparsity, one-shot and in rounds, all sizes at once.

    python bench/pruning.py --data DIR --base minilm [--tasks sst2,qnli] [--minutes 90] [--page]

Each task and seed is fine-tuned once; what prunes goes on from that file, those that train all for
as many optimiser steps. Runs what bench/ledgers/pruning.jsonl lacks, seed by seed, and writes
docs/results/pruning.md. Sparsity s is the share of heads, and of neurons, that go; of
`post_training` the share of multiplications.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import claims
import pruning_page
import torch
from claims import ROOT, Bench
from pruning_page import (
    FURTHER,
    KEEPS,
    SEEDS,
    SIZES,
    TASKS,
    TRAINED,
    UNTRAINED,
    Made,
    name_of,
)

from howfine.base import Base
from howfine.delta import SUFFIX, Delta
from howfine.evaluate import evaluate
from howfine.ledger import Record, pack_predictions
from howfine.recipe import Recipe
from howfine.task import Task
from howfine.tune import tune

LEDGER = ROOT / "bench" / "ledgers" / "pruning.jsonl"
TRAIN, TEST = 1000, 1000
TUNED = {"epochs": 3, "batch_size": 16, "learning_rate": 1e-4, "store": "fp16"}
LATER = {"epochs": 2, "batch_size": 16, "learning_rate": 5e-5, "store": "fp16"}
STILL = {"max_steps": 1, "batch_size": 16, "learning_rate": 0.0, "readout_learning_rate": 0.0}
STILL |= {"store": "fp16"}
# Two kinds of text in which the same is asked: pairs of news sentences, and of people's questions.
DOMAINS = ("mrpc", "qqp")
MIXED = "paraphrases"


def run(bench: Bench) -> None:
    """Seed by seed, so that a stop leaves whole columns; what matters less comes last."""
    with tempfile.TemporaryDirectory() as folder:
        for algorithms in (TRAINED, FURTHER):
            for seed in SEEDS:
                for name in bench.options.tasks.split(","):
                    if name == "domains":
                        domains(bench, seed, Path(folder))
                        continue
                    runs = _Runs(bench, name, seed, Path(folder))
                    runs.whole()
                    runs.trained(algorithms)


class _Runs:
    """The runs of a task and a seed."""

    def __init__(self, bench: Bench, name: str, seed: int, folder: Path) -> None:
        self.bench, self.name, self.seed = bench, name, seed
        self.task = _task(name, bench.options.data)
        self.base = bench.base("body")
        self.file = folder / f"{name}-{seed}{SUFFIX}"
        self.precision = {"precision": bench.options.precision}

    def whole(self) -> None:
        """Fine-tuning, and from it all sizes, trained or only ranked."""
        self.once("full", None, self.tuned)
        for cell, settings in SIZES.items():
            self.sizes(cell, settings, STILL if cell in UNTRAINED else LATER)

    def trained(self, algorithms: Mapping[str, Made]) -> None:
        """What trains each size by itself."""
        for cell, (name, settings) in algorithms.items():
            for keep in KEEPS:
                recipe = (name, {**settings, "keep": keep})
                self.once(cell, keep, lambda r=recipe, c=cell: self._fit(*r, _common(c)))

    def once(self, cell: str, keep: float | None, made: Any) -> None:
        facts = {"task": self.name, "cell": name_of(cell, keep), "seed": self.seed}
        facts |= self.precision
        self.bench.once(f"{self.name}/{facts['cell']}/s{self.seed}", made, **facts)

    def start(self) -> Path:
        """The fine-tuned file; made anew where only its score is known."""
        if not self.file.exists():
            recipe = Recipe.load("full").override(**TUNED, **self.precision)
            tune(self.base, self.task, recipe, out=self.file, seed=self.seed)
        return self.file

    def tuned(self) -> Record:
        return _scored(Delta.load(self.start()), self.base, self.task)

    def _fit(self, name: str, settings: Mapping[str, Any], common: Mapping[str, Any]) -> Record:
        recipe = Recipe.load(name).override(
            **{**common, **settings, **self.precision}, start=str(self.start()), beside=["all"]
        )
        path = self.file.with_name(f"x{SUFFIX}")
        done = tune(self.base, self.task, recipe, out=path, seed=self.seed)
        facts = {"seconds": round(done.seconds, 1), "steps": done.steps, "bytes": done.bytes}
        return _scored(done.delta, self.base, self.task) | facts

    def sizes(self, cell: str, settings: Mapping[str, Any], common: Mapping[str, Any]) -> None:
        """One file of all sizes, evaluated at each."""
        shares = (1.0, *KEEPS)
        path = self.file.with_name(f"sizes{SUFFIX}")

        @cache
        def made() -> dict[str, Any]:
            recipe = Recipe.load("dynamic").override(
                **{**common, **settings, **self.precision}, start=str(self.start())
            )
            done = tune(self.base, self.task, recipe, out=path, seed=self.seed)
            return {"seconds": round(done.seconds, 1), "steps": done.steps, "bytes": done.bytes}

        def at(keep: float) -> Record:
            facts = made()
            return _scored(Delta.load(path).resized(keep), self.base, self.task) | facts

        for keep in shares:
            self.once(cell, keep, lambda k=keep: at(k))


def _common(cell: str) -> dict[str, Any]:
    return STILL if cell.startswith(UNTRAINED) else LATER


def _scored(delta: Delta, base: Base, task: Task) -> Record:
    test = evaluate(delta, base, task, split="test")
    return {
        "score": test.value,
        "metric": test.metric,
        "n": test.n,
        "train_size": len(task.splits["train"]),
        "predictions": pack_predictions(test.predictions),
    }


@cache
def _task(name: str, data: str) -> Task:
    """Scored by accuracy throughout: F1 of one answer for all is above many a pruned model's."""
    task = Task.load(name, data=data).subset(train=TRAIN, dev=300, test=TEST)
    return replace(task, metric="accuracy")


# --- one mask for all domains, or one for each ---------------------------------------------------


def domains(bench: Bench, seed: int, folder: Path) -> None:
    """Masks scored on all domains' rows against masks of each, over the same weights."""
    base, tasks = bench.base("body"), dict(_domains(bench.options.data))
    keys = [f"domains/{keep}/s{seed}" for keep in KEEPS]
    if all(key in bench.ledger.records() for key in keys):
        return
    file = folder / f"{MIXED}-{seed}{SUFFIX}"
    for keep, key in zip(KEEPS, keys, strict=True):

        def made(keep: float = keep) -> Record:
            if not file.exists():
                recipe = Recipe.load("full").override(**TUNED, precision=bench.options.precision)
                tune(base, tasks[MIXED], recipe, out=file, seed=seed)
            return _compared(base, tasks, file, keep, seed)

        facts = {"task": "domains", "cell": name_of("domains", keep), "seed": seed}
        facts["precision"] = bench.options.precision
        bench.once(key, made, **facts)


def _compared(base: Base, tasks: dict[str, Task], file: Path, keep: float, seed: int) -> Record:
    masks, found = {}, {}
    for name, task in tasks.items():
        recipe = Recipe.load("prune").override(
            **STILL, keep=keep, start=str(file), beside=["all"], by="gradient"
        )
        path = file.with_name(f"domain{SUFFIX}")
        masks[name] = tune(base, task, recipe, out=path, seed=seed).delta
    for name in DOMAINS:
        found[name] = {
            mask: evaluate(masks[mask], base, tasks[name], split="test").value
            for mask in (name, MIXED)
        }
    own = [_units(masks[name], base) for name in DOMAINS]
    both, either = (own[0] & own[1]).sum().item(), (own[0] | own[1]).sum().item()
    score = sum(found[name][name] for name in DOMAINS) / len(DOMAINS)
    return {"score": score, "domains": found, "overlap": both / either, "chance": _chance(keep)}


def _units(delta: Delta, base: Base) -> torch.Tensor:
    """Which units are on, one after the other."""
    held = delta.tensors(base)[0]
    return torch.cat([value.flatten() for value in held.values() if value.dtype == torch.bool])


def _chance(keep: float) -> float:
    """The overlap (intersection over union) of two masks drawn at random."""
    return keep / (2 - keep)


def _domains(data: str) -> Iterator[tuple[str, Task]]:
    each = {}
    for name in DOMAINS:
        task = _task(name, data)
        each[name] = replace(task, labels=("no", "yes"), metric="accuracy")
        yield name, each[name]
    splits = {
        split: [row for task in each.values() for row in task.splits[split]]
        for split in ("train", "dev", "test")
    }
    told = "; ".join(task.provenance for task in each.values())
    yield MIXED, Task(MIXED, splits, ("no", "yes"), "accuracy", told)


if __name__ == "__main__":
    every = ",".join((*TASKS, "domains"))
    claims.main(
        __doc__ or "",
        LEDGER,
        run,
        pruning_page.page,
        lambda parser: parser.add_argument("--tasks", default=every, help=f"some of {every}"),
    )
