"""What is coded, and what its coders share: checks, packed bits, counts."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from howfine.errors import DamagedDelta

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int6", "int4", "int3", "int2", "sign")
# Codings of values: those as they are, named like the precision, and two by their entropy.
VALUES = (*PRECISIONS, "steps", "fp16h")
PLACES = ("none", "all", "bits", "rank", "gaps", "histogram", "grid", "zlib")

MAX_COUNT = 1 << 40  # gaps must fit two raw symbols of at most 24 bits

_BLOCK = 1 << 20  # numbers packed at a time, a multiple of 8: bounds what their bits take

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Coded:
    """Coded places or values, and what a decoder needs besides their count."""

    coding: str
    params: tuple[int | float, ...]
    payload: bytes


def damaged(coded: Coded, found: str, expected: str) -> DamagedDelta:
    """The error for a stream; of its coding it says no more than a known name."""
    name = coded.coding if coded.coding in (*VALUES, *PLACES) else "unknown"
    return DamagedDelta(
        f"a stream of coding {name!r} is damaged: found {found}, expected {expected}; "
        "get the file again"
    )


def check(coded: Coded, count: int, known: tuple[str, ...]) -> None:
    """Raises DamagedDelta where the coding is not known, or a part is of another type."""
    if type(coded.coding) is not str or coded.coding not in known:
        raise damaged(coded, "another coding", f"one of {', '.join(known)}")
    if type(coded.params) is not tuple or type(coded.payload) is not bytes:
        raise damaged(coded, "params or payload of another type", "a tuple and bytes")
    if not isinstance(count, int) or not 0 <= count < MAX_COUNT:
        raise damaged(coded, "an impossible count of entries", f"an integer below {MAX_COUNT}")


def check_length(coded: Coded, expected: int) -> None:
    """Raises DamagedDelta where the payload has not so many bytes."""
    if len(coded.payload) != expected:
        raise damaged(coded, f"{len(coded.payload)} bytes", f"{expected}")


def packed(flat: Array) -> bytes:
    """A bool array (count,) as bits, eight entries a byte, the first one lowest."""
    return np.packbits(flat, bitorder="little").tobytes()


def unpacked(coded: Coded, plain: bytes, count: int) -> Array:
    """The bool array (count,) in `plain`; DamagedDelta for another length or nonzero padding."""
    if len(plain) != (count + 7) // 8:
        raise damaged(coded, f"{len(plain)} bytes of bits", f"{(count + 7) // 8}")
    if count % 8 and plain[-1] >> count % 8:
        raise damaged(coded, "nonzero padding bits", "zeros")
    bits = np.unpackbits(np.frombuffer(plain, np.uint8), count=count, bitorder="little")
    return bits.view(np.bool_)


def bits_packed(numbers: Array, width: int) -> bytes:
    """Unsigned integers below 2^width ≤ 2^16, `width` bits each, the first one lowest."""
    found = []
    for start in range(0, len(numbers), _BLOCK):
        octets = numbers[start : start + _BLOCK, None].astype("<u2").view(np.uint8)
        bits = np.unpackbits(octets, axis=1, count=width, bitorder="little")
        found.append(np.packbits(bits, bitorder="little").tobytes())
    return b"".join(found)


def bits_unpacked(coded: Coded, plain: bytes, count: int, width: int) -> Array:
    """The inverse of `bits_packed`: uint16 (count,). DamagedDelta as for `unpacked`."""
    if len(plain) != (count * width + 7) // 8:
        raise damaged(coded, f"{len(plain)} bytes of bits", f"{(count * width + 7) // 8}")
    if count * width % 8 and plain[-1] >> count * width % 8:
        raise damaged(coded, "nonzero padding bits", "zeros")
    found, stored = np.zeros(count, "<u2"), np.frombuffer(plain, np.uint8)
    for start in range(0, count, _BLOCK):
        some = min(_BLOCK, count - start)
        part = stored[start * width // 8 :][: (some * width + 7) // 8]
        bits = np.unpackbits(part, count=some * width, bitorder="little").reshape(some, width)
        octets = np.packbits(bits, axis=1, bitorder="little")
        found[start : start + some].view(np.uint8).reshape(some, 2)[:, : octets.shape[1]] = octets
    return found.astype(np.uint16)


def head_of(true: int, count: int) -> bytes:
    """Twice the rarer of True and False, plus 1 if that is False: seven bits a byte, lowest first,
    bit 7 in all but the last (LEB128)."""
    number = min(2 * true, 2 * (count - true) + 1)
    groups = range(0, number.bit_length(), 7)
    return bytes(number >> at & 127 | (at < groups[-1]) << 7 for at in groups)


def true_of(coded: Coded, count: int) -> tuple[int, bytes]:
    """The number of True entries in the payload's head, and the rest of the payload."""
    length = next((i for i, byte in enumerate(coded.payload[:6], 1) if byte < 128), 0)
    number = sum((byte & 127) << 7 * i for i, byte in enumerate(coded.payload[:length]))
    true = count - number // 2 if number % 2 else number // 2
    if not 2 <= number <= count or head_of(true, count) != coded.payload[:length]:
        raise damaged(coded, f"{number // 2} places", f"1..{count // 2}")
    return true, coded.payload[length:]


def bytes_below(limit: int) -> int:
    """Bytes of the largest integer below `limit`."""
    return ((limit - 1).bit_length() + 7) // 8


def inflated(coded: Coded, limit: int) -> tuple[bytes, bytes]:
    """What a raw DEFLATE stream at the payload's start holds, and the rest of the payload."""
    inflater = zlib.decompressobj(-15)
    try:
        plain = inflater.decompress(coded.payload, limit + 1)
    except zlib.error as error:
        raise damaged(coded, str(error), "a raw DEFLATE stream") from error
    if not inflater.eof:
        raise damaged(coded, "a DEFLATE stream without its end", f"at most {limit} bytes in it")
    return plain, inflater.unused_data
