"""Coders of places by their gaps: tokens and raw bits on one asymmetric-numeral-system stack."""

from __future__ import annotations

import itertools
import zlib
from typing import Any, final

import numpy as np
from constriction import stream

from howfine.codec.ans import (
    CHUNK,
    LEVELS,
    Symbols,
    close,
    law_of,
    model,
    opened,
    written,
)
from howfine.codec.coded import (
    MAX_COUNT,
    Array,
    Coded,
    bytes_below,
    damaged,
    head_of,
    inflated,
    true_of,
)

_SPLIT = 16  # raw bits that go into one symbol; part of the format
# Leading bits kept in a token: finer ones fit the geometric law better, coarser ones make a
# shorter table.
_FINE, _COARSE = 3, 2


def encode_gaps(places: Array, count: int, true: int) -> bytes:
    """The head, then the stack."""
    symbols = _symbols(*_tokens(places, _FINE), _geometric(count, len(places)))
    return head_of(true, count) + written(symbols)


def decode_gaps(coded: Coded, count: int) -> Array:
    """The bool array (count,) that `encode_gaps` had the places of."""
    true, rest = true_of(coded, count)
    stack = _Stack(coded, rest)
    mask = stack.pop(count, true, _geometric(count, min(true, count - true)), _FINE)
    stack.close()
    return mask


def encode_histogram(places: Array, count: int, true: int, limit: int) -> bytes | None:
    """The head, the law's length and one byte a token, then the stack.

    None where the entropy alone reaches `limit` bytes.
    """
    tokens, widths, raw = _tokens(places, _COARSE)
    counts = np.bincount(tokens)
    seen = counts[counts > 0]
    bits = float(seen @ np.log2(len(places) / seen)) + int(widths.sum())
    if bits / 8 + len(counts) >= limit:
        return None
    law = law_of(counts)
    head = head_of(true, count) + bytes([len(law)]) + law.tobytes()
    return head + written(_symbols(tokens, widths, raw, model(LEVELS[law])))


def decode_histogram(coded: Coded, count: int) -> Array:
    """The bool array (count,) that `encode_histogram` had the places of."""
    true, rest = true_of(coded, count)
    size = rest[0] if rest else 0
    law, rest = rest[1 : 1 + size], rest[1 + size :]
    if not size or len(law) != size or not law[-1] or size > len(alphabet(count, _COARSE)[0]):
        raise damaged(coded, "a law that is none", "its length and as many bytes, the last not 0")
    stack = _Stack(coded, rest)
    mask = stack.pop(count, true, model(LEVELS[np.frombuffer(law, np.uint8)]), _COARSE)
    stack.close()
    return mask


def encode_grid(flat: Array, direct: bool, rows: int) -> bytes | None:
    """Deflated: a class for each row and column, then the number of True entries of each level.
    After it the stack with the gaps of each level. None where neither rows nor columns differ.

    An entry's level is its row's class plus its column's: about the log2 of its chance to be a
    place, if rows and columns act independently.
    """
    grid = (flat if direct else ~flat).reshape(rows, -1)
    classes = [_classes(np.count_nonzero(grid, axis=axis), grid.shape[axis]) for axis in (1, 0)]
    if not any(found.any() for found in classes):
        return None
    levels = np.add.outer(*classes).reshape(-1)
    side = [found.tobytes() for found in classes]
    symbols: list[Symbols] = []
    for level in _present(*classes):
        part = flat[levels == level]
        true = int(np.count_nonzero(part))
        side.append(true.to_bytes(bytes_below(flat.size), "little"))
        if 0 < true < part.size:
            places = np.flatnonzero(part if 2 * true <= part.size else ~part)
            symbols += _symbols(*_tokens(places, _FINE), _geometric(part.size, len(places)))
    return zlib.compress(b"".join(side), 9, -15) + written(symbols)


def decode_grid(coded: Coded, count: int) -> Array:
    """The bool array (count,) that `encode_grid` was given."""
    rows = coded.params[0]
    if type(rows) is not int or not 0 < rows < count or count % rows:
        raise damaged(coded, "a number of rows that does not fit", f"a divisor of {count}")
    ends, width = rows + count // rows, bytes_below(count)
    side, rest = inflated(coded, ends + 256 * width)
    classes = np.frombuffer(side[:ends], np.uint8)
    if len(classes) < ends or classes.max() > MAX_COUNT.bit_length():
        raise damaged(coded, f"{len(classes)} classes", f"{ends} up to {MAX_COUNT.bit_length()}")
    levels = np.add.outer(classes[:rows], classes[rows:]).reshape(-1)
    present = _present(classes[:rows], classes[rows:])
    if len(side) != ends + width * len(present):
        raise damaged(coded, f"{len(side)} bytes of classes", f"{ends + width * len(present)}")
    stack, mask = _Stack(coded, rest), np.empty(count, np.bool_)
    for at, level in zip(range(ends, len(side), width), present, strict=True):
        part, true = levels == level, int.from_bytes(side[at : at + width], "little")
        size = int(np.count_nonzero(part))
        if true > size:
            raise damaged(coded, f"{true} places in a level of {size}", "no more than fit")
        law = _geometric(size, min(true, size - true)) if 0 < true < size else None
        mask[part] = stack.pop(size, true, law, _FINE)
    stack.close()
    return mask


