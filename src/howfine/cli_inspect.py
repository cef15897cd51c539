"""The command `inspect`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from howfine import options

if TYPE_CHECKING:  # torch comes with these
    from howfine.cost import Part
    from howfine.regions import Place

_Against = Annotated[
    str | None,
    typer.Option(help="Also count the changed entries of each part of each layer of this base."),
]


def inspect(
    delta: options.DeltaFile, base: _Against = None, as_json: options.AsJson = False
) -> None:
    """Account for every byte of a delta file, and with --base for every entry it changes."""
    from dataclasses import asdict

    from howfine.cost import parts
    from howfine.delta import Delta
    from howfine.regions import where_changed

    opened = Delta.load(delta)
    found, size = parts(delta), delta.stat().st_size
    header = opened.header()
    result: dict[str, Any] = {"file": str(delta), "bytes": size, "header": header}
    result["parts"] = [asdict(part) for part in found]
    lines = [json.dumps(header, indent=2, ensure_ascii=False), *_bytes_said(found, size)]
    if base is not None:
        places = where_changed(opened, options.base(base, opened, "cpu", "float32"))
        result["where"] = [place.as_dict() for place in places]
        lines += _places_said(places)
    options.show(as_json, result, "\n".join(lines))


def _bytes_said(found: Sequence[Part], size: int) -> list[str]:
    """A line for every part of the file, and their sum."""
    lines = [f"{'bytes':>12}  {'coding':<10}{'entries':>12}{'kept':>12}{'bound':>12}  part"]
    for part in found:
        kept = "" if part.kept is None else f"{part.kept:,}"
        bound = "" if part.bound_bytes is None else f"{part.bound_bytes:,.0f}"
        row = f"{part.bytes:>12,}  {part.coding:<10}{part.entries:>12,}{kept:>12}{bound:>12}"
        lines.append(f"{row}  {part.name}")
    total = sum(part.bytes for part in found)
    return [*lines, f"{total:>12,}  in all (the file has {size:,})"]


def _places_said(places: Sequence[Place]) -> list[str]:
    """A line for every part of every layer that changed, and their sum."""
    from howfine.wording import share_said

    lines = [f"{'changed':>12}{'of entries':>14}{'share':>10}  layer  part"]
    for place in places:
        layer = "–" if place.layer is None else place.layer
        numbers = f"{place.changed:>12,}{place.entries:>14,}{share_said(place.share):>10}"
        lines.append(f"{numbers}  {layer:>5}  {place.part}")
    return [*lines, f"{sum(place.changed for place in places):>12,}  changed in all"]
