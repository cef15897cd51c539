"""What several processes that train together have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

T = TypeVar("T")


def together() -> bool:
    """Whether several processes train together."""
    return distributed.is_available() and distributed.is_initialized()


def agreed(find: Callable[[], T], device: torch.device) -> T:
    """What the first process finds, for all of them: measured times differ between two.

    All processes call this, perhaps before a trainer has let them meet; `device` is what they train
    on. What `find` raises in the first one is raised everywhere.
    """
    PartialState(cpu=device.type == "cpu")
    if not together():
        return find()
    told: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            told[0] = find()
        except Exception as error:
            told[1] = error
    distributed.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    found: T = told[0]
    return found


def gathered(*tensors: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """Tensors of all processes, joined by rows, and the number of this one's first row.

    Gradients flow back to the process that a row is from, summed over all; DistributedDataParallel
    then divides them, so that a mean of each process's loss is one over all rows. All processes
    give as many rows. One process alone has what it gave.
    """
    if not together():
        return tensors, 0
    first = distributed.get_rank() * len(tensors[0])
    return tuple(_Gathered.apply(tensor) for tensor in tensors), first


class _Gathered(torch.autograd.Function):
    """All processes' rows; each row's gradient is the sum of all processes' ones."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ctx.rows = len(own)
        parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        whole = gradients[0].contiguous()
        distributed.all_reduce(whole)
        first = distributed.get_rank() * ctx.rows
        return whole[first : first + ctx.rows]
