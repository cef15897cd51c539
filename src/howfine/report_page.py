"""The report as a page (HTML, one file that asks no network for anything) and as Markdown."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from plotly.offline import get_plotlyjs

from howfine import figures, figures_distance, wording
from howfine.wording import interval_said, score_said, share_said, significant

_EXAMPLE = "a quiet, moving film"
_UNITS = r"%|[kMGT]B\b|bytes?\b|seeds?\b|points\b"


class Cell(NamedTuple):
    """What a table shows, and what it is sorted by."""

    text: str
    order: float | str


class Table(NamedTuple):
    """A table: column names, rows of cells, and the index of the recommended row."""

    columns: list[str]
    rows: list[list[Cell]]
    chosen: int | None = None


def html(result: Mapping[str, Any]) -> str:
    """The whole page. Everything in `result` is escaped; the only scripts are the page's own."""
    plots = {"score": figures.score_against_bytes(result)}
    if rows := result["distance"]:
        plots |= {
            "relative": figures_distance.heatmap(rows, "relative"),
            "angle": figures_distance.heatmap(rows, "angle"),
            "layers": figures_distance.ranking(rows, "layer"),
            "parts": figures_distance.ranking(rows, "part"),
        }
    return (
        _environment()
        .get_template("report.html.j2")
        .render(_view(result), plots=plots, plotly=get_plotlyjs())
    )


def markdown(result: Mapping[str, Any]) -> str:
    """The same content as text and tables."""
    return _environment().get_template("report.md.j2").render(_view(result))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("howfine"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        unbroken=_unbroken, md=_markdown_text, share=share_said, significant=significant
    )
    return environment


def _unbroken(text: str) -> str:
    """The text with no line break inside a quantity or an interval."""
    return re.sub(
        rf"(?<=\d) (?={_UNITS})|(?<=[±×]) |(?<=\d,) (?=\S*\])", "\N{NO-BREAK SPACE}", text
    )


def _markdown_text(text: object) -> str:
    """Text that means itself in Markdown, in tables too; intervals stay as they are."""
    special = r"[\\`*_<>|#&~]|\[(?!-?\d)|\](?=[(\[:])"
    return re.sub(special, r"\\\g<0>", " ".join(str(text).split()))


def _view(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the templates show, in words."""
    return {
        "report": result,
        "task": wording.name_said(result["task"]["name"]),
        "base": wording.name_said(result["base"]["name"]),
        "ceiling": wording.ceiling_said(result),
        "margin": wording.margin_said(result["margin"]),
        "cards": _cards(result),
        "groups": groups_table(result),
        "runs": runs_table(result),
        "failed": [run for run in result["runs"] if "error" in run],
        "scale": scale_table(result["distance"]) if result["distance"] else None,
        "moved": _moved(result["distance"]) if result["distance"] else "",
        "partial": layers_table(result),
        "commands": commands(result),
        "seeds": sorted({seed for group in result["groups"] for seed in group["seeds"]}),
    }


def _cards(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, figure, remark) of the answer's four numbers."""
    chosen, metric = result["recommended"], result["task"]["metric"]
    ceiling = wording.ceiling_of(result["groups"])
    return [
        ("File", wording.human(chosen["bytes"]), f"recipe {chosen['recipe']}"),
        (
            "Of full size",
            share_said(chosen["share_of_full_bytes"]),
            f"the ceiling has {wording.human(ceiling['bytes'])}",
        ),
        (
            f"Test {wording.metric_said(metric)}",
            score_said(metric, chosen["mean_score"]),
            f"interval {interval_said(metric, chosen['mean_interval'])}",
        ),
        (
            f"P(within {wording.margin_said(result['margin'])})",
            "reference"
            if chosen["key"] in ceiling["keys"]
            else wording.probability_said(chosen["probability"]),
            f"of the ceiling's {score_said(metric, ceiling['score'])}",
        ),
    ]


def groups_table(result: Mapping[str, Any]) -> Table:
    """One row for every recipe and setting, smallest file first."""
    ceiling, metric = wording.ceiling_of(result["groups"]), result["task"]["metric"]
    groups = sorted(result["groups"], key=lambda group: group["bytes"])
    keys = [result["recommended"]["key"] in group["keys"] for group in groups]
    columns = ["recipe", "settings", "test score", "dev", "bytes", "of full", "trainable"]
    columns += ["step time", "peak memory", f"P(within {wording.margin_said(result['margin'])})"]
    rows = [_group_row(group, ceiling, metric) for group in groups]
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
        Cell(_seeds_said(group), len(group["seeds"])),
    ]


def _seeds_said(group: Mapping[str, Any]) -> str:
    """How many seeds there are, and of how many where some are missing."""
    found = len(group["seeds"])
    return f"{found} of {found + len(group['missing'])}" if group["missing"] else str(found)


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


def _moved(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which layer and which matrix moved most and least, in a sentence."""
    layers, parts = figures_distance.ranks(rows, "layer"), figures_distance.ranks(rows, "part")
    (most, far), (least, near) = layers[0], layers[-1]
    times = f", {far / near:.1f} times as far as {least}" if near else f"; {least} did not move"
    text = f"Of the layers, {most} moved most ({share_said(far)} of its weights' mean size{times})"
    return f"{text}; of the matrices, {parts[0][0]} moved most and {parts[-1][0]} least."


def commands(result: Mapping[str, Any]) -> dict[str, str] | None:
    """What applies the recommended file, to be pasted; None where it was not kept."""
    file = result["recommended"]["file"]
    if file is None:
        return None
    pair, name = result["task"]["texts"] == 2, shlex.quote(file)
    asked = "$'first text\\tsecond text'" if pair else f'"{_EXAMPLE}"'
    text = '("first text", "second text")' if pair else f'"{_EXAMPLE}"'
    base = result["base"]["name"]
    shell = [
        f"howfine evaluate {name}",
        f"howfine predict {name} {asked}",
        f"howfine inspect {name}",
        f"howfine merge {name} merged",
    ]
    python = f"""import howfine

base = howfine.Base.load({_quoted(base)})
print(howfine.predict({_quoted(file)}, [{text}], base))

with howfine.Delta.load({_quoted(file)}).applied(base) as model:
    ...  # a torch module: the base with the change on; the base is itself again on leaving"""
    return {"shell": "\n".join(shell), "python": python}


def _quoted(text: str) -> str:
    """A Python literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _text(text: str) -> Cell:
    return Cell(text, text)
