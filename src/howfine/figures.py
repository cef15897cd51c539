"""The report's plots, as plotly figures in plain data.

Colours are names of the page's CSS variables (`var(--accent)`): the page's script puts their values
in, so that one figure serves a light page, a dark one and paper.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from howfine.wording import (
    ceiling_of,
    ceiling_said,
    human,
    in_percent,
    interval_said,
    margin_said,
    metric_said,
    probability_said,
    score_said,
    settings_said,
)

Figure = dict[str, Any]

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon")
# As many as the page defines: --c1 … --c8.
_COLOURS = 8


def score_against_bytes(result: Mapping[str, Any]) -> Figure:
    """Every group's test score and interval over its file's size, between floor and ceiling."""
    groups, metric = result["groups"], result["task"]["metric"]
    scale = 100 if in_percent(metric) else 1
    across, up = _size_axis(groups), _score_axis(groups, metric, scale)
    traces = [*_levels(result, scale, across["range"]), _front(groups, scale)]
    recipes = list(dict.fromkeys(group["recipe"] for group in groups))
    for number, recipe in enumerate(recipes):
        rows = [group for group in groups if group["recipe"] == recipe]
        traces.append(_points(rows, number, metric, scale, result["margin"]))
    winner = next(g for g in groups if result["recommended"]["key"] in g["keys"])
    traces.append(_ring(winner, scale))
    figure = plot(traces, 480, xaxis=across, yaxis=up)
    figure["layout"] |= {
        "shapes": [_band(group, colour, scale) for group, colour in _ends(result)],
        "annotations": [*_band_names(result, scale), _answer(winner, scale, up["range"])],
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
    }
    return figure


def plot(
    traces: list[dict[str, Any]], height: int, *, xaxis: dict[str, Any], yaxis: dict[str, Any]
) -> Figure:
    """Traces in the page's look, `height` pixels high."""
    look = {
        "gridcolor": "var(--line)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "ticks": "",
        "automargin": True,
        "fixedrange": True,
    }
    layout = {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 10, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--muted)", "family": "system-ui, sans-serif", "size": 12},
        "hoverlabel": {"bgcolor": "var(--paper)", "font": {"color": "var(--ink)"}},
        "xaxis": {**look, **xaxis},
        "yaxis": {**look, **yaxis},
    }
    return {"data": traces, "layout": layout}


def plain(text: str) -> str:
    """Text that plotly, which knows a few HTML tags, shows as it is."""
    return html.escape(text, quote=False)


def _size_axis(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bytes on a logarithm, ticks at powers of ten."""
    low = math.log10(max(1, min(group["bytes"] for group in groups)))
    high = math.log10(max(group["bytes"] for group in groups))
    room = max(0.08 * (high - low), 0.15)
    powers = range(math.floor(low - room), math.ceil(high + room) + 1)
    return {
        "type": "log",
        "range": [low - room, high + room],
        "title": {"text": "bytes of the delta file, logarithmic"},
        "tickvals": [10**power for power in powers if power >= 0],
        "ticktext": [human(10**power).replace(".0", "") for power in powers if power >= 0],
    }


def _score_axis(groups: Sequence[Mapping[str, Any]], metric: str, scale: int) -> dict[str, Any]:
    """All intervals, and above them the place where the answer is named."""
    low = min(scale * group["interval"][0] for group in groups)
    high = max(scale * group["interval"][1] for group in groups)
    height = (high - low) or 1
    return {
        "range": [low - 0.05 * height, high + 0.2 * height],
        "title": {"text": f"{metric_said(metric)} on test", "standoff": 14},
        "ticksuffix": " %" if scale == 100 else "",
    }


def _ends(result: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    """The ceiling's group and the floor's, if it has one, with their colours."""
    ends = [(ceiling_of(result["groups"]), "var(--ceiling)")]
    return ends + ([(result["floor"], "var(--floor)")] if result["floor"] else [])


def _band(group: Mapping[str, Any], colour: str, scale: int) -> dict[str, Any]:
    """A group's interval over the plot's whole width."""
    return {
        "type": "rect",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": scale * group["interval"][0],
        "y1": scale * group["interval"][1],
        "fillcolor": colour,
        "opacity": 0.13,
        "line": {"width": 0},
        "layer": "below",
    }


def _levels(result: Mapping[str, Any], scale: int, ends: Sequence[float]) -> list[dict[str, Any]]:
    """The ceiling's and the floor's score, and the least that is within the margin."""
    ceiling = ceiling_of(result["groups"])
    least = ceiling["score"] - result["margin"] * abs(ceiling["score"])
    levels = [(group["score"], colour, "solid") for group, colour in _ends(result)]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [10**end for end in ends],
            "y": [scale * level, scale * level],
            "line": {"color": colour, "width": 1.2, "dash": dash},
            "showlegend": False,
            "hoverinfo": "skip",
        }
        for level, colour, dash in [*levels, (least, "var(--ceiling)", "dot")]
    ]


def _band_names(result: Mapping[str, Any], scale: int) -> list[dict[str, Any]]:
    """The bands' names, on the right: the ceiling's above its band, the floor's on its line."""
    metric, names = result["task"]["metric"], []
    for group, colour in _ends(result):
        top = group["role"] == "ceiling"
        name = ceiling_said(result) if top else f"floor: {group['recipe']}"
        names.append(
            {
                "text": f"{plain(name)}, {score_said(metric, group['score'])}",
                "font": {"color": colour, "size": 12},
                "xref": "paper",
                "x": 1,
                "xanchor": "right",
                "y": scale * (group["interval"][1] if top else group["score"]),
                "yanchor": "bottom",
                "showarrow": False,
            }
        )
    return names


def _front(groups: Sequence[Mapping[str, Any]], scale: int) -> dict[str, Any]:
    """The Pareto front of the test scores: no other group is both smaller and better."""
    front: list[Mapping[str, Any]] = []
    for group in sorted(groups, key=lambda group: (group["bytes"], -group["score"])):
        if not front or group["score"] > front[-1]["score"]:
            front.append(group)
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [group["bytes"] for group in front],
        "y": [scale * group["score"] for group in front],
        "line": {"color": "var(--muted)", "width": 1.3, "shape": "hv", "dash": "dash"},
        "showlegend": False,
        "hoverinfo": "skip",
    }


