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
from torch.nn import functional

# Rows times columns up to which the smaller product of just the rows and columns in use is the
# quickest, and the share of entries above which the whole product is: bench/sampled.py.
SMALL, WHOLE = 1 << 15, 0.10


@dataclass(frozen=True)
class Sampling:
    """Which entries of a product (rows, columns) are wanted, and how they are got."""

    shape: tuple[int, int]
    row: Tensor  # (k,)
    column: Tensor  # (k,)

    def __post_init__(self) -> None:
        rows, at_row = self.row.unique(return_inverse=True)
        columns, at_column = self.column.unique(return_inverse=True)
        object.__setattr__(self, "_used", (rows, columns, at_row, at_column))
        pointers = torch.zeros(self.shape[0] + 1, dtype=torch.long, device=self.row.device)
        pointers[1:] = torch.bincount(self.row, minlength=self.shape[0]).cumsum(0)
        object.__setattr__(self, "_pointers", pointers)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """(k,) entries of leftᵀ·right; left is (tokens, rows), right (tokens, columns).

        Entries are in row-major order.
        """
        rows, columns, at_row, at_column = self._used  # type: ignore[attr-defined]
        if len(rows) * len(columns) <= SMALL:
            return (left[:, rows].t() @ right[:, columns])[at_row, at_column]
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
        ctx.sampling, ctx.transposed = sampling, transposed
        ctx.save_for_backward(x, weight)
        if not transposed:
            return functional.linear(x, weight, bias)
        flat = x.reshape(-1, x.shape[-1])
        made = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return made.view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_values, _, to_bias, *_ = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        from_x = from_values = from_bias = None
        if to_x:
            same = weight.to(gradient.dtype)
            from_x = (flat @ (same.t() if ctx.transposed else same)).view(x.shape).to(x.dtype)
        if to_values:
            read, wrote = x.reshape(-1, x.shape[-1]).float(), flat.float()
            pair = (read, wrote) if ctx.transposed else (wrote, read)
            from_values = ctx.sampling.product(*pair)
        if to_bias:
            from_bias = flat.sum(0)
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
