"""Differences of a pair of models, tensor by tensor: measured, and coded as streams of a delta.

Nothing is held but one chunk of each model, what is kept of the entries, and coded bytes. Entries
of several tensors share one stream of places, up to MOST_JOINED entries of the base together. A
tensor has one of its own where that is smaller: where its density differs from the others', or its
rows and columns differ among themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from howfine.codec import Coded, encode_places, encode_steps_of, encode_values
from howfine.errors import BaseError
from howfine.pair import Pair
from howfine.spread import LAST_STEP, Quantiser, Spread, part_of
from howfine.streams import Stream, joined_name

Array = npt.NDArray[Any]
Weights = Mapping[str, float]  # of a tensor's differences, where not 1

MOST_JOINED = 1 << 26  # entries: their mask takes as many bytes
_ROW = 40  # bytes that one more stream takes in the index
_WORTH = 300  # bytes of places for which another coding is tried


@dataclass
class Tally:
    """What a coding kept, and what it lost."""

    entries: int = 0
    kept: int = 0
    energy: float = 0.0  # squared differences
    error: float = 0.0  # of them, what the stored change lacks
    edge: int = 0  # entries of which a share is kept

    @property
    def relative(self) -> float:
        """Squared error over squared difference."""
        return self.error / self.energy if self.energy else 0.0


@dataclass
class _Kept:
    """What is kept of one tensor."""

    path: str
    shape: tuple[int, ...]
    index: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)  # steps, signs, differences or new values

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        return sum(map(len, self.index))

    def mask(self) -> Array:
        found = np.zeros(self.size, np.bool_)
        for index in self.index:
            found[index] = True
        return found


def measured(pair: Pair, weights: Weights, progress: bool) -> Spread:
    """The spread of all differences, each tensor's times its weight.

    Raises BaseError where a model holds NaN or infinity, or where the two are the same.
    """
    spread = Spread()
    for path in _bar(pair, "measure", progress):
        weight = np.float32(weights.get(path, 1.0))
        for before, after in pair.chunks(path):
            size = np.abs(after - before)
            size *= weight
            if not spread.add(size):
                raise _not_finite(pair, path, before, after)
    if not spread.changed:
        raise BaseError(
            f"the two models are the same in all {len(pair.base.paths())} tensors: there is "
            "nothing to extract. Give the base first and the tuned model second"
        )
    return spread


def _not_finite(pair: Pair, path: str, before: Array, after: Array) -> BaseError:
    sides = {"the base": before, "the tuned model": after}
    odd = [side for side, values in sides.items() if not np.isfinite(values).all()]
    return BaseError(
        f"{path} holds NaN or infinity in {' and '.join(odd) or 'the difference'}; get a "
        "checkpoint whose training did not diverge"
    )


def sparse(
    pair: Pair, quantiser: Quantiser, weights: Weights, progress: bool
) -> tuple[list[Stream], Tally]:
    """The entries that a quantiser keeps, as streams, and what they keep."""
    tally = Tally()
    streams: list[Stream] = []
    group: list[_Kept] = []
    for path in _bar(pair, "code", progress):
        found = _kept(pair, path, quantiser, weights.get(path, 1.0), tally)
        if group and sum(each.size for each in group) + found.size > MOST_JOINED:
            streams += _coded(group, pair, quantiser, weights)
            group = []
        if found.count:
            group.append(found)
    return [*streams, *_coded(group, pair, quantiser, weights)], tally


def _kept(pair: Pair, path: str, quantiser: Quantiser, weight: float, tally: Tally) -> _Kept:
    found, start = _Kept(path, pair.before.shape(path)), 0
    scale = np.float32(_scale(quantiser, weight))
    for before, after in pair.chunks(path):
        d = after - before
        size = np.abs(d)
        if weight != 1:
            size *= np.float32(weight)
        at = _chosen(size, quantiser, tally)
        kept = d[at]
        tally.energy += _power(d)
        values, stored = _values(quantiser, kept, size[at], after[at], scale)
        d[at] = kept - stored  # what the stored change lacks
        tally.error += _power(d)
        tally.kept += len(at)
        tally.entries += len(d)
        found.index.append((at + start).astype(np.uint32 if found.size < 2**32 else np.int64))
        found.values.append(values)
        start += len(d)
    return found


def _chosen(size: Array, quantiser: Quantiser, tally: Tally) -> Array:
    """Indices of the magnitudes that a quantiser keeps."""
    at = np.flatnonzero(size >= np.float32(max(quantiser.threshold, 1e-45)))
    if quantiser.share == 1:
        return at
    kept = size[at] >= np.float32(quantiser.whole)
    edge = np.flatnonzero(~kept)
    kept[edge] = part_of(tally.edge, len(edge), quantiser.share)
    tally.edge += len(edge)
    return at[kept]


def _values(
    quantiser: Quantiser, kept: Array, size: Array, after: Array, scale: np.float32
) -> tuple[Array, Array]:
    """(what is coded of kept differences, what they are then)."""
    if quantiser.precision == "fp32":
        return after, kept
    if quantiser.precision == "fp16":
        return kept, kept.astype(np.float16).astype(np.float32)
    steps = np.sign(kept)
    if quantiser.precision == "steps":
        steps *= np.clip(np.rint(size / np.float32(quantiser.step)), 1, LAST_STEP)
    return steps.astype(np.int8), steps * scale


def _power(x: Array) -> float:
    return float(np.dot(x, x))


def _coded(
    group: list[_Kept], pair: Pair, quantiser: Quantiser, weights: Weights
) -> Iterator[Stream]:
    """One stream for the group, but for tensors whose places are smaller by themselves."""
    if not group:
        return
    alone: list[tuple[_Kept, Coded]] = []
    size, count = sum(each.size for each in group), sum(each.count for each in group)
    for each in group:
        shared = _share(each.size, each.count, count / size)
        if len(group) > 1 and shared > _WORTH:
            coded = encode_places(torch.from_numpy(each.mask()).view(each.shape))
            if len(coded.payload) + _ROW < shared:
                alone.append((each, coded))
    apart = {each.path for each, _ in alone}
    rest = [each for each in group if each.path not in apart]
    if rest:  # all may be apart
        mask = np.concatenate([each.mask() for each in rest])
        places = torch.from_numpy(mask)
        coded = encode_places(places.view(rest[0].shape) if len(rest) == 1 else places)
        yield _stream(rest, coded, pair, quantiser, weights)
    for each, coded in alone:
        yield _stream([each], coded, pair, quantiser, weights)


def _share(size: int, count: int, density: float) -> float:
    """Bytes of a tensor's places at the density of all."""
    if density in (0, 1):
        return 0.0
    bits = -count * math.log2(density) - (size - count) * math.log2(1 - density)
    return bits / 8


