"""Hostile delta files: what a broken disk, a bad transfer or an attacker makes of a good one.

mutants(data, seed) yields (kind, bytes): bit flips, truncations, swapped and repeated pieces;
and, with the checksum made right again, headers and indexes that lie about sizes, shapes,
codings and parameters, so that every check behind the checksum is reached too.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from typing import Any

import safetensors

from howfine import container

LIES: tuple[Any, ...] = (
    -1,
    0,
    1,
    7,
    2**31,
    2**40,
    2**63,
    1e308,
    float("nan"),
    "x",
    None,
    [],
    {},
    True,
)


def mutants(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` mutations of a delta file's bytes, half of them with a fitting checksum."""
    rng = random.Random(seed)
    header, groups = take_apart(data)
    for number in range(count):
        if number % 2:
            kind = rng.choice((flip, flip_header, truncate, swap, repeat))
            yield kind.__name__, kind(data, rng)
        else:
            kind = rng.choice((lie_in_index, lie_in_header, lie_in_payload))
            yield kind.__name__, put_together(*kind(header, groups, rng))


def take_apart(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Header and groups of a good file."""
    header = container.parse_header(data)
    header.pop("check")
    return header, {n: bytes(t["data"]) for n, t in safetensors.deserialize(data)}


def put_together(header: dict[str, Any], groups: dict[str, bytes]) -> bytes:
    """A file of these parts whose checksum fits."""
    header = dict(header)
    header["check"] = container.checksum(header, groups)
    return container.assemble(header, groups)


def flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_header(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    out[rng.randrange(8 + int.from_bytes(data[:8], "little"))] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def swap(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[b:] + data[a:b] + data[:a]


def repeat(data: bytes, rng: random.Random) -> bytes:
    cut = rng.randrange(len(data))
    return data[:cut] + data[rng.randrange(len(data)) :]


def lie_in_index(header: Any, groups: dict[str, bytes], rng: random.Random) -> tuple[Any, Any]:
    rows = json.loads(zlib.decompress(groups[container.INDEX]))
    row = rng.choice(rows)
    place = rng.randrange(len(row))
    if place == 1 and rng.random() < 0.7:
        row[1] = [rng.choice(LIES) for _ in range(rng.randrange(4))]
    elif rng.random() < 0.2:
        row.append(rng.choice(LIES))
    elif rng.random() < 0.2:
        rows.append(row)
    elif place == 2:
        row[2] = rng.choice(
            ("gaps", "bits", "none", "all", "zlib", "fp32", "int8", "sign", "nonsense")
        )
    else:
        row[place] = rng.choice(LIES)
    return header, {**groups, container.INDEX: container.pack_index(rows)}


def lie_in_header(header: Any, groups: dict[str, bytes], rng: random.Random) -> tuple[Any, Any]:
    lying = json.loads(json.dumps(header))
    key = rng.choice(list(lying))
    if isinstance(lying[key], dict) and lying[key] and rng.random() < 0.5:
        inner = rng.choice(list(lying[key]))
        lying[key][inner] = rng.choice(LIES)
    elif rng.random() < 0.2:
        del lying[key]
    else:
        lying[key] = rng.choice(LIES)
    return lying, groups


def lie_in_payload(header: Any, groups: dict[str, bytes], rng: random.Random) -> tuple[Any, Any]:
    name = rng.choice(list(groups))
    data = groups[name]
    width = {"fp32": 4, "fp16": 2, "bf16": 2}.get(name, 1)
    if rng.random() < 0.3:
        data = data[: rng.randrange(len(data) // width + 1) * width]
    elif rng.random() < 0.3:
        data = data + bytes(width * rng.randrange(1, 9))
    elif data:
        data = flip(data, rng)
    return header, {**groups, name: data}
