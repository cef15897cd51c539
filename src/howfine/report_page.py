"""The report as a page (HTML, one file that asks no network for anything) and as Markdown."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from plotly.offline import get_plotlyjs

from howfine import (
    calibration,
    figures,
    figures_calibration,
    figures_distance,
    figures_latency,
    report_latency,
    report_pictures,
    report_tables,
    report_where,
    wording,
)
from howfine.wording import interval_said, score_said, share_said, significant

_EXAMPLE = "a quiet, moving film"
_LOOKED_FOR = "a dog in snow"
_UNITS = r"%|[kMGT]B\b|bytes?\b|seeds?\b|points\b"


def html(result: Mapping[str, Any], thumbnails: Mapping[str, str] | None = None) -> str:
    """The whole page. Everything in `result` is escaped; the only scripts are the page's own.

    `thumbnails` are the pictures that `result` names, as `report_pictures.thumbnails` makes them.
    """
    plots = {"score": figures.score_against_bytes(result)}
    if figures_calibration.shown(result):
        plots["reliability"] = figures_calibration.reliability(result)
    if result["latency"] and result["latency"]["rows"]:
        plots["latency"] = figures_latency.score_against_latency(result)
    if rows := result["distance"]:
        plots |= {
            "relative": figures_distance.heatmap(rows, "relative"),
            "angle": figures_distance.heatmap(rows, "angle"),
            "layers": figures_distance.ranking(rows, "layer"),
            "parts": figures_distance.ranking(rows, "part"),
        }
    rows = result["where"].get(result["recommended"]["recipe"], [])
    if any(row["changed"] for row in rows):
        plots["where"] = figures_distance.shares(rows)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(_view(result), plots=plots, plotly=get_plotlyjs(), thumbnails=thumbnails or {})
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
        "groups": report_tables.groups_table(result),
        "trust": figures_calibration.summary(result),
        "bin_count": calibration.BINS,
        "bins": report_tables.reliability_table(result),
        "runs": report_tables.runs_table(result),
        "failed": [run for run in result["runs"] if "error" in run],
        "scale": report_tables.scale_table(result["distance"]) if result["distance"] else None,
        "moved": _moved(result["distance"]) if result["distance"] else "",
        "where": report_where.view(result),
        "found": report_pictures.said(result["pictures"]) if result["pictures"] else "",
        "input": report_latency.input_said(result["latency"]) if result["latency"] else "",
        "speed": report_latency.table(result["latency"], result["task"]["metric"])
        if result["latency"] and result["latency"]["rows"]
        else None,
        "partial": report_tables.layers_table(result),
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
    if result["pictures"]:
        return _of_towers(name, file, base)
    # Answers that each row chooses among by itself are given with the row, not on a command line.
    options = result["task"]["options"]
    # What a task was loaded with, a name alone does not tell.
    task = "" if result["task"]["by_name"] else " --task TASK  # with the study's options"
    shell = [
        f"howfine evaluate {name}{task}",
        *([] if options else [f"howfine predict {name} {asked}"]),
        f"howfine inspect {name}",
        *([f"howfine merge {name} merged"] if result["recommended"]["merges"] else []),
    ]
    predicted = "" if options else f"print(howfine.predict({_quoted(file)}, [{text}], base))\n"
    python = f"""import howfine

base = howfine.Base.load({_quoted(base)})
{predicted}
with howfine.Delta.load({_quoted(file)}).applied(base) as model:
    ...  # a torch module: the base with the change on; the base is itself again on leaving"""
    return {"shell": "\n".join(shell), "python": python}


def _of_towers(name: str, file: str, base: str) -> dict[str, str]:
    """What looks for pictures with the recommended file."""
    shell = [
        f"howfine evaluate {name}",
        f'howfine search "{_LOOKED_FOR}" --delta {name} --images pictures --page found.html',
        f"howfine inspect {name}",
    ]
    python = f"""import howfine

base = howfine.Base.load({_quoted(base)}, kind="two_towers")
print(howfine.search({_quoted(file)}, ["{_LOOKED_FOR}"], "pictures", base).hits)"""
    return {"shell": "\n".join(shell), "python": python}


def _quoted(text: str) -> str:
    """A Python literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)