def _stream(
    members: list[_Kept], coded: Coded, pair: Pair, quantiser: Quantiser, weights: Weights
) -> Stream:
    paths = [each.path for each in members]
    values = np.concatenate([part for each in members for part in each.values])
    return Stream(
        joined_name("method", paths, pair.base),
        (sum(each.size for each in members),),
        coded,
        difference=quantiser.precision != "fp32",
        values=_coded_values(values, quantiser, [weights.get(path, 1.0) for path in paths]),
    )


def _coded_values(values: Array, quantiser: Quantiser, weights: list[float]) -> Coded:
    if quantiser.precision in ("fp16", "fp32"):
        return encode_values(torch.from_numpy(values), quantiser.precision)
    alike = len(set(weights)) == 1
    return encode_steps_of(
        values, [_scale(quantiser, weight) for weight in weights[: 1 if alike else None]]
    )


def _scale(quantiser: Quantiser, weight: float) -> float:
    """What a step stands for, in three digits: they cost no error to speak of, and few bytes."""
    return float(np.float32(f"{quantiser.scale / weight:.2e}")) if weight else 0.0


def dense(
    pair: Pair, precision: Callable[[str], str], progress: bool
) -> tuple[list[Stream], Tally]:
    """Every tensor that differs, whole, in a precision of its own.

    Raises BaseError where a model holds NaN or infinity.
    fp32 is the new values, any other the difference; "sign" has one scale a tensor (BitDelta, Liu
    et al. 2024, without the training of scales).
    """
    tally, streams = Tally(), []
    for path in _bar(pair, "code", progress):
        chosen = precision(path)
        parts, new = [], []
        for before, after in pair.chunks(path):
            parts.append(after - before)
            if not math.isfinite(_power(parts[-1])) and not np.isfinite(parts[-1]).all():
                raise _not_finite(pair, path, before, after)
            if chosen == "fp32":
                new.append(after)
        d = np.concatenate([np.empty(0, np.float32), *parts])
        tally.entries += d.size
        tally.energy += (power := _power(d))
        if not power and not d.any():
            continue
        tally.kept += d.size
        values = torch.from_numpy(np.concatenate(new) if new else d)
        coded = encode_values(values, chosen)
        if chosen != "fp32":
            tally.error += _lost(d, coded)
        shape = pair.before.shape(path)
        streams.append(Stream(f"method/{path}", shape, coded, difference=chosen != "fp32"))
    return streams, tally


def _lost(d: Array, coded: Coded) -> float:
    from howfine.codec import decode_values

    return _power(d - decode_values(coded, d.size).numpy())


def _bar(pair: Pair, what: str, progress: bool) -> Iterable[str]:
    return tqdm(pair.base.paths(), desc=what, unit="tensor", disable=not progress)
