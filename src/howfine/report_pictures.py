"""What a study of two towers found: some of the test captions, and the pictures likest to each.

The directions are those the recommended run was scored by, kept in the ledger: nothing is encoded
again, and the grid shows what the score counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from howfine import retrieval
from howfine.images import Picture
from howfine.ledger import Record, unpack_predictions
from howfine.metrics import METRICS
from howfine.pictures_page import thumbnail
from howfine.task import Task

# Captions on the page, and pictures a caption.
CAPTIONS, HITS = 8, 5

Row = dict[str, Any]  # caption, own, rank, hits: picture, similarity, own


def found(task: Task, records: Sequence[Record], key: str) -> list[Row] | None:
    """What run `key` found for captions spread evenly over the test split, good or bad.

    None of a task that is not about pictures and captions.
    """
    if METRICS[task.metric].kind != "alignment":
        return None
    (record,) = (record for record in records if record["key"] == key)
    examples = task.splits["test"]
    vectors = np.stack(list(unpack_predictions(record["predictions"]))).astype(np.float64)
    images, texts = np.split(vectors, 2, axis=1)
    _, first, owner = np.unique(task.targets("test"), return_index=True, return_inverse=True)
    ranks, _ = retrieval.ranks(images[first], texts, owner)
    count = min(CAPTIONS, len(examples))
    rows = []
    for number in ((2 * np.arange(count) + 1) * len(examples) // (2 * count)).tolist():
        scores = _cosines(images[first], texts[number])
        best = np.argsort(-scores, kind="stable")[:HITS]
        hits = [
            {
                "picture": _name(task, first[place]),
                "similarity": round(float(scores[place]), 4),
                "own": bool(place == owner[number]),
            }
            for place in best
        ]
        rows.append(
            {
                "caption": examples[number].texts[0],
                "own": _name(task, first[owner[number]]),
                "rank": int(ranks[number]),
                "hits": hits,
            }
        )
    return rows


def thumbnails(task: Task, rows: Sequence[Mapping[str, Any]] | None) -> dict[str, str]:
    """JPEG in base64 of every picture that `rows` name, by its name."""
    named = {hit["picture"] for row in rows or () for hit in row["hits"]}
    named |= {row["own"] for row in rows or ()}
    shown: dict[str, Picture] = {}
    for example in task.splits["test"] if named else ():
        if example.picture and example.picture.name in named:
            shown.setdefault(example.picture.name, example.picture)
    return {name: thumbnail(picture) for name, picture in shown.items()}


def said(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many of the shown captions have their own picture first, and among the shown."""
    count = len(rows)
    first, among = (sum(row["rank"] <= k for row in rows) for k in (1, HITS))
    return (
        f"Of {count} captions, {first} found their own picture first and {among} among the first "
        f"{HITS}"
    )


def _cosines(images: np.ndarray, text: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(text)
    cosines: np.ndarray = images @ text / np.maximum(lengths, 1e-12)
    return cosines


def _name(task: Task, number: int) -> str:
    picture = task.splits["test"][int(number)].picture
    assert picture is not None  # every example of a task of captions has one
    return picture.name
