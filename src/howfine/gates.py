"""Gates: how a decision to keep or change an entry is relaxed, trained, settled and counted.

Pure functions on tensors; methods only carry the scores. Every relaxed gate returns its *hard*
value exactly in the forward pass and differs only in the gradient: writing the straight-through
trick as `hard + soft - soft.detach()` is off by a rounding error for about one entry in eight, so
that the mask trained with is not the mask stored. Here the forward value is the hard one.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from howfine.errors import SettingError

Granularity = Literal["entry", "row", "column", "head", "n:m"]


# Entries sampled at a time: half a megabyte of floats. An even number: they come in pairs.
CHUNK = 1 << 17

Slope = Literal["identity", "sigmoid", "sign"]  # what the backward pass multiplies by


def _slope(gradient: Tensor, scores: Tensor, slope: Slope, own: bool = False) -> Tensor:
    """`gradient` times 1, σ'(score) or sign(score), in the fewest passes over memory.

    With `own` nobody else holds the gradient, and it may be written over.
    """
    gradient = gradient.to(scores.dtype)
    if slope == "sigmoid":
        into = gradient if own else torch.empty_like(gradient)
        share = torch.sigmoid(scores)
        return torch.ops.aten.sigmoid_backward.grad_input(gradient, share, grad_input=into)
    return gradient * torch.sign(scores) if slope == "sign" else gradient


class _Surrogate(torch.autograd.Function):
    """Forward: a hard gate as 0/1. Backward: the gradient times a slope.

    The slope is computed again in the backward pass: only the scores, which live anyway, are kept.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, hard: Tensor, slope: Slope) -> Tensor:
        ctx.slope = slope
        ctx.save_for_backward(scores)
        return hard.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _slope(gradient, ctx.saved_tensors[0], ctx.slope), None, None


class _Masked(torch.autograd.Function):
    """weight ⊙ gate and the gate's surrogate gradient, in one pass each way.

    The same as a product with `_Surrogate`, at a third of the memory traffic: on a CPU the passes
    over a matrix, not the arithmetic, are what mask training costs beyond full fine-tuning.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, hard: Tensor, slope: Slope) -> Tensor:
        ctx.slope = slope
        ctx.save_for_backward(weight, scores, hard)
        return drop(weight, hard)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        weight, scores, hard = ctx.saved_tensors
        to_weight = drop(gradient, hard) if ctx.needs_input_grad[0] else None
        to_gate = _gather(gradient * weight, tuple(scores.shape))
        return to_weight, _slope(to_gate, scores, ctx.slope, own=True), None, None


def masked(weight: Tensor, scores: Tensor, hard: Tensor, slope: Slope = "identity") -> Tensor:
    """`weight` with the entries dropped that `hard` does not keep; gradients reach the scores.

    `scores` and `hard` hold one entry a unit and spread over the weight's shape: see `gate_shape`.
    """
    return _Masked.apply(weight, scores, hard, slope)


def drop(weight: Tensor, hard: Tensor) -> Tensor:
    """`weight` where `hard` keeps it, exact 0 elsewhere. `hard` spreads over the weight's shape."""
    return torch.where(spread(hard, tuple(weight.shape)), weight, 0)


