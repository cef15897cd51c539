"""The report's tables: what each cell shows, and what it is sorted by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from howfine import figures_calibration, wording
from howfine.wording import interval_said, percent_said, score_said, share_said, significant


class Cell(NamedTuple):
    """What a table shows, and what it is sorted by."""

    text: str
    order: float | str


class Table(NamedTuple):
    """A table: column names, rows of cells, and the index of the recommended row."""

    columns: list[str]
    rows: list[list[Cell]]
    chosen: int | None = None


def groups_table(result: Mapping[str, Any]) -> Table:
    """One row for every recipe and setting, smallest file first."""
    ceiling, metric = wording.ceiling_of(result["groups"]), result["task"]["metric"]
    groups = sorted(result["groups"], key=lambda group: group["bytes"])
    keys = [result["recommended"]["key"] in group["keys"] for group in groups]
    columns = ["recipe", "settings", "test score", "dev", "bytes", "of full", "trainable"]
    columns += ["step time", "peak memory", f"P(within {wording.margin_said(result['margin'])})"]
    rows = [_group_row(group, ceiling, metric) for group in groups]
    if any(group["ece"] is not None for group in groups):
        columns.append("ECE")
        rows = [[*row, _error(group)] for row, group in zip(rows, groups, strict=True)]
    rows = [[*row, _seeds(group)] for row, group in zip(rows, groups, strict=True)]
    return Table([*columns, "seeds"], rows, keys.index(True))


def _group_row(group: Mapping[str, Any], ceiling: Mapping[str, Any], metric: str) -> list[Cell]:
    said = score_said(metric, group["score"])
    reference = group is ceiling
    role = {"ceiling": " (ceiling)", "floor": " (floor)"}.get(group["role"], "")
    probability = "reference" if reference else wording.probability_said(group["probability"])
    share = group["bytes"] / ceiling["bytes"]
    return [
        Cell(f"{group['recipe']}{role}", group["recipe"]),
        _text(wording.settings_said(group["settings"]) or "–"),
        Cell(f"{said} {interval_said(metric, group['interval'])}", group["score"]),
        Cell(score_said(metric, group["dev_score"]), group["dev_score"]),
        Cell(f"{group['bytes']:,}", group["bytes"]),
        Cell(share_said(share), share),
        Cell(f"{group['trainable']:,}", group["trainable"]),
        Cell(f"× {group['step_ratio']:.2f}", group["step_ratio"]),
        Cell(wording.human(group["peak_bytes"]), group["peak_bytes"]),
        Cell(probability, 2.0 if reference else group["probability"]),
    ]


def _error(group: Mapping[str, Any]) -> Cell:
    """The expected calibration error; unknown ones, of older runs, are sorted behind all others."""
    known = group["ece"] is not None
    return Cell(percent_said(group["ece"]), group["ece"]) if known else Cell("–", 2.0)


def _seeds(group: Mapping[str, Any]) -> Cell:
    """How many seeds there are, and of how many where some are missing."""
    found = len(group["seeds"])
    said = f"{found} of {found + len(group['missing'])}" if group["missing"] else str(found)
    return Cell(said, found)


def runs_table(result: Mapping[str, Any]) -> Table:
    """One row for every finished run, in the plan's order."""
    metric = result["task"]["metric"]
    columns = ["recipe", "settings", "seed", "test score", "dev", "bytes", "steps", "seconds"]
    rows = [
        [
            _text(run["recipe"]),
            _text(wording.settings_said(run["settings"]) or "–"),
            Cell(str(run["seed"]), run["seed"]),
            Cell(
                f"{score_said(metric, run['score'])} {interval_said(metric, run['interval'])}",
                run["score"],
            ),
            Cell(score_said(metric, run["dev_score"]), run["dev_score"]),
            Cell(f"{run['bytes']:,}", run["bytes"]),
            Cell(f"{run['steps']:,}", run["steps"]),
            Cell(f"{run['seconds']:,.0f}", run["seconds"]),
        ]
        for run in result["runs"]
        if "error" not in run
    ]
    return Table(columns, rows)


def reliability_table(result: Mapping[str, Any]) -> Table:
    """The points of the reliability plot: a row for each bin that has answers."""
    rows = [
        [
            _text(name),
            Cell(point.said, point.low),
            Cell(f"{point.answers:,}", point.answers),
            Cell(percent_said(point.confidence), point.confidence),
            Cell(percent_said(point.accuracy), point.accuracy),
        ]
        for _, name, group in figures_calibration.shown(result)
        for point in figures_calibration.points_of(group["reliability"])
    ]
    return Table(["recipe", "confidence", "answers", "mean confidence", "right"], rows)


def layers_table(result: Mapping[str, Any]) -> Table:
    """The groups that change only some layers, by the selectors in their method's settings."""
    metric, rows = result["task"]["metric"], []
    for group in sorted(result["groups"], key=lambda group: -group["score"]):
        layers = sorted({text for text in _texts(group["method"]) if "@" in text})
        if layers:
            scored = f"{score_said(metric, group['score'])} "
            rows.append(
                [
                    _text(", ".join(layers)),
                    _text(group["recipe"]),
                    Cell(scored + interval_said(metric, group["interval"]), group["score"]),
                    Cell(f"{group['bytes']:,}", group["bytes"]),
                ]
            )
    return Table(["layers", "recipe", "test score", "bytes"], rows)


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested settings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for item in value.values() for text in _texts(item))
    elif isinstance(value, Iterable):
        yield from (text for item in value for text in _texts(item))


def scale_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """How far the matrices moved, beside R1 (to a fresh init) and R2 (between two inits)."""
    known = [row for row in rows if row["relative"] is not None]
    moved = [row for row in known if row["relative"] and row["reference_mean_abs"] is not None]
    # References are means of |d|: a matrix's own mean |before| makes them relative.
    weight = [row["mean_abs"] / row["relative"] for row in moved]
    columns = ["", "relative movement", "angle / π"]
    angles = [row["angle"] for row in known]
    lines = [("this fine-tuning", [row["relative"] for row in known], angles)]
    for name, prefix in (("R1: base to a fresh random init", "reference"),
                         ("R2: between two random inits", "random")):  # fmt: skip
        values = [row[f"{prefix}_mean_abs"] for row in moved]
        relative = [value / one for value, one in zip(values, weight, strict=True)]
        lines.append((name, relative, [row[f"{prefix}_angle"] for row in moved]))
    return Table(
        columns,
        [
            [_text(name), _spread(relative, percent=True), _spread(angles)]
            for name, relative, angles in lines
        ],
    )


def _spread(values: Sequence[float], *, percent: bool = False) -> Cell:
    """'0.7 % (0.2 % to 1.4 %)': median and range."""
    if not values:
        return Cell("nothing moved", 0.0)
    low, middle, high = (
        share_said(value) if percent else significant(value)
        for value in (min(values), median(values), max(values))
    )
    spread = middle if low == high else f"{middle} ({low} to {high})"
    return Cell(spread, median(values))


def _text(text: str) -> Cell:
    return Cell(text, text)
