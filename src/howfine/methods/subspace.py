"""A change of d numbers, spread over the weights by a fixed map that no file need hold.

θ = θ0 + map(v), v = 0 at the start. Three maps:

random     θ = θ0 + P v (Li et al. 2018, "Measuring the intrinsic dimension of objective
           landscapes", equation 2; Aghajanyan et al. 2020). P is hashed: every entry of θ belongs
           to one of the d numbers, with a random sign, as in Uni-LoRA (Li et al. 2025).
lora-xs    ΔW = U_r Σ_r R V_rᵀ, W = U Σ Vᵀ, R free (Bałazy et al. 2024, "LoRA-XS").
tiny-lora  the same with R = Σ_i v_i P_i, the P_i random, v shared by several matrices (Morris et
           al. 2026, "Learning to reason in 13 parameters").

What is random follows from whole numbers, so that it is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from howfine import surgery
from howfine.base import Base
from howfine.change import Change, all_or_nothing
from howfine.codec import rounded
from howfine.errors import DamagedDelta, SettingError
from howfine.method import Method, Probe, Tensors, as_parameter

NAME = "v"  # the one tensor that trains and is stored
_MOST = 2**30  # numbers of a random map: twice as many codes fit 32 bits
_CHUNK = 1 << 16  # words at a time, so that they stay in cache
# Singular values below this share of the largest count as 0: their vectors are rounding errors.
_FLAT = 1e-6


def words(seed: int, stream: int, count: int) -> npt.NDArray[np.uint64]:
    """(count,) random 64-bit words of one of a seed's streams (Philox, Salmon et al. 2011)."""
    return np.random.Philox(key=seed | stream << 64).random_raw(count)


def codes(seed: int, stream: int, count: int, size: int) -> Tensor:
    """(count,) int32: 2 j + s for an entry that follows number j of `size` with the sign (-1)^s.

    j comes from the upper half of a word, scaled; s is its lowest bit.
    """
    generator = np.random.Philox(key=seed | stream << 64)
    found = np.empty(count, np.int32)
    for start in range(0, count, _CHUNK):
        raw = generator.random_raw(min(_CHUNK, count - start))
        number = (raw >> np.uint64(32)) * np.uint64(size) >> np.uint64(32)
        found[start : start + len(raw)] = number << np.uint64(1) | raw & np.uint64(1)
    return torch.from_numpy(found)


def cores(seed: int, stream: int, count: int, rank: int) -> Tensor:
    """(count, rank, rank) float32, near normal; a matrix has the norm 1 on average.

    An entry is the sum of a word's four 16-bit parts: no function is called that rounds otherwise
    elsewhere.
    """
    parts = words(seed, stream, count * rank * rank).view(np.uint16).reshape(-1, 4)
    centred = parts.sum(axis=1, dtype=np.int64) - 2 * (2**16 - 1)
    values = centred / (math.sqrt((2**32 - 1) / 3) * rank)
    return torch.from_numpy(values.astype(np.float32)).view(count, rank, rank)


