"""How many places are coded, found without the mask: from heads, side tables and payload bytes.

What is found is what the coded mask has. Whether the rest of the payload is whole, only decoding
tells.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from howfine.codec.coded import (
    MAX_COUNT,
    PLACES,
    Coded,
    bytes_below,
    check,
    check_length,
    damaged,
    true_of,
)

_PIECE = 1 << 16  # bytes inflated at a time, and given to the inflater


def count_places(coded: Coded, count: int) -> int:
    """True entries of the mask (count,) that `encode_places` was given.

    Takes time by the payload's bytes, and memory of a fixed size besides them. Raises DamagedDelta
    for what can't be the head or the table of such a mask.
    """
    check(coded, count, PLACES)
    if coded.coding != "grid" and coded.params:
        raise damaged(coded, f"{len(coded.params)} params", "none")
    return _COUNTERS[coded.coding](coded, count)


def _count_none(coded: Coded, count: int) -> int:
    check_length(coded, 0)
    return count if coded.coding == "all" else 0


def _count_head(coded: Coded, count: int) -> int:
    return true_of(coded, count)[0]


def _count_bits(coded: Coded, count: int) -> int:
    starts = range(0, len(coded.payload), _PIECE)
    return _true_in(coded, (coded.payload[at : at + _PIECE] for at in starts), count)


def _count_zlib(coded: Coded, count: int) -> int:
    return _true_in(coded, _inflated(coded, (count + 7) // 8, alone=True), count)


def _count_grid(coded: Coded, count: int) -> int:
    """The side table has the number of each level, which the classes of rows and columns name."""
    rows = coded.params[0] if len(coded.params) == 1 else None
    if type(rows) is not int or not 0 < rows < count or count % rows:
        raise damaged(coded, "a number of rows that does not fit", f"a divisor of {count}")
    ends, width = rows + count // rows, bytes_below(count)
    seen, tail, done = np.zeros((2, 256), np.int64), b"", 0
    for piece in _inflated(coded, ends + 256 * width):
        classes = np.frombuffer(piece, np.uint8)
        of_rows = max(rows - done, 0)
        of_both = max(ends - done, 0)
        seen[0] += np.bincount(classes[:of_rows], minlength=256)
        seen[1] += np.bincount(classes[of_rows:of_both], minlength=256)
        tail += piece[of_both:]
        done += len(piece)
    limit = MAX_COUNT.bit_length()
    if done < ends or seen[:, limit + 1 :].any():
        raise damaged(coded, f"{done} bytes of classes", f"{ends} up to {limit}")
    sizes = _sizes(*seen[:, : limit + 1].tolist())
    found = [int.from_bytes(tail[at : at + width], "little") for at in range(0, len(tail), width)]
    if len(tail) != width * len(sizes) or any(map(int.__gt__, found, sizes)):
        raise damaged(coded, f"{len(tail)} bytes of places in levels", "no more than fit")
    return sum(found)


def _sizes(rows: list[int], columns: list[int]) -> list[int]:
    """Entries of each level that occurs, ascending, from how often each class does."""
    found: dict[int, int] = {}
    for row, many in enumerate(rows):
        for column, more in enumerate(columns):
            if many and more:
                found[row + column] = found.get(row + column, 0) + many * more
    return [found[level] for level in sorted(found)]


def _true_in(coded: Coded, pieces: Iterable[bytes], count: int) -> int:
    """How many bits are set in the pieces of a mask's bits."""
    true = done = last = 0
    for piece in pieces:
        true += int.from_bytes(piece, "little").bit_count()
        done += len(piece)
        last = piece[-1] if piece else last
    if done != (count + 7) // 8:
        raise damaged(coded, f"{done} bytes of bits", f"{(count + 7) // 8}")
    if count % 8 and last >> count % 8:
        raise damaged(coded, "nonzero padding bits", "zeros")
    return true


def _inflated(coded: Coded, limit: int, alone: bool = False) -> Iterator[bytes]:
    """What the raw DEFLATE stream at the payload's start holds, at most `limit` bytes, in pieces.

    With `alone`, nothing may come after it. Raises DamagedDelta.
    """
    inflater, done = zlib.decompressobj(-15), 0
    for start in range(0, len(coded.payload), _PIECE):
        data = coded.payload[start : start + _PIECE]
        while not inflater.eof:
            try:
                piece = inflater.decompress(data, _PIECE)
            except zlib.error as error:
                raise damaged(coded, str(error), "a raw DEFLATE stream") from error
            data = inflater.unconsumed_tail
            if not piece and not data:
                break
            done += len(piece)
            if done > limit:
                raise damaged(coded, "a DEFLATE stream that goes on", f"at most {limit} bytes")
            yield piece
        if inflater.eof:
            rest = len(coded.payload) - min(start + _PIECE, len(coded.payload))
            rest += len(inflater.unused_data)
            if rest and alone:
                raise damaged(coded, f"{rest} bytes left over", "none")
            return
    raise damaged(coded, "a DEFLATE stream without its end", f"at most {limit} bytes in it")


_COUNTERS: dict[str, Callable[[Coded, int], int]] = {
    "none": _count_none,
    "all": _count_none,
    "bits": _count_bits,
    "rank": _count_head,
    "gaps": _count_head,
    "histogram": _count_head,
    "grid": _count_grid,
    "zlib": _count_zlib,
}
