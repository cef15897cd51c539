"""Whole heads and neurons off: Σ_i ξ_i·Att_i(x)·W_O and W_2(ξ ⊙ act(W_1 x)), ξ in {0, 1}.

Michel, Levy & Neubig 2019, "Are sixteen heads really better than one?", for heads and neurons
alike; Li et al. 2022 (arXiv 2204.02601) compare such prunings of multilingual models. A unit's
importance is E_x |∂L/∂ξ| at ξ = 1, of each example by itself with dropout off: how much the loss
changes, to first order, where the unit goes. Biases of W_O and W_2 are no unit's.

With nothing `beside`, no weight changes, and the file says which units are on. What trains
`beside` goes on from an earlier phase's weights (a recipe's `start`), with the units off from the
first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from howfine import gates, surgery, whole
from howfine.anatomy import FEEDS
from howfine.base import Base
from howfine.change import Change, all_or_nothing
from howfine.errors import DamagedDelta, SettingError
from howfine.method import Method, Probe, Tensors, as_parameter

_KEPT = "units:"
_KIND = {"D": "heads", "CD": "heads", "O": "neurons"}


class _OfUnits(nn.Module):
    """A weight that trains: what belongs to units that are off is read as it is here."""

    def __init__(self, on: Tensor, instead: Tensor) -> None:
        super().__init__()
        self.register_buffer("on", on, persistent=False)
        self.register_buffer("instead", instead, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.on, weight, self.instead)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Prune(Method):
    """How many units stay on, which ones, and what trains without the others."""

    starts_at_base: ClassVar[bool] = False
    start: ClassVar[Any] = "optional"

    # Share of the heads, and of the neurons, that stay on; of each layer at least one.
    keep: float = 0.5
    # Which units may go off.
    units: Literal["both", "heads", "neurons"] = "both"
    # How important a unit is: by the loss's gradient, its weights' mean magnitude, or at random.
    by: Literal["gradient", "magnitude", "random"] = "gradient"
    # The most important ones of the whole model, or of every layer the same share.
    scope: Literal["global", "layer"] = "global"
    # Of the importances of a layer: over their Euclidean norm, or as they are.
    normalised: bool = True
    # Parameters of the base that train, too, as selectors: those of the start among them.
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise SettingError(
                f"prune keep {self.keep}: expected a share of the units, above 0 and at most 1"
            )

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        start: Tensors = dict(probe.start) if probe is not None else {}
        training = base.choose(self.beside) if self.beside else []
        if left := sorted(start.keys() - set(training)):
            raise SettingError(
                f"prune goes on from a change of {left[0]} and {len(left) - 1} others that would "
                "be left out of the file; name them in beside, such as beside=all, or leave the "
                "start out"
            )
        kept = self._kept(base, probe, start)
        with all_or_nothing() as undo:
            beside = whole.attach(base, training)
            undo.append(beside.remove)
            with torch.no_grad():
                for path, value in start.items():
                    beside.trainable[path].copy_(value)
            for path in sorted(kept.keys() | beside.trainable.keys()):
                weight, on = base.parameter(path), _units_of(base, path, kept)
                if path not in beside.trainable:
                    assert on is not None
                    value = as_parameter(gates.drop(weight.detach(), on), weight)
                    undo.append(surgery.replace(base.towers, path, value))
                elif on is not None:
                    gate = _OfUnits(on, torch.zeros(()) if path in kept else weight.detach())
                    undo.append(surgery.reweight(base.towers, path, gate.to(base.device)))
            return Change(dict(beside.trainable), undo, {"kept": kept, "beside": beside})

    def _kept(self, base: Base, probe: Probe | None, start: Tensors) -> Tensors:
        """(units,) which are on, by the path of the matrix that they lead into."""
        counts = _counts(base, self.units)
        scores = self._importance(base, counts, probe, start)
        kept: Tensors = {}
        for kind in sorted({_kind(base, path) for path in counts}):
            own = {path: scores[path] for path in counts if _kind(base, path) == kind}
            kept |= self._strongest(own, kind)
        return {path: kept[path].to(base.device) for path in counts}

    def _importance(
        self, base: Base, counts: Mapping[str, int], probe: Probe | None, start: Tensors
    ) -> Tensors:
        if self.by == "random":
            return {path: torch.rand(count) for path, count in counts.items()}
        if self.by == "magnitude":
            return {
                path: _of_inputs(base, start.get(path, base.original(path)).float().abs(), count)
                for path, count in counts.items()
            }
        if probe is None:
            raise SettingError(
                "prune by='gradient' measures gradients, which needs a task: call it through "
                "tune, pass a probe to attach, or choose by='magnitude' or 'random'"
            )
        return probe.sensitivities(base, counts, at=start)

    def _strongest(self, scores: Tensors, kind: str) -> Tensors:
        """The most important units of one kind; of each layer the most important one."""
        if self.normalised and self.scope == "global":
            scores = {path: score / (score.norm() + 1e-20) for path, score in scores.items()}
        if self.scope == "layer":
            return {
                path: gates.settle_top_k(score, max(1, round(self.keep * len(score))))
                for path, score in scores.items()
            }
        total = sum(map(len, scores.values()))
        count = round(self.keep * total)
        if count < len(scores):
            raise SettingError(
                f"prune keep {self.keep}: {count} of {total} {kind} would stay on, and "
                f"{len(scores)} layers keep one each; the nearest keep is {len(scores) / total:.3g}"
            )
        firm = [score.clone() for score in scores.values()]
        for score in firm:
            score[score.argmax()] = torch.inf
        on = gates.settle_top_k(torch.cat(firm), count).split([len(score) for score in firm])
        return dict(zip(scores, on, strict=True))

    def pack(self, base: Base, change: Change) -> Tensors:
        kept: Tensors = change.parts["kept"]
        found = whole.pack(change.parts["beside"])
        for path, value in found.items():
            if (on := _units_of(base, path, kept)) is not None:
                # What belongs to a unit that is off has no say, and so it is the base's.
                value.copy_(torch.where(on, value, base.original(path)))
        return found | {_KEPT + path: on.cpu() for path, on in kept.items()}

    def stored(self, change: Change, store: str) -> Tensors:
        return whole.stored(change.parts["beside"], store)

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        kept = {
            name.removeprefix(_KEPT): value
            for name, value in tensors.items()
            if name.startswith(_KEPT)
        }
        expected = _counts(base, "both")
        for path, on in kept.items():
            if expected.get(path) != on.numel() or on.ndim != 1 or on.dtype != torch.bool:
                raise DamagedDelta(
                    f"delta switches units of {path!r} with shape {tuple(on.shape)} ({on.dtype}), "
                    f"which does not fit the base {base.name}; the file is damaged, or made for "
                    "another model"
                )
        values = {name: value for name, value in tensors.items() if not name.startswith(_KEPT)}
        for path, on in kept.items():
            value = values.get(path, base.original(path).to(on.device))
            values[path] = gates.drop(value, _along_inputs(base, on))
        return whole.unpack(base, values)


def _counts(base: Base, units: str) -> dict[str, int]:
    """How many units lead into a matrix, by its path, of the layers from the bottom up."""
    kinds = {path: _kind(base, path) for path in base.choose(("matrices",))}
    wanted = ("heads", "neurons") if units == "both" else (units,)
    return {path: base.units_into(path) for path, kind in kinds.items() if kind in wanted}


def _kind(base: Base, path: str) -> str:
    return _KIND.get(base.place(path)[1], "")


def _axis(base: Base, which: str) -> int:
    return base.anatomy.linear_axes.index(which)


def _along_inputs(base: Base, on: Tensor) -> Tensor:
    """(units, 1) or (1, units), which spreads over a matrix whose inputs are units."""
    return on.unsqueeze(1 - _axis(base, "in"))


def _of_inputs(base: Base, values: Tensor, count: int) -> Tensor:
    """(count,) means of a matrix's values over the inputs of each unit."""
    return values.movedim(_axis(base, "in"), 0).reshape(count, -1).mean(1)


def _units_of(base: Base, path: str, kept: Mapping[str, Tensor]) -> Tensor | None:
    """Which entries of a matrix belong to units that are on, None where none of it is a unit's.

    Not so where several heads share their keys and values, or projections are fused.
    """
    layer, part = base.place(path)
    weight = base.parameter(path)
    for other, on in kept.items():
        own, into = base.place(other)
        inputs = base.parameter(other).shape[_axis(base, "in")]
        if path == other:
            return gates.spread(_along_inputs(base, on), tuple(weight.shape))
        if own == layer and part in FEEDS[into] and weight.shape[_axis(base, "out")] == inputs:
            along = on.unsqueeze(1 - _axis(base, "out"))
            return gates.spread(along, tuple(weight.shape))
    return None


EXAMPLE = Prune(by="magnitude", beside=("all@-1",))
