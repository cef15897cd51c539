"""Units behind hard-concrete gates: drawn in training, settled at a size in evaluation.

Gates after Louizos, Welling & Kingma 2018 (see `howfine.concrete`); constants, and how many of a
layer are on without chance, after Xia, Zhong & Chen 2022 (CoFi) and its authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from howfine import concrete, gates, units
from howfine.base import Base
from howfine.budgets import Budget
from howfine.codec import rounded

Tensors = dict[str, Tensor]

TEMPERATURE = 2 / 3
# log α is kept within these. CoFi draws it around 10 to begin with, which this makes the upper one.
LEAST, MOST = math.log(0.01), math.log(100)
# Noise is kept this far from 0 and 1.
EDGE = 1e-6
# Of gates without chance, CoFi's factor on log α/β.
SHARPNESS = 0.8 / TEMPERATURE


class Gate(nn.Module):
    """Factors on the units that lead into a matrix: drawn in training, settled in evaluation.

    `axis` is that of the matrix's inputs; with `layers` all units share one more gate.
    """

    noise: Tensor
    # Of this gate and those it shares a size with.
    settling: Settling

    def __init__(self, like: Tensor, count: int, axis: int, layers: bool) -> None:
        super().__init__()
        self.axis = axis
        self.log_alpha = nn.Parameter(torch.full((count,), MOST, device=like.device))
        # Of the whole sub-layer.
        self.whole = nn.Parameter(torch.full((1,), MOST, device=like.device)) if layers else None
        noise = torch.empty(count + layers, device=like.device)
        self.register_buffer("noise", noise, persistent=False)
        self.draw()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep log α where a gate can still close, and open, within a few steps."""
        for value in (self.log_alpha, self.whole):
            if value is not None:
                value.clamp_(LEAST, MOST)

    def draw(self) -> None:
        """New noise for the next forward passes: a matrix that is read twice has one draw."""
        # As a new tensor: autograd may still need the one before.
        self.noise = torch.empty_like(self.noise).uniform_(EDGE, 1 - EDGE)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return self.folded(weight)
        self.settling.forget()
        return weight * self._along(self._drawn(), weight).to(weight.dtype)

    def _drawn(self) -> Tensor:
        """(units,) factors by the noise of this step."""
        count = len(self.log_alpha)
        own = concrete.hard_concrete(self.log_alpha, self.noise[:count], TEMPERATURE)
        if self.whole is None:
            return own
        return own * concrete.hard_concrete(self.whole, self.noise[count:], TEMPERATURE)

    def open(self) -> bool:
        """Whether any of its units is on, in this step of a training."""
        return bool((self._drawn() if self.training else self.settling.factors(self)).any())

    def folded(self, weight: Tensor) -> Tensor:
        """The matrix as it is stored: times the settled factors, 0 where units are off."""
        factors = self.settling.factors(self)
        scaled = weight * self._along(factors, weight).to(weight.dtype)
        return gates.drop(scaled, (factors != 0).unsqueeze(1 - self.axis))

    def rounded(self, weight: Tensor, before: Tensor, store: str) -> Tensor:
        """A weight that gives, folded, what a file has of it as steps from the matrix `before`."""
        factors = self._along(self.settling.factors(self), weight).to(weight.dtype)
        apart = torch.where(factors != 0, weight * factors - before, 0)
        found = before + rounded(apart, store).to(weight.device)
        return torch.where(factors != 0, found / factors, weight)

    def _along(self, factors: Tensor, weight: Tensor) -> Tensor:
        return gates.spread(factors.unsqueeze(1 - self.axis), tuple(weight.shape))

    def chances(self) -> Tensor:
        """(units,) P(z ≠ 0), of unit and sub-layer together."""
        found = concrete.chances(self.log_alpha, TEMPERATURE)
        return found if self.whole is None else found * concrete.chances(self.whole, TEMPERATURE)

    def settled(self) -> Tensor:
        """(units,) factors without chance, of those that are on: CoFi's, not stretched."""
        found = torch.sigmoid(self.log_alpha * SHARPNESS)
        return found if self.whole is None else found * torch.sigmoid(self.whole * SHARPNESS)