def _gather(gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum a gradient per entry into one per unit: the adjoint of `spread`."""
    for axis, units in enumerate(shape):
        if units != gradient.shape[axis]:
            gradient = gradient.unflatten(axis, (units, -1)).sum(axis + 1)
    return gradient


def surrogate(scores: Tensor, hard: Tensor) -> Tensor:
    """`hard` as 0/1 in the forward pass, the identity in the backward pass. Any shape."""
    return _Surrogate.apply(scores, hard, "identity")


def threshold(scores: Tensor, at: float = 0.0) -> Tensor:
    """1 where score > `at`, else 0; identity gradient (Mallya et al. 2018). Any shape."""
    return surrogate(scores, scores > at)


def sample(logits: Tensor) -> Tensor:
    """Boolean draws of Bernoulli(σ(logit)), to 2⁻²³, repeatable by torch's own seed. Any shape.

    On a CPU, memory traffic is what it costs: it goes by chunks that stay in a core's cache.
    """
    if logits.device.type != "cpu":
        chance = torch.sigmoid(logits.detach().float())
        return torch.rand_like(chance) < chance
    flat = logits.detach().reshape(-1)
    stream = random_stream()
    hard = torch.empty(flat.shape, dtype=torch.bool)
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK]
        chance = torch.sigmoid(part.float()).add_(1)
        torch.lt(random_floats(stream, len(part)), chance, out=hard[start : start + CHUNK])
    return hard.view(logits.shape)


def random_stream() -> np.random.SFC64:
    """A stream of random words, seeded by torch's own generator.

    Torch's makes one number at a time on one thread.
    """
    return np.random.SFC64(int(torch.randint(2**63 - 1, ())))


def random_floats(stream: np.random.SFC64, count: int) -> Tensor:
    """Floats (count,) uniform in [1, 2), of 23 random bits each, two from 64 bits of the stream."""
    words = stream.random_raw((count + 1) // 2).view(np.int64)
    bits = torch.from_numpy(words).bitwise_and_(0x007FFFFF_007FFFFF)  # the two mantissas
    bits.bitwise_or_(0x3F800000_3F800000)  # sign and exponent of a float from 1 to 2
    return bits.view(torch.float32)[:count]


def bernoulli(logits: Tensor, noise: Tensor, through_sigmoid: bool = True) -> Tensor:
    """A sample of Bernoulli(σ(logit)): 1 where `noise` < σ(logit). Any shape.

    `noise` is uniform in [0, 1), of the logits' shape. The sigmoid stays in the graph, so the
    gradient is σ(1-σ) (Zhou et al. 2019); without it the gradient is the identity (Zhao et al.
    2020, scheme 3).
    """
    hard = noise < torch.sigmoid(logits.detach())
    return _Surrogate.apply(logits, hard, "sigmoid" if through_sigmoid else "identity")


def top_k(scores: Tensor, keep: int) -> Tensor:
    """1 on exactly the `keep` highest scores, else 0; identity gradient (Ramanujan et al. 2020).

    Ties are settled by position, so the count is exact and the same every time.
    """
    return surrogate(scores, settle_top_k(scores, keep))


def settle_top_k(scores: Tensor, keep: int) -> Tensor:
    """Boolean mask, of the scores' shape, of exactly the `keep` highest scores."""
    count = scores.numel()
    if not 0 <= keep <= count:
        raise SettingError(f"top-k: found k = {keep}, expected 0 ≤ k ≤ {count} entries; lower k")
    hard = torch.zeros(count, dtype=torch.bool, device=scores.device)
    order = torch.argsort(scores.detach().flatten().float(), descending=True, stable=True)
    hard[order[:keep]] = True
    return hard.view(scores.shape)


def settle_n_of_m(scores: Tensor, keep: int, group: int, axis: int = -1) -> Tensor:
    """Boolean mask keeping the `keep` highest of every `group` neighbours along `axis` (N:M).

    Raises SettingError where the axis is not a multiple of `group`.
    """
    if scores.shape[axis] % group or not 0 < keep <= group:
        raise SettingError(
            f"{keep}:{group} sparsity: found an axis of {scores.shape[axis]}, expected a "
            f"multiple of {group} and 0 < {keep} ≤ {group}; choose another pattern or matrix"
        )
    moved = scores.detach().movedim(axis, -1)
    grouped = moved.reshape(-1, group)
    order = torch.argsort(grouped.float(), dim=-1, descending=True, stable=True)
    hard = torch.zeros(grouped.shape, dtype=torch.bool, device=scores.device)
    hard.scatter_(1, order[:, :keep], True)
    return hard.view(moved.shape).movedim(-1, axis)


def count_of(share: float, count: int) -> int:
    """floor(n·share) of n entries, of the share as it is written: .29 of 100 are 29.

    The product of two floats may lie just below a whole number.
    """
    return math.floor(count * Fraction(str(share)))


def smallest(values: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Boolean mask of exactly floor(n·share) entries of smallest magnitude, ties in random order.

    Random ties matter where many entries are equal (the zero row of a padding token): by position,
    they would always be the same ones.
    """
    if not 0 <= share <= 1:
        raise SettingError(f"share of entries: found {share}, expected 0 to 1")
    count = values.numel()
    magnitude = values.detach().abs().flatten().float()
    shuffle = torch.randperm(count, generator=generator).to(values.device)
    order = shuffle[torch.argsort(magnitude[shuffle], stable=True)]
    hard = torch.zeros(count, dtype=torch.bool, device=values.device)
    hard[order[: count_of(share, count)]] = True
    return hard.view(values.shape)


def gate_shape(
    shape: tuple[int, ...], granularity: Granularity, linear_axes: tuple[str, str], heads: int
) -> tuple[int, ...]:
    """Shape of the scores that gate a matrix of `shape`, one score per unit.

    `linear_axes` says which stored axis is the output ("out", "in" for nn.Linear; the reverse for
    GPT-2's Conv1D). A row is an output unit (for the first feed-forward matrix: a neuron), a
    column an input unit (for the second one: a neuron). A head is `rows / heads` neighbouring
    outputs of a query, key or value matrix, which has `heads` of them.
    """
    if granularity in ("entry", "n:m"):
        return shape
    axis = linear_axes.index("in" if granularity == "column" else "out")
    units = shape[axis]
    if granularity == "head":
        if units % heads:
            raise SettingError(
                f"granularity 'head': found {units} outputs, expected a multiple of {heads} "
                "attention heads; use granularity 'row'"
            )
        units = heads
    return tuple(units if i == axis else 1 for i in range(len(shape)))


def spread(gate: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A gate per unit, (units, 1) or (1, units), as one that broadcasts against `shape`."""
    for axis, (units, size) in enumerate(zip(gate.shape, shape, strict=True)):
        if units not in (1, size):
            gate = gate.repeat_interleave(size // units, dim=axis)
    return gate


def count_kept(hard: Tensor, shape: tuple[int, ...]) -> int:
    """Entries of a matrix of `shape` that a hard gate keeps."""
    return int(spread(hard, shape).expand(shape).sum())
