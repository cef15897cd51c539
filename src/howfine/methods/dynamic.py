"""Dynamic sparsification: one training, from which a model of any size is cut.

Li et al. 2022 (arXiv 2204.02601) train once and choose the size afterwards. How they do it could
not be read; this follows what is published of its relatives. Units are ranked once, as `prune`
does, and a size keeps those of the highest ranks, so that smaller models lie within larger ones
(DynaBERT: Hou et al. 2020). Each step takes the whole model, the smallest, and some of a size drawn
in between (the sandwich rule: Yu & Huang 2019); all but the whole one learn from its outputs, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from howfine import surgery, units, whole
from howfine.base import Base
from howfine.change import Change, all_or_nothing
from howfine.errors import DamagedDelta, SettingError
from howfine.method import Method, Probe, Tensors


@dataclass(frozen=True)
class Dynamic(Method):
    """Which sizes a training is for, and which of them is put on."""

    start: ClassVar[Any] = "optional"
    resizable: ClassVar[bool] = True

    # Share of the heads, and of the neurons, that are on where a file of it is put on.
    keep: float = 1.0
    # The least share that is trained; of each layer one unit stays on.
    smallest: float = 0.1
    # How important a unit is: by the loss's gradient, its weights' mean magnitude, or at random.
    by: Literal["gradient", "magnitude", "random"] = "gradient"
    # Models of a size drawn at random in each step, beside the whole and the smallest.
    drawn: int = 1
    # Share of a smaller model's loss that is how far its outputs are from the whole one's.
    distil: float = 0.5
    # Parameters of the base that train, as selectors: those of the start among them.
    beside: tuple[str, ...] = ("all",)

    def __post_init__(self) -> None:
        shares = 0 < self.smallest <= 1 and 0 < self.keep <= 1 and 0 <= self.distil <= 1
        if not shares or self.drawn < 0:
            raise SettingError(
                f"dynamic: found keep {self.keep}, smallest {self.smallest}, distil {self.distil} "
                f"and drawn {self.drawn}, expected shares above 0, up to 1 (distil: from 0), and 0 "
                "or more"
            )
        if self.keep < self.smallest:
            raise SettingError(
                f"dynamic keep {self.keep}: no size below {self.smallest} (smallest) is trained; "
                f"the nearest keep is {self.smallest}"
            )

    @property
    def moves(self) -> Literal["", "steps", "passes"]:
        return "passes"

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        start: Tensors = dict(probe.start) if probe is not None else {}
        training = whole.going_on(base, self.beside, start)
        placed = self._ranks(base, probe, start)
        with all_or_nothing() as undo:
            beside = whole.attach(base, training, start)
            undo.append(beside.remove)
            gated: dict[str, units.OfUnits] = {}
            for path, own in placed.items():
                on = units.along_inputs(base, torch.ones_like(own, dtype=torch.bool))
                zero = base.original(path).new_zeros(())
                gated[path] = units.OfUnits(on, zero).to(base.device)
                undo.append(surgery.reweight(base.towers, path, gated[path]))
            parts = {"ranks": placed, "beside": beside, "gated": gated, "base": base}
            change = Change(dict(beside.trainable), undo, parts)
            self._put(change, self.keep)
            return change

    def _ranks(self, base: Base, probe: Probe | None, start: Tensors) -> Tensors:
        counts = units.counts(base)
        if self.by == "random":
            scores = {path: torch.rand(count) for path, count in counts.items()}
        elif self.by == "magnitude":
            scores = units.magnitudes(base, counts, start)
        elif probe is None:
            raise SettingError(
                "dynamic by='gradient' measures gradients, which needs a task: call it through "
                "tune, pass a probe to attach, or choose by='magnitude' or 'random'"
            )
        else:
            scores = units.importance(probe.sensitivities(base, counts, at=start), "rows")
        found: Tensors = {}
        for name, own in units.by_kind(base, scores).items():
            units.check_share(own, self.smallest, name, "smallest")
            found |= units.ranks(own)
        return {path: found[path] for path in counts}

    def _put(self, change: Change, keep: float) -> None:
        """Let so many units be on. As new tensors: autograd may still need those before."""
        base = change.parts["base"]
        for path, on in _on(base, change.parts["ranks"], keep).items():
            gate = change.parts["gated"][path]
            gate.on = units.along_inputs(base, on).to(gate.on.device)

    def passes(self, change: Change, progress: float) -> Iterator[float]:
        drawn = torch.empty(self.drawn).uniform_(self.smallest, 1).tolist()
        for keep in (1.0, self.smallest, *drawn):
            self._put(change, keep)
            yield 0.0 if keep == 1.0 else self.distil
        self._put(change, self.keep)

    def pack(self, base: Base, change: Change) -> Tensors:
        ranks = {path: _bits(own) for path, own in change.parts["ranks"].items()}
        return whole.pack(change.parts["beside"]) | {
            units.KEPT + p: own for p, own in ranks.items()
        }

    def stored(self, change: Change, store: str) -> Tensors:
        return whole.stored(change.parts["beside"], store)

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        bits, values = units.parted(base, tensors, 2)
        placed = _placed(base, bits)
        for name, own in units.by_kind(base, placed).items():
            units.check_share(own, self.keep, name)
        for path, on in _on(base, placed, self.keep).items():
            value: Tensor = values.get(path, base.original(path).to(on.device))
            if not on.all():
                values[path] = units.without(base, path, value, on)
        return whole.unpack(base, values)


def _placed(base: Base, bits: Mapping[str, Tensor]) -> Tensors:
    """(units,) ranks by path, from their digits. Raises DamagedDelta for what are none."""
    for path, count in units.counts(base).items():
        if path not in bits or len(bits[path]) != _DIGITS:
            digits = f"{len(bits[path])} digits" if path in bits else "nothing"
            raise DamagedDelta(
                f"delta has no ranks of the {count} units at {path!r} of the base {base.name}: "
                f"found {digits}, expected {_DIGITS} digits of each; the file is damaged, or made "
                "for another model"
            )
    placed = {path: _number(own) for path, own in bits.items()}
    for name, own in units.by_kind(base, placed).items():
        ranks = torch.cat(list(own.values())).sort().values
        if not torch.equal(ranks, torch.arange(len(ranks), device=ranks.device)):
            raise DamagedDelta(
                f"delta has ranks of {name} that repeat or leave gaps, expected each of 0 to "
                f"{len(ranks) - 1} once; the file is damaged"
            )
    return placed


def _on(base: Base, placed: Mapping[str, Tensor], keep: float) -> Tensors:
    """(units,) which are on at a size, by path."""
    found: Tensors = {}
    for own in units.by_kind(base, placed).values():
        found |= units.by_rank(own, keep)
    return found


def _bits(ranks: Tensor) -> Tensor:
    """(32, units) digits of ranks, the lowest first: exact whatever precision a file has."""
    return ((ranks.cpu() >> torch.arange(_DIGITS)[:, None]) & 1).bool()


def _number(bits: Tensor) -> Tensor:
    return (bits.long() << torch.arange(len(bits), device=bits.device)[:, None]).sum(0)


# Of a rank, which is an int32; digits that are 0 everywhere take no room in a file.
_DIGITS = 32

EXAMPLE = Dynamic(smallest=0.3, by="magnitude", beside=("all@-1",))
