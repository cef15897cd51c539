"""One vector of a tower's hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_READ: ContextVar[str] = ContextVar("read", default="")


@contextmanager
def reading(pooling: str) -> Iterator[None]:
    """Tell what is put on a tower which of its last states are read in the forward pass inside."""
    token = _READ.set(pooling)
    try:
        yield
    finally:
        _READ.reset(token)


def first_alone() -> bool:
    """Whether the states of the first position are all that is read of a tower's last block."""
    return _READ.get() == "cls"


def first_counts() -> bool:
    """Whether answers depend on the last block's states at the first position alone.

    A pooler is given all of them, and takes that one.
    """
    return _READ.get() in ("cls", "pooler")


def pool(state: object, mask: Tensor | None, pooling: str) -> Tensor:
    """(B, H) from a model's output: the first, last or mean unmasked position, or the pooler's."""
    if pooling == "pooler":
        return state.pooler_output  # type: ignore[attr-defined]
    hidden: Tensor = state.last_hidden_state  # type: ignore[attr-defined]
    if pooling == "cls":
        return hidden[:, 0]
    if mask is None:
        mask = torch.ones(hidden.shape[:2], device=hidden.device)
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(1)
    rows = torch.arange(hidden.shape[0], device=hidden.device)  # len() would fix it in a graph
    return hidden[rows, last]
