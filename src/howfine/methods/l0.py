"""Heads and neurons behind hard-concrete gates, with a Lagrangian that holds a size.

Xia, Zhong & Chen 2022, "Structured pruning learns compact and accurate models" (CoFi), section 3,
without its gates on the hidden width; gates and Lagrangian after Wang, Wohlwend & Lei 2020,
"Structured pruning of large language models" (FLOP), section 3: the loss plus
λ1·(ŝ - t) + λ2·(ŝ - t)², which the weights and the gates minimise and λ1, λ2 maximise. ŝ is the
share of the units' parameters that is expected to be off, t what is asked, from 0 up in the first
part of a training. With `states`, layers learn those of the model it starts from.

A gate z is drawn anew at each step; what is evaluated and stored has no chance in it, and no more
parameters than asked: see `howfine.unit_gates.Settling`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from howfine import concrete, gates, hidden, surgery, unit_gates, units, whole
from howfine.base import Base
from howfine.budgets import Budget
from howfine.change import Change, all_or_nothing
from howfine.errors import SettingError
from howfine.method import Method, Probe, Tensors

# What the two of them are called, among what trains, and CoFi's W from states to a teacher's.
MULTIPLIERS, LAYER_MAP = "multipliers", "layer_map"


@dataclass(frozen=True)
class L0(Method):
    """How much of the heads and neurons stays on, and how hard the gates are driven there."""

    starts_at_base: ClassVar[bool] = False
    start: ClassVar[Any] = "optional"

    # Share of the parameters of all heads and neurons together that stays on, at most; or what
    # `howfine.budgets` says ('0.5 encoder', '0.5 macs@64'). A time: as many parameters as a model
    # has whose layers are all cut alike and that is as fast.
    keep: float | str = 0.5
    # A gate for each layer's whole attention and whole feed-forward net, too.
    layers: bool = False
    # AdamW's rate for the gates' log α and the multipliers, constant: the paper's 0.01 is for many
    # thousand steps.
    rate: float = 0.2
    # Share of the training, its first part, in which the share that is asked off rises from 0.
    warm: float = 0.5
    # Parameters of the base that train, too, as selectors: those of the start among them.
    beside: tuple[str, ...] = ("all",)
    # How much the loss has of how far hidden states are from those of the model it starts from,
    # with all units on: CoFi's shares .9, .7 and .5 of this and a teacher's answers are 9, 2.3, 1.
    states: float = 0.0

    def __post_init__(self) -> None:
        budget = Budget.parse(self.keep)
        object.__setattr__(self, "keep", budget.amount if budget.of == "units" else str(budget))
        if not 0 <= self.warm <= 1:
            raise SettingError(f"l0 warm {self.warm}: expected a share of the training, 0 to 1")
        if not 0 < self.rate < math.inf:
            raise SettingError(f"l0 rate {self.rate}: expected a finite number above 0")
        if not 0 <= self.states < math.inf:
            raise SettingError(f"l0 states {self.states}: expected a finite number, 0 or above")

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        start: Tensors = dict(probe.start) if probe is not None else {}
        training = whole.going_on(base, self.beside, start)
        teacher = hidden.Teacher(base, start) if self.states else None
        settling = self._settling(base)
        with all_or_nothing() as undo:
            beside = whole.attach(base, training, start)
            undo.append(beside.remove)
            folded: dict[str, Any] = dict(settling.gates)
            for path, gate in settling.gates.items():
                undo.append(surgery.reweight(base.towers, path, gate))
            for path in sorted(beside.trainable.keys() - folded.keys()):
                if (made := _fed(base, path, settling.gates)) is not None:
                    outputs = units.axis(base, "out")
                    folded[path] = unit_gates.Feeding(made, base.original(path), outputs)
                    undo.append(surgery.reweight(base.towers, path, folded[path]))
            undo += teacher.listen() if teacher else []
            trainable = beside.trainable | _trainable(settling)
            parts = {"settling": settling, "beside": beside, "folded": folded}
            return Change(trainable, undo, parts | {"teacher": teacher, "base": base})

    def _settling(self, base: Base) -> unit_gates.Settling:
        """A gate for every unit, open.

        Raises SettingError for a size below one unit of every layer; with `layers`, of every kind.
        """
        counts, inputs = units.counts(base), units.axis(base, "in")
        made = {
            path: unit_gates.Gate(base.original(path), count, inputs, self.layers)
            for path, count in counts.items()
        }
        kinds = {path: base.place(path)[1] for path in counts}
        budget = Budget.parse(self.keep)
        prices = unit_gates.Prices.of(budget, base, counts)
        settling = unit_gates.Settling(made, kinds, prices.each, prices.share)
        self._check_room(settling, budget, prices)
        held = next(iter(made.values()))
        held.multipliers = nn.Parameter(torch.zeros(2, device=base.device))
        if self.states:
            held.layer_map = nn.Parameter(torch.eye(base.hidden_size, device=base.device))
        return settling

    def _check_room(
        self, settling: unit_gates.Settling, budget: Budget, prices: unit_gates.Prices
    ) -> None:
        of_kind: dict[str, int] = {}
        for path, price in prices.each.items():
            kind = settling.kinds[path]
            of_kind[kind] = min(price, of_kind.get(kind, price))
        least = sum((of_kind if self.layers else prices.each).values())
        if settling.budget < least:
            nearest = math.ceil(1000 * (prices.other + least) / prices.whole) / 1000
            held = "a head and a neuron" + ("" if self.layers else " of every layer")
            raise SettingError(
                f"l0 keep '{budget}': {settling.budget} of the units' {settling.prunable} "
                f"{prices.what} would stay on, fewer than {held} have; the nearest keep is "
                f"'{replace(budget, amount=nearest)}'"
                + ("" if self.layers else ", or let whole sub-layers go off with layers=true")
            )

    def passes(self, change: Change, progress: float) -> Iterator[float]:
        for gate in change.parts["settling"].gates.values():
            gate.clamp()
            gate.draw()
        if self.states:
            change.parts["teacher"].forget()
        yield 0.0

    def penalty(self, change: Change, progress: float) -> Tensor:
        ramp = min(1.0, progress / self.warm) if self.warm else 1.0
        apart = change.parts["settling"].expected() - ramp * (1 - change.parts["settling"].share)
        first, second = concrete.ascended(change.trainable[MULTIPLIERS])
        loss = first * apart + second * apart.square()
        if self.states:
            learned = change.parts["teacher"].apart(change.trainable[LAYER_MAP], _layers(change))
            loss = loss + self.states * learned
        return loss

    def groups(self, change: Change) -> list[dict[str, Any]]:
        beside = change.parts["beside"].trainable
        own = {name: p for name, p in change.trainable.items() if name not in beside}
        multipliers = [own.pop(MULTIPLIERS)]
        mapping = [own.pop(LAYER_MAP)] if LAYER_MAP in own else []
        held = {"lr": self.rate, "weight_decay": 0.0, "constant": True}
        return [
            {"params": [*beside.values(), *mapping]},
            {"params": list(own.values()), "clip": "gates", **held},
            {"params": multipliers, "clip": MULTIPLIERS, **held},
        ]

    def pack(self, base: Base, change: Change) -> Tensors:
        found = whole.pack(change.parts["beside"])
        settling: unit_gates.Settling = change.parts["settling"]
        kept = settling.kept()
        for path, module in change.parts["folded"].items():
            value = module.folded(found.get(path, base.original(path)))
            on = units.entries(base, path, kept)
            assert on is not None
            # What belongs to a unit that is off has no say, and so it is the base's.
            mine = gates.spread(on, tuple(value.shape))
            value = torch.where(mine, value, base.original(path))
            if path in found or not torch.equal(value, base.original(path)):
                found[path] = value.detach()
        return found | units.named(kept)

    def stored(self, change: Change, store: str) -> Tensors:
        # Matrices that factors are folded into are stored with them.
        beside, folded = change.parts["beside"], change.parts["folded"]
        values = whole.stored(beside, store)
        for path in values.keys() & folded.keys():
            weight, before = beside.trainable[path].detach(), beside.parts["originals"][path]
            values[path] = folded[path].rounded(weight, before.detach(), store)
        return values

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        return whole.unpack(base, units.cleared(base, tensors))


def _layers(change: Change) -> list[bool]:
    """Which layers have any unit on in this step."""
    base: Base = change.parts["base"]
    found = [False] * base.depth
    for path, gate in change.parts["settling"].gates.items():
        layer, _ = base.place(path)
        assert layer is not None
        found[layer] |= gate.open()
    return found


def _fed(base: Base, path: str, made: Mapping[str, unit_gates.Gate]) -> unit_gates.Gate | None:
    """The gate on the units that a matrix makes; None where it makes none, or shared ones."""
    for into, gate in made.items():
        on = torch.ones(len(gate.log_alpha), dtype=torch.bool)
        if path != into and units.entries(base, path, {into: on}) is not None:
            return gate
    return None


def _trainable(settling: unit_gates.Settling) -> dict[str, nn.Parameter]:
    """What trains of the gates, by path and name, and the multipliers."""
    found = {
        f"{path}:{name}": value
        for path, gate in settling.gates.items()
        for name, value in gate.named_parameters()
    }
    shared = {name: name.rpartition(":")[2] for name in found}
    shared = {name: own for name, own in shared.items() if own in (MULTIPLIERS, LAYER_MAP)}
    return {shared.get(name, name): value for name, value in found.items()}


EXAMPLE = L0(keep=0.4, beside=("all@-1",))
