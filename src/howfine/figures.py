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
    significant,
)

Figure = dict[str, Any]

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon")
# As many as the page defines: --c1 … --c8.
_COLOURS = 8
# Beyond this many cells, values written into them are too small to read.
_MOST_WRITTEN = 120


def score_against_bytes(result: Mapping[str, Any]) -> Figure:
    """Every group's test score and interval over its file's size, between floor and ceiling."""
    groups, metric = result["groups"], result["task"]["metric"]
    scale = 100 if in_percent(metric) else 1
    low = math.log10(max(1, min(group["bytes"] for group in groups)))
    high = math.log10(max(group["bytes"] for group in groups))
    room = max(0.08 * (high - low), 0.15)
    ends = [low - room, high + room]
    bands = _bands(result, scale)
    traces = [*_lines(result, scale, ends), _front(groups, scale)]
    recipes = list(dict.fromkeys(group["recipe"] for group in groups))
    for number, recipe in enumerate(recipes):
        rows = [group for group in groups if group["recipe"] == recipe]
        traces.append(_points(rows, number, metric, scale, result["margin"]))
    winner = next(g for g in groups if result["recommended"]["key"] in g["keys"])
    traces.append(_ring(winner, scale))
    ticks = range(math.ceil(ends[0]), math.floor(ends[1]) + 1)
    axis = {"type": "log", "range": ends, "title": {"text": "bytes of the delta file (log)"}}
    axis |= {"tickvals": [10**t for t in ticks], "ticktext": [_round_size(10**t) for t in ticks]}
    title = f"{metric_said(metric)} on test"
    values = {"title": {"text": title}, "ticksuffix": " %" if scale == 100 else ""}
    layout = _layout(460, xaxis=axis, yaxis=values)
    layout["shapes"], layout["annotations"] = (
        bands,
        [*_band_names(result, scale), _answer(winner, scale)],
    )
    layout["legend"] = {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}
    return {"data": traces, "layout": layout}


def _round_size(size: int) -> str:
    """A power of ten as a tick: '10 kB'."""
    return human(size).replace(".0", "").replace(" bytes", " B")


def _edges(group: Mapping[str, Any], scale: int) -> tuple[float, float]:
    return scale * group["interval"][0], scale * group["interval"][1]


def _bands(result: Mapping[str, Any], scale: int) -> list[dict[str, Any]]:
    """The ceiling's interval and the floor's, over the plot's whole width."""
    shapes = []
    for group, colour in _ends_of(result):
        low, high = _edges(group, scale)
        shapes.append(
            {
                **{"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": low, "y1": high},
                **{"fillcolor": colour, "opacity": 0.13, "line": {"width": 0}, "layer": "below"},
            }
        )
    return shapes


def _ends_of(result: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    ends = [(ceiling_of(result["groups"]), "var(--ceiling)")]
    return ends + ([(result["floor"], "var(--floor)")] if result["floor"] else [])


def _lines(result: Mapping[str, Any], scale: int, ends: Sequence[float]) -> list[dict[str, Any]]:
    """The ceiling's and the floor's score, and the least that is within the margin."""
    ceiling = ceiling_of(result["groups"])
    least = ceiling["score"] - result["margin"] * abs(ceiling["score"])
    levels = [(group["score"], colour, "solid") for group, colour in _ends_of(result)]
    levels.append((least, "var(--ceiling)", "dot"))
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [10 ** ends[0], 10 ** ends[1]],
            "y": [scale * level] * 2,
            "line": {"color": colour, "width": 1.2, "dash": dash},
            "name": f"within {margin_said(result['margin'])} of the ceiling's mean",
            "showlegend": dash == "dot",
            "hoverinfo": "skip",
        }
        for level, colour, dash in levels
    ]


