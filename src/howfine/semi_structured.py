"""2:4 masks as torch's semi-structured tensors, which GPUs with sparse tensor cores multiply.

A matrix of which two of every four neighbouring inputs are 0 is kept as its other half and two
bits an entry. Whether that is faster hangs on the GPU, the kernel and the shapes:
`python bench/semi_structured.py` tells for yours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from howfine.errors import SettingError

# torch.sparse names its kernels' least shapes; these fit both of its kernels, in 16 bits.
_ROWS, _COLUMNS = 32, 64
_GROUP, _MOST = 4, 2
_DTYPES = (torch.float16, torch.bfloat16)


def semi_structured(
    model: nn.Module, convert: Callable[[Tensor], Tensor] | None = None
) -> list[str]:
    """Let a model's 2:4 matrices be semi-structured tensors; their modules' names.

    The model, such as one that `merge` wrote, is on a CUDA device in float16 or bfloat16; it is
    changed in place, and from then on computes outputs but no gradients of these weights. Of linear
    modules (out, in), those go that have at most two entries other than 0 in every four neighbours
    along `in`, and a shape that torch's kernels take. `convert` is by default
    `torch.sparse.to_sparse_semi_structured`. Raises SettingError where no matrix is of that kind,
    and for another device or number format; then nothing is changed.
    """
    found = {name: module for name, module in model.named_modules() if _fits(module)}
    if not found:
        raise SettingError(
            "no linear module of this model has 2 of every 4 neighbouring inputs at 0, in "
            f"multiples of {_ROWS} rows and {_COLUMNS} columns; tune with a 2:4 mask "
            "(howfine methods), and merge the file"
        )
    for name, module in found.items():
        weight = module.weight
        if convert is None and not weight.is_cuda:
            raise SettingError(
                f"{name}: its weight is on {weight.device}, and torch has semi-structured kernels "
                "for CUDA alone; move the model there"
            )
        if weight.dtype not in _DTYPES:
            raise SettingError(
                f"{name}: its weight is {weight.dtype}, expected float16 or bfloat16; call "
                "model.half()"
            )
    made = convert or torch.sparse.to_sparse_semi_structured
    new = {name: made(module.weight.detach().contiguous()) for name, module in found.items()}
    for name, weight in new.items():
        found[name].weight = nn.Parameter(weight, requires_grad=False)
    return list(found)


def _fits(module: nn.Module) -> bool:
    """Whether it is a linear module with such a weight."""
    if not isinstance(module, nn.Linear) or module.weight.layout != torch.strided:
        return False
    rows, columns = module.weight.shape
    if rows % _ROWS or columns % _COLUMNS:
        return False
    on = (module.weight.detach() != 0).unflatten(1, (-1, _GROUP)).sum(2)
    return bool((on <= _MOST).all()) and bool(on.any())
