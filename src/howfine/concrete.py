"""Hard-concrete gates: a number from 0 to 1 that is exactly 0 or 1 with positive probability.

Louizos, Welling & Kingma 2018, "Learning sparse neural networks through L0 regularization"; on a
free difference Guo, Rush & Kim 2021, "Parameter-efficient transfer learning with diff pruning".
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from howfine import gates

# Diff pruning's gate: temperature 1, stretched to twice its width on either side of one half.
LOW, HIGH = -1.5, 1.5
WIDTH = HIGH - LOW
# Noise is kept this far from 0 and 1, where its logit is infinite.
EDGE = 1e-4


def hard_concrete(
    log_alpha: Tensor,
    noise: Tensor,
    temperature: float = 2 / 3,
    stretch: tuple[float, float] = (-0.1, 1.1),
) -> Tensor:
    """A stretched, clamped concrete gate in [0, 1], exactly 0 or 1 with positive probability.

    z = clamp(σ((log u - log(1-u) + log α) / τ)·(r-l) + l, 0, 1) (Louizos et al. 2018, eq. 10-11).
    `noise` u is uniform in (0, 1), of log_alpha's shape.
    """
    low, high = stretch
    concrete = torch.sigmoid((torch.logit(noise) + log_alpha) / temperature)
    return (concrete * (high - low) + low).clamp(0, 1)


def hard_concrete_settled(log_alpha: Tensor, stretch: tuple[float, float] = (-0.1, 1.1)) -> Tensor:
    """The gate used at test time: clamp(σ(log α)·(r-l) + l, 0, 1) (Louizos et al. 2018, eq. 13)."""
    low, high = stretch
    return (torch.sigmoid(log_alpha) * (high - low) + low).clamp(0, 1)


def chances(
    log_alpha: Tensor, temperature: float = 2 / 3, stretch: tuple[float, float] = (-0.1, 1.1)
) -> Tensor:
    """P(gate ≠ 0) = σ(log α - τ log(-l/r)) of each (Louizos et al. 2018, eq. 12). Any shape."""
    low, high = stretch
    return torch.sigmoid(log_alpha - temperature * math.log(-low / high))


def expected_l0(
    log_alpha: Tensor, temperature: float = 2 / 3, stretch: tuple[float, float] = (-0.1, 1.1)
) -> Tensor:
    """How many gates are not 0, on average: Σ `chances`. A scalar."""
    return chances(log_alpha, temperature, stretch).sum()


def ascended(value: Tensor) -> Tensor:
    """`value`, whose gradient comes back with the other sign: a step that descends then ascends.

    For multipliers of a constraint, which are maximised while all else is minimised.
    """
    return _Ascended.apply(value)


class _Ascended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def diff_gate(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Diff pruning's gate: `hard_concrete` of temperature 1, stretched from -1.5 to 1.5.

    Any shape; `noise` is uniform in [0, 1).
    """
    return hard_concrete(log_alpha, noise.clamp(EDGE, 1 - EDGE), 1.0, (LOW, HIGH))


def diff_gate_settled(log_alpha: Tensor) -> Tensor:
    """Diff pruning's gate without chance: 0 for log_alpha ≤ 0, 1 from log 5 on. Any shape."""
    return hard_concrete_settled(log_alpha, (LOW, HIGH))


def diff_expected_l0(log_alpha: Tensor) -> Tensor:
    """How many of diff pruning's gates are not 0, on average: Σ σ(log_alpha). A scalar."""
    return expected_l0(log_alpha, 1.0, (LOW, HIGH))


Noise = tuple[Tensor, float]
Spare = list[tuple[Tensor, Tensor]]


def add_gated(
    weight: Tensor,
    diff: Tensor,
    log_alpha: Tensor,
    group: Tensor | None = None,
    noise: Noise | None = None,
    spare: Spare | None = None,
) -> tuple[Tensor, Tensor]:
    """θ + z·z_g·w with gates drawn as `diff_gate` does, and `diff_expected_l0(log_alpha)`.

    Guo et al. 2021, eq. 4 to 6. θ, w and log_alpha are of one shape; `group` is the logit of one
    gate z_g over all of them, a scalar; z_g is 1 where there is none. Gradients reach w and both
    logits: dz/dα is 3·s·(1-s) where 0 < z < 1, s being the sigmoid in the gate, else 0. `noise` is
    for the entries and for the group, uniform in [0, 1); drawn here where there is none.

    On a CPU, passes over memory are what gates cost: this makes two, one each way, by chunks that
    stay in a core's cache. The penalty's gradient comes along in the second. `spare` keeps memory
    from one call to the next, which a system may take long to give: what was returned is
    overwritten by the first call after its backward pass.
    """
    return _AddGated.apply(weight, diff, log_alpha, group, noise, spare)


