"""Hard-concrete gates: a number from 0 to 1 that is exactly 0 or 1 with positive probability.

Louizos, Welling & Kingma 2018, "Learning sparse neural networks through L0 regularization"; on a
free difference Guo, Rush & Kim 2021, "Parameter-efficient transfer learning with diff pruning".
"""

from __future__ import annotations

import math
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


def expected_l0(
    log_alpha: Tensor, temperature: float = 2 / 3, stretch: tuple[float, float] = (-0.1, 1.1)
) -> Tensor:
    """Σ P(gate ≠ 0) = Σ σ(log α - τ log(-l/r)) (Louizos et al. 2018, eq. 12). A scalar."""
    low, high = stretch
    return _sum_of_sigmoids(log_alpha - temperature * math.log(-low / high))


def _sum_of_sigmoids(logits: Tensor) -> Tensor:
    return _SumOfSigmoids.apply(logits)


class _SumOfSigmoids(torch.autograd.Function):
    """Σ σ(logit), by chunks that stay in a core's cache; σ is computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        parts = [torch.sigmoid(part).sum() for part in logits.reshape(-1).split(_chunk(logits))]
        return torch.stack(parts).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        slope = torch.empty_like(logits, memory_format=torch.contiguous_format)
        size = _chunk(logits)
        pairs = zip(logits.reshape(-1).split(size), slope.view(-1).split(size), strict=True)
        for part, into in pairs:
            torch.sigmoid(part, out=into)
            torch.ops.aten.sigmoid_backward.grad_input(gradient, into, grad_input=into)
        return slope


def diff_gate(log_alpha: Tensor, noise: Tensor | None = None) -> Tensor:
    """Diff pruning's gate, drawn: `hard_concrete` of temperature 1 from -1.5 to 1.5. Any shape.

    Gradients reach log_alpha: 3·s·(1-s) where 0 < z < 1, s being the sigmoid in it. `noise` is
    uniform in [0, 1), of log_alpha's shape; drawn here where there is none.
    """
    if noise is None:
        noise = torch.rand_like(log_alpha)
    return hard_concrete(log_alpha, noise.clamp(EDGE, 1 - EDGE), 1.0, (LOW, HIGH))


def diff_gate_settled(log_alpha: Tensor) -> Tensor:
    """Diff pruning's gate without chance: 0 for log_alpha ≤ 0, 1 from log 5 on. Any shape."""
    return hard_concrete_settled(log_alpha, (LOW, HIGH))


def diff_expected_l0(log_alpha: Tensor) -> Tensor:
    """How many of diff pruning's gates are not 0, on average: Σ σ(log_alpha). A scalar."""
    return _sum_of_sigmoids(log_alpha)  # log(-l/r) = 0


def add_gated(
    weight: Tensor,
    diff: Tensor,
    log_alpha: Tensor,
    group: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """weight + z·group·diff with z drawn by `diff_gate`; gradients reach diff, log_alpha and group.

    Guo et al. 2021, eq. 4 and 5. The first three are of one shape; `group` is a scalar gate over
    all of them, 1 for None. `noise` as in `diff_gate`. The same as the formula in torch's own
    operations, at a fraction of the passes over memory: that is what the gates cost on a CPU.
    """
    if group is None:
        group = weight.new_ones(())
    return _AddGated.apply(weight, diff, log_alpha, group, noise)


class _AddGated(torch.autograd.Function):
    """θ + z·z_g·w. Of the draw only s = σ(logit u + α) is kept: z and dz/dα are cheap from it."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        diff: Tensor,
        log_alpha: Tensor,
        group: Tensor,
        noise: Tensor | None,
    ) -> Tensor:
        share = torch.empty_like(log_alpha, memory_format=torch.contiguous_format)
        value = torch.empty_like(weight, memory_format=torch.contiguous_format)
        ctx.save_for_backward(diff, share, group)
        uniform = _uniform(share, noise)
        size = _chunk(weight)
        outer, whole = group.item(), [t.reshape(-1) for t in (weight, diff, log_alpha)]
        for start in range(0, weight.numel(), size):
            here = slice(start, start + size)
            base, moved, alpha = (tensor[here] for tensor in whole)
            s, u = share.view(-1)[here], uniform(here)
            _concrete(alpha, u, out=s)
            z = _stretched(s, out=u)
            torch.addcmul(base, z, moved, value=outer, out=value.view(-1)[here])
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None]:
        diff, share, group = ctx.saved_tensors
        to_diff, to_alpha = torch.empty_like(share), torch.empty_like(share)
        outer, to_group = group.item(), []
        size = _chunk(share)
        whole = [t.reshape(-1) for t in (gradient.to(share.dtype), diff, share)]
        for start in range(0, share.numel(), size):
            here = slice(start, start + size)
            g, moved, s = (tensor[here] for tensor in whole)
            down, up = to_diff.view(-1)[here], to_alpha.view(-1)[here]
            z = _stretched(s, out=torch.empty_like(s))
            product = g * moved
            to_group.append(torch.dot(product, z))
            torch.mul(g, z, out=down)
            if outer != 1:
                down.mul_(outer)
            # dz/dα = (r-l)·s(1-s) strictly between 0 and 1, and 0 elsewhere
            torch.ops.aten.sigmoid_backward.grad_input(product, s, grad_input=product)
            product.mul_(WIDTH * outer)
            torch.ops.aten.hardtanh_backward.grad_input(product, z, 0, 1, grad_input=up)
        return None, to_diff, to_alpha, torch.stack(to_group).sum().view(group.shape), None


def _concrete(alpha: Tensor, u: Tensor, out: Tensor) -> Tensor:
    """σ(logit(u) + α) = u / (u + (1-u)·exp(-α)): one exponential and no logarithm. (n,)"""
    torch.neg(alpha, out=out).exp_()
    return torch.div(u, out.mul_(1 - u).add_(u), out=out)


def _stretched(s: Tensor, out: Tensor) -> Tensor:
    """clamp((r-l)·s + l, 0, 1). (n,)"""
    return torch.add(s.new_full((), LOW), s, alpha=WIDTH, out=out).clamp_(0, 1)


def _uniform(like: Tensor, noise: Tensor | None) -> Any:
    """A function from a slice of `like`, in turn, to noise for it that may be written over."""
    if noise is not None:
        given = noise.reshape(-1)
        return lambda here: given[here].clamp(EDGE, 1 - EDGE)
    count = like.numel()
    if like.device.type != "cpu":
        return lambda here: torch.rand(
            len(range(*here.indices(count))), device=like.device, dtype=like.dtype
        ).clamp_(EDGE, 1 - EDGE)
    stream = gates.random_stream()

    def draw(here: slice) -> Tensor:
        floats = gates.random_floats(stream, len(range(*here.indices(count))))
        return floats.sub_(1).clamp_(EDGE, 1 - EDGE)

    return draw


def _chunk(tensor: Tensor) -> int:
    """Entries worked on at a time: what stays in a CPU's cache; all of them elsewhere."""
    return gates.CHUNK if tensor.device.type == "cpu" else max(1, tensor.numel())
