"""Look for pictures by what they show: a folder's directions, kept in an index between calls.

The index is of one delta and one folder, in the user's cache: a FAISS file of directions, and what
was known of each picture's file. A picture is encoded once, until its file changes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from howfine import checks, fingerprint
from howfine.base import Base
from howfine.container import write_atomically
from howfine.directions import Directions, Encoder, encoder
from howfine.errors import SettingError, TaskError
from howfine.images import SUFFIXES, Picture, fault

# Name of a file under the folder -> its state.
States = dict[str, str]


@dataclass(frozen=True)
class Found:
    """What a search gave."""

    # Of each query, the best pictures: `path` and `similarity`, best first.
    hits: list[list[dict[str, Any]]]
    # Pictures in the index, those of them encoded now, and what was left out, by reason.
    pictures: int
    encoded: int
    left_out: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return dict(vars(self))


def search(
    delta: str | Path,
    queries: Sequence[str],
    folder: str | Path,
    base: Base | None = None,
    *,
    top: int = 10,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Found:
    """The pictures of a folder, and of those in it, that are likest to each of some texts.

    `delta` is a file that aligns two towers. The index is kept in `cache`, by default the user's.
    Raises TaskError for a folder without pictures or an empty query, SettingError for `top` below 1
    or without the package `faiss-cpu`, and as `howfine.directions.encoder` does.
    """
    if top < 1:
        raise SettingError(f"top is {top}, expected 1 or more pictures")
    checks.several("queries", queries)
    folder = Path(folder).expanduser()
    states = _states(folder)
    kept = _Index(Path(cache or fingerprint.cache_folder() / "search"), Path(delta), folder)
    with encoder(delta, base, progress=progress) as encode:
        asked = encode.texts(list(queries))
        encoded, left_out = kept.update(states, encode)
    return Found(kept.best(asked, top), len(kept.paths), encoded, left_out)


def _states(folder: Path) -> States:
    if not folder.is_dir():
        raise TaskError(f"there is no folder {folder}; name one that holds pictures")
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    found = {}
    for path in filter(Path.is_file, paths):
        state = path.stat()
        found[str(path.relative_to(folder))] = f"{state.st_size}:{state.st_mtime_ns}"
    if not found:
        raise TaskError(
            f"{folder} has no pictures; expected files that end in {', '.join(SUFFIXES)}"
        )
    return found


class _Index:
    """A folder's directions under one delta."""

    def __init__(self, cache: Path, delta: Path, folder: Path) -> None:
        told = f"{fingerprint.of_path(delta)}|{folder.resolve()}"
        self.stem, self.folder = cache / fingerprint.of_text(told)[:32], folder
        self.faiss = _faiss()
        # Rows of the index, in order, and states of all files, with why some have no row.
        self.paths: list[str] = []
        self.states: States = {}
        self.faults: dict[str, str] = {}
        self.rows = np.zeros((0, 0), np.float32)
        self._read()

    def _read(self) -> None:
        """What was kept; nothing where there is none, or it is torn."""
        table, vectors = self.stem.with_suffix(".json"), self.stem.with_suffix(".faiss")
        try:
            told = json.loads(table.read_text())
            index = self.faiss.deserialize_index(np.frombuffer(vectors.read_bytes(), np.uint8))
        except (OSError, ValueError, RuntimeError):  # no index yet, or a torn one: encode again
            return
        if not _whole(told) or told["check"] != fingerprint.of_file(vectors):
            return
        if index.ntotal == len(told["paths"]):
            self.paths, self.states, self.faults = told["paths"], told["states"], told["faults"]
            self.rows = index.reconstruct_n(0, index.ntotal)

    def update(self, states: States, encode: Encoder) -> tuple[int, dict[str, int]]:
        """Encode what is new, drop what is gone; (pictures encoded, those left out by reason)."""
        known = {path for path, state in self.states.items() if states.get(path) == state}
        pictures = [Picture(path, self.folder / path) for path in states if path not in known]
        faults = {picture.name: _named(picture) or fault(picture) for picture in pictures}
        fresh = [picture for picture in pictures if not faults[picture.name]]
        keep = [number for number, path in enumerate(self.paths) if path in known]
        parts = [self.rows[keep]] if keep else []
        parts += [encode.pictures(fresh)] if fresh else []
        if not parts:
            raise TaskError(f"none of {len(states)} pictures in {self.folder} can be used")
        self.rows = np.concatenate(parts)
        self.paths = [self.paths[n] for n in keep] + [picture.name for picture in fresh]
        self.faults = {path: why for path, why in self.faults.items() if path in known}
        self.faults |= {path: why for path, why in faults.items() if why}
        if fresh or states != self.states:
            self.states = states
            self._write()
        return len(fresh), dict(Counter(self.faults.values()))

    def _write(self) -> None:
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        vectors = self.stem.with_suffix(".faiss")
        write_atomically(vectors, self.faiss.serialize_index(self._filled()).tobytes())
        told = {"paths": self.paths, "states": self.states, "faults": self.faults}
        told["check"] = fingerprint.of_file(vectors)
        write_atomically(self.stem.with_suffix(".json"), json.dumps(told).encode())

    def _filled(self) -> Any:
        index = self.faiss.IndexFlatIP(self.rows.shape[1])
        index.add(self.rows)
        return index

    def best(self, asked: Directions, top: int) -> list[list[dict[str, Any]]]:
        """Of each query the likest pictures, by the cosine of their directions."""
        scores, rows = self._filled().search(asked, min(top, len(self.paths)))
        return [
            [
                {"path": str(self.folder / self.paths[row]), "similarity": round(float(score), 4)}
                for row, score in zip(*both, strict=True)
            ]
            for both in zip(rows, scores, strict=True)
        ]


def _whole(told: Any) -> bool:
    """Whether JSON is what `_Index` writes: names of rows, and of files their states and faults."""
    if not isinstance(told, dict) or not isinstance(told.get("paths"), list):
        return False
    tables = [told.get(key) for key in ("states", "faults")]
    if not all(isinstance(table, dict) for table in tables) or "check" not in told:
        return False
    texts = [*told["paths"], *(value for table in tables if table for value in table.values())]
    return all(isinstance(text, str) for text in texts)


def _named(picture: Picture) -> str:
    """Why a picture's name can't be shown; "" for one that can."""
    return "" if picture.name.isprintable() else "unprintable name"


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise SettingError(
            "search keeps its index with faiss, which is not installed; run "
            "`pip install howfine[images]`"
        ) from error
    return faiss
