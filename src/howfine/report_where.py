"""Where the changes lie: the report's counts of changed entries, layer by layer, part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from howfine import wording
from howfine.base import Base
from howfine.delta import Delta
from howfine.distance import ORDER
from howfine.errors import HowfineError
from howfine.ledger import Record
from howfine.regions import everywhere
from howfine.report_tables import Cell, Table
from howfine.wording import share_said

Row = dict[str, Any]  # layer, part, changed, entries, share

_ORDER = (*ORDER, "bias", "norm", "embedding", "pooler", "other")
_OUTSIDE = "outside"  # of the layers
# As many cells as are named in a sentence.
_NAMED = 3


def measure(
    folder: Path,
    records: Sequence[Record],
    groups: Sequence[Mapping[str, Any]],
    recommended: Mapping[str, Any],
    base: Base,
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Rows of one delta file of every recipe, and the key of its run, by the recipe's name.

    The recommended file itself; of other recipes, the first seed of the settings with the best
    mean dev score. A recipe whose file is gone or can't be decoded is left out.
    """
    files = {record["key"]: folder / record["file"] for record in records if "file" in record}
    rows, runs = {}, {}
    for recipe in dict.fromkeys(group["recipe"] for group in groups):
        key = _shown(recipe, groups, recommended)
        found = _rows(files[key], base)
        if found is not None:
            rows[recipe], runs[recipe] = found, key
    return rows, runs


def _shown(recipe: str, groups: Sequence[Mapping[str, Any]], recommended: Mapping[str, Any]) -> str:
    """The key of the run that stands for a recipe."""
    if recipe == recommended["recipe"]:
        return str(recommended["key"])
    mine = [group for group in groups if group["recipe"] == recipe]
    best = max(mine, key=lambda group: (group["dev_score"], -group["bytes"]))
    return str(min(zip(best["seeds"], best["keys"], strict=True))[1])


def _rows(file: Path, base: Base) -> list[Row] | None:
    """A row for every part of every layer, changed or not; None without a file that applies."""
    if not file.is_file():
        return None
    try:
        places = everywhere(Delta.load(file), base)
    except HowfineError:  # a report is of scores that are measured: the page says what is lacking
        return None
    known = {part: index for index, part in enumerate(_ORDER)}
    rows = [place.as_dict() for place in places]
    rows.sort(key=lambda r: (r["layer"] is None, r["layer"], known.get(r["part"], len(known))))
    return rows


def view(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the templates show of it; None where no file was there to count in."""
    found = result["where"]
    if not found:
        return None
    chosen = result["recommended"]["recipe"]
    order = sorted(found, key=lambda recipe: recipe != chosen)
    recipes = dict.fromkeys(group["recipe"] for group in result["groups"])
    return {
        "chosen": found.get(chosen),
        "said": said(found[chosen]) if chosen in found else "",
        "overview": _overview(result, order),
        "tables": [
            (recipe, layers_table(found[recipe])) for recipe in order if _sum(found[recipe])
        ],
        "missing": [recipe for recipe in recipes if recipe not in found],
    }


def said(rows: Sequence[Row]) -> str:
    """How much changed, where it is densest and which layers are as they were, in sentences."""
    changed, entries = _sum(rows), _sum(rows, "entries")
    if not changed:
        return f"None of the base's {entries:,} entries changed; the head alone was trained."
    dense = sorted((row for row in rows if row["changed"]), key=lambda row: -row["share"])
    cells = [f"{_place(row)} ({_share(row)})" for row in dense[:_NAMED]]
    text = f"{changed:,} of {entries:,} entries changed ({share_said(changed / entries)}). "
    text += f"The largest shares: {', '.join(cells)}."
    layers = dict.fromkeys(row["layer"] for row in rows if row["layer"] is not None)
    still = [n for n in layers if not _sum([row for row in rows if row["layer"] == n])]
    if still:
        noun = "layer" if len(still) == 1 else "layers"
        text += f" Nothing changed in {noun} {', '.join(map(str, still))}."
    return text


def _place(row: Row) -> str:
    return row["part"] if row["layer"] is None else f"{row['part']} of layer {row['layer']}"


def _overview(result: Mapping[str, Any], recipes: Sequence[str]) -> Table:
    """One row for every recipe: how much it changes, and where most of that is."""
    runs = {run["key"]: run for run in result["runs"]}
    lines = []
    for recipe in recipes:
        rows, run = result["where"][recipe], runs[result["where_runs"][recipe]]
        changed, entries = _sum(rows), _sum(rows, "entries")
        settings = wording.settings_said(run["settings"]) or "–"
        lines.append(
            [
                Cell(recipe, recipe),
                Cell(settings, settings),
                Cell(str(run["seed"]), run["seed"]),
                Cell(f"{changed:,}", changed),
                Cell(share_said(changed / entries) if changed else "0", changed / entries),
                _most(rows, "layer"),
                _most(rows, "part"),
            ]
        )
    columns = ["recipe", "settings", "seed", "changed entries", "of all"]
    columns += ["most in layer", "most in part"]
    chosen = result["recommended"]["recipe"]
    return Table(columns, lines, recipes.index(chosen) if chosen in recipes else None)


def _most(rows: Sequence[Row], by: str) -> Cell:
    """The layer or the part that has most of the changed entries, and how many of them."""
    counts: dict[Any, int] = {}
    for row in rows:
        counts[row[by]] = counts.get(row[by], 0) + row["changed"]
    name, most = max(counts.items(), key=lambda pair: pair[1])
    if not most:
        return Cell("–", "")
    place = _OUTSIDE if name is None else str(name)
    return Cell(f"{place} ({share_said(most / sum(counts.values()))})", place)


def layers_table(rows: Sequence[Row]) -> Table:
    """Layer × part: the share of entries that changed; '–' where the base has no such part."""
    parts = list(dict.fromkeys(row["part"] for row in rows))
    cells = {(row["layer"], row["part"]): row for row in rows}
    lines = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        found = [cells.get((layer, part)) for part in parts]
        name = Cell(_OUTSIDE, 1e9) if layer is None else Cell(str(layer), layer)
        lines.append([name, *map(_cell, found)])
    return Table(["layer", *parts], lines)


def _cell(row: Row | None) -> Cell:
    return Cell("–", -1.0) if row is None else Cell(_share(row), row["share"])


def _share(row: Row) -> str:
    return share_said(row["share"]) if row["changed"] else "0"


def _sum(rows: Sequence[Row], column: str = "changed") -> int:
    return sum(row[column] for row in rows)
