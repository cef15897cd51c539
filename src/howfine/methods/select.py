"""Train chosen parameters, freeze the rest at the base's values (L0-close fine-tuning).

Radiya-Dixit & Wang 2020, "How fine can fine-tuning be?", excluding the least sensitive groups;
with `train="bias"` BitFit (Ben Zaken et al. 2022), with `train="norm"` LayerNorm tuning, with
`train="none"` the readout alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from howfine import whole
from howfine.base import Base
from howfine.change import Change
from howfine.errors import SettingError
from howfine.method import Method, Probe, Tensors


@dataclass(frozen=True)
class Select(Method):
    """Which parameters train, by selector: see `howfine.anatomy` for the grammar."""

    start: ClassVar[Any] = "optional"
    keeps_out: ClassVar[bool] = True

    # What trains, as selectors: "all", "none", "bias", "norm", "K", "matrices@0-3", "all@-2,-1".
    train: tuple[str, ...] = ("all",)
    # What stays frozen of it, as selectors.
    freeze: tuple[str, ...] = ()
    # Train only the k most sensitive groups (matrices, with their biases) of these; 0 for all.
    top: int = 0
    # Sensitivity of a group: summed |gradient| per entry at the base, or |gradient·weight|.
    by: str = "gradient"
    # Weight of Σ|θ - θ_base| over what trains in the loss: few entries then move far (Panigrahi et
    # al. 2023, who find grafts of such models smaller).
    l1: float = 0.0

    def __post_init__(self) -> None:
        if self.by not in ("gradient", "saliency"):
            raise SettingError(f"select by {self.by!r}: expected 'gradient' or 'saliency'")
        if self.top < 0:
            raise SettingError(f"select top {self.top}: expected 0 (all) or more groups")
        if not 0 <= self.l1 < math.inf:
            raise SettingError(f"select l1 {self.l1}: expected a number from 0, such as 1e-4")

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        frozen = set(base.choose(self.freeze))
        paths = [path for path in base.choose(self.train) if path not in frozen]
        if self.top:
            if probe is None:
                raise SettingError(
                    f"select top={self.top} measures gradients, which needs a task: call it "
                    "through tune, or pass a probe to attach"
                )
            paths = self._most_sensitive(base, paths, probe)
        if probe is None:
            return whole.attach(base, paths)
        whole.check_kept(base, probe.start, paths, "train")
        _check_free(paths, probe.outside)
        return whole.attach(base, paths, probe.start, outside=probe.outside)

    def penalty(self, change: Change, progress: float) -> Tensor:
        if not self.l1 or not change.trainable:
            return super().penalty(change, progress)
        originals = change.parts["originals"]
        pairs = [(value, originals[path]) for path, value in change.trainable.items()]
        return self.l1 * torch.stack([(value - base).abs().sum() for value, base in pairs]).sum()

    def _most_sensitive(self, base: Base, paths: list[str], probe: Probe) -> list[str]:
        """Paths of the `top` groups whose entries move the loss most, a group being a module."""
        gradients = probe.gradients(base, paths, at=probe.start)
        if self.by == "saliency":
            weights = {p: probe.start.get(p, base.original(p)) for p in paths}
            gradients = {p: g * weights[p].abs() for p, g in gradients.items()}
        groups: dict[str, list[str]] = {}
        for path in paths:
            groups.setdefault(path.rpartition(".")[0], []).append(path)

        def sensitivity(group: str) -> float:
            total = sum(float(gradients[p].double().sum()) for p in groups[group])
            return total / sum(gradients[p].numel() for p in groups[group])

        ranked = sorted(groups, key=sensitivity, reverse=True)
        chosen = {path for group in ranked[: self.top] for path in groups[group]}
        return [path for path in paths if path in chosen]

    def pack(self, base: Base, change: Change) -> Tensors:
        return whole.pack(change)

    def stored(self, change: Change, store: str) -> Tensors:
        return whole.stored(change, store)

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        return whole.unpack(base, tensors)


def _check_free(paths: list[str], outside: Mapping[str, Tensor]) -> None:
    """Refuse to train nothing but entries that are to be kept out of."""
    if paths and all(path in outside and bool(outside[path].all()) for path in paths):
        raise SettingError(
            f"select: all of {paths[0]} and {len(paths) - 1} others lies in the region that "
            "'outside' keeps out; train other tensors, such as train=all, or name fewer files"
        )


EXAMPLE = Select(train=("all@-1",))
