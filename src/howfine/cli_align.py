"""The commands align and search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from howfine import options


def align(
    context: typer.Context,
    task: Annotated[
        str, typer.Option(help="Pictures with captions: 'img/flickr8k', a data file or folder.")
    ],
    image_base: Annotated[str, typer.Option(help="An image encoder: a name or a folder.")],
    text_base: Annotated[str, typer.Option(help="A text encoder, alike.")] = "minilm",
    recipe: Annotated[str, typer.Option(help="A recipe by name, or a YAML file.")] = "lilt",
    out: Annotated[Path | None, typer.Option(help="The delta file to write.")] = None,
    seed: int = 0,
    train_size: Annotated[int | None, typer.Option(help="Train on so many captions.")] = None,
    work: options.Work = None,
    resume: options.Resume = False,
    data: options.DataDir = None,
    image: options.ImageColumn = None,
    text: options.TextColumns = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    as_json: options.AsJson = False,
) -> None:
    """Align an image and a text encoder on pictures with captions: `tune` with two towers.

    Settings of the recipe's training, method and readout are flags, too, such as --size 112.
    """
    from howfine.base import Base
    from howfine.pretrained import TWO_TOWERS
    from howfine.recipe import Recipe
    from howfine.tune import tune

    chosen = Recipe.load(recipe).override(**options.settings(context.args))
    stated = options.stated_task(task, data, text, image=image, train=train_size)
    found = options.load_task(stated)
    name = f"{image_base}+{text_base}"
    loaded = Base.load(name, kind=TWO_TOWERS, dtype=dtype, device=device)
    tuned = tune(
        loaded, found, chosen, out=out, seed=seed, work=work, resume=resume, progress=not as_json
    )
    options.show(as_json, tuned.as_dict(), options.tuned(tuned))


def search(
    queries: Annotated[list[str], typer.Argument(help='Texts, such as "a dog in snow".')],
    delta: Annotated[Path, typer.Option(help="A delta file that `align` made.")],
    images: Annotated[Path, typer.Option(help="A folder of pictures; those under it count too.")],
    base: options.OwnBase = None,
    top: Annotated[int, typer.Option(help="Pictures shown of each text.")] = 10,
    page: Annotated[Path | None, typer.Option(help="Write the pictures as one HTML page.")] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    as_json: options.AsJson = False,
) -> None:
    """Look for pictures by what they show. An index of the folder is kept between calls."""
    from howfine.container import write_atomically
    from howfine.delta import Delta
    from howfine.pictures_page import html
    from howfine.search import search as run

    loaded = options.base(base, Delta.load(delta), device, dtype)
    found = run(delta, queries, images, loaded, top=top, progress=not as_json).as_dict()
    if page is not None:
        write_atomically(page, html(queries, found, f"Pictures in {images}").encode())
    lines = []
    for query, hits in zip(queries, found["hits"], strict=True):
        lines += [query] if len(queries) > 1 else []
        lines += [f"{hit['similarity']:.3f}\t{options.cell(hit['path'])}" for hit in hits]
    left = [f"{count} left out for {reason}" for reason, count in found["left_out"].items()]
    counts = [f"{found['pictures']} pictures, {found['encoded']} of them encoded now", *left]
    lines += ["; ".join(counts), *([str(page)] if page else [])]
    options.show(as_json, {"queries": queries, **found}, "\n".join(lines))
