"""Units: a layer's heads and neurons, what of the base is theirs, and which of them stay on.

A unit is a group of neighbouring inputs of the matrix that it leads into: W_O for a head, W_2 for a
neuron. Its score, and whether it is on, are an entry of a tensor (units,) at that matrix's path.
Where it is off, those inputs count as 0; the rows of W_Q, W_K, W_V or W_1 that make them have then
no say. Biases of W_O and W_2 are no unit's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from howfine import gates
from howfine.anatomy import FEEDS
from howfine.base import Base
from howfine.errors import DamagedDelta, SettingError

Kinds = Literal["both", "heads", "neurons"]
Scope = Literal["global", "raw", "layer"]
Importance = Literal["rows", "batches", "squares"]
Tensors = dict[str, Tensor]

# Rows of a batch whose gradient is one sample of it: Kwon et al.'s.
BATCH = 32
# Which tensors of a file say that units are on.
KEPT = "units:"
_KIND = {"D": "heads", "CD": "heads", "O": "neurons"}


def counts(base: Base, which: Kinds = "both") -> dict[str, int]:
    """How many units lead into a matrix, by its path, of the layers from the bottom up.

    Raises SettingError where the base has none of that kind.
    """
    found = _counts(base)
    check_kinds(base, found, which)
    return {path: n for path, n in found.items() if which in ("both", kind(base, path))}


def _counts(base: Base) -> dict[str, int]:
    return {p: base.units_into(p) for p in base.choose(("matrices",)) if kind(base, p)}


def check_kinds(base: Base, paths: Iterable[str], which: Kinds) -> None:
    """Raises SettingError unless units of these kinds lead into some of the matrices at `paths`."""
    wanted = {"heads", "neurons"} if which == "both" else {which}
    if missing := sorted(wanted - {kind(base, path) for path in paths}):
        raise SettingError(
            f"found no matrix of {base.name} that {' or '.join(missing)} lead into, expected one "
            "in each layer: they can't be switched off. Choose the other kind of units where the "
            "method has that setting, or name the matrices in its row of howfine.architectures"
        )


def kind(base: Base, path: str) -> str:
    """ "heads", "neurons", or "" for a matrix that no units lead into."""
    return _KIND.get(base.place(path)[1], "")


def by_kind(base: Base, scores: Mapping[str, Tensor]) -> dict[str, Tensors]:
    """Tensors by path, apart for heads and for neurons."""
    found: dict[str, Tensors] = {}
    for path, own in scores.items():
        found.setdefault(kind(base, path), {})[path] = own
    return found


# --- which stay on -------------------------------------------------------------------------------


def strongest(
    base: Base,
    scores: Mapping[str, Tensor],
    keep: float,
    scope: Scope = "global",
    among: Mapping[str, Tensor] | None = None,
) -> Tensors:
    """(units,) which stay on, by path: the share `keep` of the heads, and of the neurons.

    The highest scores of the whole model, those of a layer first divided by their Euclidean norm
    ("global") or as they are ("raw"), or of every layer the same share; of each layer at least one.
    Only units `among` those that are on. Raises SettingError for a share below that.
    """
    kept: Tensors = {}
    for name, own in sorted(by_kind(base, scores).items()):
        check_share(own, keep, name)
        parts = [{path: score} for path, score in own.items()] if scope == "layer" else [own]
        for part in parts:
            kept |= by_rank(ranks(part, scope == "global", among), keep)
    return {path: kept[path].to(base.device) for path in scores}


def ranks(
    scores: Mapping[str, Tensor],
    normalised: bool = True,
    among: Mapping[str, Tensor] | None = None,
) -> Tensors:
    """(units,) int32 by path: how many units of these paths are less important.

    Of each path the most important one comes after all that are not, so that it goes last; units
    that are not `among` those on are below all. Ties are settled by position. Raises SettingError
    for scores that are not finite: they would be the highest.
    """
    for path, score in scores.items():
        if odd := int((~score.isfinite()).sum()):
            raise SettingError(
                f"the importance of {odd} of {len(score)} units at {path} is NaN or infinite, so "
                "that none can be ranked: the gradients are, or the weights; load the base in "
                "float32, or train the start again with a lower learning_rate, where it diverged"
            )
    firm = []
    for path, score in scores.items():
        on = among[path].cpu() if among else torch.ones(len(score), dtype=torch.bool)
        score = score.detach().float().cpu() * on
        score = score / (score.norm() + 1e-20) if normalised else score
        score = score.masked_fill(~on, -torch.inf)
        score[score.argmax()] = torch.inf
        firm.append(score)
    order = torch.argsort(torch.cat(firm), stable=True, descending=True).flip(0)
    places = torch.empty(len(order), dtype=torch.int32)
    places[order] = torch.arange(len(order), dtype=torch.int32)
    return dict(zip(scores, places.split([len(score) for score in firm]), strict=True))


def budget(sizes: Mapping[str, int], keep: float, scope: Scope = "global") -> int:
    """How many units of one kind stay on, of so many at each path."""
    parts = list(sizes.values()) if scope == "layer" else [sum(sizes.values())]
    return sum(max(1, round(keep * part)) for part in parts)


def check_share(sizes: Mapping[str, Any], share: float, name: str, setting: str = "keep") -> None:
    """Refuse a share of the units, as a setting gives it, by which some layer would have none."""
    total = sum(map(len, sizes.values()))
    if round(share * total) < len(sizes):
        raise SettingError(
            f"{setting} {share}: {round(share * total)} of {total} {name} would stay on, and "
            f"{len(sizes)} layers keep one each; the nearest {setting} is {len(sizes) / total:.3g}"
        )


def by_rank(placed: Mapping[str, Tensor], keep: float) -> Tensors:
    """The share `keep` of units with the highest ranks; of smaller shares they are among these."""
    total = sum(map(len, placed.values()))
    least = total - max(1, round(keep * total))
    return {path: own >= least for path, own in placed.items()}


def importance(gradients: Mapping[str, Tensor], by: Importance) -> Tensors:
    """(units,) from (rows, units) ∂loss/∂ξ: E_x |∂L/∂ξ| of rows, or of batches of `BATCH` rows.

    Of batches in the order of the rows, the magnitude of their mean's (as in
    transformers' own script), or its square (Fisher information; Kwon et al. 2022).
    """
    if by == "rows":
        return {path: own.abs().mean(0) for path, own in gradients.items()}
    power = 1 if by == "batches" else 2
    return {path: of_batches(own).abs().pow(power).mean(0) for path, own in gradients.items()}


def of_batches(gradients: Tensor) -> Tensor:
    """(batches, units) means over every `BATCH` of (rows, units), the last of what is left."""
    return torch.stack([rows.mean(0) for rows in gradients.split(BATCH)])


def magnitudes(base: Base, counted: Mapping[str, int], start: Mapping[str, Tensor]) -> Tensors:
    """Mean |θ| of the weights that lead out of each unit, at `start` where that has them."""
    return {
        path: of_inputs(base, start.get(path, base.original(path)).float().abs(), count)
        for path, count in counted.items()
    }


# --- what is theirs ------------------------------------------------------------------------------


def axis(base: Base, which: str) -> int:
    """The stored axis of a matrix's inputs ("in") or outputs ("out")."""
    return base.anatomy.linear_axes.index(which)


