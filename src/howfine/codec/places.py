"""Coders of places: the smallest of those that howfine.codec lists."""

from __future__ import annotations

import bisect
import json
import math
import zlib
from collections.abc import Callable

import numpy as np
import torch

from howfine.codec.coded import (
    MAX_COUNT,
    PLACES,
    Array,
    Coded,
    bytes_below,
    check,
    check_length,
    damaged,
    head_of,
    inflated,
    packed,
    true_of,
    unpacked,
)
from howfine.codec.gaps import (
    decode_gaps,
    decode_grid,
    decode_histogram,
    encode_gaps,
    encode_grid,
    encode_histogram,
)
from howfine.errors import SettingError

_RANK_LIMIT = 127  # big integers take milliseconds up to here


def combinatorial_bits(n: int, k: int) -> float:
    """log2 C(n, k): what a code for k places among n, all sets being alike, needs on average.

    Raises SettingError unless 0 ≤ k ≤ n.
    """
    if not 0 <= k <= n:
        raise SettingError(f"cannot choose k = {k} places among n = {n}; k must lie in 0..n")
    nats = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return max(nats, 0.0) / math.log(2)


def encode_places(mask: torch.Tensor) -> Coded:
    """The smallest coding of a bool mask of any shape.

    Raises SettingError for another dtype, or for 2^40 entries or more.
    """
    if mask.dtype != torch.bool:
        raise SettingError(f"places must be a bool mask, found {mask.dtype}; compare it first")
    count = mask.numel()
    if count >= MAX_COUNT:
        raise SettingError(f"a mask of {count} entries is too large, split it below {MAX_COUNT}")
    flat = mask.detach().cpu().reshape(-1).numpy()
    true = int(np.count_nonzero(flat))
    if true in (0, count):
        return Coded("all" if true else "none", (), b"")
    plain, direct = packed(flat), 2 * true <= count
    places = np.flatnonzero(flat if direct else ~flat)
    best = Coded("bits", (), plain)
    if len(places) <= _RANK_LIMIT:
        best = min(best, Coded("rank", (), _encode_rank(places, count, true)), key=_size)
    elif combinatorial_bits(count, true) < 8 * len(plain):
        best = min(best, Coded("gaps", (), encode_gaps(places, count, true)), key=_size)
    histogram = encode_histogram(places, count, true, _size(best))
    if histogram is not None:
        best = min(best, Coded("histogram", (), histogram), key=_size)
    grid = encode_grid(flat, direct, mask.shape[0]) if mask.ndim > 1 else None
    if grid is not None:
        best = min(best, Coded("grid", (mask.shape[0],), grid), key=_size)
    # Level 1 is quick to tell whether a mask repeats; level 9 takes seconds on one that does not.
    if len(zlib.compress(plain, 1, -15)) < _size(best):
        best = min(best, Coded("zlib", (), zlib.compress(plain, 9, -15)), key=_size)
    return best


def decode_places(coded: Coded, count: int) -> torch.Tensor:
    """The bool mask (count,) that `encode_places` was given.

    Raises DamagedDelta if `coded` is not a mask of `count` entries, to the last bit.
    """
    check(coded, count, PLACES)
    if len(coded.params) != (coded.coding == "grid"):
        raise damaged(
            coded, f"{len(coded.params)} params", "the number of rows of a grid, else none"
        )
    try:
        mask = _DECODERS[coded.coding](coded, count)
    except MemoryError as error:
        raise damaged(coded, f"{count} entries", "what this machine's memory holds") from error
    return torch.from_numpy(mask)


def _size(coded: Coded) -> int:
    return len(coded.payload) + len(json.dumps([coded.coding, *coded.params]))


def _decode_none(coded: Coded, count: int) -> Array:
    check_length(coded, 0)
    return np.full(count, coded.coding == "all")


def _decode_bits(coded: Coded, count: int) -> Array:
    return unpacked(coded, coded.payload, count)


def _decode_zlib(coded: Coded, count: int) -> Array:
    plain, rest = inflated(coded, (count + 7) // 8)
    if rest:
        raise damaged(coded, f"{len(rest)} bytes left over", "none")
    return unpacked(coded, plain, count)


def _encode_rank(places: Array, count: int, true: int) -> bytes:
    """The head, then Σ C(place_i, i) over i = 1, 2, …"""
    number = sum(math.comb(place, i) for i, place in enumerate(places.tolist(), 1))
    length = bytes_below(math.comb(count, len(places)))
    return head_of(true, count) + number.to_bytes(length, "little")


def _decode_rank(coded: Coded, count: int) -> Array:
    true, rest = true_of(coded, count)
    few, direct = min(true, count - true), 2 * true <= count
    if few > _RANK_LIMIT:
        raise damaged(coded, f"{few} places", f"1..{_RANK_LIMIT}")
    sets = math.comb(count, few)
    number = int.from_bytes(rest, "little")
    if len(rest) != bytes_below(sets):
        raise damaged(coded, f"a rank of {len(rest)} bytes", f"{bytes_below(sets)}")
    if number >= sets:
        raise damaged(coded, "a rank beyond the last", "one below C(n, k)")
    mask = np.full(count, not direct)
    place = count
    for i in range(few, 0, -1):
        # The largest place with C(place, i) ≤ what is left of the number.
        place = bisect.bisect_right(range(place), number, key=lambda p: math.comb(p, i)) - 1
        number -= math.comb(place, i)
        mask[place] = direct
    return mask


_DECODERS: dict[str, Callable[[Coded, int], Array]] = {
    "none": _decode_none,
    "all": _decode_none,
    "bits": _decode_bits,
    "rank": _decode_rank,
    "gaps": decode_gaps,
    "histogram": decode_histogram,
    "grid": decode_grid,
    "zlib": _decode_zlib,
}
