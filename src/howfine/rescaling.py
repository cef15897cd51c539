"""Factors on the units that stay on, so that each layer gives what it gave before others went off.

Kwon et al. 2022 (arXiv 2204.09656), section 4.3: from the bottom up, by linear least squares on the
outputs of a layer before its LayerNorm, the residual included. A layer's units give A·f for their
factors f = 1 + x; the system is AᵀA·x = Aᵀ(y - A·1), solved by LSMR with damping 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from scipy.sparse.linalg import lsmr
from torch import Tensor, nn

from howfine import gates, units
from howfine.anatomy import FEEDS
from howfine.base import IMAGE, Base
from howfine.batch import Batch
from howfine.errors import SettingError
from howfine.method import Probe
from howfine.pooling import first_counts
from howfine.replay import Replay

Tensors = dict[str, Tensor]

# A factor beyond this is no rescaling: its layer's, and those of all later ones, stay 1.
MOST = 10.0
_DAMPING = 1.0
# Steps of LSMR for each unknown: as many as unknowns are enough but for rounding.
_STEPS = 10
# Why LSMR stops where it has found something: 0, a solution, or the nearest to one.
_SOLVED = (0, 1, 2)
_ORDER = ("D", "CD", "O")


@torch.no_grad()
def factors(
    base: Base, probe: Probe, at: Mapping[str, Tensor], kept: Tensors, milder: Tensors, rows: int
) -> Tensors:
    """(units,) factors by path, 1 where units are off, of a model with the weights `at`.

    A layer shall give what it gives in the model where `milder` says which units are on. Raises
    SettingError where what its units give is not what is added to its residual.
    """
    _check_added(base)
    found = {path: torch.ones(len(on), device=base.device) for path, on in kept.items()}
    whole = {path: at.get(path, base.original(path)) for path in kept}
    teacher, student = (
        Replay(
            base, probe, {**at, **{p: units.without(base, p, whole[p], on[p]) for p in on}}, rows
        )
        for on in (milder, kept)
    )
    for layer in range(base.depth):
        own = {path for path in kept if base.place(path)[0] == layer}
        paths = sorted(own, key=lambda path: _ORDER.index(base.place(path)[1]))
        with ExitStack() as undo:
            heard = {path: Heard(base, path, undo) for path in paths}
            taught: dict[str, list[list[Tensor]]] = {path: [] for path in paths}
            for batch in teacher.block(layer, done=True):
                for path in paths:
                    taught[path].append([stream for _, stream in heard[path].taken(batch)])
        for path in paths:
            system = System(base, path, whole[path], kept[path])
            with ExitStack() as undo:
                listener = Heard(base, path, undo)
                for number, batch in enumerate(student.block(layer)):
                    calls = list(zip(taught[path][number], listener.taken(batch), strict=True))
                    for wanted, (inputs, stream) in calls[_reads_embeddings(base, path) :]:
                        system.add(inputs, wanted - stream)
            if not system.rows:
                continue
            solved = system.solved()
            if solved is None:
                return found
            found[path][kept[path]] = solved.to(found[path])
            student.at[path] = scaled(base, whole[path], kept[path], found[path])
        for _ in student.block(layer, done=True):
            pass
    return found


class System:
    """Normal equations of the factors of those units that lead into a matrix and are on."""

    def __init__(self, base: Base, path: str, weight: Tensor, on: Tensor) -> None:
        self.heads = units.kind(base, path) == "heads"
        self.units, width = int(on.sum()), weight.shape[units.axis(base, "in")] // len(on)
        self.index = on.repeat_interleave(width).nonzero().flatten().to(weight.device)
        self.weight = weight.float().movedim(units.axis(base, "in"), 0)[self.index]
        count = len(self.index)
        self.products = torch.zeros(count, count, dtype=torch.float64)
        self.sums, self.right = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
        self.rows, self.missing = 0, 0.0

    def add(self, inputs: Tensor, missing: Tensor) -> None:
        """Positions: (T, n) inputs of the matrix, (T, d) what its output lacks at factors of 1."""
        own, missing = inputs.float()[:, self.index], missing.float()
        self.products += (own.T @ own).double().cpu()
        self.right += (own * (missing @ self.weight.T)).sum(0).double().cpu()
        self.sums += own.sum(0).double().cpu()
        self.missing += float(missing.sum())
        self.rows += missing.numel()

    def normal(self) -> tuple[Tensor, Tensor]:
        """(AᵀA, Aᵀ(y - A·1)); for heads with a last column of ones in A, for what is constant."""
        weight = self.weight.double().cpu()
        left = self._of_units(self._of_units(self.products * (weight @ weight.T)).T)
        right = self._of_units(self.right)
        if not self.heads:
            return left, right
        ones = self._of_units(self.sums * weight.sum(1))
        left = torch.cat([left, ones[:, None]], dim=1)
        last = torch.cat([ones, torch.tensor([float(self.rows)], dtype=torch.float64)])
        right = torch.cat([right, torch.tensor([self.missing], dtype=torch.float64)])
        return torch.cat([left, last[None]]), right

    def _of_units(self, values: Tensor) -> Tensor:
        """Sums over the first axis, of the inputs of each unit."""
        return values.unflatten(0, (self.units, -1)).sum(1)

    def solved(self) -> Tensor | None:
        """(units,) factors, or None where there are none within `MOST`."""
        left, right = self.normal()
        most = _STEPS * len(left)
        x, stop = lsmr(left.numpy(), right.numpy(), damp=_DAMPING, maxiter=most)[:2]
        found = 1 + torch.from_numpy(x)[: self.units]
        fits = stop in _SOLVED and bool(torch.isfinite(found).all())
        return found if fits and float(found.abs().max()) <= MOST else None


class Heard:
    """What a matrix is given and what comes of it, noted by hooks until the stack is left."""

    def __init__(self, base: Base, path: str, undo: ExitStack) -> None:
        self.base, self.path = base, path
        self.layer, part = base.place(path)
        assert self.layer is not None
        matrices = base.choose((f"matrices@{self.layer}",))
        feeding = [each for each in matrices if base.place(each)[1] in FEEDS[part]]
        first = min(feeding, key=lambda each: FEEDS[part].index(base.place(each)[1]))
        self.top = part == "O" and self.layer == base.depth - 1
        branches = base.anatomy.stack_of(self.layer).branches
        self.before_norm = branches[0].startswith("before:")
        self._normed: list[tuple[Tensor, Tensor]] = []
        self._residual: Tensor | None = None
        self._calls: list[tuple[Tensor, Tensor, bool]] = []
        undo.callback(self._host(first).register_forward_pre_hook(self._begin).remove)
        undo.callback(self._host(path).register_forward_hook(self._end).remove)
        for norm in base.choose((f"norm@{self.layer}",)) if self.before_norm else ():
            if norm.endswith(".weight"):
                undo.callback(self._host(norm).register_forward_hook(self._note).remove)

    def _host(self, path: str) -> nn.Module:
        return self.base.towers.get_submodule(path.rpartition(".")[0])

    def _note(self, module: nn.Module, given: tuple[Any, ...], made: Tensor) -> None:
        self._normed.append((made, given[0]))

    def _begin(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        """What a branch reads says what its residual is: that, or what its LayerNorm reads."""
        residuals = [states for made, states in self._normed if made is given[0]]
        if self.before_norm and not residuals:
            raise SettingError(
                f"{self.base.config.model_type} computes something between a LayerNorm and what "
                f"leads to {self.path}, so factors can't be fitted; choose stage=rearranged"
            )
        self._residual = residuals[-1] if self.before_norm else given[0]
        self._normed.clear()

    def _end(self, module: nn.Module, given: tuple[Any, ...], made: Tensor) -> None:
        assert self._residual is not None
        self._calls.append((given[0], made + self._residual, self.top and first_counts()))

    def taken(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Of each call of a batch, (T, n) inputs and (T, d) outputs with the residual.

        At the positions that are no padding, or at the first alone where nothing else is read.
        """
        found = []
        for number, (inputs, stream, first) in enumerate(self._calls):
            counts = torch.zeros(stream.shape[:2], dtype=torch.bool, device=stream.device)
            counts[:, 0] = True
            # Of a block that several layers share, the last run alone is read so.
            if not (first and number == len(self._calls) - 1):
                counts = self._positions(batch, counts)
            found.append((inputs[counts], stream[counts]))
        self._calls.clear()
        return found

    def _positions(self, batch: Batch, like: Tensor) -> Tensor:
        assert self.layer is not None
        if self.base.anatomy.stack_of(self.layer).first > 0:
            return _of_decoder(batch, like)
        mask = batch.inputs.get("attention_mask")
        if self.base.tower_name == IMAGE or mask is None or mask.shape != like.shape:
            return torch.ones_like(like)
        return mask.bool()