def _band_names(result: Mapping[str, Any], scale: int) -> list[dict[str, Any]]:
    """The bands' names: the ceiling's on the left, where files are small, the floor's opposite."""
    metric, names = result["task"]["metric"], []
    for group, colour in _ends_of(result):
        top = group["role"] == "ceiling"
        name = ceiling_said(result) if top else f"floor: {group['recipe']}"
        names.append(
            {
                **{"xref": "paper", "x": 0 if top else 1, "xanchor": "left" if top else "right"},
                **{"y": scale * group["score"], "yanchor": "bottom", "showarrow": False},
                "text": f"{_plain(name)}, {score_said(metric, group['score'])}",
                "font": {"color": colour, "size": 12},
            }
        )
    return names


def _front(groups: Sequence[Mapping[str, Any]], scale: int) -> dict[str, Any]:
    """The Pareto front of the test scores: no other group is both smaller and better."""
    best, front = -math.inf, []
    for group in sorted(groups, key=lambda group: (group["bytes"], -group["score"])):
        if group["score"] > best:
            best = group["score"]
            front.append(group)
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [group["bytes"] for group in front],
        "y": [scale * group["score"] for group in front],
        "line": {"color": "var(--muted)", "width": 1.5, "shape": "hv", "dash": "dash"},
        "name": "Pareto front on test",
        "hoverinfo": "skip",
    }


def _points(
    rows: Sequence[Mapping[str, Any]], number: int, metric: str, scale: int, margin: float
) -> dict[str, Any]:
    colour = f"var(--c{number % _COLOURS + 1})"
    low, high = zip(*(_edges(group, scale) for group in rows), strict=True)
    means = [scale * group["score"] for group in rows]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": _plain(rows[0]["recipe"]),
        "x": [group["bytes"] for group in rows],
        "y": means,
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [top - mean for top, mean in zip(high, means, strict=True)],
            "arrayminus": [mean - bottom for bottom, mean in zip(low, means, strict=True)],
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
        "hovertext": [_hover(group, metric, margin) for group in rows],
        "hoverinfo": "text",
    }


def _hover(group: Mapping[str, Any], metric: str, margin: float) -> str:
    scored = f"{score_said(metric, group['score'])} {interval_said(metric, group['interval'])}"
    lines = [
        f"<b>{_plain(group['recipe'])}</b>",
        _plain(settings_said(group["settings"])),
        f"{metric_said(metric)} {scored}",
        human(group["bytes"]),
        f"P(within {margin_said(margin)}) {_plain(probability_said(group['probability']))}",
    ]
    return "<br>".join(filter(None, lines))


def _ring(winner: Mapping[str, Any], scale: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [winner["bytes"]],
        "y": [scale * winner["score"]],
        "marker": {
            **{"symbol": "circle-open", "size": 20, "color": "var(--ink)"},
            "line": {"width": 2, "color": "var(--ink)"},
        },
        "showlegend": False,
        "hoverinfo": "skip",
    }


def _answer(winner: Mapping[str, Any], scale: int) -> dict[str, Any]:
    return {
        **{
            "x": math.log10(max(1, winner["bytes"])),
            "y": scale * winner["score"],
            "ax": 0,
            "ay": 62,
        },
        "text": f"<b>{_plain(winner['recipe'])}</b><br>{human(winner['bytes'])}",
        **{"showarrow": True, "arrowhead": 0, "arrowwidth": 1.2, "standoff": 12},
        **{"arrowcolor": "var(--ink)", "bgcolor": "var(--paper)", "borderpad": 3},
        "font": {"color": "var(--ink)", "size": 13},
    }


