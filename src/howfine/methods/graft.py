"""Between the base and a fine-tuned model, entry by entry: θ(γ) = θ + γ ⊙ (θ_ft - θ), γ in {0, 1}.

Panigrahi, Saunshi, Zhao & Arora 2023, "Task-specific skill localization in fine-tuned language
models" (arXiv 2302.06600). No weight trains: inside the region γ values are θ_ft's, outside the
base's. In training the gate is soft, f = γ₀ + (1 - 2γ₀)·σ(S - b) with S from U(0, 1) and b = 10, so
that it starts next to the base mask γ₀, and S climbs by plain gradient steps,

    S -= rate · (1 - 2γ₀) · ∂L/∂θ ⊙ (θ_ft - θ) · σ(S - b)·(1 - σ(S - b)).

For use γ is f rounded: an entry has left γ₀ if S > b. What moves S grows with S, so this is nearly
a threshold on -∂L/∂θ ⊙ (θ_ft - θ), which rate and steps set. The published rate is 1e7 for all
models; with a `density` the rate is instead the one at which that many entries would cross b if
gradients stayed those at γ₀, and γ is the entries of the highest S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from howfine import crossing, entries, surgery
from howfine.base import Base
from howfine.change import Change, all_or_nothing
from howfine.crossing import HIGHEST_START
from howfine.errors import SettingError
from howfine.method import Method, Probe, Tensors

PUBLISHED_RATE = 1e7


class _Gate(nn.Module):
    """One weight between base and fine-tuned model: soft in training, one or the other in use."""

    def __init__(
        self, path: str, scores: Tensor, tuned: Tensor, held: Tensor | None, region: _Region
    ) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.path, self.tuned, self.held, self.region = path, tuned, held, region

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            self.region.forget()  # fused optimisers write scores without counting versions up
            return crossing.Soft.apply(self.scores, weight, self.tuned, self.held, self.region.bias)
        return torch.where(self.region.masks()[self.path], self.tuned, weight)


class _Region:
    """γ over all gates: by rounding, or with a size by the highest S."""

    def __init__(self, bias: float, size: int) -> None:
        self.bias, self.size = bias, size  # size 0: by rounding
        self.gates: dict[str, _Gate] = {}
        self._made: tuple[list[int], dict[str, Tensor]] | None = None

    def forget(self) -> None:
        """Training goes on: what was settled is out of date."""
        self._made = None

    def masks(self) -> dict[str, Tensor]:
        """γ by path, made again whenever a score was written."""
        versions = [gate.scores._version for gate in self.gates.values()]
        if self._made is None or self._made[0] != versions:
            self._made = (versions, self.settled())
        return self._made[1]

    def settled(self) -> dict[str, Tensor]:
        """γ by path as the scores have it now: boolean masks of the weights' shapes."""
        scores = {path: gate.scores.detach() for path, gate in self.gates.items()}
        held = {path: gate.held for path, gate in self.gates.items()}
        return settle(scores, held, self.bias, self.size)


def settle(
    scores: dict[str, Tensor], held: dict[str, Tensor | None], bias: float, size: int
) -> dict[str, Tensor]:
    """γ by path: f rounded, or with a `size` the entries of γ₀ that stay and the highest others.

    An entry of γ₀ (`held`; None for none) stays unless S > b. To these are added, up to `size`
    in all, the others of the highest S among those that rose above where scores begin. So an
    untrained S gives γ₀, and a region is smaller than `size` only where too few entries ever rose.
    """
    if not size:
        return {
            path: value > bias if (base := held[path]) is None else base ^ (value > bias)
            for path, value in scores.items()
        }
    stay, rising = {}, {}
    for path, value in scores.items():
        base = held[path]
        stay[path] = torch.zeros_like(value, dtype=torch.bool) if base is None else base.clone()
        rising[path] = ((value > HIGHEST_START) & ~stay[path]).flatten().nonzero().flatten()
        stay[path] &= value <= bias
    wanted = size - sum(int(mask.count_nonzero()) for mask in stay.values())
    found = {path: scores[path].flatten()[index] for path, index in rising.items() if len(index)}
    count = min(wanted, sum(map(len, found.values())))
    if count > 0:
        for path, chosen in entries.strongest(found, count).items():
            index = rising[path][chosen.to(rising[path].device)]
            stay[path].view(-1)[index] = True
    return stay


