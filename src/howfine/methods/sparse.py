"""Train k chosen entries of the base and nothing else: θ + w at the places, θ elsewhere.

The places are drawn at random (Sung et al. 2021's control), or are those that moved most in an
earlier training (movement; diff pruning's non-adaptive baseline, Guo et al. 2021), or those of
largest gradient, Fisher information E[(∂L/∂θ)²] (FISH mask, Sung et al. 2021, eq. 4, with the
gradients of batches for those of examples) or saliency |θ·∂L/∂θ|, or those of an earlier delta,
such as the support that a learned gate found (diff pruning, stage 3). With `regrow`, some of an
earlier delta's places are given up for others, as in RigL (Evci et al. 2020), once a phase.

Optimiser state and gradients exist for k numbers: see `howfine.sampled`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from howfine import entries, whole
from howfine.base import Base
from howfine.change import Change
from howfine.codec import rounded
from howfine.errors import SettingError
from howfine.method import Method, Probe, Tensors
from howfine.overlay import Overlay, put_on


@dataclass(frozen=True)
class Sparse(Method):
    """Which entries train, how many, and how they are chosen."""

    start: ClassVar[Any] = "optional"
    holds: ClassVar[Any] = "entries"
    neutral: ClassVar[bool] = True
    keeps_out: ClassVar[bool] = True

    # Which tensors the entries are taken from, as selectors (see `howfine.anatomy`).
    where: tuple[str, ...] = ("matrices",)
    # Share of those tensors' entries that train; by=start and regrow take as many as the start has.
    density: float = 0.001
    # How they are chosen: random, gradient, fisher, saliency; movement or start need a start.
    by: Literal["random", "gradient", "fisher", "saliency", "movement", "start"] = "gradient"
    # The share of every tensor by itself, or of all of them together.
    scope: Literal["global", "tensor"] = "global"
    # Share of the start's places that is given up (the least moved) for others chosen by `by`.
    regrow: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise SettingError(
                f"sparse density: found {self.density}, expected a share above 0 and below 1; to "
                "train everything or nothing use the methods for that"
            )
        if not 0 <= self.regrow < 1:
            raise SettingError(f"sparse regrow: found {self.regrow}, expected 0 to below 1")
        if self.regrow and self.by in ("movement", "start"):
            raise SettingError(
                f"sparse regrow {self.regrow} by={self.by!r}: free places have not moved, so none "
                "is better than another; choose them by gradient, fisher, saliency or random"
            )

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        begun = dict(probe.start) if probe is not None else {}
        paths = base.choose(self.where)
        chosen = self._chosen(base, paths, probe)
        if probe is not None and probe.outside:
            chosen = _without(chosen, probe.outside)
        chosen = {path: index for path, index in chosen.items() if len(index)}
        values = nn.Parameter(torch.cat([_moved(base, begun, *item) for item in chosen.items()]))
        overlays, at = {}, 0
        for path, index in chosen.items():
            weight = base.parameter(path)
            overlays[path] = Overlay(
                weight, index.to(weight.device), values, slice(at, at + len(index))
            )
            at += len(index)
        return Change({"values": values}, put_on(base, overlays), parts=overlays)

    def _chosen(self, base: Base, paths: list[str], probe: Probe | None) -> dict[str, Tensor]:
        """Row-major indices of the entries that train, by path."""
        begun = {} if probe is None else {p: w for p, w in probe.start.items() if p in set(paths)}
        if not begun and (self.by in ("movement", "start") or self.regrow):
            raise SettingError(
                f"sparse by={self.by!r}, regrow={self.regrow} takes its places from an earlier "
                "training: name it as the recipe's start (another phase, a delta file or a "
                "checkpoint that differs from the base there)"
            )
        if self.by == "start" or self.regrow:
            assert probe is not None
            whole.check_kept(base, probe.start, paths, "where")
            moved = {p: (w - base.original(p)).abs() for p, w in begun.items()}
            held = {path: size.flatten().nonzero().flatten() for path, size in moved.items()}
            if not any(map(len, held.values())):
                raise SettingError(
                    f"sparse by={self.by!r}, regrow={self.regrow}: the start has the base's own "
                    f"values in all {len(paths)} tensors of where={','.join(self.where)}, so it "
                    "names no places; choose other tensors or another start"
                )
            if self.regrow:
                return self._regrown(base, paths, probe, moved, held)
            return held
        scores = self._scores(base, paths, probe)
        together = [list(scores)] if self.scope == "global" else [[path] for path in scores]
        parts = [{path: scores[path] for path in own} for own in together]
        if self.by == "movement":
            self._check_moved(parts)
        found: dict[str, Tensor] = {}
        for part in parts:
            found |= entries.strongest(part, self._count(part))
        return found

    def _count(self, scores: Mapping[str, Tensor]) -> int:
        return max(1, round(self.density * sum(map(torch.Tensor.numel, scores.values()))))

    def _check_moved(self, parts: list[dict[str, Tensor]]) -> None:
        """Refuse to choose among places that have not moved: the first ones would be taken.

        Those to keep out of have scores below 0.
        """
        moved = [sum(int((each > 0).count_nonzero()) for each in part.values()) for part in parts]
        totals = [sum(map(torch.Tensor.numel, part.values())) for part in parts]
        for part, found, total in zip(parts, moved, totals, strict=True):
            if found >= self._count(part):
                continue
            least = min(map(operator.truediv, moved, totals))
            instead = f"the nearest density is {_down(least):g}" if least else "no density fits"
            less = any(bool((each < 0).any()) for each in part.values())
            raise SettingError(
                f"sparse density {self.density} by='movement': {self._count(part):,} entries are "
                f"asked, and the start moved {found:,} of the {total:,} of "
                f"{', '.join(list(part)[:2])}{' …' if len(part) > 2 else ''}"
                f"{', less those that outside keeps out' if less else ''}; {instead}, or choose "
                f"{'scope=global, ' if len(parts) > 1 else ''}other tensors, or by gradient"
            )

    def _regrown(
        self,
        base: Base,
        paths: list[str],
        probe: Probe | None,
        moved: dict[str, Tensor],
        held: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """The start's places without the least moved, and as many others by score."""
        count = sum(map(len, held.values()))
        given_up = round(self.regrow * count)
        if not given_up:
            return held
        free = _free(base, paths, held, {} if probe is None else probe.outside)
        if free < given_up or given_up == count:
            raise SettingError(
                f"sparse regrow {self.regrow}: {given_up:,} of {count:,} places would be given up, "
                f"and {free:,} others are free; start from a sparser change, or lower regrow"
            )
        kept = entries.strongest(moved, count - given_up)
        scores = self._scores(base, paths, probe)
        for path, index in held.items():
            scores[path] = scores[path].flatten().clone()
            scores[path][index] = -1.0  # what was held does not come back at once
        grown = entries.strongest(scores, given_up)
        none = torch.zeros(0, dtype=torch.long)
        both = {p: torch.cat([kept.get(p, none).cpu(), grown[p]]) for p in scores}
        return {path: index.sort().values for path, index in both.items()}

    def _scores(self, base: Base, paths: list[str], probe: Probe | None) -> dict[str, Tensor]:
        """How much each entry is wanted; higher is more, and those to keep out of the least."""
        scores = self._wanted(base, paths, probe)
        outside = {} if probe is None else probe.outside
        for path in outside.keys() & scores.keys():
            mask = outside[path].to(scores[path].device)
            scores[path] = scores[path].masked_fill(mask, -1.0)
        return scores

    def _wanted(self, base: Base, paths: list[str], probe: Probe | None) -> dict[str, Tensor]:
        if self.by == "random":
            return {path: torch.rand(base.parameter(path).shape) for path in paths}
        if probe is None:
            raise SettingError(
                f"sparse by={self.by!r} measures gradients, which needs a task: call it through "
                "tune, pass a probe to attach, or choose by='random'"
            )
        if self.by in ("movement", "start"):
            zero = torch.zeros(())
            return {
                p: (probe.start[p] - base.original(p)).abs()
                if p in probe.start
                else zero.expand(base.parameter(p).shape)
                for p in paths
            }
        found = probe.gradients(base, paths, _GRADIENT[self.by], probe.start)
        if self.by == "saliency":
            weights = {p: probe.start.get(p, base.original(p)) for p in found}
            found = {p: g.abs() * weights[p].abs() for p, g in found.items()}
        return found if self.by != "gradient" else {p: g.abs() for p, g in found.items()}

    def pack(self, base: Base, change: Change) -> Tensors:
        return {
            path: entries.changed(
                base.original(path), overlay.index, overlay.now().detach().to(base.dtype)
            )
            for path, overlay in change.parts.items()
        }

    def stored(self, change: Change, store: str) -> Tensors:
        values = change.trainable["values"].detach()
        moved = torch.cat([part.now() != part.original for part in change.parts.values()])
        made = values.clone()  # what did not move is not stored, and has no say in the scale
        made[moved] = rounded(values[moved], store).to(values.device)
        return {"values": made}

    def groups(self, change: Change) -> list[dict[str, Any]]:
        # Decay would pull the weights towards the base's, unevenly: Adam has scaled their steps.
        return [{"params": list(change.trainable.values()), "weight_decay": 0.0}]

    def learning_rate(self, steps: int) -> float:
        return 3e-3

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        return entries.unpack(base, tensors)


