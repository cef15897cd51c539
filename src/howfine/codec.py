"""Coders for the two things a change is made of: places (a mask) and values.

Places are k True entries among n, in row-major order. No code for uniformly random masks can beat
log2 C(n, k) bits on average; a mask with structure may take far less. `encode_places` keeps the
smallest of

    none, all   no payload
    bits        the mask itself, eight entries a byte: right near k = n/2
    rank        up to 127 places: the set's number in an enumeration of all such sets (Cover 1973)
    gaps        distances between places, entropy coded under the geometric law of n and k
    histogram   the same under a stored law, for places that come in runs or bursts
    grid        gaps within classes of rows and columns, for a matrix whose rows or columns differ;
                its one param is the number of rows
    zlib        raw DEFLATE of bits, for masks that repeat

Whichever of True and False is rarer counts as a place; the stored head says which.

A gap is cut into a token (its octave and the leading bits in it) and the raw bits below, much as a
floating-point number is. Tokens and raw bits go onto one asymmetric-numeral-system stack (Duda
2013) in chunks, so that a decoder holds little more than the mask.

Only the padding after the last bit of a DEFLATE stream escapes the decoders: zlib hides it.
"""

# long: a coder and its decoder are read side by side.

from __future__ import annotations

import bisect
import itertools
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from constriction import stream

from howfine.errors import DamagedDelta, SettingError, near

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "sign")

