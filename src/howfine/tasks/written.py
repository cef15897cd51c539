"""Rows whose answer is a text: learned one by one, scored against all references of a source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from howfine.errors import TaskError
from howfine.tasks import SPLITS, Row
from howfine.tasks import rows_of as labelled


def referenced(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Train with a row for each target, the other splits with a row for each source."""
    learned = [row._replace(targets=(each,)) for row in splits["train"] for each in row.targets]
    return {"train": learned, **{s: together(splits[s]) for s in SPLITS if s != "train"}}


def together(rows: Sequence[Row]) -> list[Row]:
    """One row for each source, with the targets of all its rows, in the first one's place."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        before = found.setdefault(row.texts, row._replace(targets=()))
        found[row.texts] = before._replace(targets=before.targets + row.targets)
    return list(found.values())


def rows_of(
    columns: Mapping[str, Sequence[Any]], text: Sequence[str], target: str, source: str
) -> list[Row]:
    """Rows of a table whose column `target` holds a text each, or a list of texts.

    Raises MissingColumn, or TaskError naming the first bad row.
    """
    rows = []
    for row in labelled(columns, text, target, source):
        found = row.label if isinstance(row.label, list | tuple) else [row.label]
        targets = tuple(found)
        if not targets or not all(isinstance(each, str) and each.strip() for each in targets):
            raise TaskError(
                f"{row.where}: column {target!r} holds {row.label!r}, expected a text, or a list "
                "of texts, none of them empty; correct the row or take it out"
            )
        rows.append(row._replace(label=0, targets=targets))
    return rows
