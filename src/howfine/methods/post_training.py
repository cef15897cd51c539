"""Heads and neurons of a fine-tuned model off under a budget, with no training.

Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers" (arXiv 2204.09656).
Units are chosen by the diagonal of the Fisher information of their factors (section 4.1), then
rearranged in each layer by its block (4.2), and those that stay get factors of their own so that
each layer gives what it gave before (4.3): Σ_i ξ_i·Att_i(x)·W_O and W_2(ξ ⊙ act(W_1 x)), ξ real.
The weights are those of the recipe's `start`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from howfine import gates, macs, rescaling, surgery, units, whole
from howfine.base import Base
from howfine.budgets import Budget
from howfine.change import Change, all_or_nothing
from howfine.errors import DamagedDelta, SettingError
from howfine.method import Method, Probe, Tensors

# Names tensors of a file: how far the factors of a matrix's units that are on are from 1.
_FACTORS = "factors:"


@dataclass(frozen=True)
class PostTraining(Method):
    """How much stays, and how far the paper's three steps go."""

    starts_at_base: ClassVar[bool] = False
    start: ClassVar[Any] = "needed"

    # How much stays: a share of the multiply-adds of all heads and neurons (0.5), of parameters
    # ('0.5 encoder', '0.5 parameters'), or a time here ('5 ms@1x64'); of each layer one of both.
    keep: float | str = 0.5
    # Tokens of the sequence whose multiply-adds are counted, where `keep` is a number alone.
    length: int = 32
    # Train rows that are looked at.
    rows: int = 2048
    # The last step taken: the search alone, the rearrangement in each layer, or factors, too.
    stage: Literal["masked", "rearranged", "rescaled"] = "rescaled"
    # Parameters of the base that are stored, as selectors: those of the start among them.
    beside: tuple[str, ...] = ("all",)

    def __post_init__(self) -> None:
        budget = Budget.parse(self.keep)
        object.__setattr__(self, "keep", budget.amount if budget.of == "units" else str(budget))
        if self.length < 1 or self.rows < 1:
            raise SettingError(
                f"post_training: found length {self.length} and rows {self.rows}, expected numbers "
                "from 1 on"
            )

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        if probe is None:
            raise SettingError(
                "post_training measures gradients of a fine-tuned model, which needs a task: call "
                "it through tune, or pass a probe to attach"
            )
        start = dict(probe.start)
        training = whole.going_on(base, self.beside, start)
        kept, apart = self._found(base, probe, start)
        with all_or_nothing() as undo:
            beside = whole.attach(base, training, start, trains=False)
            undo.append(beside.remove)
            for path in sorted(kept.keys() | beside.trainable.keys()):
                gate = _gate(base, path, kept, apart)
                if gate is not None:
                    undo.append(surgery.reweight(base.towers, path, gate.to(base.device)))
            parts = {"kept": kept, "apart": apart, "beside": beside}
            return Change(dict(beside.trainable), undo, parts)

    def _found(self, base: Base, probe: Probe, start: Tensors) -> tuple[Tensors, Tensors]:
        """(units,) which are on, and how far their factors are from 1, by path."""
        counts, budget = units.counts(base), Budget.parse(self.keep)
        if budget.of == "units":
            budget = replace(budget, of="macs", tokens=self.length)
        prices = budget.prices(base, counts)
        room, more = budget.room(prices), budget.room(prices, milder=True)
        found = probe.sensitivities(base, counts, at=start, rows=self.rows)
        information = units.importance(found, "squares")
        kept = macs.search(base, information, prices.costs, room)
        if self.stage != "masked":
            kept = {p: macs.rearranged(on, units.of_batches(found[p])) for p, on in kept.items()}
        kept = {path: on.to(base.device) for path, on in kept.items()}
        if self.stage != "rescaled":
            return kept, {
                path: torch.zeros(len(on), device=base.device) for path, on in kept.items()
            }
        milder = macs.search(base, information, prices.costs, more)
        milder = {path: on.to(base.device) for path, on in milder.items()}
        factors = rescaling.factors(base, probe, start, kept, milder, self.rows)
        return kept, {path: own - 1 for path, own in factors.items()}

    def pack(self, base: Base, change: Change) -> Tensors:
        kept, apart = change.parts["kept"], change.parts["apart"]
        found = whole.pack(change.parts["beside"])
        for path, value in found.items():
            if (on := units.entries(base, path, kept)) is not None:
                # What belongs to a unit that is off has no say, and so it is the base's.
                mine = gates.spread(on, tuple(value.shape))
                value.copy_(torch.where(mine, value, base.original(path)))
        moved = {_FACTORS + p: own[kept[p]].cpu() for p, own in apart.items() if own.any()}
        return found | units.named(kept) | moved

    def stored(self, change: Change, store: str) -> Tensors:
        return whole.stored(change.parts["beside"], store)

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        kept, values = units.parted(base, tensors, 1)
        named = [name for name in values if name.startswith(_FACTORS)]
        apart = {name.removeprefix(_FACTORS): values.pop(name) for name in named}
        for path in sorted(kept.keys() | apart.keys()):
            factors = 1 + _spread(base, path, kept.get(path), apart.get(path))
            on: Tensor = kept[path]
            value: Tensor = values.get(path, base.original(path).to(on.device))
            values[path] = rescaling.scaled(base, value, on, factors)
        return whole.unpack(base, values)


def _gate(base: Base, path: str, kept: Tensors, apart: Tensors) -> nn.Module | None:
    """What a matrix is read through: its units' factors, or the base's own where they are off."""
    if path in kept:
        wide = (units.along_inputs(base, own) for own in (kept[path], 1 + apart[path]))
        return rescaling.Scaled(*wide)
    on = units.entries(base, path, kept)
    return None if on is None else units.OfUnits(on, base.original(path))


def _spread(base: Base, path: str, on: Tensor | None, apart: Tensor | None) -> Tensor:
    """(units,) from what a file has of those that are on. Raises DamagedDelta for a misfit."""
    if on is not None and on.ndim == 1:
        found = torch.zeros(len(on), device=on.device)
        if apart is None:
            return found
        if apart.is_floating_point() and apart.shape == found[on].shape:
            found[on] = apart.to(found)
            return found
    raise DamagedDelta(
        f"delta has factors of units of {path!r} that do not fit which of them are on, or the base "
        f"{base.name}; the file is damaged, or made for another model"
    )


EXAMPLE = PostTraining()
