"""Pictures with captions: tables that name or hold them, and tar files.

A row of a table is a picture with a caption or a list of them; an example is one caption with its
picture. Pictures that can't be decoded, pictures that move and empty captions are left out, and
counted in the task's provenance and in a warning. Splits that are missing are carved out by
pictures, so that all captions of one stay together.
"""

from __future__ import annotations

import tarfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from howfine.errors import MissingColumn
from howfine.images import SUFFIXES, Picture, fault
from howfine.tasks import Found, Row, bad_row, completed

# What a tar file's columns are called, and the endings of captions in it.
IMAGE, TEXT = "image", "text"
# No picture has more.
MOST_BYTES = 2**28
_CAPTIONS = (".txt", ".caption", ".text")


def found(
    tables: Mapping[str, Mapping[str, Sequence[Any]]],
    sources: Mapping[str, str],
    columns: tuple[str, str],
    origin: str,
    how: str,
    seed: int,
) -> Found:
    """Captions of all splits. `columns` are the picture's and the caption's."""
    left: Counter[str] = Counter()
    rows = {split: _pictures(tables[split], columns, sources[split], left) for split in tables}
    whole = {split: _captions(some) for split, some in completed(rows, seed).items()}
    return Found(whole, (), metric=None, provenance=f"{origin}{how}{_said(left, origin)}")


def _pictures(
    table: Mapping[str, Sequence[Any]], columns: tuple[str, str], source: str, left: Counter[str]
) -> list[Row]:
    """One row for each picture that can be used; its text stands for it, its targets are captions.

    Raises MissingColumn, or TaskError for a cell that is no picture or no caption.
    """
    for name in columns:
        if name not in table:
            raise MissingColumn(
                f"{source} has no column {name!r}; found {', '.join(table) or 'none'}. Name the "
                "columns with image= and text="
            )
    rows: dict[int, Row] = {}
    cells = zip(*(table[name] for name in columns), strict=True)
    for number, (picture_cell, caption_cell) in enumerate(cells, 1):
        row = Row((), 0, source, number)
        picture = _picture(row, columns[0], picture_cell)
        if reason := fault(picture):
            left[reason] += 1
            continue
        captions = _texts(row, columns[1], caption_cell)
        kept = tuple(text for text in captions if text.strip())
        left["empty caption"] += len(captions) - len(kept)
        if kept:
            mark = picture.digest
            before = rows.setdefault(mark, row._replace(texts=(str(mark),), picture=picture))
            rows[mark] = before._replace(targets=before.targets + kept)
    return list(rows.values())


def _captions(rows: Sequence[Row]) -> list[Row]:
    return [row._replace(texts=(text,), targets=()) for row in rows for text in row.targets]


def _picture(row: Row, column: str, cell: Any) -> Picture:
    """From a path, relative to its table's folder, bytes, or the hub's dict of both."""
    if isinstance(cell, dict) and cell.keys() & {"bytes", "path"}:
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes) and cell:
        return Picture(row.where, cell)
    if isinstance(cell, str) and cell.strip():
        path = Path(row.source).parent / cell
        return Picture(f"{path} ({row.where})", path)
    raise bad_row(row, column, cell, "the path of an image file, or its bytes")


def _texts(row: Row, column: str, cell: Any) -> list[str]:
    if cell is None:  # an empty cell of a table
        return [""]
    texts = list(cell) if isinstance(cell, list | tuple) else [cell]
    if not all(isinstance(text, str) for text in texts):
        raise bad_row(row, column, cell, "a caption, or a list of captions")
    return texts or [""]


def _said(left: Counter[str], origin: str) -> str:
    """What was left out, in words; a warning says it too."""
    counts = [f"{count} for {reason}" for reason, count in sorted(left.items()) if count]
    if not counts:
        return ""
    warnings.warn(f"{origin}: left out {', '.join(counts)}", stacklevel=2)
    return f"; left out {', '.join(counts)}"


def tarred(path: Path) -> dict[str, list[Any]]:
    """The columns of a tar file in WebDataset's layout: files of one name are one example.

    Raises ValueError for an example that lacks its picture or its caption, or has two.
    """
    examples: dict[str, dict[str, Any]] = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            stem, dot, ending = member.name.rpartition(".")
            if member.issparse() or member.size > MOST_BYTES:
                raise ValueError(f"{member.name} says that it has {member.size:,} bytes")
            content = archive.extractfile(member) if member.isfile() and dot else None
            if content is None:
                continue
            held, suffix = examples.setdefault(stem, {}), f".{ending.lower()}"
            column = IMAGE if suffix in SUFFIXES else TEXT if suffix in _CAPTIONS else None
            if column is None:
                continue
            if column in held:
                raise ValueError(
                    f"{member.name} is a second {column} of {stem}, expected one; give one of them "
                    "another name, or take it out"
                )
            found = content.read()
            held[column] = found if column == IMAGE else found.decode("utf-8").strip()
    odd = next((stem for stem, held in examples.items() if len(held) == 1), None)
    if odd is not None:
        lacks = "caption" if IMAGE in examples[odd] else "picture"
        raise ValueError(f"{odd} has no {lacks}: expected NAME.jpg (or .png) and NAME.txt")
    return {name: [held[name] for held in examples.values() if held] for name in (IMAGE, TEXT)}
