"""The delta file's outside: header, groups of bytes, checksum, atomic writing.

Readable without torch. docs/format.md is the page that says what MUST be where.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tempfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import safetensors

from howfine import folded
from howfine.errors import DamagedDelta, StorageError, UnsupportedFormat

FORMAT = 2
INDEX = "index"
PLACES = "places"
# Codings of values; each has a group of its own, all codings of places share one.
_OLD_GROUPS = ("fp32", "fp16", "bf16", "int8", "sign")
VALUE_GROUPS = (*_OLD_GROUPS, "int6", "int4", "int3", "int2", "steps", "fp16h")
# The one tensor of a folded file, and from which size on a file is laid out flat.
FOLDED, MOST_FOLDED = "delta", 1 << 16

# Group name -> safetensors dtype: values are stored as what they are, for any reader to see.
_DTYPES = {"fp32": ("F32", 4), "fp16": ("F16", 2), "bf16": ("BF16", 2), "int8": ("I8", 1)}
# Header keys whose values are plain text; the others' are JSON.
_PLAIN = ("base", "sha256", "kind", "check")
# A JSON header or index beyond this is not ours: reading stops before memory is spent on it.
_MAX_HEADER = 1 << 20
_MAX_INDEX = 1 << 24
_MAX_ENTRIES = 1 << 20


def write(path: Path, header: dict[str, Any], groups: dict[str, bytes]) -> int:
    """Write a file atomically (temporary file, fsync, rename) and return its bytes.

    It is folded where that makes a small file, else laid out flat.
    """
    rows = unpack_index(groups)
    data = None
    if sum(map(len, groups.values())) < 2 * MOST_FOLDED:
        data = assemble_folded(header, rows, _in_rows(rows, groups))
    if data is None or len(data) >= MOST_FOLDED:
        header = {"howfine": _needed(header, rows, groups), **header}
        header["check"] = checksum(header, groups)
        data = assemble(header, groups)
    return write_atomically(path, data)


def _needed(header: dict[str, Any], rows: list[list[Any]], groups: dict[str, bytes]) -> int:
    """The oldest format version that knows all of this, laid out flat."""
    known = {INDEX, PLACES, *_OLD_GROUPS} >= groups.keys() and all(row[0] for row in rows)
    return 1 if known and len(header["sha256"]) == 64 else FORMAT


def group_of(coding: str) -> str:
    """The group that payloads of a coding are joined in."""
    return coding if coding in VALUE_GROUPS else PLACES


def _in_rows(rows: list[list[Any]], groups: dict[str, bytes]) -> bytes:
    """The payloads of all groups in the index's order."""
    at, found = dict.fromkeys(groups, 0), []
    for _, _, coding, length, *_ in rows:
        group = group_of(coding)
        found.append(groups[group][at[group] : at[group] + length])
        at[group] += length
    return b"".join(found)


def assemble_folded(header: dict[str, Any], rows: list[list[Any]], payloads: bytes) -> bytes | None:
    """The bytes of a folded file, None where the header does not suit."""
    body = folded.fold(header, rows, payloads)
    if body is None:
        return None
    entry = {"dtype": "U8", "shape": [len(body)], "data_offsets": [0, len(body)]}
    table = _json({"__metadata__": {"howfine": str(FORMAT)}, FOLDED: entry}).encode()
    return len(table).to_bytes(8, "little") + table + body