class Feeding(nn.Module):
    """A matrix that makes units: its rows for those that are off are the base's, once settled."""

    instead: Tensor

    def __init__(self, gate: Gate, instead: Tensor, axis: int) -> None:
        super().__init__()
        self._gate = (gate,)  # in a tuple: it is no part of this module
        self._axis = axis
        self.register_buffer("instead", instead, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        (gate,) = self._gate
        # Not by this module's own mode: without a parameter, it may be in evaluation throughout.
        return weight if gate.training else self.folded(weight)

    def folded(self, weight: Tensor) -> Tensor:
        """The matrix as it is stored."""
        return torch.where(self._on(weight), weight, self.instead)

    def rounded(self, weight: Tensor, before: Tensor, store: str) -> Tensor:
        """The weight as a file gives it back: of rows that are off, it has no steps."""
        apart = torch.where(self._on(weight), weight - before, 0)
        return before + rounded(apart, store).to(weight.device)

    def _on(self, weight: Tensor) -> Tensor:
        (gate,) = self._gate
        on = (gate.settling.factors(gate) != 0).unsqueeze(1 - self._axis)
        return gates.spread(on, tuple(weight.shape))


@dataclass(frozen=True)
class Prices:
    """What one unit of each path has, and the share of all units' that may stay on, at most."""

    each: Mapping[str, int]
    share: float
    # What the budget is a share of, and what of it is no unit's.
    whole: int
    other: int
    # What is counted.
    what: str

    @classmethod
    def of(cls, budget: Budget, base: Base, counts: Mapping[str, int]) -> Prices:
        """Of a share of the units, and of a time, parameters count.

        To be as fast as a time, as many stay as a model has whose layers are all cut alike. Raises
        SettingError where there is none.
        """
        if budget.of in ("units", "ms"):
            each = units.costs(base, counts)
            whole = sum(each[path] * count for path, count in counts.items())
            even = {path: torch.arange(count, 0, -1) for path, count in counts.items()}
            share = budget.share(base, counts, lambda s: units.strongest(base, even, s, "layer"))
            return cls(each, share, whole, 0, "parameters")
        prices = budget.prices(base, counts)
        each = {path: int(own[0]) for path, own in prices.costs.items()}
        own = sum(each[path] * count for path, count in counts.items())
        other = int(prices.whole) - own
        share = max(0.0, (budget.amount * prices.whole - other) / own)
        what = "multiply-adds" if budget.of == "macs" else "parameters"
        return cls(each, share, int(prices.whole), other, what)


class Settling:
    """Which units are on without chance, and by what factor, once for each state of the gates.

    As in CoFi's code, of each layer's heads, and neurons, as many are likely as are on on average,
    those with the highest log α; with gates of sub-layers, as many of those of one kind, one at
    least. Likely units come first, others after, units of sub-layers that are off last; each by its
    chance to be on. One after another stays on where its parameters still fit what is asked. The
    most likely of every layer, or of every kind with gates of sub-layers, comes before all others.

    `kinds` says, by path, which sub-layers are counted together, `costs` what one unit has:
    parameters, or multiply-adds.
    """

    def __init__(
        self,
        by_path: Mapping[str, Gate],
        kinds: Mapping[str, str],
        costs: Mapping[str, int],
        keep: float,
    ) -> None:
        self.gates, self.kinds, self.costs = dict(by_path), dict(kinds), dict(costs)
        self.units = {path: len(gate.log_alpha) for path, gate in self.gates.items()}
        self.prunable = sum(costs[path] * count for path, count in self.units.items())
        # What may stay on, at most: of all units together.
        self.share, self.budget = keep, gates.count_of(keep, self.prunable)
        self._watched = [
            value
            for gate in self.gates.values()
            for value in (gate.log_alpha, gate.whole)
            if value is not None
        ]
        # Parameters' versions, which loading counts up; fused optimisers don't: see `forget`.
        self._state: tuple[int, ...] | None = None
        self._found: dict[Gate, Tensor] = {}
        for gate in self.gates.values():
            gate.settling = self

    def forget(self) -> None:
        """Training goes on: what was computed is out of date."""
        self._state = None

    def factors(self, gate: Gate) -> Tensor:
        """(units,) of a gate's: 0 for those that are off."""
        state = tuple(parameter._version for parameter in self._watched)
        if state != self._state:
            self._found, self._state = self._settled(), state
        return self._found[gate]

    def kept(self) -> Tensors:
        """(units,) which are on, by path."""
        return {path: self.factors(gate) != 0 for path, gate in self.gates.items()}

    def expected(self) -> Tensor:
        """ŝ: the share of the units' parameters that is off on average. A scalar, with gradients.

        Wang et al. 2020, eq. 9; Xia et al. 2022, eq. 2 and 3, without the hidden width.
        """
        sizes = [self.costs[path] * gate.chances().sum() for path, gate in self.gates.items()]
        return 1 - torch.stack(sizes).sum() / self.prunable

    @torch.inference_mode(False)
    @torch.no_grad()
    def _settled(self) -> dict[Gate, Tensor]:
        order = torch.argsort(torch.cat(self._places()), stable=True, descending=True)
        sizes = [torch.full((count,), self.costs[path]) for path, count in self.units.items()]
        on = _fitting(order, torch.cat(sizes), self.budget)
        parts = on.split(list(self.units.values()))
        return {
            gate: gate.settled() * part.to(gate.log_alpha.device)
            for gate, part in zip(self.gates.values(), parts, strict=True)
        }

    def _places(self) -> list[Tensor]:
        """(units,) of each path: the higher, the earlier a unit is let stay."""
        closed = self._closed()
        found: Tensors = {}
        for path, gate in self.gates.items():
            own = concrete.chances(gate.log_alpha, TEMPERATURE).cpu()
            found[path] = place = gate.chances().cpu()
            if path in closed:
                place -= 1
            else:
                place += gates.settle_top_k(own, round(float(own.sum())))
                place[own.argmax()] += 2  # so that no layer that is on is left without
        # The budget may be too small for all of these: one of each kind is before them.
        for kind in set(self.kinds.values()):
            first = max((p for p in found if self.kinds[p] == kind), key=lambda p: found[p].max())
            found[first][found[first].argmax()] += 2
        return list(found.values())

    def _closed(self) -> set[str]:
        """Paths of sub-layers that are off: of each kind as many as on average, but never all."""
        found: set[str] = set()
        for kind in sorted(set(self.kinds.values())):
            own = {
                path: concrete.chances(gate.whole, TEMPERATURE)
                for path, gate in self.gates.items()
                if gate.whole is not None and self.kinds[path] == kind
            }
            if own:
                chances = torch.cat(list(own.values()))
                on = gates.settle_top_k(chances, max(1, round(float(chances.sum())))).tolist()
                found |= {path for path, stays in zip(own, on, strict=True) if not stays}
        return found


def _fitting(order: Tensor, costs: Tensor, budget: int) -> Tensor:
    """(units,) which are on: in this order, each whose cost is not above what is left by then."""
    on = torch.zeros(len(order), dtype=torch.bool)
    while len(order):
        total = costs[order].cumsum(0)
        taken = int((total <= budget).sum())
        on[order[:taken]] = True
        budget -= int(total[taken - 1]) if taken else 0
        order = order[taken:]
        order = order[costs[order] <= budget]  # without the next one: it ends
    return on
