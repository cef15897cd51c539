"""Which tensor of one checkpoint is which of the other, whatever each calls its tower."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from howfine.checkpoint import Source
from howfine.errors import BaseError

Place = Callable[[str], tuple[int | None, str]]  # path inside the tower -> (layer, part)

# Parts of a block or beside it that are no matrix of a block.
_NO_MATRIX = ("norm", "bias", "embedding", "pooler", "other")


@dataclass(frozen=True)
class Alignment:
    """Which tensor of one checkpoint is which of the other."""

    common: list[tuple[str, str, str]]  # path inside the tower, name before, name after
    only_before: list[str]  # names, as they are stored
    only_after: list[str]


def align(before: Source, after: Source, place: Place) -> Alignment:
    """Pairs the float tensors of two checkpoints, whatever tower prefix ("bert.") each has.

    The prefixes are those that pair most tensors, then those that let `place` find most block
    matrices. Tensors outside the tower (heads) are paired by their full names, and left unpaired
    where their shapes differ. Integer tensors are buffers, not weights: they are left out.

    Raises BaseError where not even half of the smaller checkpoint can be paired, or a tensor inside
    the tower has two shapes.
    """
    ours, theirs = _keyed(before), _keyed(after)
    pairs = itertools.product(ours, theirs)
    ranks = {prefix: _rank(prefix, keys, place) for prefix, keys in ours.items()}
    ours_at, theirs_at = max(
        pairs,
        key=lambda p: (len(ours[p[0]].keys() & theirs[p[1]].keys()), ranks[p[0]], -len(p[1])),
    )
    a, b = ours[ours_at], theirs[theirs_at]
    common = []
    for key in a.keys() & b.keys():
        shapes = before.shape(a[key]), after.shape(b[key])
        inside = a[key].startswith(ours_at) and b[key].startswith(theirs_at)
        if shapes[0] == shapes[1]:
            common.append((key, a[key], b[key]))
        elif inside:
            raise BaseError(
                f"{key}: shape {shapes[0]} before and {shapes[1]} after: this is another "
                "architecture or a resized one. Compare a model with the base it was tuned from."
            )
    # Unlike models share a name or two, such as LayerNorm.weight, under some prefix.
    if not common or 2 * len(common) < min(len(a), len(b)):
        raise BaseError(
            f"the checkpoints have {len(common)} tensors in common, of {_some(a)} before and "
            f"{_some(b)} after. Compare a model with the base it was tuned from."
        )
    common.sort(key=lambda names: _natural(names[0]))
    paired = {name for names in common for name in names[1:]}
    return Alignment(
        common,
        [name for name in a.values() if name not in paired],
        [name for name in b.values() if name not in paired],
    )


def is_matrix(layer: int | None, part: str) -> bool:
    """Whether a place is that of a matrix of a block, one with a letter."""
    return layer is not None and part not in _NO_MATRIX


def _keyed(source: Source) -> dict[str, dict[str, str]]:
    """For every prefix the tower may have: path inside the tower -> stored name.

    A prefix leaves a module and a parameter to some name, and no two tensors the same path.
    """
    names = [name for name in source.names() if source.dtype(name).startswith(("F", "BF"))]
    stored, heads = set(names), {""}
    paths = {name: name if _current(name) in stored else _current(name) for name in names}
    for name in names:
        modules = itertools.takewhile(lambda part: not part.isdigit(), name.split(".")[:-2])
        heads.update(itertools.accumulate(f"{module}." for module in modules))
    keyed = {
        head: {path.removeprefix(head): name for name, path in paths.items()}
        for head in sorted(heads)
    }
    return {head: keys for head, keys in keyed.items() if len(keys) == len(names)}


def _current(path: str) -> str:
    """Checkpoints converted from TensorFlow call a LayerNorm's parameters gamma and beta."""
    path = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", path)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", path)


def _rank(prefix: str, keys: Iterable[str], place: Place) -> tuple[int, int, int]:
    """Larger is likelier to be the tower: an encoder beats a decoder, which has more in a block."""
    places = [place(key) for key in keys]
    matrices = sum(is_matrix(layer, part) for layer, part in places)
    return matrices, -sum(layer is not None for layer, _ in places), -len(prefix)


def _natural(path: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in path.split(".")]


def _some(names: Iterable[str]) -> str:
    """'23 (a, b and 21 more)'."""
    found = sorted(names)
    more = f" and {len(found) - 2} more" if len(found) > 2 else ""
    return f"{len(found)} ({', '.join(found[:2])}{more})"
