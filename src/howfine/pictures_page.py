"""A page of pictures found for texts: one file that asks no network for anything."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from howfine.images import Picture

# Pixels of a picture's longer side on the page.
SHOWN = 224


def html(queries: Sequence[str], found: Mapping[str, Any], title: str) -> str:
    """A row of pictures for each text, best first. `found` is `howfine.search.Found.as_dict`."""
    rows = [
        {"query": query, "hits": [{**hit, "data": _of_file(hit["path"])} for hit in hits]}
        for query, hits in zip(queries, found["hits"], strict=True)
    ]
    environment = Environment(
        loader=PackageLoader("howfine"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
    )
    template = environment.get_template("pictures.html.j2")
    return template.render(title=title, rows=rows, found=found)


def _of_file(path: str) -> str:
    return thumbnail(Picture(path, Path(path)))


def thumbnail(picture: Picture) -> str:
    """A small JPEG of a picture, in base64."""
    image = picture.open()
    image.thumbnail((SHOWN, SHOWN))
    held = io.BytesIO()
    image.save(held, "JPEG", quality=85)
    return base64.b64encode(held.getvalue()).decode()
