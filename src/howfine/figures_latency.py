"""The plot of scores against latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from howfine.figures import Figure, marks, plain, plot
from howfine.report_latency import input_said, size_said
from howfine.wording import in_percent, interval_said, metric_said, score_said


def score_against_latency(result: Mapping[str, Any]) -> Figure:
    """Test score and interval over milliseconds; sizes of one file are joined by a line."""
    rows, metric = result["latency"]["rows"], result["task"]["metric"]
    scale = 100 if in_percent(metric) else 1
    low = min(scale * row["interval"][0] for row in rows)
    high = max(scale * row["interval"][1] for row in rows)
    room = 0.05 * ((high - low) or 1)
    recipes = list(dict.fromkeys(group["recipe"] for group in result["groups"]))
    keys = dict.fromkeys((row["recipe"], row["key"] if row["keep"] else None) for row in rows)
    traces = []
    for recipe, key in keys:
        own = [
            r for r in rows if r["recipe"] == recipe and (r["key"] if r["keep"] else None) == key
        ]
        traces.append(_trace(own, recipes.index(recipe), metric, scale))
    figure = plot(
        traces,
        420,
        xaxis={
            "title": {"text": f"milliseconds for {input_said(result['latency'])}"},
            "rangemode": "tozero",
        },
        yaxis={
            "range": [low - room, high + room],
            "title": {"text": f"{metric_said(metric)} on test", "standoff": 14},
            "ticksuffix": " %" if scale == 100 else "",
        },
    )
    figure["layout"]["legend"] = {
        "orientation": "h",
        "yref": "container",
        "y": 0,
        "yanchor": "bottom",
    }
    return figure


def _trace(
    rows: Sequence[Mapping[str, Any]], number: int, metric: str, scale: int
) -> dict[str, Any]:
    rows = sorted(rows, key=lambda row: row["milliseconds"])
    sizes = all(row["keep"] for row in rows)
    return {
        **marks(rows, number, scale),
        "mode": "lines+markers" if sizes else "markers",
        "x": [row["milliseconds"] for row in rows],
        "hovertext": [_hover(row, metric) for row in rows],
        "hoverinfo": "text",
    }


def _hover(row: Mapping[str, Any], metric: str) -> str:
    scored = f"{score_said(metric, row['score'])} {interval_said(metric, row['interval'])}"
    lines = [f"<b>{plain(row['recipe'])}</b>", plain(size_said(row))]
    lines += [f"{metric_said(metric)} {scored}", f"{row['milliseconds']:.2f} ms"]
    return "<br>".join([*lines, f"{row['parameters']:,} parameters"])
