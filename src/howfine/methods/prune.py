"""Whole heads and neurons off: Σ_i ξ_i·Att_i(x)·W_O and W_2(ξ ⊙ act(W_1 x)), ξ in {0, 1}.

Michel, Levy & Neubig 2019, "Are sixteen heads really better than one?", for heads and neurons
alike; Li et al. 2022 (arXiv 2204.02601) compare such prunings of multilingual models. A unit's
importance is E_x |∂L/∂ξ| at ξ = 1, of each example by itself with dropout off: how much the loss
changes, to first order, where the unit goes.

With nothing `beside`, no weight changes, and the file says which units are on. What trains
`beside` goes on from an earlier phase's weights (a recipe's `start`). With several `rounds`, units
go off bit by bit, ranked anew each time (Xu et al. 2021, of the authors of Li et al.).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from howfine import gates, surgery, units, whole
from howfine.base import Base
from howfine.budgets import Budget
from howfine.change import Change, all_or_nothing
from howfine.errors import SettingError
from howfine.method import Method, Probe, Tensors, as_parameter
from howfine.units import Importance, Kinds, Scope

# Share of a training in which units go off; the rest is for those that are left.
_GOING = 0.6


@dataclass(frozen=True)
class Prune(Method):
    """How many units stay on, which ones, and what trains without the others."""

    starts_at_base: ClassVar[bool] = False
    start: ClassVar[Any] = "optional"

    # How much stays on: a share of the heads, and of the neurons (0.5), of parameters
    # ('0.5 encoder', '0.5 parameters'), of multiply-adds ('0.5 macs@128'), or a time here
    # ('5 ms@1x64'); of each layer at least one of both.
    keep: float | str = 0.5
    # Which units may go off.
    units: Kinds = "both"
    # How important a unit is: by the loss's gradient of each example, of each position, of each
    # batch, its square (fisher), by its weights' mean magnitude, or at random.
    by: Literal["gradient", "position", "batch", "fisher", "magnitude", "random"] = "gradient"
    # The most important ones of the whole model, importances of a layer over their Euclidean norm
    # (global) or as they are (raw), or of every layer the same share.
    scope: Scope = "global"
    # Times that units go off: once before training, or as many times in its first part, equally
    # many each time.
    rounds: int = 1
    # Parameters of the base that train, too, as selectors: those of the start among them.
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        budget = Budget.parse(self.keep)
        object.__setattr__(self, "keep", budget.amount if budget.of == "units" else str(budget))
        if self.rounds < 1 or (self.rounds > 1 and not self.beside):
            raise SettingError(
                f"prune rounds {self.rounds}: expected 1 or more, and something beside that trains "
                "between them, such as beside=all"
            )

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        start: Tensors = dict(probe.start) if probe is not None else {}
        training = whole.going_on(base, self.beside, start)
        final, kept = self._kept(base, probe, start, 1)
        with all_or_nothing() as undo:
            beside = whole.attach(base, training, start)
            undo.append(beside.remove)
            gated: dict[str, units.OfUnits] = {}
            for path in sorted(kept.keys() | beside.trainable.keys()):
                on = units.entries(base, path, kept)
                if on is None:
                    continue
                weight = base.original(path)
                if path in beside.trainable or self.rounds > 1:
                    instead = weight.new_zeros(()) if path in kept else weight
                    gated[path] = units.OfUnits(on, instead).to(base.device)
                    undo.append(surgery.reweight(base.towers, path, gated[path]))
                else:
                    value = as_parameter(gates.drop(weight, on), base.parameter(path))
                    undo.append(surgery.replace(base.towers, path, value))
            parts = {"kept": kept, "beside": beside, "gated": gated, "base": base, "probe": probe}
            return Change(dict(beside.trainable), undo, parts | {"final": final})

    def _share(self, final: float, number: int) -> float:
        """What stays on in a round, from 1, of which the last one's is `final`."""
        return final if number >= self.rounds else 1 - (1 - final) * number / self.rounds

    def _kept(
        self, base: Base, probe: Probe | None, start: Tensors, number: int
    ) -> tuple[float, Tensors]:
        """The share of the last round, and (units,) which are on in this one.

        These are by the path of the matrix that they lead into.
        """
        counts = units.counts(base, self.units)
        scores = self._importance(base, counts, probe, start)

        def strongest(share: float) -> Tensors:
            return units.strongest(base, scores, share, self.scope)

        final = Budget.parse(self.keep).share(base, counts, strongest)
        return final, strongest(self._share(final, number))

    def _importance(
        self, base: Base, counts: Mapping[str, int], probe: Probe | None, start: Tensors
    ) -> Tensors:
        if self.by == "random":
            return {path: torch.rand(count) for path, count in counts.items()}
        if self.by == "magnitude":
            return units.magnitudes(base, counts, start)
        if probe is None:
            raise SettingError(
                f"prune by={self.by!r} measures gradients, which needs a task: call it through "
                "tune, pass a probe to attach, or choose by='magnitude' or 'random'"
            )
        found = probe.sensitivities(base, counts, at=start, positions=self.by == "position")
        return units.importance(found, _OF[self.by])

    @property
    def moves(self) -> Literal["", "steps", "passes"]:
        return "steps" if self.rounds > 1 else ""

    def passes(self, change: Change, progress: float) -> Iterator[float]:
        share = self._share(change.parts["final"], 1 + int(progress / _GOING * self.rounds))
        if self._over(change, share):
            self._go_on(change, share)
        yield 0.0

    def _over(self, change: Change, share: float) -> bool:
        """Whether more units are on than a share of them."""
        kinds = units.by_kind(change.parts["base"], _kept_now(change))
        sizes = [{path: len(on) for path, on in own.items()} for own in kinds.values()]
        on = sum(int(on.sum()) for own in kinds.values() for on in own.values())
        return on > sum(units.budget(own, share, self.scope) for own in sizes)

    def _go_on(self, change: Change, share: float) -> None:
        """Let the next units go off, by what they are worth now. Those that are off stay so."""
        base, kept = change.parts["base"], _kept_now(change)
        now = {path: value.detach() for path, value in change.trainable.items()}
        counts = {path: len(on) for path, on in kept.items()}
        at = now if self.by == "magnitude" else {}  # gradients are taken as all stands
        found = self._importance(base, counts, change.parts["probe"], at)
        kept = units.strongest(base, found, share, self.scope, kept)
        for path, gate in change.parts["gated"].items():
            on = units.entries(base, path, kept)
            assert on is not None
            gate.on.copy_(on)

    def finished(self, change: Change) -> bool:
        return self.rounds == 1 or not self._over(change, change.parts["final"])

    def pack(self, base: Base, change: Change) -> Tensors:
        kept = _kept_now(change)
        if not self.finished(change):
            raise SettingError(
                f"prune: training ended before all of the {self.rounds} rounds were done; train "
                "more steps, with patience=0, or in fewer rounds"
            )
        found = whole.pack(change.parts["beside"])
        for path, value in found.items():
            if (on := units.entries(base, path, kept)) is not None:
                # What belongs to a unit that is off has no say, and so it is the base's.
                mine = gates.spread(on, tuple(value.shape))
                value.copy_(torch.where(mine, value, base.original(path)))
        return found | units.named(kept)

    def stored(self, change: Change, store: str) -> Tensors:
        on = {path: gate.on for path, gate in change.parts["gated"].items()}
        return whole.stored(change.parts["beside"], store, on)

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        return whole.unpack(base, units.cleared(base, tensors))


def _kept_now(change: Change) -> Tensors:
    """(units,) which are on, by path: as the gates have it, which a checkpoint may have set."""
    gated = change.parts["gated"]
    return {
        path: gated[path].on.flatten() if path in gated else on
        for path, on in change.parts["kept"].items()
    }


_OF: dict[str, Importance] = {
    "gradient": "rows",
    "position": "rows",
    "batch": "batches",
    "fisher": "squares",
}

EXAMPLE = Prune(by="magnitude", beside=("all@-1",))
