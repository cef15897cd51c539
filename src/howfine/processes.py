"""What several processes that train together have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def gathered(*tensors: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """Tensors of all processes, joined by rows, and the number of this one's first row.

    Gradients flow back to the process that a row is from, summed over all; DistributedDataParallel
    then divides them, so that a mean of each process's loss is one over all rows. All processes
    give as many rows. One process alone has what it gave.
    """
    if not distributed.is_available() or not distributed.is_initialized():
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
