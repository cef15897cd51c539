"""One file per source of examples; here is what they share: rows, splits by a hash, samples.

A reader returns `Found`: rows as they stand in the source. `howfine.task` makes a Task of them,
turning labels into class indices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from howfine.errors import MissingColumn, TaskError
from howfine.images import Picture

SPLITS = ("train", "dev", "test")
# How other collections name their splits.
ALIASES = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test",),
}


class Row(NamedTuple):
    """One example as the source has it."""

    texts: tuple[str, ...]
    label: Any
    # For messages: the file or split, and the row in it, counted from 1 without the header.
    source: str
    number: int
    # What may be answered, where each row has options of its own.
    options: tuple[str, ...] = ()
    # What may be written, where the answer is a text.
    targets: tuple[str, ...] = ()
    # (kind, text) in reading order, where the first text is made of such; the last is what is to
    # be written: its kind and "".
    segments: tuple[tuple[str, str], ...] = ()
    # What the text is about, where it is a caption.
    picture: Picture | None = None

    @property
    def where(self) -> str:
        """The place in words."""
        return f"{self.source}, row {self.number}"


@dataclass(frozen=True)
class Found:
    """What a reader found."""

    splits: dict[str, list[Row]]
    # Class names where the source knows them (labels are then their indices), () for scores,
    # None to take the classes from the values.
    labels: tuple[str, ...] | None
    # A metric's name, or None to choose by the kind of labels.
    metric: str | None
    # Where the data is from; `howfine.task` ends it with how missing splits were made.
    provenance: str


def rows_of(
    columns: Mapping[str, Sequence[Any]],
    text: Sequence[str],
    label: str,
    source: str,
    *,
    skip_empty: bool = False,
) -> list[Row]:
    """Rows of a table, each text checked to be one and each label to be there.

    `skip_empty` leaves out rows with an empty text. Raises MissingColumn, or TaskError naming the
    first bad row.
    """
    for name in (*text, label):
        if name not in columns:
            raise MissingColumn(
                f"{source} has no column {name!r}; found {', '.join(columns) or 'none'}. "
                "Name the columns with text= and label= (or target=)"
            )
    texts = zip(*(columns[name] for name in text), strict=True)
    rows = []
    for number, (found, value) in enumerate(zip(texts, columns[label], strict=True), 1):
        row = Row(found, value, source, number)
        if skip_empty and "" in found:
            continue
        for name, content in zip(text, found, strict=True):
            if not isinstance(content, str) or not content.strip():
                raise bad_row(row, name, content, "a text that is not empty")
        if value is None or value == "":
            raise bad_row(row, label, value, "a label")
        rows.append(row)
    return rows


def bad_row(row: Row, column: str, found: Any, expected: str) -> TaskError:
    """What to raise for a cell that holds something else than is expected."""
    return TaskError(
        f"{row.where}: column {column!r} holds {found!r:.200}, expected {expected}; "
        "correct the row or take it out"
    )


def key(texts: tuple[str, ...]) -> str:
    """The letters and digits of an example: equal for copies that differ in case or punctuation.

    A text that has none stands for itself.
    """
    return "\x1f".join("".join(filter(str.isalnum, t.casefold())) or t for t in texts)


def without(rows: list[Row], *others: list[Row]) -> list[Row]:
    """The rows that no other list has a copy of, first copies only."""
    seen = {key(row.texts) for other in others for row in other}
    kept = []
    for row in rows:
        if (mark := key(row.texts)) not in seen:
            seen.add(mark)
            kept.append(row)
    return kept


def carve(rows: list[Row], count: int, salt: str) -> tuple[list[Row], list[Row]]:
    """(the rest, at most `count` rows): those whose texts have the lowest SHA-256.

    The choice depends on the texts alone, whatever their order, and copies of a text stay on one
    side, so a few rows less than `count` may come.
    """
    marks = [hashlib.sha256(f"{salt}\x1e{key(row.texts)}".encode()).digest() for row in rows]
    if count >= len(rows):
        return [], rows
    bound = sorted(marks)[count]
    carved = [row for row, mark in zip(rows, marks, strict=True) if mark < bound]
    rest = [row for row, mark in zip(rows, marks, strict=True) if mark >= bound]
    return rest, carved


def completed(splits: dict[str, list[Row]], seed: int = 0) -> dict[str, list[Row]]:
    """Train, dev and test: what is missing of dev and test is a tenth of the train rows each."""
    whole = dict(splits)
    count = max(1, round(len(splits["train"]) / 10))
    for name in ("test", "dev"):
        if name not in whole:
            whole["train"], whole[name] = carve(whole["train"], count, f"{name} {seed}")
    return {name: whole[name] for name in SPLITS}


def stratified(strata: Sequence[float], size: int, rng: np.random.Generator) -> list[int]:
    """At most `size` rows, in order, with each stratum's share of all (`strata`: one a row)."""
    if size >= len(strata):
        return list(range(len(strata)))
    values, counts = np.unique(strata, return_counts=True)
    chosen = [
        rng.permutation(np.flatnonzero(np.asarray(strata) == value))[:part]
        for value, part in zip(values, _parts(counts.tolist(), size), strict=True)
    ]
    return sorted(np.concatenate(chosen).tolist())


def _parts(counts: Sequence[int], size: int) -> list[int]:
    """`size` divided in proportion to counts, by largest remainder; each gets 1 if there is room.

    No part exceeds its count, as `size` is below their sum.
    """
    exact = [size * count / sum(counts) for count in counts]
    least = 1 if size >= len(counts) else 0
    parts = [max(least, int(share)) for share in exact]
    while sum(parts) != size:
        step = 1 if sum(parts) < size else -1
        movable = [at for at, part in enumerate(parts) if step > 0 or part > least]
        at = max(movable, key=lambda at: step * (exact[at] - parts[at]))
        parts[at] += step
    return parts


def shots(
    strata: Sequence[float], marks: Sequence[str], count: int, rng: np.random.Generator
) -> tuple[list[int], ...]:
    """(train, dev): of each stratum `count` rows at random, and as many others.

    Of a stratum with fewer than twice that, half its rows each. Of rows with one mark, the `key`
    of their texts, the first one drawn stands for all, so that no copy is in both.
    """
    firsts: dict[str, int] = {}
    for row in rng.permutation(len(strata)):
        firsts.setdefault(marks[row], int(row))
    order = list(firsts.values())
    train: list[int] = []
    dev: list[int] = []
    for value in np.unique(strata):
        rows = [row for row in order if strata[row] == value]
        share = min(count, len(rows) // 2)
        train += rows[:share]
        dev += rows[share : 2 * share]
    return sorted(train), sorted(dev)
