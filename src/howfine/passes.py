"""One pass of a base for rows of several tasks: read once, or written token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from howfine import language, mixed, surgery, vectors, writing
from howfine.base import Base
from howfine.batch import Batch, running, to_device
from howfine.delta import Delta
from howfine.errors import DeltaError, TaskError
from howfine.method import Tensors
from howfine.readout import Asked, Head
from howfine.task import Example


@dataclass
class Worn:
    """One task's change: its number in a batch's rows, what it holds, and its head."""

    number: int
    delta: Delta
    tensors: Tensors
    head: Head
    takes: int

    @property
    def asked(self) -> Asked | None:
        """How its texts are to be written, where it writes."""
        return self.head.asked


@contextmanager
def naming(*names: str) -> Iterator[None]:
    """Let errors of what is done inside say for which task it was."""
    try:
        yield
    except (TaskError, DeltaError) as error:
        raise type(error)(f"task {' or '.join(map(repr, names))}: {error}") from error


def shares(base: Base, task: Worn) -> bool:
    """Whether its readout can share a pass; whole encoder-decoders write for one task at a time."""
    return task.asked is None or base.kind == language.CAUSAL


def collated(base: Base, task: Worn, examples: Sequence[Example]) -> Batch:
    """A task's own batch, texts cut as they are when its change is on alone."""
    before = base.reserved
    base.reserved = task.takes
    try:
        batch = task.delta.readout.collate(base, examples, labelled=False)
    finally:
        base.reserved = before
    fields = to_device(batch.as_kwargs(), base.device)
    return Batch.from_kwargs(fields)


def read(base: Base, tasks: Mapping[str, Worn], batches: Mapping[str, Batch]) -> dict[str, Tensor]:
    """Outputs of collated batches, by task, from one pass of the body."""
    merged = _merged(base, tasks, batches)
    with running(merged):
        state = base.body(**merged.inputs)
    found, start = {}, 0
    for name, batch in batches.items():
        rows, length = batch.inputs["input_ids"].shape
        # A head may go through parts of the tower, which rows wear changes of, too.
        worn = replace(batch, rows=batch.inputs["input_ids"].new_full((rows,), tasks[name].number))
        with _replayed(base, state, slice(start, start + rows), length), running(worn):
            found[name] = tasks[name].head(base.towers, batch)
        start += rows
    return found


def write(
    base: Base, tasks: Mapping[str, Worn], batches: Mapping[str, Batch], count: int
) -> dict[str, Tensor]:
    """Written tokens of collated batches, by task, each row going on until its own task's end.

    The tasks search alike (`Asked.search`) and are `count` with those that have no batch here.
    """
    merged = _merged(base, tasks, batches, left=True)
    asked = {name: _asked(tasks[name]) for name in batches}
    tables = {tasks[n].number: each.own for n, each in asked.items() if each.own is not None}
    beams, penalty, _ = next(iter(asked.values())).search
    most = max(each.most for each in asked.values())
    both = Asked(most, beams, penalty, next(iter(tables.values()), None))
    with ExitStack() as undo:
        if tables:
            undo.callback(vectors.wear(base, tables, count))
        undo.enter_context(running(merged))
        tokens = writing.written(base, merged, both)
    found, start = {}, 0
    for name, batch in batches.items():
        rows = len(batch.inputs["input_ids"])
        found[name] = tokens[start : start + rows, : asked[name].most]
        start += rows
    return found


def alike(
    base: Base, tasks: Mapping[str, Worn], batches: Mapping[str, Batch]
) -> Iterator[dict[str, Batch]]:
    """Batches that can be written in one pass: of tasks that search alike, and fit together.

    A row that has ended still counts positions, and so does one that another's need makes go on.
    """
    groups: list[dict[str, Batch]] = []
    for name, batch in batches.items():
        for group in groups:
            first = next(iter(group))
            longer = {**group, name: batch}
            if _asked(tasks[first]).search == _asked(tasks[name]).search and _fits(
                base, tasks, longer
            ):
                group[name] = batch
                break
        else:
            groups.append({name: batch})
    yield from groups


def _fits(base: Base, tasks: Mapping[str, Worn], batches: Mapping[str, Batch]) -> bool:
    """Whether the longest of sources, fronts and texts together have positions."""
    read = max(batch.inputs["input_ids"].shape[1] for batch in batches.values())
    front = max(tasks[name].takes for name in batches)
    most = max(_asked(tasks[name]).most for name in batches)
    return read + front + most <= base.room


def _asked(task: Worn) -> Asked:
    assert task.asked is not None
    return task.asked


def _merged(
    base: Base, tasks: Mapping[str, Worn], batches: Mapping[str, Batch], left: bool = False
) -> Batch:
    numbers = [tasks[name].number for name in batches]
    return mixed.merged(base, list(batches.values()), numbers, left)


@contextmanager
def _replayed(base: Base, state: Any, rows: slice, length: int) -> Iterator[None]:
    """Let the body give some rows of a state that it computed before."""
    pooled = getattr(state, "pooler_output", None)
    part = SimpleNamespace(
        last_hidden_state=state.last_hidden_state[rows, :length],
        pooler_output=None if pooled is None else pooled[rows],
    )
    with ExitStack() as undo:
        undo.callback(surgery.rewire(base.body, lambda **_: part))  # type: ignore[arg-type]
        yield