class _AddGated(torch.autograd.Function):
    """Of the draw only s = σ(logit u + α) is kept: z and dz/dα are cheap from it."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        diff: Tensor,
        log_alpha: Tensor,
        group: Tensor | None,
        noise: Noise | None,
        spare: Spare | None,
    ) -> tuple[Tensor, Tensor]:
        share, value = _memory(weight, spare)
        ctx.spare, ctx.memory = spare, (share, value)
        ctx.save_for_backward(diff, log_alpha, share)
        uniform = _uniform(share, noise and noise[0])
        ctx.outer, ctx.slope = _drawn_group(group, noise and noise[1])
        ctx.group = group
        counts = []
        parts = _chunks(weight, diff, log_alpha, share, value)
        scratch = _scratch(share)
        for base, moved, alpha, s, into in parts:
            torch.sigmoid(alpha, out=s)
            counts.append(s.sum())
            _concrete(uniform(len(s)), s, next(scratch))
            z = _stretched(s, next(scratch))
            torch.addcmul(base, z, moved, value=ctx.outer, out=into)
        return value.view(weight.shape), torch.stack(counts).sum()

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor, count: Tensor
    ) -> tuple[None, Tensor, Tensor, Tensor | None, None, None]:
        diff, log_alpha, share = ctx.saved_tensors
        to_diff, to_alpha = torch.empty_like(share), torch.empty_like(share)
        outer, penalty, to_group = ctx.outer, count.item(), []
        gradient = gradient.to(share.dtype)
        parts = _chunks(gradient, diff, log_alpha, share, to_diff, to_alpha)
        scratch = _scratch(share)
        for g, moved, alpha, s, down, up in parts:
            z = _stretched(s, next(scratch))
            product = torch.mul(g, moved, out=_like(s, next(scratch)))
            if ctx.group is not None:
                to_group.append(torch.dot(product, z))
            torch.mul(g, z, out=down)
            if outer != 1:
                down.mul_(outer)
            # (r-l)·s(1-s) strictly between z = 0 and 1, and 0 elsewhere
            torch.ops.aten.sigmoid_backward.grad_input(product, s, grad_input=product)
            product.mul_(WIDTH * outer)
            torch.ops.aten.hardtanh_backward.grad_input(product, z, 0, 1, grad_input=up)
            if penalty:
                p = torch.sigmoid(alpha, out=z)
                up.add_(p, alpha=penalty).addcmul_(p, p, value=-penalty)
        if ctx.spare is not None and ctx.memory is not None:
            ctx.spare.append(ctx.memory)
            ctx.memory = None  # a second pass must not give it back again
        upstream = None
        if ctx.group is not None:
            upstream = (torch.stack(to_group).sum() * ctx.slope).view(ctx.group.shape)
        return None, to_diff, to_alpha, upstream, None, None


def _memory(like: Tensor, spare: Spare | None) -> tuple[Tensor, Tensor]:
    """Two contiguous tensors to write to, of the shape and on the device of `like`."""
    if spare and spare[-1][0].device == like.device:
        return spare.pop()
    return torch.empty(like.shape, device=like.device), torch.empty(like.shape, device=like.device)


def _scratch(like: Tensor) -> Iterator[Tensor]:
    """Two rows of memory for a chunk's intermediate values, in turn.

    A CPU's allocator gives memory of this size back to the system and asks for it again, which
    takes longer than what is computed there; this is kept, for each thread.
    """
    if like.device.type != "cpu":
        return itertools.repeat(like.new_empty(0))
    if getattr(_KEPT, "dtype", None) != like.dtype:
        with torch.inference_mode(False):  # whoever calls first: training will write there, too
            rows = torch.empty(2, _chunk(like), dtype=like.dtype, device=like.device)
        _KEPT.rows, _KEPT.dtype = tuple(rows), like.dtype
    return itertools.cycle(_KEPT.rows)


_KEPT = threading.local()


def _like(s: Tensor, memory: Tensor) -> Tensor:
    """Memory of this size, of `memory` where there is so much."""
    return memory[: len(s)] if len(memory) >= len(s) else torch.empty_like(s)


def _concrete(u: Tensor, p: Tensor, memory: Tensor) -> Tensor:
    """σ(logit(u) + α) for p = σ(α), written over p: u·p / (u·p + (1-u)·(1-p)). (n,)

    Without a logarithm or a second exponential. The denominator as 1 - u - p + 2·u·p is exact to
    the spacing of u itself, from which logit(u) is no better known.
    """
    both = torch.mul(u, p, out=_like(p, memory))
    less = u.add_(p).sub_(both, alpha=2).sub_(1)  # minus the denominator
    return torch.div(both, less.neg_(), out=p)


def _stretched(s: Tensor, memory: Tensor) -> Tensor:
    """clamp((r-l)·s + l, 0, 1). (n,)"""
    return torch.add(s.new_full((), LOW), s, alpha=WIDTH, out=_like(s, memory)).clamp_(0, 1)


def _drawn_group(group: Tensor | None, noise: float | None) -> tuple[float, float]:
    """A drawn gate over a whole tensor, and its derivative by its logit; (1, 0) for none."""
    if group is None:
        return 1.0, 0.0
    u = float(torch.rand(())) if noise is None else noise
    u = min(max(u, EDGE), 1 - EDGE)
    s = 1 / (1 + (1 - u) / u * math.exp(-max(group.item(), -500.0)))
    stretched = WIDTH * s + LOW
    if 0 < stretched < 1:
        return stretched, WIDTH * s * (1 - s)
    return float(stretched > 0), 0.0


def _uniform(like: Tensor, noise: Tensor | None) -> Callable[[int], Tensor]:
    """A function that gives the next so many numbers, which may be written over."""
    if noise is not None:
        given = iter(noise.flatten().split(_chunk(like)))
        return lambda count: next(given).clamp(EDGE, 1 - EDGE)
    if like.device.type != "cpu":
        return lambda count: torch.rand(count, device=like.device).clamp_(EDGE, 1 - EDGE)
    stream = gates.random_stream()
    return lambda count: gates.random_floats(stream, count).sub_(1).clamp_(EDGE, 1 - EDGE)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, flat, by parts; those that are contiguous may be written to."""
    size = _chunk(tensors[0])
    return zip(*(tensor.reshape(-1).split(size) for tensor in tensors), strict=True)


def _chunk(tensor: Tensor) -> int:
    """Entries worked on at a time: what stays in a CPU's cache; all of them elsewhere."""
    return 2 * gates.CHUNK if tensor.device.type == "cpu" else max(1, tensor.numel())