@dataclass(frozen=True)
class Graft(Method):
    """What of a fine-tuned model is grafted onto the base, and how the region is found."""

    start: ClassVar[Any] = "needed"
    holds: ClassVar[Any] = "entries"
    keeps_out: ClassVar[bool] = True

    # Which tensors the region lies in, as selectors (see `howfine.anatomy`).
    where: tuple[str, ...] = ("all@0--1",)
    # Share of those tensors' entries to graft; 0 for whatever crosses at the published rate, 1e7.
    density: float = 0.01
    # Entries grafted from the beginning (γ₀): none (zero), or those that moved most (movement).
    base_mask: Literal["zero", "movement"] = "zero"
    # Share of the entries in a base mask of movement; exactly that many.
    base_density: float = 1e-5
    # How far scores have to climb (b).
    bias: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.density < 1:
            raise SettingError(
                f"graft density: found {self.density}, expected a share below 1 (all of the "
                "fine-tuned model is no graft), or 0 for whatever crosses at the published rate"
            )
        if self.base_mask == "movement" and not 0 < self.base_density < (self.density or 1):
            raise SettingError(
                f"graft base_density: found {self.base_density}, expected a share above 0 and "
                f"below {self.density or 1} (density); for an empty base mask set base_mask=zero"
            )
        if not HIGHEST_START < self.bias < 100:
            raise SettingError(
                f"graft bias: found {self.bias}, expected more than 1, where scores begin at most, "
                "and less than 100, from where nothing moves"
            )

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        tuned = self._tuned(base, probe)
        assert probe is not None
        total = sum(base.parameter(path).numel() for path in base.choose(self.where))
        size = max(1, round(self.density * total)) if self.density else 0
        held = self._held(base, tuned, total)
        scores = {path: torch.rand(value.shape).to(value.device) for path, value in tuned.items()}
        parts: dict[str, Any] = {"region": _Region(self.bias, size)}
        if size:
            parts["pulls"] = self._pulls(base, probe, tuned, held, scores, size)
        trainable, gates = {}, parts["region"].gates
        with all_or_nothing() as undo:
            for path, value in tuned.items():
                gate = _Gate(path, scores[path], value, held[path], parts["region"])
                gates[path], trainable[path] = gate, gate.scores
                undo.append(surgery.reweight(base.towers, path, gate))
            return Change(trainable, undo, parts)

    def _tuned(self, base: Base, probe: Probe | None) -> Tensors:
        """θ_ft in the scope, the base's own values at the places to keep out of."""
        if probe is None or not probe.start:
            raise SettingError(
                "graft takes its values from a fine-tuned model: name it as the recipe's start (a "
                "phase, a delta file or a checkpoint)"
            )
        found = {}
        for path in base.choose(self.where):
            if path not in probe.start:
                continue
            value, ours = probe.start[path].detach(), base.original(path)
            if value.shape != ours.shape or not torch.isfinite(value).all():
                raise SettingError(
                    f"graft: the fine-tuned model's {path} has the shape {tuple(value.shape)} or "
                    f"holds NaN, expected {tuple(ours.shape)} and finite numbers; start from a "
                    "training of this base that did not diverge"
                )
            value = value.to(ours.device, ours.dtype)
            if path in probe.outside:
                value = torch.where(probe.outside[path].to(ours.device), ours, value)
            if not torch.equal(value, ours):
                found[path] = value
        if not found:
            raise SettingError(
                f"graft: nothing in where={list(self.where)} differs between the base and the "
                "fine-tuned model; choose other tensors, or another start"
            )
        return found

    def _held(self, base: Base, tuned: Tensors, total: int) -> dict[str, Tensor | None]:
        """γ₀: exactly base_density of all entries, those that moved most; None for none."""
        if self.base_mask == "zero":
            return dict.fromkeys(tuned)
        moved = {path: (value - base.original(path)).abs() for path, value in tuned.items()}
        chosen = entries.strongest(moved, max(1, round(self.base_density * total)))
        held: dict[str, Tensor | None] = {}
        for path, value in moved.items():
            mask = torch.zeros(value.numel(), dtype=torch.bool, device=value.device)
            mask[chosen[path].to(value.device)] = True
            held[path] = mask.view(value.shape) & (value > 0)
        return held

    def _pulls(
        self,
        base: Base,
        probe: Probe,
        tuned: Tensors,
        held: dict[str, Tensor | None],
        scores: Tensors,
        size: int,
    ) -> tuple[Tensor, Tensor, int]:
        """(pulls, first scores, count): what sets the rate at which `count` entries cross."""
        at = {
            p: torch.where(m, tuned[p], base.original(p)) for p, m in held.items() if m is not None
        }
        gradients = probe.gradients(base, list(tuned), "mean", at)
        pulls = {
            p: -g * (tuned[p].float() - base.original(p).float()) for p, g in gradients.items()
        }
        count = size
        for path, mask in held.items():
            if mask is not None:
                pulls[path] = pulls[path].masked_fill(mask, 0.0)
                count -= int(mask.count_nonzero())
        helpful = sum(int((pull > 0).count_nonzero()) for pull in pulls.values())
        if helpful < count:
            raise SettingError(
                f"graft density {self.density}: {count:,} entries to graft, but only {helpful:,} "
                "would lower the loss, to first order; lower density, or train the start longer"
            )
        together = torch.cat([pull.flatten() for pull in pulls.values()])
        begun = torch.cat([scores[path].flatten() for path in pulls])
        # No start in [0, 1) makes up for a pull that much weaker than the count-th.
        weakest = together.topk(count).values[-1] * (1 - 1 / self.bias) / math.e
        near = together >= weakest
        return together[near], begun[near], count

    def finished(self, change: Change) -> bool:
        region: _Region = change.parts["region"]
        return any(bool(mask.any()) for mask in region.masks().values())

    def pack(self, base: Base, change: Change) -> Tensors:
        region: _Region = change.parts["region"]
        packed = {}
        for path, mask in region.settled().items():
            index = mask.flatten().nonzero().flatten()
            if not len(index):
                continue
            values = region.gates[path].tuned.flatten()[index]
            packed[path] = entries.changed(base.original(path), index, values)
        if not packed:
            raise SettingError(
                "graft: found an empty region, with which the model is the bare base, expected "
                f"entries whose score rose above {HIGHEST_START if region.size else self.bias:g}; "
                f"{self._wider()}"
            )
        return packed

    def _wider(self) -> str:
        """What to change where no entry was grafted."""
        if self.density:
            return "leave learning_rate out, which is then set for the density, or take more steps"
        return "set density, such as 0.01, for which the rate is set, or a higher learning_rate"

    def groups(self, change: Change) -> list[dict[str, Any]]:
        # The rate is that of a plain climb: no decay towards 0, no warm-up, no schedule.
        own = {"weight_decay": 0.0, "constant": True}
        return [{"params": list(change.trainable.values()), **own}]

    def learning_rate(self, steps: int) -> float:
        return PUBLISHED_RATE

    def rate_for(self, change: Change, steps: int) -> float:
        if "pulls" not in change.parts:
            return PUBLISHED_RATE
        pulls, starts, count = change.parts["pulls"]
        return crossing.rate(pulls, starts, count, steps, self.bias)

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        return entries.unpack(base, tensors)


EXAMPLE = Graft(density=0.05)
