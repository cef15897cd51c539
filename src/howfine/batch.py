"""Batch: the one place where methods and readouts meet.

A readout fills it from examples; a method may read it and never builds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from howfine.errors import BaseInUse


@dataclass
class Batch:
    """B examples, ready for the towers' forward.

    `inputs` holds what the tower's forward takes (`input_ids` (B, S), `attention_mask` (B, S), …).
    """

    inputs: dict[str, Tensor]
    targets: Tensor | None = None  # (B,) class indices or scores; None when predicting
    slots: Tensor | None = None  # (B, S) which free vector stands at a position, -1 for a word
    reads: Tensor | None = None  # (B, R) positions the readout looks at
    rows: Tensor | None = None  # (B,) which delta each row wears, in a mixed batch
    # Of a readout with vectors of its own: (B, S) which of them stands at a position, and which is
    # added there; -1 for none. Behind an input's end its last types go on.
    marks: Tensor | None = None
    types: Tensor | None = None
    # Stretches of rows that wear one change, found when first asked for.
    runs: list[tuple[int, slice]] | None = field(default=None, repr=False, compare=False)

    def as_kwargs(self) -> dict[str, Any]:
        """The fields that are set, as keyword arguments for `Wired.forward`.

        A plain dict of tensors is what Trainer and accelerate know how to move and split.
        """
        held = {name: value for name, value in vars(self).items() if value is not None}
        held.pop("runs", None)
        return held

    @classmethod
    def from_kwargs(cls, fields: Mapping[str, Any]) -> Batch:
        """The inverse of `as_kwargs`."""
        return cls(**fields)


_RUNNING: ContextVar[Batch | None] = ContextVar("running", default=None)


@contextmanager
def running(batch: Batch) -> Iterator[None]:
    """Let what is put on a base see the batch whose forward pass runs inside."""
    token = _RUNNING.set(batch)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def current() -> Batch | None:
    """The batch whose forward pass runs now; None outside of one, as in a tower called alone."""
    return _RUNNING.get()


def worn_rows(count: int) -> Tensor:
    """(B,) which change each row of the running batch wears.

    Raises BaseInUse where there is no batch of so many rows: several changes are on, and nothing
    says which of them a row is for.
    """
    rows, beams = _rows(count)
    return rows if beams == 1 else rows.repeat_interleave(beams)


def worn_runs(count: int) -> list[tuple[int, slice]]:
    """(change, rows) for each stretch of neighbouring rows of the running batch that wear one."""
    rows, beams = _rows(count)
    batch: Any = current()
    if batch.runs is None:  # once a batch: it asks an accelerator for numbers
        numbers, sizes = torch.unique_consecutive(rows, return_counts=True)
        ends = sizes.cumsum(0)
        both = zip(numbers.tolist(), (ends - sizes).tolist(), ends.tolist(), strict=True)
        batch.runs = [(number, slice(start, end)) for number, start, end in both]
    return [(n, slice(beams * run.start, beams * run.stop)) for n, run in batch.runs]


def _rows(count: int) -> tuple[Tensor, int]:
    """The running batch's rows, and how many times each stands in an input: beams, neighbours."""
    batch = current()
    held = 0 if batch is None or batch.rows is None else len(batch.rows)
    if batch is None or batch.rows is None or not held or count % held:
        raise BaseInUse(
            "several changes are on this base, each for its own rows, and this forward pass does "
            "not say which row wears which; run it through howfine.combine, or leave the context "
            "of the tasks that are combined first"
        )
    return batch.rows, count // held


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors, in dicts of dicts, on a device."""
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value.to(device)
