"""Batches of several tasks as one: padded to one width, each row with the number of its change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from howfine.base import Base
from howfine.batch import Batch
from howfine.choices import unseen_in


def merged(
    base: Base, batches: Sequence[Batch], numbers: Sequence[int], left: bool = False
) -> Batch:
    """One batch of all rows in order, `rows` being the numbers given, one for each batch.

    Attention masks are of one kind: all of two axes (B, S), or all of four, added to scores.
    Padding is on the right, or on the `left`, where all batches have theirs there.
    """
    width = max(batch.inputs["input_ids"].shape[1] for batch in batches)
    names = {name for batch in batches for name in batch.inputs}
    inputs = {
        name: torch.cat([_input(base, batch, name, width, left) for batch in batches])
        for name in sorted(names)
    }
    numbered: dict[str, Any] = {
        name: torch.cat([_numbers(batch, name, width, left) for batch in batches])
        for name in ("slots", "marks", "types")
        if any(getattr(batch, name) is not None for batch in batches)
    }
    counts = torch.tensor([len(batch.inputs["input_ids"]) for batch in batches])
    rows = torch.tensor(numbers).repeat_interleave(counts).to(base.device)
    return Batch(inputs=inputs, rows=rows, **numbered)


def _input(base: Base, batch: Batch, name: str, width: int, left: bool) -> Tensor:
    """One of a batch's inputs at the common width, or what the model would take where it lacks."""
    ids, value = batch.inputs["input_ids"], batch.inputs.get(name)
    more = width - ids.shape[1]
    if name == "attention_mask" and value is not None and value.ndim == 4:
        wider = functional.pad(value, (0, more), value=unseen_in(value.dtype))
        # Places of padding see what the last place does: a row of nothing has no softmax.
        return torch.cat([wider, wider[:, :, -1:].expand(-1, -1, more, -1)], dim=2)
    if name == "position_ids" and value is None:
        value = (torch.arange(ids.shape[1], device=ids.device) + base.first_position).expand_as(ids)
    if value is None:
        value = torch.zeros_like(ids)
    fill = {"input_ids": base.tokenizer.pad_token_id or 0, "position_ids": base.first_position}
    return functional.pad(value, (more, 0) if left else (0, more), value=fill.get(name, 0))


def _numbers(batch: Batch, name: str, width: int, left: bool) -> Tensor:
    """(B, width) of a field that numbers vectors, -1 where there is none."""
    ids, own = batch.inputs["input_ids"], getattr(batch, name)
    own = torch.full_like(ids, -1) if own is None else own
    more = width - ids.shape[1]
    return functional.pad(own, (more, 0) if left else (0, more), value=-1)