_GRADIENT: dict[str, Any] = {"gradient": "mean", "fisher": "square", "saliency": "mean"}


def _down(share: float) -> float:
    """A share above 0 in six digits, rounded down."""
    digits = 10.0 ** (5 - math.floor(math.log10(share)))
    return math.floor(share * digits) / digits


def _moved(base: Base, begun: Tensors, path: str, index: Tensor) -> Tensor:
    """Where training starts, (k,): how far the start's entries are from the base's."""
    index = index.to(base.parameter(path).device)
    if path not in begun:
        return torch.zeros(len(index), device=index.device)
    return (begun[path].float() - base.original(path).float()).flatten()[index]


def _free(
    base: Base, paths: list[str], held: Mapping[str, Tensor], outside: Mapping[str, Tensor]
) -> int:
    """How many entries of these tensors are neither held nor to keep out of."""
    found = 0
    for path in paths:
        taken = torch.zeros(base.parameter(path).numel(), dtype=torch.bool)
        if path in outside:
            taken |= outside[path].flatten().cpu()
        if path in held:
            taken[held[path].cpu()] = True
        found += int((~taken).sum())
    return found


def _without(chosen: dict[str, Tensor], outside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The places that are not to be kept out of. Raises SettingError where none is left."""
    left = {
        path: index[~outside[path].flatten()[index.cpu()].to(index.device)]
        if path in outside
        else index
        for path, index in chosen.items()
    }
    if not any(map(len, left.values())):
        raise SettingError(
            "sparse: every place to train lies in the region that 'outside' keeps out; choose "
            "other tensors or another start"
        )
    return left


EXAMPLE = Sparse(density=0.05)
