"""Laws of symbols, and the asymmetric-numeral-system stack that their coders share.

Every law is made of integers alone, so that each machine finds the same one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from constriction import stream

from howfine.codec.coded import Array, Coded, damaged

CHUNK = 1 << 16  # symbols coded at a time; part of the format of gaps
_UNIT = 1 << 24  # constriction's probabilities are multiples of 2^-24
# What every stack lies on. An empty coder goes on giving symbols, from a state below 2^24; so
# whoever pops too much or too little does not end here. The coder needs most of these bits anyway.
_BOTTOM = 1 << 24
# What one byte of a stored law can say: 0, then five significant bits at 16 powers of two.
LEVELS = np.array([0] + [(16 + v % 16) << v // 16 for v in range(255)])

Symbols = tuple[Any, ...]  # int32 symbols and their law; alphabet sizes if the law is Uniform


def law_of(counts: Array) -> Array:
    """The levels, uint8 numbers in LEVELS, that are nearest to the ratio of integer `counts`.

    No symbol that occurs has level 0.
    """
    middles = (LEVELS[1:] + LEVELS[:-1]) / 2
    law = np.searchsorted(middles, counts * (LEVELS[-1] / counts.max()))
    return np.maximum(law, counts > 0).astype(np.uint8)


def shares(weights: Array) -> Array:
    """What `model` tells the coder: integers (k + 1,) in the ratio of the integer `weights` (k,).

    The coder takes floats, spreads what is left of 2^24 after one unit a symbol in proportion to
    them, and rounds down. These sum to just that: nothing is ever rounded, so the law is the same
    wherever it is computed.
    """
    weights = np.append(weights, 0)  # it wants two symbols; a law may have one
    free = _UNIT - len(weights)
    found = weights * free // int(weights.sum())
    found[found.argmax()] += free - found.sum()
    return found


def model(weights: Array) -> Any:
    """constriction's categorical law with probabilities in the ratio of the integer `weights`."""
    return stream.model.Categorical(shares(weights).astype(np.float64), perfect=False)


def bits(weights: Array) -> Array:
    """What each symbol of `model(weights)` costs, in bits (k,)."""
    return np.log2(_UNIT / (shares(weights)[:-1] + 1))


def written(symbols: list[Symbols]) -> bytes:
    """The stack's little-endian words without the zero bytes at the end."""
    coder = stream.stack.AnsCoder(np.array([_BOTTOM], np.uint32))
    for part in reversed(symbols):
        coder.encode_reverse(*part)
    return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


def opened(coded: Coded, stored: bytes) -> Any:
    """constriction's coder on what `written` gave. DamagedDelta for zero bytes at the end."""
    if stored[-1:] == b"\0":
        raise damaged(coded, "zero bytes at the end", "none")
    words = np.frombuffer(stored + bytes(-len(stored) % 4), "<u4")
    return stream.stack.AnsCoder(words.astype(np.uint32))


def popped(coded: Coded, coder: Any, law: Any, count: int) -> Array:
    """`count` symbols, int8, of an alphabet of at most 128.

    Memory grows with what was there to decode: a coder that has run dry is found out at the next
    chunk. Raises DamagedDelta.
    """
    found = []
    for done in range(0, count, CHUNK):
        found.append(coder.decode(law, min(CHUNK, count - done)).astype(np.uint8))
        if coder.num_words() < 2 and coder.get_compressed().tolist() < [_BOTTOM]:
            raise damaged(coded, f"symbols that end before {count}", "as many as entries")
    return np.concatenate([np.empty(0, np.uint8), *found])


def close(coded: Coded, coder: Any) -> None:
    """Raises DamagedDelta unless all that was pushed is popped."""
    if coder.get_compressed().tolist() != [_BOTTOM]:
        raise damaged(coded, "more or fewer bytes than its entries take", "just them")
