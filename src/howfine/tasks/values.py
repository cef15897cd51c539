"""Labels as they stand in a source: class values, or scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from howfine import checks
from howfine.checks import CLASSIFICATION, REGRESSION
from howfine.errors import TaskError
from howfine.tasks import SPLITS, Row


def class_values(splits: Mapping[str, Sequence[Row]], metric: str | None) -> list[Any]:
    """The train split's distinct labels, sorted; none where labels are scores.

    Raises TaskError for labels of several kinds, or of another kind than the metric's.
    """
    first: dict[type, Row] = {}
    for split in SPLITS:
        for row in splits[split]:
            first.setdefault(type(row.label), row)
    types = set(first)
    kind = REGRESSION if float in types else CLASSIFICATION
    if metric is not None:
        kind = checks.known(metric).kind
    if kind == REGRESSION and types <= {int, float}:
        return []
    if kind == CLASSIFICATION and types in ({int}, {str}, {bool}, set()):
        return sorted({row.label for row in splits["train"]})
    seen = " and ".join(f"{row.label!r} ({row.where})" for row in first.values())
    raise TaskError(
        f"labels are {seen}; expected numbers for scores, or only ints or only texts for classes"
        + (f", and metric {metric!r} is for {kind}" if metric else "")
    )


def score_of(row: Row) -> float:
    """A row's label as a finite number. Raises TaskError for anything else."""
    if not isinstance(row.label, int | float) or not math.isfinite(row.label):
        raise TaskError(f"{row.where}: score {row.label!r}, expected a finite number")
    return float(row.label)
