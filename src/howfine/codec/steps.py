"""Coders of steps (small signed integers) and of half-precision floats, by their entropy.

A law of steps takes two bytes, or more where a table fits so much better that it pays.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from howfine.codec.ans import LEVELS, close, law_of, model, opened, popped, written
from howfine.codec.coded import Array, Coded, bits_packed, bits_unpacked, damaged
from howfine.codec.gaps import alphabet

MOST_STEP = 127
# Numbers of laws; part of the format. First the two-sided laws with one parameter, then tables
# whose steps share an entry if their magnitudes have these leading bits (besides the first) alike.
_NORMAL, _GEOMETRIC = 136, 112
_TABLES = (1, 2, 3, 7)
_ONE = 31  # bits after the point of the numbers that make laws of one parameter
# Leading bits of the mantissa that are entropy coded with the exponent; 10 less those are raw.
_HALVES = (0, 1, 2)


def entropy_bits(steps: Any) -> float:
    """Σ n_i log2(n / n_i) over the distinct values of an array or tensor: its empirical entropy.

    In bits, of all entries together; no code that treats entries alike and must say its law can
    take fewer.
    """
    counts = np.unique(np.asarray(steps), return_counts=True)[1]
    return float(counts @ np.log2(counts.sum() / counts)) if counts.size else 0.0


def encode_steps(steps: Array, limit: int) -> bytes | None:
    """int8 steps (count,), count > 0: largest magnitude, law, stack. None from `limit` bytes on."""
    most = int(np.abs(steps.astype(np.int16)).max())
    if not most:
        return b"\0"
    shifted = steps.astype(np.int32) + most
    counts = np.bincount(shifted, minlength=2 * most + 1)
    law, bits = min(_laws(counts, most), key=lambda pair: 8 * len(pair[0]) + pair[1])
    if len(law) + 1 + bits / 8 >= limit:
        return None
    found = bytes([most]) + law + written([(shifted, model(_weights(law, most)))])
    return found if len(found) < limit else None


def decode_steps(coded: Coded, stored: bytes, count: int) -> Array:
    """The int8 steps (count,) that `encode_steps` was given."""
    if not stored or stored[0] > MOST_STEP:
        raise damaged(coded, "no largest step", f"one in 0..{MOST_STEP}")
    most = stored[0]
    if not most:
        if len(stored) != 1:
            raise damaged(coded, f"{len(stored)} bytes for zeros", "1")
        return np.zeros(count, np.int8)
    law = stored[1 : 2 + _entries(stored[1], most)] if len(stored) > 1 else b""
    if not law or len(law) != 1 + _entries(law[0], most):
        raise damaged(coded, "a law that is none", "its number and as many bytes as it has entries")
    weights = _weights(law, most)
    if not weights.any():
        raise damaged(coded, "a law without weight", "one of some step")
    coder = opened(coded, stored[1 + len(law) :])
    found = popped(coded, coder, model(weights), count)
    close(coded, coder)
    if found.max(initial=0) > 2 * most:
        raise damaged(coded, "a step of no meaning", f"steps in -{most}..{most}")
    return (found.astype(np.int16) - most).astype(np.int8)


def _laws(counts: Array, most: int) -> list[tuple[bytes, float]]:
    """(law, bits of all steps) of the best law with one parameter, and of every table."""
    magnitudes = counts[most:] + np.append(0, counts[:most][::-1])
    bits = _prices(most) @ magnitudes
    found = [(bytes([bits.argmin()]), float(bits.min()))]
    for number in range(_NORMAL + _GEOMETRIC, 256):
        buckets = _buckets(number, most)
        law = bytes([number]) + law_of(np.bincount(buckets, counts).astype(np.int64)).tobytes()
        found.append((law, float(_bits(_weights(law, most)) @ counts)))
    return found


def _bits(weights: Array) -> Array:
    """What a symbol costs under `model`, nearly: it gives each one unit of 2^24 in advance."""
    shares = weights / weights.sum(-1, keepdims=True) + 2.0**-24
    return -np.log2(shares)


def _entries(number: int, most: int) -> int:
    """Bytes of a law after its number."""
    return 0 if number < _NORMAL + _GEOMETRIC else int(_buckets(number, most).max()) + 1


def _weights(law: bytes, most: int) -> Array:
    """Integer weights of the steps -most..most under a law."""
    if law[0] < _NORMAL + _GEOMETRIC:
        half = _half_laws(most)[law[0]]
        return np.concatenate([half[:0:-1], half])
    buckets = _buckets(law[0], most)
    levels = LEVELS[np.frombuffer(law, np.uint8, offset=1)] << 10
    return (levels // np.bincount(buckets))[buckets]


def _buckets(number: int, most: int) -> Array:
    """Which entry of a table each of the steps -most..most shares."""
    signed, kept = divmod(number - _NORMAL - _GEOMETRIC, len(_TABLES))
    steps = np.arange(-most, most + 1)
    starts = alphabet(most + 1, _TABLES[kept])[0]
    tokens = np.searchsorted(starts, np.abs(steps), side="right") - 1
    return np.sign(steps) * tokens + tokens.max() if signed else tokens


@lru_cache(4)
def _half_laws(most: int) -> Array:
    """Weights (law, magnitude 0..most) of all laws with one parameter, in integers below 2^32.

    With q = s / (s + 1): q^(k^2), a Gaussian of variance about s / 2, for s in eighths of octaves
    from 1/16; then q^k for s from 1/256. Both are products of ratios: each is the one before,
    times q^2 or 1.
    """
    scales = [(8 + v % 8) << v // 8 for v in range(_NORMAL)]
    ratios = [(s << _ONE) // (s + 128) for s in scales]
    factors = [ratio * ratio >> _ONE for ratio in ratios]
    scales = [(8 + v % 8) << v // 8 for v in range(_GEOMETRIC)]
    ratio = np.array(ratios + [(s << _ONE) // (s + 2048) for s in scales])
    factor = np.array(factors + [1 << _ONE] * _GEOMETRIC)
    weight = np.full(len(ratio), 1 << _ONE)
    columns = [weight]
    for _ in range(most):
        weight = weight * ratio >> _ONE
        ratio = ratio * factor >> _ONE
        columns.append(weight)
    return np.stack(columns, axis=1)


@lru_cache(4)
def _prices(most: int) -> Array:
    """What a step of each magnitude costs under each law with one parameter, in bits."""
    half = _half_laws(most)
    return _bits(np.concatenate([half, half[:, 1:]], axis=1))[:, : most + 1]


def encode_halves(halves: Array, limit: int) -> bytes | None:
    """uint16 patterns of float16 (count,): kept bits, first token, tokens, levels, raw bits, stack.

    A token is a number's exponent and the kept leading bits of its mantissa; raw are the mantissa's
    other bits and, above them, the sign. None where no choice gets below `limit` bytes.
    """
    best: tuple[float, bytes, int, int] | None = None
    for kept in _HALVES:
        counts = np.bincount((halves & 0x7FFF) >> 10 - kept)
        low = int(np.flatnonzero(counts)[0])
        law = law_of(counts[low:])
        bits = float(_bits(LEVELS[law]) @ counts[low:])
        size = 3 + len(law) + (len(halves) * (11 - kept) + bits) / 8
        if size < (best[0] if best else limit):
            best = size, law.tobytes(), kept, low
    if best is None:
        return None
    _, stored, kept, low = best
    tokens = ((halves & 0x7FFF) >> 10 - kept).astype(np.int32) - low
    raw = halves & (1 << 10 - kept) - 1 | halves >> 15 << 10 - kept
    weights = LEVELS[np.frombuffer(stored, np.uint8)]
    head = bytes([kept, low, len(stored) - 1]) + stored
    found = head + bits_packed(raw, 11 - kept) + written([(tokens, model(weights))])
    return found if len(found) < limit else None


def decode_halves(coded: Coded, count: int) -> Array:
    """The uint16 patterns (count,) that `encode_halves` was given."""
    kept, low, more = coded.payload[:3] if len(coded.payload) > 3 else (3, 0, 0)
    law, rest = coded.payload[3 : 4 + more], coded.payload[4 + more :]
    if kept not in _HALVES or len(law) != more + 1 or low + more >= 32 << kept or not any(law):
        raise damaged(coded, "a law that is none", "one of float16's exponents")
    size = (count * (11 - kept) + 7) // 8
    raw = bits_unpacked(coded, rest[:size], count, 11 - kept)
    coder = opened(coded, rest[size:])
    tokens = popped(coded, coder, model(LEVELS[np.frombuffer(law, np.uint8)]), count)
    close(coded, coder)
    if tokens.max(initial=0) > more:
        raise damaged(coded, "an exponent of no meaning", f"{more + 1} of them")
    found = (tokens.astype(np.uint16) + np.uint16(low)) << np.uint16(10 - kept)
    sign = raw >> np.uint16(10 - kept) << np.uint16(15)
    return found | raw & np.uint16((1 << 10 - kept) - 1) | sign
