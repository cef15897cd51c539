"""The report's plots over layers and parts: how far each moved, and what share of it changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from howfine.figures import Figure, plain, plot
from howfine.wording import significant

# Beyond this many cells, values written into them are too small to read.
_MOST_WRITTEN = 120
_ROW, _AXES = 24, 60  # pixels


def heatmap(rows: Sequence[Mapping[str, Any]], value: str) -> Figure:
    """Layer × part of one column of the rows, on a logarithmic colour scale.

    What is at 0 has no logarithm: its cell is empty and says 0. `rows` are the report's of the
    distance, or of where a change lies; those outside the layers are below them.
    """
    layers, parts = _axes(rows)
    cells = {(row["layer"], row["part"]): row[value] for row in rows}
    found = [[cells.get((layer, part)) for part in parts] for layer in layers]
    said = [[_said(value, number) for number in line] for line in found]
    trace = {
        "type": "heatmap",
        "x": parts,
        "y": ["outside" if layer is None else str(layer) for layer in layers],
        "z": [[math.log10(number) if number else None for number in line] for line in found],
        "hovertext": [
            [f"{place}, {part}: {text}" for part, text in zip(parts, line, strict=True)]
            for place, line in zip(map(_layer, layers), said, strict=True)
        ],
        "hoverinfo": "text",
        "xgap": 1.5,
        "ygap": 1.5,
        "colorscale": [[step / 5, f"var(--h{step})"] for step in range(6)],
        "colorbar": _colour_bar(value, [number for line in found for number in line if number]),
    }
    if len(layers) * len(parts) <= _MOST_WRITTEN:
        trace |= {"text": said, "texttemplate": "%{text}", "textfont": {"size": 11}}
    return plot(
        [trace],
        _AXES + max(_ROW * len(layers), 160),
        xaxis={
            "title": {"text": "part" if value == "share" else "matrix"},
            "type": "category",
            "showgrid": False,
        },
        yaxis={"title": {"text": "layer"}, "type": "category", "showgrid": False},
    )


def shares(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Layer × part: the share of entries that changed. Parts without any are grey, with a 0."""
    figure = heatmap(rows, "share")
    (cells,) = figure["data"]
    layers, parts = _axes(rows)
    at_zero = {(row["layer"], row["part"]) for row in rows if not row["changed"]}
    none = [[0 if (layer, part) in at_zero else None for part in parts] for layer in layers]
    cells["hoverongaps"] = False
    unchanged = {
        **{name: value for name, value in cells.items() if name != "colorbar"},
        "z": none,
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "var(--line)"], [1, "var(--line)"]],
        "showscale": False,
    }
    figure["data"].append(unchanged)
    figure["layout"]["height"] += _ROW  # names of parts are long: on narrow pages they lean
    written = cells.get("text")
    for trace in figure["data"] if written else ():  # plotly writes into gaps too
        trace["text"] = [
            [text if z is not None else "" for text, z in zip(*lines, strict=True)]
            for lines in zip(written, trace["z"], strict=True)
        ]
    return figure


def _axes(rows: Sequence[Mapping[str, Any]]) -> tuple[list[int | None], list[str]]:
    """Layers from the lowest, after what is in none; and parts as the rows have them."""
    layers = sorted({row["layer"] for row in rows}, key=lambda n: -1 if n is None else n)
    return layers, list(dict.fromkeys(row["part"] for row in rows))


def _layer(layer: int | None) -> str:
    return "outside the layers" if layer is None else f"layer {layer}"


def _said(value: str, number: float | None, digits: int = 2) -> str:
    """A cell: movements and shares as percentages, the angle as it is."""
    if number is None:
        return ""
    if value in ("relative", "share"):
        return f"{significant(100 * number, digits)} %"
    return significant(number, digits)


def _colour_bar(value: str, numbers: Sequence[float]) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times powers of ten, or at the ends where there are no two of these."""
    low, high = min(numbers, default=1.0), max(numbers, default=1.0)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) < 5 else (1,)
    ticks = [step * 10.0**power for power in powers for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    digits = 1
    if len(ticks) < 2:
        ticks, digits = sorted({low, high}), 2
    return {
        "tickvals": [math.log10(tick) for tick in ticks],
        "ticktext": [_said(value, tick, digits) for tick in ticks],
        "thickness": 10,
        "outlinewidth": 0,
        "xpad": 4,
    }


def ranking(rows: Sequence[Mapping[str, Any]], by: str) -> Figure:
    """Bars of the mean relative movement of each layer or part, the largest on top."""
    ranked = ranks(rows, by)[::-1]
    values = [100 * value for _, value in ranked]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": [plain(name) for name, _ in ranked],
        "text": [f"{significant(value)} %" for value in values],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": "var(--accent)"},
        "hoverinfo": "skip",
    }
    across = {
        "title": {"text": "mean relative movement"},
        "ticksuffix": " %",
        "range": [0, 1.2 * max(values) or 1],
    }
    upright = {"type": "category", "showgrid": False}
    figure = plot([trace], _AXES + _ROW * len(ranked), xaxis=across, yaxis=upright)
    figure["layout"]["bargap"] = 0.35
    return figure


def ranks(rows: Sequence[Mapping[str, Any]], by: str) -> list[tuple[str, float]]:
    """(name, mean relative movement) of each layer or part, largest first; `by` is the column."""
    found: dict[str, list[float]] = {}
    for row in rows:
        name = f"layer {row['layer']}" if by == "layer" else row[by]
        if row["relative"] is not None:
            found.setdefault(name, []).append(row["relative"])
    means = [(name, sum(values) / len(values)) for name, values in found.items()]
    return sorted(means, key=lambda pair: -pair[1])