def assemble(header: dict[str, Any], groups: dict[str, bytes]) -> bytes:
    """The bytes of a safetensors file: length, JSON, data.

    Written by hand, because the library writes metadata in no fixed order, and a file must not
    depend on chance. Wide dtypes come first, so that all data is aligned.
    """
    metadata = {key: value if key in _PLAIN else _json(value) for key, value in header.items()}
    table: dict[str, Any] = {"__metadata__": metadata}
    order = sorted(groups, key=lambda name: (-_DTYPES.get(name, ("U8", 1))[1], name))
    offset = 0
    for name in order:
        dtype, size = _DTYPES.get(name, ("U8", 1))
        end = offset + len(groups[name])
        table[name] = {"dtype": dtype, "shape": [(end - offset) // size]}
        table[name]["data_offsets"] = [offset, end]
        offset = end
    encoded = _json(table).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = b"".join(groups[name] for name in order)
    return len(encoded).to_bytes(8, "little") + encoded + data


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def write_atomically(path: Path, data: bytes) -> int:
    """All of `data` at `path`, or an error and what was there before.

    A link stays one: what it names is written. A file that is replaced keeps its permissions.
    """
    temporary = ""
    path = Path(os.path.realpath(path))
    try:
        if path.exists() and not path.is_file():  # renaming would put a file in a device's place
            raise OSError(errno.EINVAL, "it is there and no regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, _permissions(path))
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(
            f"{path} can't be written: {error.strerror or error}; nothing was left behind. Free "
            "some space, or choose another place"
        ) from error
    finally:
        if temporary:  # gone where it was renamed
            Path(temporary).unlink(missing_ok=True)
    return len(data)


def _permissions(path: Path) -> int:
    """Those of the file that is there, or else what the user's mask leaves a new one."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0o077)  # it can only be read by setting it: meanwhile to the strictest
    os.umask(mask)
    return 0o666 & ~mask


def read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(header, groups) of a file, its layout and checksum verified.

    The header of a folded file has 32 digits of the base's fingerprint. Raises DamagedDelta, or
    UnsupportedFormat for a newer format version.
    """
    try:
        with path.open("rb") as stream:
            header, start = _begun(path, stream)
            # Only now, as any file may be given here, also one of many gigabytes.
            tensors = safetensors.deserialize(start + stream.read())
    except OSError as error:
        raise _unreadable(path, error) from error
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise _not_whole(path, error) from None
    version = header["howfine"]
    groups = {name: bytes(tensor["data"]) for name, tensor in tensors}
    if version >= 2 and header.keys() == {"howfine"} and groups.keys() == {FOLDED}:
        try:
            return _unfolded(groups[FOLDED], version)
        except (ValueError, RecursionError) as error:
            raise _not_whole(path, error) from None
    stated = header.pop("check", None)
    if stated != checksum(header, groups):
        raise DamagedDelta(f"{path} was altered: its checksum does not fit; get a fresh copy")
    return header, groups


def _begun(path: Path, stream: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """The JSON header of a file of ours, and all bytes up to its end; no more are read.

    Raises as `read` does, or ValueError.
    """
    state = os.fstat(stream.fileno())
    start = stream.read(8)
    size = int.from_bytes(start, "little")
    whole = state.st_size if stat.S_ISREG(state.st_mode) else 8 + size  # a pipe has none
    if len(start) < 8 or size > min(_MAX_HEADER, whole - 8):
        raise ValueError(f"{whole} bytes, with a header said to be of {size}")
    start += stream.read(size)
    header = parse_header(start)
    version = header.get("howfine")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise DamagedDelta(f"{path} has no format version; it was not written by howfine")
    if version > FORMAT:
        raise UnsupportedFormat(
            f"{path} has format version {version}, this howfine reads up to {FORMAT}; "
            "upgrade howfine"
        )
    return header, start


def _data(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DamagedDelta:
    return DamagedDelta(
        f"{path} can't be read: {error.strerror or error}; expected a delta file "
        "(*.delta.safetensors)"
    )


def _not_whole(path: Path, error: Exception) -> DamagedDelta:
    return DamagedDelta(
        f"{path} is not a whole delta file ({str(error)[:120]}); it is truncated or altered: "
        "get a fresh copy"
    )


def _unfolded(body: bytes, version: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Header and groups as a flat file would have them."""
    header, rows, payloads = folded.unfold(body)
    joined: dict[str, list[bytes]] = {INDEX: [pack_index(rows)]}
    for row, payload in zip(rows, payloads, strict=True):
        joined.setdefault(group_of(str(row[2])), []).append(payload)
    groups = {group: b"".join(found) for group, found in joined.items()}
    return {"howfine": version, **header}, groups


def overhead(path: Path) -> dict[str, int]:
    """Bytes of a file that `read` accepts which are no payloads: header, index, and what else."""
    data = _data(path)
    header = 8 + int.from_bytes(data[:8], "little")
    groups = {name: bytes(tensor["data"]) for name, tensor in safetensors.deserialize(data)}
    if INDEX in groups:
        return {"header": header, "index": len(groups[INDEX])}
    index = folded.overhead(groups[FOLDED])
    return {"header": header, "checksum, base": folded.CHECK + folded.BASE, "index": index}


def is_delta(path: Path) -> bool:
    """Whether a file begins like a delta (its content is not checked)."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        start = stream.read(size) if size <= _MAX_HEADER else b""
        return start.startswith(b"{") and b'"howfine"' in start


def parse_header(data: bytes) -> dict[str, Any]:
    """The JSON header, checked to be ours; ValueError otherwise."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(_MAX_HEADER, len(data) - 8):
        raise ValueError(f"{len(data)} bytes, with a header said to be of {size}")
    outer = json.loads(data[8 : 8 + size])
    metadata = outer.get("__metadata__") if isinstance(outer, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("no howfine header")
    return {key: v if key in _PLAIN else json.loads(v) for key, v in metadata.items()}


def checksum(header: dict[str, Any], groups: dict[str, bytes]) -> str:
    """First 16 hex digits of SHA-256 over the header (without `check`) and the groups by name."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(groups):
        digest.update(f"{name}:{len(groups[name])}:".encode())
        digest.update(groups[name])
    return digest.hexdigest()[:16]


def pack_index(rows: list[list[Any]]) -> bytes:
    """The index as deflated JSON."""
    return zlib.compress(json.dumps(rows, separators=(",", ":")).encode(), 9)


def unpack_index(groups: dict[str, bytes]) -> list[list[Any]]:
    """The inverse of `pack_index`, never inflating beyond a fixed limit."""
    inflate = zlib.decompressobj()
    text = inflate.decompress(groups[INDEX], _MAX_INDEX)
    if not inflate.eof or inflate.unused_data:
        raise ValueError("the index is not one whole deflated text of bounded size")
    if sum(map(text.count, (b",", b"[", b"{"))) > _MAX_ENTRIES:  # each takes some 70 bytes, read
        raise ValueError(f"the index has more than {_MAX_ENTRIES:,} entries in its rows")
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError("the index is not a list")
    return rows
