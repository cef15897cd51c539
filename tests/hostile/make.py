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
from pathlib import Path
from typing import Any

import safetensors

from howfine import container, folded

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
    for number in range(count):
        if number % 2:
            kind = rng.choice((flip, flip_header, truncate, swap, repeat))
            yield kind.__name__, kind(data, rng)
        else:
            kind = rng.choice((lie_in_index, lie_in_header, lie_in_payload))
            yield kind.__name__, lied(data, kind, rng)


def lied(data: bytes, kind: Any, rng: random.Random) -> bytes:
    """A file with a lie in it and a checksum that fits."""
    body = body_of(data)
    if body is None:
        return put_together(*kind(*take_apart(data), rng))
    header, rows, payloads = folded.unfold(body)
    groups = {container.PLACES: b"".join(payloads)}
    if kind is not lie_in_payload:
        groups[container.INDEX] = container.pack_index(rows)
    header, groups = kind(header, groups, rng)
    if container.INDEX in groups:
        rows = json.loads(zlib.decompress(groups[container.INDEX]))
    # A lie in place of the fingerprint can't be folded.
    return container.assemble_folded(header, rows, groups[container.PLACES]) or flip(data, rng)


def body_of(data: bytes) -> bytes | None:
    """The one tensor of a good file that is folded, None for one that is flat."""
    return dict(safetensors.deserialize(data)).get(container.FOLDED, {"data": None})["data"]


def refolded(text: bytes, payloads: bytes) -> bytes:
    """A folded file with another text deflated in it, and a checksum that fits."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=folded.DICTIONARY)
    body = bytes(folded.BASE) + deflater.compress(text) + deflater.flush() + payloads
    return framed(folded._check(body) + body)


def framed(body: bytes) -> bytes:
    entry = {"dtype": "U8", "shape": [len(body)], "data_offsets": [0, len(body)]}
    table = json.dumps({"__metadata__": {"howfine": "2"}, "delta": entry}).encode()
    return len(table).to_bytes(8, "little") + table + body


def flattened(data: bytes) -> bytes:
    """A good folded file as it would be laid out if it were large."""
    header, rows, payloads = folded.unfold(bytes(body_of(data)))
    groups: dict[str, bytes] = {container.INDEX: container.pack_index(rows)}
    for row, payload in zip(rows, payloads, strict=True):
        group = container.group_of(row[2])
        groups[group] = groups.get(group, b"") + payload
    return put_together({"howfine": 2, **header}, groups)


def take_apart(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Header and groups of a good file that is flat."""
    header = container.parse_header(data)
    header.pop("check")
    return header, {n: bytes(t["data"]) for n, t in safetensors.deserialize(data)}


def put_together(header: dict[str, Any], groups: dict[str, bytes]) -> bytes:
    """A flat file of these parts whose checksum fits."""
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
        names = "gaps bits none all zlib fp32 fp16h int8 int3 steps sign nonsense"
        row[2] = rng.choice(names.split())
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


# Kept files, by name: the error that each ends in, and a part of its sentence.
FIXTURES = Path(__file__).parent
FORMS = {
    "empty": ("DamagedDelta", "0 bytes, with a header said to be of 0"),
    "truncated": ("DamagedDelta", "is truncated or altered"),
    "long-header": ("DamagedDelta", "with a header said to be of 4611686018427387904"),
    "newer": ("UnsupportedFormat", "format version 9"),
    "flipped": ("DamagedDelta", "a stream of coding 'gaps' is damaged"),
    "lying-shape": ("DamagedDelta", "more than any change of golden needs"),
    "unknown-coding": ("DamagedDelta", "found another coding, expected one of none, all"),
    "bomb": ("DamagedDelta", "not one whole deflated text of bounded size"),
    "wide-scale": ("DamagedDelta", "scale"),
    "foreign-path": ("DamagedDelta", "does not fit the base golden"),
}


def forms(masks: bytes, values: bytes) -> dict[str, bytes]:
    """The kept files, made of a good delta of masks and a good one of int8 values."""
    header, groups = take_apart(masks)
    rows = json.loads(zlib.decompress(groups[container.INDEX]))
    first = next(number for number, row in enumerate(rows) if row[2] == "gaps")

    def lying(column: int, value: Any) -> bytes:
        changed = [[*row] for row in rows]
        changed[first][column] = value
        return put_together(header, {**groups, container.INDEX: container.pack_index(changed)})

    start = sum(row[3] for row in rows[:first] if row[2] != "fp16")
    flipped = bytearray(groups[container.PLACES])
    flipped[start + rows[first][3] // 2] ^= 1
    bomb = zlib.compress(b"[" + b" " * (1 << 24) + b"]", 9)
    other, scaled = take_apart(values)
    scales = json.loads(zlib.decompress(scaled[container.INDEX]))
    scales[0][5] = 1e300
    return {
        "empty": b"",
        "truncated": masks[:-20],
        "long-header": (1 << 62).to_bytes(8, "little") + masks[8:],
        "newer": put_together({**header, "howfine": 9}, groups),
        "flipped": put_together(header, {**groups, container.PLACES: bytes(flipped)}),
        "lying-shape": lying(1, [1 << 20, 1 << 20]),
        "unknown-coding": lying(2, "gasp"),
        "bomb": put_together(header, {**groups, container.INDEX: bomb}),
        "wide-scale": put_together(
            other, {**scaled, container.INDEX: container.pack_index(scales)}
        ),
        "foreign-path": lying(0, "method/text.nowhere.weight"),
    }


def main() -> None:
    """Write the kept files: `cd tests && python -m hostile.make`, after golden.make."""
    golden = FIXTURES.parent / "golden"
    masks, values = (golden / f"{n}.delta.safetensors" for n in ("mask", "select-int8"))
    for name, data in forms(masks.read_bytes(), values.read_bytes()).items():
        (FIXTURES / f"{name}.safetensors").write_bytes(data)


if __name__ == "__main__":
    main()