def along_inputs(base: Base, on: Tensor) -> Tensor:
    """(units, 1) or (1, units), which spreads over a matrix whose inputs are units."""
    return on.unsqueeze(1 - axis(base, "in"))


def of_inputs(base: Base, values: Tensor, count: int) -> Tensor:
    """(count,) means of a matrix's values over the inputs of each unit."""
    return values.movedim(axis(base, "in"), 0).reshape(count, -1).mean(1)


def entries(base: Base, path: str, kept: Mapping[str, Tensor]) -> Tensor | None:
    """Of a matrix, which groups of neighbouring rows or columns belong to units that are on.

    (units, 1) or (1, units), which spreads over the matrix; None where none of it is a unit's, such
    as where several heads share their keys and values, or projections are fused.
    """
    layer, part = base.place(path)
    weight = base.parameter(path)
    for other, on in kept.items():
        own, into = base.place(other)
        inputs = base.parameter(other).shape[axis(base, "in")]
        if path == other:
            return along_inputs(base, on)
        if own == layer and part in FEEDS[into] and weight.shape[axis(base, "out")] == inputs:
            return on.unsqueeze(1 - axis(base, "out"))
    return None


def without(base: Base, path: str, weight: Tensor, on: Tensor) -> Tensor:
    """A matrix that units lead into, with 0 for those that are off."""
    return gates.drop(weight, along_inputs(base, on))


