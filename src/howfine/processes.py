"""What several processes that train together have in common."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_gather


def gathered(*tensors: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """Tensors of all processes, joined by rows, and the number of this one's first row.

    Gradients flow back to the process that a row is from, summed over all; DistributedDataParallel
    then divides them, so that a mean of each process's loss is one over all rows. All processes
    give as many rows. One process alone has what it gave.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return tensors, 0
    made = []
    for tensor in tensors:
        if tensor.requires_grad:
            parts = list(all_gather(tensor.contiguous()))
        else:
            parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
            distributed.all_gather(parts, tensor.contiguous())
        made.append(torch.cat(parts))
    return tuple(made), distributed.get_rank() * len(tensors[0])
