"""How far the confidence of a recipe's answers can be trusted: the report's plot of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from howfine.figures import Figure, plain, plot
from howfine.wording import ceiling_said, counted, percent_said

# What is shown, in this order. By symbols too: colours alone don't tell all readers apart.
_LOOKS = {
    "ceiling": ("var(--ceiling)", "circle"),
    "recommended": ("var(--mark)", "diamond"),
    "floor": ("var(--floor)", "square"),
}
_SMALLEST, _LARGEST = 5, 22  # of a mark, in pixels


class Point(NamedTuple):
    """A bin of a reliability table that has answers, how many; the others are shares."""

    low: float  # the bin's edges
    high: float
    answers: int
    confidence: float
    accuracy: float

    @property
    def said(self) -> str:
        """'66.7 to 73.3 %'."""
        return f"{100 * self.low:.1f} to {100 * self.high:.1f} %"


def points_of(table: Mapping[str, Sequence[Any]]) -> list[Point]:
    """The bins of a group's `reliability` that have answers, lowest confidence first."""
    bins = len(table["count"])
    rows = zip(table["count"], table["confidence"], table["accuracy"], strict=True)
    return [
        Point(number / bins, (number + 1) / bins, *row) for number, row in enumerate(rows) if row[0]
    ]


def shown(result: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(role, name, group) of ceiling, recommended and floor, as far as they were measured.

    A ceiling or a floor that is recommended is there once, and named so.
    """
    found: dict[str, tuple[str, str, Mapping[str, Any]]] = {}
    for group in result["groups"]:
        chosen = result["recommended"]["key"] in group["keys"]
        role = "recommended" if chosen and group["role"] == "candidate" else group["role"]
        if role in _LOOKS and group["ece"] is not None:
            name = ceiling_said(result) if role == "ceiling" else group["recipe"]
            said = [name, "(floor)" * (role == "floor"), "(recommended)" * chosen]
            found.setdefault(role, (role, " ".join(filter(None, said)), group))
    return [found[role] for role in _LOOKS if role in found]


def summary(result: Mapping[str, Any]) -> str:
    """The errors in words, with accuracy and mean confidence; "" where none was measured."""
    return "; ".join(_summary(name, group) for _, name, group in shown(result))


def _summary(name: str, group: Mapping[str, Any]) -> str:
    points = points_of(group["reliability"])
    total = sum(point.answers for point in points)
    right = sum(point.answers * point.accuracy for point in points) / total
    sure = sum(point.answers * point.confidence for point in points) / total
    means = f"{percent_said(right)} right at a mean confidence of {percent_said(sure)}"
    return f"{name}: ECE {percent_said(group['ece'])}, {means}"


def reliability(result: Mapping[str, Any]) -> Figure:
    """Accuracy over confidence, a mark for each bin that has answers, and the diagonal.

    Of the ceiling, the recommended group and the floor. The area of a mark grows with its answers.
    """
    groups = shown(result)
    points = [point for _, _, group in groups for point in points_of(group["reliability"])]
    # Confidence starts at one over the number of classes; empty room on the left says nothing.
    left = 100 * min(point.low for point in points)
    lowest = min(left, *(100 * point.accuracy for point in points))
    traces = [_diagonal(left), *(_trace(*each) for each in groups)]
    figure = plot(
        traces,
        420,
        xaxis={
            "title": {"text": "confidence: probability given to the answer"},
            "range": [left - 1, 101.5],
            "ticksuffix": " %",
        },
        yaxis={
            "title": {"text": "answers that are right", "standoff": 14},
            "range": [lowest - 4, 104],
            "ticksuffix": " %",
        },
    )
    legend = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}
    figure["layout"]["legend"] = legend
    return figure


def _diagonal(left: float) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "confidence that is right",
        "x": [left, 100],
        "y": [left, 100],
        "line": {"color": "var(--muted)", "width": 1.2, "dash": "dot"},
        "hoverinfo": "skip",
    }


def _trace(role: str, name: str, group: Mapping[str, Any]) -> dict[str, Any]:
    colour, symbol = _LOOKS[role]
    points = points_of(group["reliability"])
    most = max(point.answers for point in points)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": f"{plain(name)}, ECE {percent_said(group['ece'])}",
        "x": [100 * point.confidence for point in points],
        "y": [100 * point.accuracy for point in points],
        "line": {"color": colour, "width": 1.3},
        "marker": {
            "color": colour,
            "symbol": symbol,
            "size": [
                max(_SMALLEST, _LARGEST * math.sqrt(point.answers / most)) for point in points
            ],
            "opacity": 0.85,
            "line": {"color": "var(--paper)", "width": 1},
        },
        "hovertext": [
            f"<b>{plain(name)}</b><br>confidence {point.said}: "
            f"{counted(point.answers, 'answer')}<br>{percent_said(point.accuracy)} right at a mean "
            f"confidence of {percent_said(point.confidence)}"
            for point in points
        ],
        "hoverinfo": "text",
    }