class OfUnits(nn.Module):
    """A weight of which what belongs to units that are off is read as it is here.

    `on` is (units, 1) or (1, units), which spreads over the weight; checkpoints hold it.
    """

    on: Tensor
    instead: Tensor

    def __init__(self, on: Tensor, instead: Tensor) -> None:
        super().__init__()
        self.register_buffer("on", on.clone())
        self.register_buffer("instead", instead, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(gates.spread(self.on, tuple(weight.shape)), weight, self.instead)


def costs(base: Base, counted: Mapping[str, int]) -> dict[str, int]:
    """Parameters of one unit, by the path of the matrix that it leads into.

    Its inputs of that matrix, and its outputs, with their biases, of those that make them: 4·d·d_h
    + 3·d_h of a head of BERT's, 2·d + 1 of a neuron. What several units share is no one's.
    """
    found = {}
    for path, count in counted.items():
        layer, into = base.place(path)
        weight = base.parameter(path)
        size, total = weight.shape[axis(base, "in")], weight.numel()
        for other in base.choose(("matrices",)):
            if base.place(other) not in {(layer, part) for part in FEEDS[into]}:
                continue
            made = base.parameter(other)
            if made.shape[axis(base, "out")] % size == 0:  # a multiple where several are fused
                bias = f"{other.rpartition('.')[0]}.bias"
                total += made.numel()
                total += base.parameter(bias).numel() if bias in base.paths() else 0
        found[path] = total // count
    return found


# --- in files ------------------------------------------------------------------------------------


def named(kept: Mapping[str, Tensor]) -> Tensors:
    """As a file names them."""
    return {KEPT + path: on.cpu() for path, on in kept.items()}


def parted(base: Base, tensors: Mapping[str, Tensor], axes: int) -> tuple[Tensors, ...]:
    """(what a file says of units, a column each in so many axes; its other tensors).

    Raises DamagedDelta where that does not fit the base's units, or its parameters.
    """
    own = {n.removeprefix(KEPT): v for n, v in tensors.items() if n.startswith(KEPT)}
    expected = _counts(base)
    for path, value in own.items():
        fits = value.ndim == axes and value.dtype == torch.bool
        if not fits or value.shape[-1] != expected.get(path):
            raise DamagedDelta(
                f"delta speaks of units of {path!r} with shape {tuple(value.shape)} "
                f"({value.dtype}), which does not fit the base {base.name}; the file is damaged, "
                "or made for another model"
            )
    values = {n: v for n, v in tensors.items() if not n.startswith(KEPT)}
    for path in values.keys() & set(base.paths()):
        value, shape = values[path], tuple(base.parameter(path).shape)
        if tuple(value.shape) != shape or not value.is_floating_point():
            raise DamagedDelta(
                f"delta holds {path!r} of shape {tuple(value.shape)} ({value.dtype}), expected "
                f"floating-point numbers of shape {shape}, as the base {base.name} has it; the "
                "file is damaged, or made for another model"
            )
    return own, values


def cleared(base: Base, tensors: Mapping[str, Tensor]) -> Tensors:
    """A file's tensors, and those that units lead into, with 0 for the units that are off."""
    kept, values = parted(base, tensors, 1)
    for path, on in kept.items():
        value: Tensor = values.get(path, base.original(path).to(on.device))
        values[path] = without(base, path, value, on)
    return values