def _present(rows: Array, columns: Array) -> list[int]:
    """The levels that occur, in ascending order."""
    return np.unique(np.add.outer(np.unique(rows), np.unique(columns))).tolist()


def _classes(counts: Array, size: int) -> Array:
    """Bit lengths of the places in each row (or column) of `size`; all 0 if they hardly differ.

    Chance alone gives the counts a binomial variance. Below four times that, a class says less than
    it takes to store: it saves (variance / chance - 1) / (2 ln 2) bits and takes about two.
    """
    chance = counts.mean() * (1 - counts.mean() / size)
    if counts.var() <= 4 * chance:
        return np.zeros(len(counts), np.uint8)
    return np.frexp(counts.astype(np.float64))[1].astype(np.uint8)


def _tokens(places: Array, kept: int) -> tuple[Array, Array, Array]:
    """Gaps before `places` as tokens, widths of the raw bits, and raw bits.

    A gap keeps its leading 1 + `kept` bits; if it has `width` more, its token is
    (width << kept) + (gap >> width), so that tokens go up with gaps.
    """
    gaps = np.diff(places, prepend=-1) - 1
    octaves = np.frexp(gaps.astype(np.float64))[1].astype(np.int64)  # bit lengths, exactly
    widths = np.maximum(octaves - kept - 1, 0)
    return (widths << kept) + (gaps >> widths), widths, gaps & ((1 << widths) - 1)


def alphabet(count: int, kept: int) -> tuple[Array, Array]:
    """Smallest gap, and width of the raw bits, of every token that a gap below `count` can have."""
    width = max((count - 1).bit_length() - kept - 1, 0)
    tokens = np.arange((width << kept) + (count - 1 >> width) + 1)
    widths = np.maximum((tokens >> kept) - 1, 0)
    return (tokens - (widths << kept)) << widths, widths


def _geometric(count: int, few: int) -> Any:
    """P(gap) = p (1 - p)^gap with p = few / count, summed over the gaps of each token.

    In 128-bit fixed point: every machine gets the same weights.
    """
    starts = alphabet(count, _FINE)[0].tolist()
    power, step, tail = ((count - few) << 128) // count, 1, 1 << 128
    tails = [tail]
    for start, end in itertools.pairwise(starts):
        while step < end - start:
            power, step = power * power >> 128, 2 * step
        tail = tail * power >> 128
        tails.append(tail)
    weights = [(high - low) >> 92 for high, low in itertools.pairwise([*tails, 0])]
    return model(np.array(weights))


def _symbols(tokens: Array, widths: Array, raw: Array, law: Any) -> list[Symbols]:
    """What `_tokens` found as symbols, in the order in which `_Stack.pop` asks for them."""
    found: list[Symbols] = []
    for start in range(0, len(tokens), CHUNK):
        chunk = slice(start, start + CHUNK)
        found.append((tokens[chunk].astype(np.int32), law))
        for some, shift, sizes in _cuts(widths[chunk]):
            symbols = (raw[chunk][some] >> shift) % sizes
            found.append((symbols.astype(np.int32), stream.model.Uniform(), sizes))
    return found


def _cuts(widths: Array) -> list[tuple[Array, int, Array]]:
    """How raw bits become symbols: which gaps have one, its lowest bit, and alphabet sizes."""
    cuts = [(0, np.minimum(widths, _SPLIT)), (_SPLIT, widths - _SPLIT)]
    some = [(np.flatnonzero(width > 0), shift, width) for shift, width in cuts]
    return [(at, shift, (1 << width[at]).astype(np.int32)) for at, shift, width in some if at.size]


@final
class _Stack:
    """Pops masks; `close` once there is none left."""

    def __init__(self, coded: Coded, stored: bytes) -> None:
        self._coder = opened(coded, stored)
        self._coded = coded

    def pop(self, count: int, true: int, law: Any, kept: int) -> Array:
        """The bool array (count,) of `true` True entries whose gaps come next."""
        few, direct = min(true, count - true), 2 * true <= count
        mask = np.full(count, not direct)
        starts, token_widths = alphabet(count, kept)
        last = -1
        for done in range(0, few, CHUNK):
            tokens = self._coder.decode(law, min(CHUNK, few - done))
            if tokens.max() >= len(starts):
                raise damaged(self._coded, "a gap of no meaning", f"gaps below {count}")
            gaps = starts[tokens]
            for some, shift, sizes in _cuts(token_widths[tokens]):
                symbols = self._coder.decode(stream.model.Uniform(), sizes)
                gaps[some] += symbols.astype(np.int64) << shift
            places = last + np.cumsum(gaps + 1)
            last = int(places[-1])
            if last >= count:
                raise damaged(self._coded, f"a place at {last}", f"places below {count}")
            mask[places] = direct
        return mask

    def close(self) -> None:
        close(self._coded, self._coder)