def directions(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U_r Σ_r (out, rank) and V_rᵀ (rank, in) of a matrix (out, in), in float64.

    The entry of largest magnitude of each left vector is positive. Directions that the matrix does
    not have are 0. By the eigenvectors of the smaller Gram matrix: a fifth of the time of an SVD.
    """
    weight = weight.detach().to("cpu", torch.float64)
    tall = weight.shape[0] > weight.shape[1]
    gram = weight.T @ weight if tall else weight @ weight.T
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    left = weight @ vectors if tall else vectors
    right = vectors.T if tall else vectors.T @ weight
    values = (left if tall else right.T).norm(dim=0)  # of U Σ, or of V Σ
    there = values > _FLAT * values[0]
    peak = left.gather(0, left.abs().argmax(0, keepdim=True))[0]
    sign = torch.where(peak < 0, -1.0, 1.0).double() * there
    if tall:
        return left * sign, right * sign[:, None]
    return left * (values * sign), right * (sign / values.where(there, 1.0))[:, None]


class _Hashed(nn.Module):
    """weight + P v for one tensor, of which `codes` are the rows of P."""

    def __init__(self, v: nn.Parameter, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.v = v
        self.codes, self.scale = codes, scale

    def forward(self, weight: Tensor) -> Tensor:
        # Not buffers: several processes would send them to each other in every step.
        self.codes, self.scale = self.codes.to(weight.device), self.scale.to(weight.device)
        scaled = self.v * self.scale
        table = torch.stack([scaled, -scaled], dim=1).flatten()
        # The gradient of a look-up is the sum by code: all that is kept for it are the codes.
        change = table.index_select(0, self.codes).view(weight.shape)
        return change.add_(weight).to(weight.dtype)


class _Core(nn.Module):
    """weight + left · core · right, the core being a row of v, or made of one with `basis`.

    `turned` is for a matrix that is stored as (in, out): its change is the transpose.
    """

    def __init__(
        self,
        v: nn.Parameter,
        row: int,
        frame: tuple[Tensor, Tensor],
        basis: Tensor | None,
        turned: bool,
    ) -> None:
        super().__init__()
        self.v, self.row, self.basis, self.turned = v, row, basis, turned
        left, right = (part.float() for part in frame)
        self.left = right.T.contiguous() if turned else left.contiguous()
        self.right = left.T.contiguous() if turned else right.contiguous()

    def forward(self, weight: Tensor) -> Tensor:
        self.left, self.right = self.left.to(weight.device), self.right.to(weight.device)
        # Mixed precision would round the small change away before it is added.
        with torch.autocast(weight.device.type, enabled=False):
            core = self.v[self.row]
            if self.basis is not None:
                self.basis = self.basis.to(weight.device)
                core = (core @ self.basis.flatten(1)).view(self.basis.shape[1:])
            core = core.T if self.turned else core
            return torch.addmm(weight.float(), self.left, core @ self.right).to(weight.dtype)


@dataclass(frozen=True)
class Subspace(Method):
    """Train a few numbers, spread over the chosen weights by a map that is not stored."""

    # random (intrinsic dimension), lora-xs (a core between singular vectors), tiny-lora (shared).
    map: Literal["random", "lora-xs", "tiny-lora"] = "lora-xs"
    # What is changed, as selectors (see `howfine.anatomy`); matrices only, but for random.
    where: tuple[str, ...] = ("matrices",)
    # How many numbers train: in all for random, in a group of matrices for tiny-lora.
    size: int = 16
    # How many singular directions of a matrix are used, for lora-xs and tiny-lora.
    rank: int = 4
    # Which matrices share their numbers in tiny-lora: all, those of a letter, of a layer, or none.
    sharing: Literal["all", "letter", "layer", "none"] = "all"
    # Seed of what is random in the map.
    map_seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (("size", _MOST), ("rank", _MOST), ("map_seed", 2**64 - 1)):
            value, least = getattr(self, name), int(name != "map_seed")
            if not least <= value <= most:
                raise SettingError(
                    f"subspace {name}: found {value}, expected a whole number from {least} to "
                    f"{most}"
                )
        idle = {
            "random": ("rank", "sharing"),
            "lora-xs": ("size", "sharing", "map_seed"),
            "tiny-lora": (),
        }[self.map]
        for name in idle:
            if getattr(self, name) != getattr(type(self), name):
                raise SettingError(
                    f"subspace {name} {getattr(self, name)!r} has no meaning with map "
                    f"{self.map!r}; leave it out, or choose another map"
                )
        if self.map == "tiny-lora" and self.size > self.rank**2:
            raise SettingError(
                f"subspace size {self.size}: a core of rank {self.rank} has {self.rank**2} "
                "entries, and more numbers reach nothing more; lower size, or raise rank"
            )

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        paths = base.choose(self.where)
        v = nn.Parameter(torch.zeros(self._shape(base, paths), device=base.device))
        with all_or_nothing() as undo:
            for path, gate in self._gates(base, paths, v):
                undo.append(surgery.reweight(base.towers, path, gate))
            entries = sum(base.parameter(path).numel() for path in paths)
            return Change({NAME: v}, undo, parts={"entries": entries})

    def _shape(self, base: Base, paths: list[str]) -> tuple[int, ...]:
        """Shape of v. Raises SettingError where the chosen tensors are too few or too small."""
        if not paths:
            raise SettingError(f"subspace where={','.join(self.where)} names nothing to change")
        shapes = {path: tuple(base.parameter(path).shape) for path in paths}
        if self.map == "random":
            entries = sum(map(math.prod, shapes.values()))
            if self.size > entries:
                raise SettingError(
                    f"subspace size {self.size}: {','.join(self.where)} has {entries:,} entries "
                    "to change; lower size, or choose more"
                )
            return (self.size,)
        for path, shape in shapes.items():
            if len(shape) != 2 or self.rank > min(shape):
                raise SettingError(
                    f"subspace rank {self.rank}: {path} has the shape {shape}, expected a matrix "
                    f"of {self.rank} rows and columns or more; choose matrices alone, such as "
                    "where=matrices, or lower rank"
                )
        if self.map == "lora-xs":
            return (len(paths), self.rank, self.rank)
        return (max(self._rows(base, paths)) + 1, self.size)

    def _rows(self, base: Base, paths: list[str]) -> list[int]:
        """The row of v that each matrix follows."""
        groups: dict[Any, int] = {}
        keys = []
        for path in paths:
            layer, letter = base.place(path)
            keys.append({"all": 0, "letter": letter, "layer": layer, "none": path}[self.sharing])
        return [groups.setdefault(key, len(groups)) for key in keys]

    def _gates(
        self, base: Base, paths: list[str], v: nn.Parameter
    ) -> Iterator[tuple[str, nn.Module]]:
        """A module for each path that adds its share of map(v), as training and use alike have."""
        if self.map == "random":
            yield from self._hashed(base, paths, v)
            return
        rows = self._rows(base, paths) if self.map == "tiny-lora" else list(range(len(paths)))
        turned = base.anatomy.linear_axes == ("in", "out")
        for stream, (path, row) in enumerate(zip(paths, rows, strict=True)):
            weight = base.parameter(path)
            frame = directions(weight.T if turned else weight, self.rank)
            basis = None
            if self.map == "tiny-lora":
                basis = cores(self.map_seed, stream, self.size, self.rank)
            yield path, _Core(v, row, frame, basis, turned)

    def _hashed(
        self, base: Base, paths: list[str], v: nn.Parameter
    ) -> Iterator[tuple[str, nn.Module]]:
        """The random map: a stream of words for each tensor, and columns of P of norm 1."""
        found = [
            codes(self.map_seed, stream, base.parameter(path).numel(), self.size)
            for stream, path in enumerate(paths)
        ]
        entries = sum(torch.bincount(code >> 1, minlength=self.size) for code in found)
        assert isinstance(entries, Tensor)
        scale = (1 / entries.clamp(min=1).double().sqrt()).float()
        for path, code in zip(paths, found, strict=True):
            yield path, _Hashed(v, code, scale)

    def pack(self, base: Base, change: Change) -> Tensors:
        return {NAME: change.trainable[NAME].detach().clone()}

    def stored(self, change: Change, store: str) -> Tensors:
        return {NAME: rounded(change.trainable[NAME], store)}

    def groups(self, change: Change) -> list[dict[str, Any]]:
        # No decay: that is for weights, and a pull of v to 0 is one to the base. A random map's
        # rate is by how much a step moves an entry of θ, which is the same for bases of any size.
        entries = change.parts["entries"]
        scale = math.sqrt(entries / self.size) if self.map == "random" else 1.0
        return [{"params": [change.trainable[NAME]], "weight_decay": 0.0, "lr_scale": scale}]

    def learning_rate(self, steps: int) -> float:
        # By √steps, so that the noise of the gradients leads as far in trainings of any length; by
        # √rank, as the norm of a random core grows. The factors are those of short trials.
        if self.map == "random":
            return 1e-2 / math.sqrt(steps)
        return (0.5 if self.map == "lora-xs" else 0.16) / math.sqrt(self.rank * steps)

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        paths = base.choose(self.where)
        shape = self._shape(base, paths)
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        if found != {NAME: shape} or not tensors[NAME].is_floating_point():
            raise DamagedDelta(
                f"the delta holds {found}, expected {NAME!r} of shape {shape} for the base "
                f"{base.name}; the file is damaged, or made for another model"
            )
        v = nn.Parameter(tensors[NAME].to(base.device, torch.float32), requires_grad=False)
        with all_or_nothing() as undo, torch.no_grad():
            for path, gate in self._gates(base, paths, v):
                weight = base.parameter(path)
                undo.append(surgery.replace(base.towers, path, as_parameter(gate(weight), weight)))
            return Change({}, undo)


EXAMPLE = Subspace(rank=4)
