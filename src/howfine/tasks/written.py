"""Rows whose answer is a text: learned one by one, scored against all references of a source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from howfine.tasks import SPLITS, Row, bad_row
from howfine.tasks import rows_of as labelled


def referenced(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Train with a row for each target, the other splits with a row for each source."""
    learned = [row._replace(targets=(each,)) for row in splits["train"] for each in row.targets]
    return {"train": learned, **{s: together(splits[s]) for s in SPLITS if s != "train"}}


def together(rows: Sequence[Row]) -> list[Row]:
    """One row for each source, with the targets of all its rows, in the first one's place."""
    found: dict[Any, Row] = {}
    for row in rows:
        source = row.texts, row.segments
        before = found.setdefault(source, row._replace(targets=()))
        found[source] = before._replace(targets=before.targets + row.targets)
    return list(found.values())


def rows_of(
    columns: Mapping[str, Sequence[Any]], text: Sequence[str], target: str, source: str
) -> list[Row]:
    """Rows of a table whose column `target` holds a text each, or a list of texts.

    Raises MissingColumn, or TaskError naming the first bad row.
    """
    rows = []
    for row in labelled(columns, text, target, source):
        rows.append(row._replace(label=0, targets=targets_of(row, target, row.label)))
    return rows


def targets_of(row: Row, column: str, cell: Any) -> tuple[str, ...]:
    """The texts to be written that a cell holds. Raises TaskError for anything else."""
    targets = tuple(cell) if isinstance(cell, list | tuple) else (cell,)
    if not targets or not all(isinstance(each, str) and each.strip() for each in targets):
        raise bad_row(row, column, cell, "a text, or a list of texts, none of them empty")
    return targets