_MAX_COUNT = 1 << 40  # gaps must fit two raw symbols of at most 24 bits
_RANK_LIMIT = 127  # big integers take milliseconds up to here
_CHUNK = 1 << 16  # gaps coded at a time; part of the format
_SPLIT = 16  # raw bits that go into one symbol; part of the format
_UNIT = 1 << 24  # constriction's probabilities are multiples of 2^-24
# What every stack lies on. An empty coder goes on giving symbols, from a state below 2^24; so
# whoever pops too much or too little does not end here. The coder needs most of these bits anyway.
_BOTTOM = 1 << 24
# Leading bits kept in a token: finer ones fit the geometric law better, coarser ones make a
# shorter table.
_FINE, _COARSE = 3, 2
# What one byte of a stored law can say: 0, then five significant bits at 16 powers of two.
_LEVELS = np.array([0] + [(16 + v % 16) << v // 16 for v in range(255)])

# Numbers as they lie in a file: torch dtype, integer of that width, the same in little-endian.
_RAW = {
    "fp32": (torch.float32, torch.int32, "<i4"),
    "fp16": (torch.float16, torch.int16, "<i2"),
    "bf16": (torch.bfloat16, torch.int16, "<i2"),
}

# Just below max / 127, whose multiple 127 would round to infinity.
_LARGEST = np.finfo(np.float32).max
_LARGEST_SCALE = {
    "int8": np.nextafter(_LARGEST / np.float32(127), np.float32(0)),
    "sign": _LARGEST,
}

Array = np.ndarray[Any, np.dtype[Any]]
_Symbols = tuple[Any, ...]  # int32 symbols and their law; alphabet sizes if the law is Uniform


@dataclass(frozen=True)
class Coded:
    """Coded places or values, and what a decoder needs besides their count."""

    coding: str
    params: tuple[int | float, ...]
    payload: bytes


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
    if count >= _MAX_COUNT:
        raise SettingError(f"a mask of {count} entries is too large, split it below {_MAX_COUNT}")
    flat = mask.detach().cpu().reshape(-1).numpy()
    true = int(np.count_nonzero(flat))
    if true in (0, count):
        return Coded("all" if true else "none", (), b"")
    plain, direct = _packed(flat), 2 * true <= count
    places = np.flatnonzero(flat if direct else ~flat)
    best = Coded("bits", (), plain)
    if len(places) <= _RANK_LIMIT:
        best = min(best, Coded("rank", (), _encode_rank(places, count, true)), key=_size)
    elif combinatorial_bits(count, true) < 8 * len(plain):
        best = min(best, Coded("gaps", (), _encode_gaps(places, count, true)), key=_size)
    histogram = _encode_histogram(places, count, true, _size(best))
    if histogram is not None:
        best = min(best, Coded("histogram", (), histogram), key=_size)
    grid = _encode_grid(flat, direct, mask.shape[0]) if mask.ndim > 1 else None
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
    _check(coded, count, _PLACES)
    if len(coded.params) != (coded.coding == "grid"):
        raise _damaged(
            coded, f"{len(coded.params)} params", "the number of rows of a grid, else none"
        )
    try:
        mask = _PLACES[coded.coding](coded, count)
    except MemoryError as error:
        raise _damaged(coded, f"{count} entries", "what this machine's memory holds") from error
    return torch.from_numpy(mask)


def encode_values(values: torch.Tensor, precision: str) -> Coded:
    """Float values of any shape in one of PRECISIONS.

    int8 is symmetric with scale max|x| / 127; sign stores x > 0 and the scale mean|x|, which is the
    best one in the least-squares sense (BitDelta, Liu et al. 2024).

    Raises SettingError for an unknown precision, a dtype that is not float, values beyond the
    precision's range, and NaN or infinity where a scale is taken.
    """
    if precision not in PRECISIONS:
        raise SettingError(f"unknown precision {precision!r}. {near(str(precision), PRECISIONS)}")
    if not values.is_floating_point():
        raise SettingError(f"values must be float, found {values.dtype}; convert them first")
    flat = values.detach().cpu().reshape(-1)
    if precision in _RAW:
        dtype, view, stored = _RAW[precision]
        _check_range(flat, precision, dtype)
        raw = flat.to(dtype).view(view).numpy().astype(stored)
        return Coded(precision, (), raw.tobytes())
    x = flat.to(torch.float32).numpy()
    if not np.isfinite(x).all():
        raise SettingError(
            f"{precision} needs finite values, found NaN or infinity among {x.size}; "
            "use fp32, or look for the step at which training diverged"
        )
    if precision == "sign":
        scale = np.float32(np.abs(x).mean(dtype=np.float64)) if x.size else np.float32(0)
        return Coded("sign", (float(scale),), _packed(x > 0))
    scale = np.minimum(np.abs(x).max(initial=0) / np.float32(127), _LARGEST_SCALE["int8"])
    # A scale that underflows to 0 stands for magnitudes below 1e-43.
    steps = np.rint(x / scale).clip(-127, 127) if scale else np.zeros_like(x)
    return Coded("int8", (float(scale),), steps.astype(np.int8).tobytes())


def decode_values(coded: Coded, count: int) -> torch.Tensor:
    """The float32 values (count,), as rounded by `encode_values`.

    Raises DamagedDelta if `coded` is not exactly `count` values.
    """
    _check(coded, count, PRECISIONS)
    if coded.coding in _RAW:
        dtype, _, stored = _RAW[coded.coding]
        _check_length(coded, count * np.dtype(stored).itemsize)
        if coded.params:
            raise _damaged(coded, f"{len(coded.params)} params", "none")
        raw = np.frombuffer(coded.payload, stored)
        return torch.from_numpy(raw.astype(stored.lstrip("<"))).view(dtype).to(torch.float32)
    scale = _scale(coded)
    if coded.coding == "sign":
        return torch.from_numpy(np.where(_unpacked(coded, coded.payload, count), scale, -scale))
    _check_length(coded, count)
    steps = np.frombuffer(coded.payload, np.int8)
    if count and steps.min() == -128:
        raise _damaged(coded, "the step -128", "steps in -127..127")
    return torch.from_numpy(steps * scale)


def _check_range(flat: torch.Tensor, precision: str, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    beyond = flat.abs() > limit
    if precision != "fp16":
        beyond &= flat.isfinite()
    if beyond.any():
        wider = {"fp16": "bf16 or fp32", "bf16": "fp32", "fp32": "smaller values"}[precision]
        raise SettingError(
            f"{precision} holds magnitudes up to {limit:g}, found {int(beyond.sum())} larger of "
            f"{flat.numel()}; use {wider}"
        )


def _scale(coded: Coded) -> np.float32:
    top = float(_LARGEST_SCALE[coded.coding])
    if len(coded.params) != 1:
        raise _damaged(coded, f"{len(coded.params)} params", "one scale")
    scale = coded.params[0]
    if type(scale) not in (int, float) or not 0 <= scale <= top or np.float32(scale) != scale:
        raise _damaged(coded, "a scale that is none", f"a float32 in 0..{top:g}")
    return np.float32(scale)


def _damaged(coded: Coded, found: str, expected: str) -> DamagedDelta:
    name = coded.coding if coded.coding in (*PRECISIONS, *_PLACES) else "unknown"
    return DamagedDelta(
        f"a stream of coding {name!r} is damaged: found {found}, expected {expected}; "
        "get the file again"
    )


def _check(coded: Coded, count: int, known: Any) -> None:
    if type(coded.coding) is not str or coded.coding not in known:
        raise _damaged(coded, "another coding", f"one of {', '.join(known)}")
    if type(coded.params) is not tuple or type(coded.payload) is not bytes:
        raise _damaged(coded, "params or payload of another type", "a tuple and bytes")
    if not isinstance(count, int) or not 0 <= count < _MAX_COUNT:
        raise _damaged(coded, "an impossible count of entries", f"an integer below {_MAX_COUNT}")


def _check_length(coded: Coded, expected: int) -> None:
    if len(coded.payload) != expected:
        raise _damaged(coded, f"{len(coded.payload)} bytes", f"{expected}")


def _size(coded: Coded) -> int:
    return len(coded.payload) + len(json.dumps([coded.coding, *coded.params]))


def _packed(flat: Array) -> bytes:
    return np.packbits(flat, bitorder="little").tobytes()


def _unpacked(coded: Coded, plain: bytes, count: int) -> Array:
    """The bool array (count,) in `plain`; DamagedDelta for another length or nonzero padding."""
    if len(plain) != (count + 7) // 8:
        raise _damaged(coded, f"{len(plain)} bytes of bits", f"{(count + 7) // 8}")
    if count % 8 and plain[-1] >> count % 8:
        raise _damaged(coded, "nonzero padding bits", "zeros")
    bits = np.unpackbits(np.frombuffer(plain, np.uint8), count=count, bitorder="little")
    return bits.view(np.bool_)


def _decode_bits(coded: Coded, count: int) -> Array:
    return _unpacked(coded, coded.payload, count)


def _decode_zlib(coded: Coded, count: int) -> Array:
    plain, rest = _inflate(coded, (count + 7) // 8)
    if rest:
        raise _damaged(coded, f"{len(rest)} bytes left over", "none")
    return _unpacked(coded, plain, count)


def _head(true: int, count: int) -> bytes:
    """Twice the rarer of True and False, plus 1 if that is False: seven bits a byte, lowest first,
    bit 7 in all but the last (LEB128)."""
    number = min(2 * true, 2 * (count - true) + 1)
    groups = range(0, number.bit_length(), 7)
    return bytes(number >> at & 127 | (at < groups[-1]) << 7 for at in groups)


def _true(coded: Coded, count: int) -> tuple[int, bytes]:
    """The number of True entries in the payload's head, and the rest of the payload."""
    length = next((i for i, byte in enumerate(coded.payload[:6], 1) if byte < 128), 0)
    number = sum((byte & 127) << 7 * i for i, byte in enumerate(coded.payload[:length]))
    true = count - number // 2 if number % 2 else number // 2
    if not 2 <= number <= count or _head(true, count) != coded.payload[:length]:
        raise _damaged(coded, f"{number // 2} places", f"1..{count // 2}")
    return true, coded.payload[length:]


def _encode_rank(places: Array, count: int, true: int) -> bytes:
    """The head, then Σ C(place_i, i) over i = 1, 2, …"""
    number = sum(math.comb(place, i) for i, place in enumerate(places.tolist(), 1))
    length = _bytes_below(math.comb(count, len(places)))
    return _head(true, count) + number.to_bytes(length, "little")


def _decode_rank(coded: Coded, count: int) -> Array:
    true, rest = _true(coded, count)
    few, direct = min(true, count - true), 2 * true <= count
    if few > _RANK_LIMIT:
        raise _damaged(coded, f"{few} places", f"1..{_RANK_LIMIT}")
    sets = math.comb(count, few)
    number = int.from_bytes(rest, "little")
    if len(rest) != _bytes_below(sets):
        raise _damaged(coded, f"a rank of {len(rest)} bytes", f"{_bytes_below(sets)}")
    if number >= sets:
        raise _damaged(coded, "a rank beyond the last", "one below C(n, k)")
    mask = np.full(count, not direct)
    place = count
    for i in range(few, 0, -1):
        # The largest place with C(place, i) ≤ what is left of the number.
        place = bisect.bisect_right(range(place), number, key=lambda p: math.comb(p, i)) - 1
        number -= math.comb(place, i)
        mask[place] = direct
    return mask


def _bytes_below(limit: int) -> int:
    """Bytes of the largest integer below `limit`."""
    return ((limit - 1).bit_length() + 7) // 8


def _encode_gaps(places: Array, count: int, true: int) -> bytes:
    """The head, then the stack."""
    symbols = _symbols(*_tokens(places, _FINE), _geometric(count, len(places)))
    return _head(true, count) + _written(symbols)


def _decode_gaps(coded: Coded, count: int) -> Array:
    true, rest = _true(coded, count)
    stack = _Stack(coded, rest)
    mask = stack.pop(count, true, _geometric(count, min(true, count - true)), _FINE)
    stack.close()
    return mask


def _encode_histogram(places: Array, count: int, true: int, limit: int) -> bytes | None:
    """The head, the law's length and one byte a token, then the stack.

    None where the entropy alone reaches `limit` bytes.
    """
    tokens, widths, raw = _tokens(places, _COARSE)
    counts = np.bincount(tokens)
    seen = counts[counts > 0]
    bits = float(seen @ np.log2(len(places) / seen)) + int(widths.sum())
    if bits / 8 + len(counts) >= limit:
        return None
    middles = (_LEVELS[1:] + _LEVELS[:-1]) / 2
    law = np.searchsorted(middles, counts * (_LEVELS[-1] / counts.max()))
    law = np.maximum(law, counts > 0).astype(np.uint8)
    head = _head(true, count) + bytes([len(law)]) + law.tobytes()
    return head + _written(_symbols(tokens, widths, raw, _model(_LEVELS[law])))


def _decode_histogram(coded: Coded, count: int) -> Array:
    true, rest = _true(coded, count)
    size = rest[0] if rest else 0
    law, rest = rest[1 : 1 + size], rest[1 + size :]
    if not size or len(law) != size or not law[-1] or size > len(_alphabet(count, _COARSE)[0]):
        raise _damaged(coded, "a law that is none", "its length and as many bytes, the last not 0")
    stack = _Stack(coded, rest)
    mask = stack.pop(count, true, _model(_LEVELS[np.frombuffer(law, np.uint8)]), _COARSE)
    stack.close()
    return mask


def _encode_grid(flat: Array, direct: bool, rows: int) -> bytes | None:
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
    symbols: list[_Symbols] = []
    for level in _present(*classes):
        part = flat[levels == level]
        true = int(np.count_nonzero(part))
        side.append(true.to_bytes(_bytes_below(flat.size), "little"))
        if 0 < true < part.size:
            places = np.flatnonzero(part if 2 * true <= part.size else ~part)
            symbols += _symbols(*_tokens(places, _FINE), _geometric(part.size, len(places)))
    return zlib.compress(b"".join(side), 9, -15) + _written(symbols)


def _decode_grid(coded: Coded, count: int) -> Array:
    rows = coded.params[0]
    if type(rows) is not int or not 0 < rows < count or count % rows:
        raise _damaged(coded, "a number of rows that does not fit", f"a divisor of {count}")
    ends, width = rows + count // rows, _bytes_below(count)
    side, rest = _inflate(coded, ends + 256 * width)
    classes = np.frombuffer(side[:ends], np.uint8)
    if len(classes) < ends or classes.max() > _MAX_COUNT.bit_length():
        raise _damaged(coded, f"{len(classes)} classes", f"{ends} up to {_MAX_COUNT.bit_length()}")
    levels = np.add.outer(classes[:rows], classes[rows:]).reshape(-1)
    present = _present(classes[:rows], classes[rows:])
    if len(side) != ends + width * len(present):
        raise _damaged(coded, f"{len(side)} bytes of classes", f"{ends + width * len(present)}")
    stack, mask = _Stack(coded, rest), np.empty(count, np.bool_)
    for at, level in zip(range(ends, len(side), width), present, strict=True):
        part, true = levels == level, int.from_bytes(side[at : at + width], "little")
        size = int(np.count_nonzero(part))
        if true > size:
            raise _damaged(coded, f"{true} places in a level of {size}", "no more than fit")
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


def _inflate(coded: Coded, limit: int) -> tuple[bytes, bytes]:
    """What a raw DEFLATE stream at the payload's start holds, and the rest of the payload."""
    inflater = zlib.decompressobj(-15)
    try:
        plain = inflater.decompress(coded.payload, limit + 1)
    except zlib.error as error:
        raise _damaged(coded, str(error), "a raw DEFLATE stream") from error
    if not inflater.eof:
        raise _damaged(coded, "a DEFLATE stream without its end", f"at most {limit} bytes in it")
    return plain, inflater.unused_data


def _tokens(places: Array, kept: int) -> tuple[Array, Array, Array]:
    """Gaps before `places` as tokens, widths of the raw bits, and raw bits.

    A gap keeps its leading 1 + `kept` bits; if it has `width` more, its token is
    (width << kept) + (gap >> width), so that tokens go up with gaps.
    """
    gaps = np.diff(places, prepend=-1) - 1
    octaves = np.frexp(gaps.astype(np.float64))[1].astype(np.int64)  # bit lengths, exactly
    widths = np.maximum(octaves - kept - 1, 0)
    return (widths << kept) + (gaps >> widths), widths, gaps & ((1 << widths) - 1)


def _alphabet(count: int, kept: int) -> tuple[Array, Array]:
    """Smallest gap, and width of the raw bits, of every token that a gap below `count` can have."""
    width = max((count - 1).bit_length() - kept - 1, 0)
    tokens = np.arange((width << kept) + (count - 1 >> width) + 1)
    widths = np.maximum((tokens >> kept) - 1, 0)
    return (tokens - (widths << kept)) << widths, widths


def _geometric(count: int, few: int) -> Any:
    """P(gap) = p (1 - p)^gap with p = few / count, summed over the gaps of each token.

    In 128-bit fixed point: every machine gets the same weights.
    """
    starts = _alphabet(count, _FINE)[0].tolist()
    power, step, tail = ((count - few) << 128) // count, 1, 1 << 128
    tails = [tail]
    for start, end in itertools.pairwise(starts):
        while step < end - start:
            power, step = power * power >> 128, 2 * step
        tail = tail * power >> 128
        tails.append(tail)
    weights = [(high - low) >> 92 for high, low in itertools.pairwise([*tails, 0])]
    return _model(np.array(weights))


def _model(weights: Array) -> Any:
    """constriction's categorical law with probabilities in the ratio of the integer `weights`.

    It takes floats, spreads what is left of 2^24 after one unit a symbol in proportion to them, and
    rounds down. These floats are integers that sum to just that: nothing is ever rounded, so the
    law is the same wherever it is computed.
    """
    weights = np.append(weights, 0)  # it wants two symbols; a law may have one
    free = _UNIT - len(weights)
    shares = weights * free // int(weights.sum())
    shares[shares.argmax()] += free - shares.sum()
    return stream.model.Categorical(shares.astype(np.float64), perfect=False)


def _symbols(tokens: Array, widths: Array, raw: Array, law: Any) -> list[_Symbols]:
    """What `_tokens` found as symbols, in the order in which `_Stack.pop` asks for them."""
    found: list[_Symbols] = []
    for start in range(0, len(tokens), _CHUNK):
        chunk = slice(start, start + _CHUNK)
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


def _written(symbols: list[_Symbols]) -> bytes:
    """The stack's little-endian words without the zero bytes at the end."""
    coder = stream.stack.AnsCoder(np.array([_BOTTOM], np.uint32))
    for part in reversed(symbols):
        coder.encode_reverse(*part)
    return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


@final
class _Stack:
    """Pops masks; `close` once there is none left."""

    def __init__(self, coded: Coded, written: bytes) -> None:
        if written[-1:] == b"\0":
            raise _damaged(coded, "zero bytes at the end", "none")
        words = np.frombuffer(written + bytes(-len(written) % 4), "<u4")
        self._coder = stream.stack.AnsCoder(words.astype(np.uint32))
        self._coded = coded

    def pop(self, count: int, true: int, law: Any, kept: int) -> Array:
        """The bool array (count,) of `true` True entries whose gaps come next."""
        few, direct = min(true, count - true), 2 * true <= count
        mask = np.full(count, not direct)
        starts, token_widths = _alphabet(count, kept)
        last = -1
        for done in range(0, few, _CHUNK):
            tokens = self._coder.decode(law, min(_CHUNK, few - done))
            if tokens.max() >= len(starts):
                raise _damaged(self._coded, "a gap of no meaning", f"gaps below {count}")
            gaps = starts[tokens]
            for some, shift, sizes in _cuts(token_widths[tokens]):
                symbols = self._coder.decode(stream.model.Uniform(), sizes)
                gaps[some] += symbols.astype(np.int64) << shift
            places = last + np.cumsum(gaps + 1)
            last = int(places[-1])
            if last >= count:
                raise _damaged(self._coded, f"a place at {last}", f"places below {count}")
            mask[places] = direct
        return mask

    def close(self) -> None:
        if self._coder.get_compressed().tolist() != [_BOTTOM]:
            raise _damaged(self._coded, "more or fewer bytes than its places take", "just them")


def _decode_none(coded: Coded, count: int) -> Array:
    _check_length(coded, 0)
    return np.full(count, coded.coding == "all")


_PLACES: dict[str, Callable[[Coded, int], Array]] = {
    "none": _decode_none,
    "all": _decode_none,
    "bits": _decode_bits,
    "rank": _decode_rank,
    "gaps": _decode_gaps,
    "histogram": _decode_histogram,
    "grid": _decode_grid,
    "zlib": _decode_zlib,
}