def heatmap(rows: Sequence[Mapping[str, Any]], value: str) -> Figure:
    """Layer × matrix of one column of the distance rows, on a logarithmic colour scale.

    Matrices at 0 have no logarithm: their cell is empty and says 0.
    """
    layers = sorted({row["layer"] for row in rows})
    parts = list(dict.fromkeys(row["part"] for row in rows))
    cells = {(row["layer"], row["part"]): row[value] for row in rows}
    found = [[cells.get((layer, part)) for part in parts] for layer in layers]
    said = [[_cell(value, number) for number in line] for line in found]
    trace = {
        "type": "heatmap",
        "x": parts,
        "y": [str(layer) for layer in layers],
        "z": [[math.log10(number) if number else None for number in line] for line in found],
        "hovertext": [
            [
                f"layer {layer}, {_plain(part)}: {text}"
                for part, text in zip(parts, line, strict=True)
            ]
            for layer, line in zip(layers, said, strict=True)
        ],
        "hoverinfo": "text",
        "xgap": 1.5,
        "ygap": 1.5,
        "colorscale": [[step / 5, f"var(--h{step})"] for step in range(6)],
        "colorbar": _colour_bar(value, [n for line in found for n in line if n]),
    }
    if len(layers) * len(parts) <= _MOST_WRITTEN:
        trace |= {"text": said, "texttemplate": "%{text}", "textfont": {"size": 11}}
    layout = _layout(
        110 + max(22 * len(layers), 120),
        xaxis={"title": {"text": "matrix"}, "type": "category", "showgrid": False},
        yaxis={"title": {"text": "layer"}, "type": "category", "showgrid": False},
    )
    return {"data": [trace], "layout": layout}


def _cell(value: str, number: float | None) -> str:
    if number is None:
        return ""
    return f"{significant(100 * number)} %" if value == "relative" else significant(number)


def _colour_bar(value: str, numbers: Sequence[float]) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times powers of ten, or at the ends where these are too far apart."""
    low, high = min(numbers, default=1.0), max(numbers, default=1.0)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < 2:
        ticks = sorted({low, high})
    return {
        "tickvals": [math.log10(tick) for tick in ticks],
        "ticktext": [_cell(value, tick) for tick in ticks],
        "thickness": 10,
        "outlinewidth": 0,
        "xpad": 4,
    }


def ranking(rows: Sequence[Mapping[str, Any]], by: str) -> Figure:
    """Bars of the mean relative movement of each layer, or each kind of matrix, largest on top."""
    ranked = ranks(rows, by)[::-1]
    values = [100 * value for _, value in ranked]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": [_plain(name) for name, _ in ranked],
        "text": [f"{significant(value)} %" for value in values],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": "var(--accent)"},
        "hoverinfo": "skip",
    }
    axis = {"title": {"text": "mean of relative movement"}, "ticksuffix": " %"}
    axis |= {"range": [0, 1.18 * max(values) or 1]}
    layout = _layout(
        90 + 24 * len(ranked), xaxis=axis, yaxis={"type": "category", "showgrid": False}
    )
    layout["bargap"] = 0.35
    return {"data": [trace], "layout": layout}


def ranks(rows: Sequence[Mapping[str, Any]], by: str) -> list[tuple[str, float]]:
    """(name, mean relative movement) of each layer or part, largest first."""
    found: dict[str, list[float]] = {}
    for row in rows:
        name = f"layer {row['layer']}" if by == "layer" else row["part"]
        if row["relative"] is not None:
            found.setdefault(name, []).append(row["relative"])
    means = [(name, sum(values) / len(values)) for name, values in found.items()]
    return sorted(means, key=lambda pair: -pair[1])


def _layout(height: int, *, xaxis: dict[str, Any], yaxis: dict[str, Any]) -> dict[str, Any]:
    look = {
        **{"gridcolor": "var(--line)", "linecolor": "var(--line)", "zeroline": False},
        **{"automargin": True, "ticks": "", "tickfont": {"size": 12}, "fixedrange": True},
    }
    return {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 12, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--muted)", "family": "system-ui, sans-serif", "size": 12},
        "hoverlabel": {"bgcolor": "var(--paper)", "font": {"color": "var(--ink)"}},
        "xaxis": {**look, **xaxis},
        "yaxis": {**look, **yaxis},
    }


def _plain(text: str) -> str:
    """Text that plotly, which knows a few HTML tags, shows as it is."""
    return html.escape(text, quote=False)