def _points(
    rows: Sequence[Mapping[str, Any]], number: int, metric: str, scale: int, margin: float
) -> dict[str, Any]:
    """One recipe's groups, with their intervals."""
    return {
        **marks(rows, number, scale),
        "mode": "markers",
        "x": [group["bytes"] for group in rows],
        "hovertext": [_hover(group, metric, margin) for group in rows],
        "hoverinfo": "text",
    }


def marks(rows: Sequence[Mapping[str, Any]], number: int, scale: int) -> dict[str, Any]:
    """What marks of the n-th recipe have in common: scores, intervals, colour, shape."""
    colour, scores = f"var(--c{number % _COLOURS + 1})", [scale * row["score"] for row in rows]
    lows, highs = ([scale * row["interval"][end] for row in rows] for end in (0, 1))
    return {
        "type": "scatter",
        "name": plain(rows[0]["recipe"]),
        "y": scores,
        "line": {"color": colour, "width": 1.3},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [high - score for high, score in zip(highs, scores, strict=True)],
            "arrayminus": [score - low for low, score in zip(lows, scores, strict=True)],
            "color": colour,
            "thickness": 1.2,
            "width": 3,
        },
        "marker": {
            "color": colour,
            "size": 10,
            "symbol": _SYMBOLS[number % len(_SYMBOLS)],
            "line": {"color": "var(--paper)", "width": 1},
        },
    }


def _hover(group: Mapping[str, Any], metric: str, margin: float) -> str:
    scored = f"{score_said(metric, group['score'])} {interval_said(metric, group['interval'])}"
    lines = [
        f"<b>{plain(group['recipe'])}</b>",
        plain(settings_said(group["settings"])),
        f"{metric_said(metric)} {scored}",
        human(group["bytes"]),
        f"P(within {margin_said(margin)}) {plain(probability_said(group['probability']))}",
    ]
    return "<br>".join(filter(None, lines))


def _ring(winner: Mapping[str, Any], scale: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [winner["bytes"]],
        "y": [scale * winner["score"]],
        "marker": {
            "symbol": "circle-open",
            "size": 20,
            "color": "var(--ink)",
            "line": {"width": 2, "color": "var(--ink)"},
        },
        "showlegend": False,
        "hoverinfo": "skip",
    }


def _answer(winner: Mapping[str, Any], scale: int, ends: Sequence[float]) -> dict[str, Any]:
    """The recommended group's name above all intervals, with a line down to its ring."""
    return {
        "text": f"<b>{plain(winner['recipe'])}</b>, {human(winner['bytes'])}",
        "font": {"color": "var(--ink)", "size": 13},
        "x": math.log10(max(1, winner["bytes"])),
        "y": scale * winner["score"],
        "ax": 0,
        "ayref": "y",
        "ay": 0.05 * ends[0] + 0.95 * ends[1],
        "showarrow": True,
        "arrowhead": 0,
        "arrowwidth": 1.2,
        "standoff": 11,
        "arrowcolor": "var(--ink)",
    }
