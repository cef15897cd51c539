"""Supermask training: W = θ ⊙ m with m in {0, 1}; no weight ever changes its value.

Radiya-Dixit & Wang 2020, "How fine can fine-tuning be?" (sparsification as fine-tuning): a real
logit per weight, +ν or -ν by pretrained magnitude so that floor(n·s₀) entries start dropped,
sampled in training, thresholded for use. Sibling mask trainers are rows of VARIANTS.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from howfine import gates, surgery
from howfine.base import Base
from howfine.change import Change, all_or_nothing
from howfine.errors import DamagedDelta, SettingError, near
from howfine.method import Method, Probe, Tensors, as_parameter

NU = 5.0  # |logit| at the start: σ(5) keeps 99.3 % of the kept entries in a sample


@dataclass(frozen=True)
class Variant:
    """How scores start, which mask a training step uses, its gradient, and the mask in the end."""

    # (unit magnitudes, boolean mask of those dropped at the start, s₀) -> scores
    start: Callable[[Tensor, Tensor, float], Tensor]
    # (scores, s₀) -> boolean mask for a training step
    draw: Callable[[Tensor, float], Tensor]
    # d gate / d score in the backward pass
    slope: gates.Slope
    # (scores, s₀) -> boolean mask of what is kept
    settle: Callable[[Tensor, float], Tensor]
    # How far most scores start from where they would flip.
    reach: float = NU


def _two_values(low: float, high: float) -> Callable[[Tensor, Tensor, float], Tensor]:
    return lambda units, dropped, _: torch.where(dropped, low, high)


def _logit(units: Tensor, _: Tensor, share: float) -> Tensor:
    return torch.full_like(units, math.log((1 - share) / share))


def _sample(scores: Tensor, _: float) -> Tensor:
    return gates.sample(scores)


def _above(at: float) -> Callable[[Tensor, float], Tensor]:
    return lambda scores, _: scores > at


def _strongest(scores: Tensor, share: float) -> Tensor:
    keep = scores.numel() - gates.count_of(share, scores.numel())
    return gates.settle_top_k(scores.abs(), keep)


def _uniform(
    low: float, high: Callable[[float], float]
) -> Callable[[Tensor, Tensor, float], Tensor]:
    return lambda units, _, share: torch.empty_like(units).uniform_(low, high(share))


def _kaiming(units: Tensor, _: Tensor, __: float) -> Tensor:
    bound = math.sqrt(1 / units.shape[-1])  # Kaiming-uniform with a = √5
    return torch.empty_like(units).uniform_(-bound, bound)


VARIANTS: dict[str, Variant] = {
    # The source paper's, as in the authors' later code: ±ν by magnitude, Bernoulli samples.
    "bernoulli": Variant(_two_values(-NU, NU), _sample, "sigmoid", _above(0.0)),
    # The same start without sampling.
    "threshold": Variant(_two_values(-NU, NU), _above(0.0), "identity", _above(0.0)),
    # Zhou et al. 2019: no magnitude prior; every entry starts with probability 1 - s₀ (their
    # sigmoid_bias, 0 by default, is s₀ = 0.5). They sample at test too; here it is thresholded.
    "zhou": Variant(_logit, _sample, "sigmoid", _above(0.0), reach=2.0),
    # Zhao et al. 2020, scheme 3: the same with the identity for a gradient.
    "zhao-bernoulli": Variant(_logit, _sample, "identity", _above(0.0), reach=2.0),
    # Zhao et al. 2020: uniform scores of which a share s₀ lies under the threshold 0.01.
    "zhao": Variant(
        _uniform(-0.02, lambda share: 0.03 / share - 0.02),
        _above(0.01),
        "identity",
        _above(0.01),
        reach=0.02,
    ),
    # Zhao et al. 2020, magnitude start.
    "zhao-magnitude": Variant(
        _two_values(0.0, 0.02), _above(0.01), "identity", _above(0.01), reach=0.01
    ),
    # Mallya et al. 2018 (Piggyback): everything starts kept, just above the threshold.
    "piggyback": Variant(
        lambda units, _, __: torch.full_like(units, 1e-2),
        _above(5e-3),
        "identity",
        _above(5e-3),
        reach=5e-3,
    ),
    # Ramanujan et al. 2020 (edge-popup): exactly the (1 - s₀) share of largest |score| is kept.
    "edge-popup": Variant(_kaiming, _strongest, "sign", _strongest, reach=0.05),
}
_NEEDS_SHARE = ("zhou", "zhao-bernoulli", "zhao")


class _Gate(nn.Module):
    """Multiplies a frozen weight by its mask: drawn in training, settled in evaluation."""

    def __init__(self, scores: Tensor, variant: Variant, share: float) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.variant = variant
        self.share = share

    def forward(self, weight: Tensor) -> Tensor:
        choose = self.variant.draw if self.training else self.variant.settle
        hard = choose(self.scores.detach(), self.share)
        return gates.masked(weight, self.scores, hard, self.variant.slope)


@dataclass(frozen=True)
class Mask(Method):
    """Drop entries of the pretrained matrices; keep the others as they are."""

    starts_at_base: ClassVar[bool] = False  # it starts at magnitude pruning

    # Which matrices are masked, as selectors (see `howfine.anatomy`).
    where: tuple[str, ...] = ("matrices",)
    # Share of entries s₀ that start dropped, the smallest by magnitude.
    initial_sparsity: float = 0.05
    # Mask trainer: bernoulli (the paper's), threshold, zhou, zhao…, piggyback, edge-popup.
    variant: str = "bernoulli"
    # s₀ of every matrix by itself, or of all of them together.
    scope: Literal["matrix", "global"] = "matrix"
    # What is dropped at once: entry, row, column, head, or a pattern such as 2:4.
    granularity: str = "entry"
    # Number format of the scores; bfloat16 halves their memory, and wants howfine.adamw.AdamW.
    scores: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise SettingError(f"mask variant {self.variant!r}. {near(self.variant, VARIANTS)}")
        low_ok = self.initial_sparsity > 0 if self.variant in _NEEDS_SHARE else True
        if not (0 <= self.initial_sparsity < 1 and low_ok):
            raise SettingError(
                f"mask initial_sparsity: found {self.initial_sparsity}, expected a share from 0 "
                f"(more than 0 for variant {self.variant!r}) to below 1"
            )
        ruled = (self.variant, self.initial_sparsity) != (Mask.variant, Mask.initial_sparsity)
        if self._pattern() and ruled:
            raise SettingError(
                f"mask granularity {self.granularity!r} keeps the strongest of each group: variant "
                "and initial_sparsity have no meaning with it; leave them out"
            )
        if self.scope == "global" and (self.variant == "edge-popup" or self._pattern()):
            raise SettingError(
                "mask scope 'global' has no meaning where the share kept is exact per matrix; "
                "use scope 'matrix', or a variant with a threshold"
            )
        if self.granularity not in ("entry", "row", "column", "head") and not self._pattern():
            raise SettingError(
                f"mask granularity {self.granularity!r}: expected entry, row, column, head or "
                "N:M such as 2:4"
            )

    def _pattern(self) -> tuple[int, int] | None:
        """(N, M) of an N:M granularity."""
        match = re.fullmatch(r"(\d+):(\d+)", self.granularity)
        return (int(match.group(1)), int(match.group(2))) if match else None

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        paths = base.choose(self.where)
        units = {path: self._units(base, path) for path in paths}
        dropped = self._dropped_at_start(units)
        trainable = {}
        with all_or_nothing() as undo:
            for path in paths:
                gate = self._gate(base, units[path], dropped[path])
                trainable[path] = gate.scores
                undo.append(surgery.reweight(base.towers, path, gate))
            return Change(trainable, undo)

    def _units(self, base: Base, path: str) -> Tensor:
        """Mean |θ| of every unit that has a score: the score tensor's shape."""
        weight = base.parameter(path).detach().float().abs()
        unit: Any = "n:m" if self._pattern() else self.granularity
        if unit != "entry" and weight.ndim != 2:
            raise SettingError(
                f"mask granularity {self.granularity!r}: {path} has the shape "
                f"{tuple(weight.shape)}, expected a matrix; select matrices only, such as "
                "where=matrices"
            )
        heads = base.heads_of(path) if unit == "head" else 0
        shape = gates.gate_shape(tuple(weight.shape), unit, base.anatomy.linear_axes, heads)
        for axis, size in enumerate(shape):
            weight = weight.unflatten(axis, (size, -1)).mean(axis + 1)
        return weight

    def _dropped_at_start(self, units: dict[str, Tensor]) -> Tensors:
        """The smallest units by magnitude: floor(n·s₀) of each matrix, or of all together."""
        generator = torch.default_generator
        if self.scope == "matrix":
            return {
                path: gates.smallest(value, self.initial_sparsity, generator)
                for path, value in units.items()
            }
        together = torch.cat([value.flatten() for value in units.values()])
        parts = gates.smallest(together, self.initial_sparsity, generator).split(
            [value.numel() for value in units.values()]
        )
        return {
            path: part.view(value.shape)
            for (path, value), part in zip(units.items(), parts, strict=True)
        }

    def _gate(self, base: Base, units: Tensor, dropped: Tensor) -> _Gate:
        variant = self._variant(base)
        scores = variant.start(units, dropped, self.initial_sparsity)
        variant.settle(scores, self.initial_sparsity)  # what can't be settled fails here, untrained
        return _Gate(scores.to(getattr(torch, self.scores)), variant, self.initial_sparsity)

    def _variant(self, base: Base) -> Variant:
        pattern = self._pattern()
        if pattern is None:
            return VARIANTS[self.variant]
        keep, group = pattern
        inputs = base.anatomy.linear_axes.index("in")  # sparse kernels group what is summed over

        def settle(scores: Tensor, _: float) -> Tensor:
            return gates.settle_n_of_m(scores, keep, group, inputs)

        return Variant(lambda units, _, __: units / units.mean(), settle, "identity", settle)

    def pack(self, base: Base, change: Change) -> Tensors:
        settle = self._variant(base).settle
        return {
            path: settle(scores.detach(), self.initial_sparsity)
            for path, scores in change.trainable.items()
        }

    def groups(self, change: Change) -> list[dict[str, Any]]:
        # Decay would pull every probability to one half, and densify the mask.
        return [{"params": list(change.trainable.values()), "weight_decay": 0.0}]

    def learning_rate(self, steps: int) -> float:
        # Adam moves a score by the rate a step at most, half of it on average under linear decay:
        # over the training, five times the way to a flip. Much less flips nothing. In a short
        # training a fifth of the way a step is the most: with more, noise alone flips everything.
        reach = 0.1 if self._pattern() else VARIANTS[self.variant].reach
        return min(10 / steps, 0.2) * reach

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        known = set(base.choose(self.where))
        with all_or_nothing() as undo:
            for path, kept in tensors.items():
                fits = path in known and kept.shape == self._units(base, path).shape
                if not fits or kept.dtype != torch.bool:
                    raise DamagedDelta(
                        f"delta masks {path!r} with shape {tuple(kept.shape)} ({kept.dtype}), "
                        f"which does not fit the base {base.name}; the file is damaged, or made "
                        "for another model"
                    )
                weight = base.parameter(path)
                value = gates.drop(weight.detach(), kept.to(weight.device))
                undo.append(surgery.replace(base.towers, path, as_parameter(value, weight)))
            return Change({}, undo)


EXAMPLE = Mask(initial_sparsity=0.1)
