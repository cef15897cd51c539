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

Record = dict[str, Any]


class Ledger:
    """A JSON-lines file of records with a `key`; the newest line of a key counts."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records().values())

    def records(self) -> dict[str, Record]:
        """Records by key. A last line cut short by a kill is left out."""
        if not self.path.exists():
            return {}
        found = {}
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the torn last line of a killed writer
                continue
            found[record["key"]] = record
        return found

    def add(self, record: Record) -> None:
        """Append one record; the whole line is on disk when this returns."""
        self.replace({**self.records(), record["key"]: record}.values())

    def replace(self, records: Iterable[Record]) -> None:
        """Write the records given, and nothing else, atomically."""
        lines = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
        container.write_atomically(self.path, lines.encode())


def pack_predictions(predictions: np.ndarray) -> str:
    """As a short text: int16 indices, float32 scores or vectors, or texts; deflated, base64."""
    if predictions.dtype.kind == "O" and isinstance(predictions[0], np.ndarray):
        vectors = np.stack(list(predictions)).astype(np.float32)
        data = zlib.compress(vectors.tobytes(), 9)
        return f"vectors{vectors.shape[1]}:{base64.b64encode(data).decode()}"
    if predictions.dtype.kind == "O":
        data = zlib.compress(json.dumps(predictions.tolist()).encode(), 9)
        return "text:" + base64.b64encode(data).decode()
    kind = np.float32 if predictions.dtype.kind == "f" else np.int16
    data = zlib.compress(predictions.astype(kind).tobytes(), 9)
    return np.dtype(kind).str + ":" + base64.b64encode(data).decode()


def unpack_predictions(text: str) -> np.ndarray:
    """The inverse of `pack_predictions`."""
    kind, _, data = text.partition(":")
    if kind.startswith("vectors"):
        values = np.frombuffer(zlib.decompress(base64.b64decode(data)), dtype=np.float32)
        return retrieval.as_objects(values.reshape(-1, int(kind.removeprefix("vectors"))))
    if kind == "text":
        return np.array(json.loads(zlib.decompress(base64.b64decode(data))), dtype=object)
    return np.frombuffer(zlib.decompress(base64.b64decode(data)), dtype=kind)