def _reads_embeddings(base: Base, path: str) -> bool:
    """Whether below a matrix's first run nothing went off. A shared block's later runs differ."""
    layer, part = base.place(path)
    assert layer is not None
    return part == "D" and layer == base.anatomy.stack_of(layer).first


def _of_decoder(batch: Batch, like: Tensor) -> Tensor:
    """(B, S) which positions of a decoder are no padding: as its mask, or else its targets, say.

    What is behind a row's last target is padding.
    """
    mask = batch.inputs.get("decoder_attention_mask")
    if mask is not None and mask.shape == like.shape:
        return mask.bool()
    targets = batch.targets
    if targets is None or targets.shape != like.shape:
        return torch.ones_like(like)
    return (targets >= 0).flip(-1).cumsum(-1).flip(-1) > 0


def _check_added(base: Base) -> None:
    """Refuse layers that do something with what their units give before they add it."""
    for stack in base.anatomy.stacks:
        block = base.anatomy.block_path(stack.first)
        path = f"{base.body_prefix}{block}.{stack.feed_forward}"
        inside = f"{stack.letters['O']}.".startswith(f"{stack.feed_forward}.")
        if not inside and not isinstance(base.towers.get_submodule(path), nn.Dropout):
            raise SettingError(
                f"{base.config.model_type} normalises or scales what a layer's units give before "
                "it adds it to the residual, so factors can't be fitted to it; choose "
                "stage=rearranged"
            )


def scaled(base: Base, weight: Tensor, on: Tensor, factors: Tensor) -> Tensor:
    """A matrix that units lead into, with a factor (units,) on what each gives; 0 where off."""
    wide, times = units.along_inputs(base, on), units.along_inputs(base, factors)
    return Scaled.of(weight, wide, times)


class Scaled(nn.Module):
    """A weight with factors on what units give, and 0 for those that are off.

    `on` and `factors` are (units, 1) or (1, units), which spreads over the weight.
    """

    on: Tensor
    factors: Tensor

    def __init__(self, on: Tensor, factors: Tensor) -> None:
        super().__init__()
        self.register_buffer("on", on.clone())
        self.register_buffer("factors", factors.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return self.of(weight, self.on, self.factors)

    @staticmethod
    def of(weight: Tensor, on: Tensor, factors: Tensor) -> Tensor:
        """That weight."""
        times = gates.spread(factors, tuple(weight.shape))
        return gates.drop((weight.float() * times).to(weight.dtype), on)
