"""Ledger: finished runs as JSON lines, one a run, that a stop can't tear."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from howfine import container, retrieval
from howfine.errors import SettingError

Record = dict[str, Any]


class Ledger:
    """A JSON-lines file of records with a `key`; the newest line of a key counts."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records().values())

    def records(self) -> dict[str, Record]:
        """Records by key. A last line cut short by a kill is left out.

        Raises SettingError for any other line that is no record.
        """
        if not self.path.exists():
            return {}
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError as error:
            raise SettingError(
                f"{self.path} can't be read: {error.strerror or error}; expected a file of "
                "records, one a line: take away what is there instead"
            ) from error
        found = {}
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = _record(line)
            except (ValueError, RecursionError) as error:
                if number == len(lines) and isinstance(error, json.JSONDecodeError):
                    continue  # the torn last line of a killed writer, without its end
                raise SettingError(
                    f"{self.path}, line {number}, is no record of a run ({error}); expected a JSON "
                    "object with a key: take that line out, and run again what it was of"
                ) from error
            found[record["key"]] = record
        return found

    def add(self, record: Record) -> None:
        """Append one record; the whole line is on disk when this returns."""
        self.replace({**self.records(), record["key"]: record}.values())

    def replace(self, records: Iterable[Record]) -> None:
        """Write the records given, and nothing else, atomically."""
        lines = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
        container.write_atomically(self.path, lines.encode())


def _record(line: bytes) -> Record:
    """Raises ValueError for what is no JSON object with a key."""
    record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict) or not isinstance(record.get("key"), str):
        raise ValueError(f"found {record!r:.40}")
    return record


def pack_predictions(predictions: np.ndarray) -> str:
    """As a short text: indices, float32 scores or vectors, or texts; deflated, base64.

    Indices are int16 where all fit, else int64.
    """
    if predictions.dtype.kind == "O" and isinstance(predictions[0], np.ndarray):
        vectors = np.stack(list(predictions)).astype(np.float32)
        data = zlib.compress(vectors.tobytes(), 9)
        return f"vectors{vectors.shape[1]}:{base64.b64encode(data).decode()}"
    if predictions.dtype.kind == "O":
        data = zlib.compress(json.dumps(predictions.tolist()).encode(), 9)
        return "text:" + base64.b64encode(data).decode()
    short = predictions.astype(np.float32 if predictions.dtype.kind == "f" else np.int16)
    if short.dtype.kind == "i" and not np.array_equal(short, predictions):
        short = predictions.astype(np.int64)
    data = zlib.compress(short.tobytes(), 9)
    return short.dtype.str + ":" + base64.b64encode(data).decode()


def unpack_predictions(text: str) -> np.ndarray:
    """The inverse of `pack_predictions`. Raises ValueError for what that can't have made."""
    try:
        return _unpacked(text)
    except (zlib.error, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _unpacked(text: str) -> np.ndarray:
    kind, _, data = text.partition(":")
    if kind.startswith("vectors"):
        values = np.frombuffer(zlib.decompress(base64.b64decode(data)), dtype=np.float32)
        return retrieval.as_objects(values.reshape(-1, int(kind.removeprefix("vectors"))))
    if kind == "text":
        return np.array(json.loads(zlib.decompress(base64.b64decode(data))), dtype=object)
    return np.frombuffer(zlib.decompress(base64.b64decode(data)), dtype=kind)
