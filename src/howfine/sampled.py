"""Gradients of a weight at a few of its entries: a product of two matrices, sampled.

∂L/∂W at k entries is k inner products over the tokens, ∂L/∂W[i, j] = Σ_t g[t, i] x[t, j]. Taking
just those costs O(k·tokens); the whole product costs O(rows·columns·tokens), and its result would
be thrown away but for k numbers. The forward pass is the layer's own, on a weight that already
holds the changed entries: what is computed does not depend on whether something trains.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Pairs for each row and column up to which pair by pair is the quickest, and the share of entries
# above which the whole product is: bench/sampled.py.
FEW, WHOLE = 0.65, 0.10
# Pairs multiplied at once: what stays in a core's cache.
AT_ONCE = 1 << 17
# Columns of a layer's input that must be spared for keeping a copy of the others to pay.
SPARED = 512


@dataclass(frozen=True)
class Sampling:
    """Which entries of a product (rows, columns) are wanted, and how they are got."""

    shape: tuple[int, int]
    row: Tensor  # (k,)
    column: Tensor  # (k,)

    def __post_init__(self) -> None:
        pointers = torch.zeros(self.shape[0] + 1, dtype=torch.long, device=self.row.device)
        pointers[1:] = torch.bincount(self.row, minlength=self.shape[0]).cumsum(0)
        object.__setattr__(self, "_pointers", pointers)

    @property
    def few(self) -> bool:
        """Whether pairs of columns are best gathered and multiplied, without a matrix product."""
        return len(self.row) <= FEW * sum(self.shape)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """(k,) entries of leftᵀ·right; left is (tokens, rows), right (tokens, columns).

        Entries are in row-major order.
        """
        if self.few:
            return pairs(left, right, self.row, self.column)
        left, right = left.float(), right.float()
        if len(self.row) > WHOLE * self.shape[0] * self.shape[1]:
            return (left.t() @ right)[self.row, self.column]
        _hear_out_torch()
        wanted = torch.sparse_csr_tensor(
            self._pointers,  # type: ignore[attr-defined]
            self.column,
            left.new_zeros(len(self.row)),
            self.shape,
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(wanted, left.t(), right, beta=0.0).values()


def pairs(left: Tensor, right: Tensor, row: Tensor | None, column: Tensor) -> Tensor:
    """(k,) inner products of the columns of `left` at `row` and those of `right` at `column`.

    Both are (tokens, …); a `left` without `row` holds just the k columns already. In float32, some
    tokens at a time: what is gathered stays in the cache.
    """
    height = max(1, min(AT_ONCE // max(1, len(column)), len(left)))
    total = left.new_zeros(height, len(column), dtype=torch.float32)
    for one, other in zip(left.split(height), right.split(height), strict=True):
        if row is not None:
            one = one.index_select(1, row)
        # The last part may be shorter.
        sums = total if len(one) == height else total[: len(one)]
        sums.addcmul_(one.float(), other.index_select(1, column).float())
    return total.sum(0)


@functools.cache
def _hear_out_torch() -> None:
    """torch says once a process that CSR tensors are in beta; users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.zeros(1, 1).to_sparse_csr()


class Linear(torch.autograd.Function):
    """x·Wᵀ + b (`transposed`: x·W + b), whose weight gets a gradient at sampled entries alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sampling: Sampling,
        transposed: bool,
    ) -> Tensor:
        ctx.sampling, ctx.transposed, ctx.like = sampling, transposed, (x.shape, x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        # All that the gradient will read of x, where that spares memory worth the copy.
        read = sampling.row if transposed else sampling.column
        ctx.gathered = sampling.few and x.shape[-1] - len(read) > SPARED
        ctx.save_for_backward(flat.index_select(1, read) if ctx.gathered else flat, weight)
        if not transposed:
            return functional.linear(x, weight, bias)
        made = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return made.view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        read, weight = ctx.saved_tensors
        to_x, to_values, _, to_bias, *_ = ctx.needs_input_grad
        wrote = gradient.reshape(-1, gradient.shape[-1])
        sampling: Sampling = ctx.sampling
        from_x = from_values = from_bias = None
        if to_values and ctx.gathered:
            written = sampling.column if ctx.transposed else sampling.row
            from_values = pairs(read, wrote, None, written)
        elif to_values:
            from_values = sampling.product(*((read, wrote) if ctx.transposed else (wrote, read)))
        if to_bias:
            from_bias = wrote.sum(0)
        if to_x:  # last: the layer below reads it next, while it is in the cache
            shape, dtype = ctx.like
            same = weight.to(gradient.dtype)
            from_x = (wrote @ (same.t() if ctx.transposed else same)).view(shape).to(dtype)
        return from_x, from_values, None, from_bias, None, None


class Embedding(torch.autograd.Function):
    """Rows of W by number, whose weight gets a gradient at sampled entries alone."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, values: Tensor, weight: Tensor, sampling: Sampling, padding: int
    ) -> Tensor:
        ctx.sampling, ctx.padding = sampling, padding
        ctx.save_for_backward(ids)
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        sampling: Sampling = ctx.sampling
        rows, at_row = sampling.row.unique(return_inverse=True)
        local = torch.full((sampling.shape[0],), -1, dtype=torch.long, device=ids.device)
        local[rows] = torch.arange(len(rows), device=ids.device)
        if ctx.padding >= 0:  # as in torch: a padding row does not train
            local[ctx.padding] = -1
        seen = local[ids.flatten()]
        used = seen >= 0
        summed = gradient.new_zeros(len(rows), gradient.shape[-1], dtype=torch.float32)
        summed.index_add_(0, seen[used], gradient.flatten(0, -2)[used].float())
        return None, summed[at_row, sampling.column], None, None, None


class Put(torch.autograd.Function):
    """A copy of a weight with some entries replaced; their gradients are taken from the whole's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        made = weight.clone(memory_format=torch.contiguous_format)
        made.view(-1)[index] = values.to(made.dtype)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        (index,) = ctx.saved_tensors
        return None, None, gradient.flatten()[index].float()
