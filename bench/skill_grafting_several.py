"""Several tasks at once: how regions overlap, a model of all tasks, and tasks one after another."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from skill_grafting_cells import Cells, fine_tuning, learned, untouched

from howfine import compose, regions
from howfine.base import Base
from howfine.delta import Delta
from howfine.evaluate import evaluate, logits
from howfine.ledger import Record
from howfine.merge import merge
from howfine.readout import Wired
from howfine.task import Example, Task

MULTI = "multi"


def overlap(base: Base, files: Mapping[tuple[str, int], Path]) -> Iterator[Record]:
    """|γ₁ ∩ γ₂| / |γ₂| of every ordered pair, and what random places would give."""
    found = {key: regions.support(Delta.load(path), base) for key, path in files.items()}
    for (by, by_seed), first in found.items():
        for (of, of_seed), second in found.items():
            if (by, by_seed) != (of, of_seed):
                names = {"by": by, "by_seed": by_seed, "of": of, "of_seed": of_seed}
                share, chance = regions.overlap(first, second), regions.chance(first, second)
                yield {**names, "overlap": share, "chance": chance}


# One after another.


def continual(cells: Cells, order: Sequence[str], density: str, seed: int) -> Record:
    """Accuracies of tasks learned in a row: one body tuned on and on, and grafts kept apart."""
    return {
        "order": list(order),
        "sequential": sequential(cells, order, seed),
        **grafted(cells, order, density, seed),
    }


def sequential(cells: Cells, order: Sequence[str], seed: int) -> list[list[float]]:
    """Row t: every task's accuracy up to t on the body after task t, each with its own head.

    The body goes on as a checkpoint folder, which is the next fine-tuning's base.
    """
    base, heads, rows = cells.base, [], []
    bodies = cells.folder / f"bodies-s{seed}"
    shutil.rmtree(bodies, ignore_errors=True)
    bodies.mkdir(parents=True)
    for number, name in enumerate(order):
        task = cells.task(name)
        path = cells.path(f"sequence-{number}-{name}", seed) if number else None
        if path is None:
            path = cells.get(name, "ft", seed)
        else:
            path.unlink(missing_ok=True)  # its base is a folder that was made anew
            cells.fit(task, fine_tuning(), seed, path, base)
        delta = Delta.load(path)
        with delta.applied(base) as model:
            heads.append((task, model.readout, model.head))
            rows.append(
                [
                    accuracy(Wired(base, readout, head).eval(), base, earlier.splits["test"])
                    for earlier, readout, head in heads
                ]
            )
        if number + 1 < len(order):
            base = Base.load(str(merge(delta, bodies / f"{number}-{name}", base)))
    shutil.rmtree(bodies)
    return rows


def grafted(cells: Cells, order: Sequence[str], density: str, seed: int) -> dict[str, Any]:
    """Accuracies of grafts that keep out of the earlier ones' regions, alone and as a union.

    Not the paper's procedure: each is of a fine-tuning of the bare base, where that goes on from
    the base with the earlier grafts on, their entries frozen (docs/methods/graft.md says how).
    """
    files: list[Path] = []
    for number, name in enumerate(order):
        start = cells.get(name, "ft", seed)
        if number == 0:
            files.append(cells.get(name, f"learned@{density}", seed))
            continue
        path = cells.path(f"apart-{number}-{name}-{density}", seed)
        raw = learned(str(start), float(density), tuple(map(str, files)))
        files.append(cells.fit(cells.task(name), raw, seed, path))
    own, union = [], []
    for number, name in enumerate(order):
        task = cells.task(name)
        own.append(scored(Delta.load(files[number]), cells.base, task))
        together = compose.union(files, cells.base, head=number)
        file = cells.path(f"union-{number}-{name}-{density}", seed)
        together.save(file)
        union.append(scored(Delta.load(file), cells.base, task))
    tuned = [
        scored(Delta.load(cells.get(name, "ft", seed)), cells.base, cells.task(name))
        for name in order
    ]
    return {"own": own, "union": union, "tuned": tuned}


def accuracy(model: Wired, base: Base, examples: Sequence[Example]) -> float:
    """Of a head on whatever body is in place."""
    predictions = model.readout.predict(logits(model, base, examples))
    targets = torch.tensor([example.label for example in examples])
    return float((predictions == targets).double().mean())


def scored(delta: Delta, base: Base, task: Task) -> float:
    result = evaluate(delta, base, task, split="test")
    return result.scores.get("accuracy", result.value)


# One model of all tasks.


def multi(cells: Cells, names: Sequence[str], density: str, seed: int) -> Record:
    """Rel(γ_i, t) in one model of all tasks; regions are found on one task's rows each.

    One head holds all tasks' labels. A task is answered among its own labels.
    """
    tasks = [cells.task(name) for name in names]
    starts = [sum(len(task.labels) for task in tasks[:number]) for number in range(len(tasks))]
    together = mixture(tasks, starts, range(len(tasks)))
    body = cells.fit(together, fine_tuning(), seed, cells.path(f"{MULTI}-ft", seed))
    tuned = Delta.load(body)

    def scores(delta: Delta) -> list[float]:
        with delta.applied(cells.base) as model:
            return [
                among(model, cells.base, mixture([task], [first], [0], together).splits["test"])
                for task, first in zip(tasks, starts, strict=True)
            ]

    rows = []
    for number, name in enumerate(names):
        own = mixture([tasks[number]], [starts[number]], [0], together)
        path = cells.path(f"{MULTI}-learned@{density}-{name}", seed)
        rows.append(
            scores(Delta.load(cells.fit(own, learned(str(body), float(density)), seed, path)))
        )
    before, after = scores(untouched(tuned)), scores(tuned)
    return {
        "tasks": list(names),
        "grafted": rows,
        "before": before,
        "tuned": after,
        "effect": regions.effect(rows, before, after),
    }


def mixture(
    tasks: Sequence[Task], starts: Sequence[int], which: Sequence[int], like: Task | None = None
) -> Task:
    """Tasks as one with all labels; a single text becomes a pair with an empty second text.

    `starts` are the places of each task's labels among all, which `like` gives where it is given.
    """
    labels = (
        like.labels if like else tuple(f"{t.name}: {label}" for t in tasks for label in t.labels)
    )
    splits = {
        split: [
            Example((*example.texts, "")[:2], int(example.label) + starts[number])
            for number in which
            for example in tasks[number].splits[split]
        ]
        for split in ("train", "dev", "test")
    }
    first = tasks[which[0]]
    name = MULTI if like is None else f"{MULTI}-{first.name}"
    return replace(first, name=name, splits=splits, labels=labels, metric="accuracy")


def among(model: Wired, base: Base, examples: Sequence[Example]) -> float:
    """Accuracy where a task's own labels alone may be answered."""
    targets = torch.tensor([int(example.label) for example in examples])
    own = targets.unique()
    outputs = logits(model, base, examples)[:, own]
    return float((own[outputs.argmax(-1)] == targets).double().mean())
