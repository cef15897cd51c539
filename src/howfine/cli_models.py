"""howfine merge, slice and export: models written out. Heavy imports inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from howfine import options

if TYPE_CHECKING:
    from howfine.slicing import Sliced


def merge(
    delta: options.DeltaFile,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    base: options.OwnBase = None,
    dtype: options.Dtype = "float32",
    as_json: options.AsJson = False,
) -> None:
    """Write base and delta as a plain Hugging Face checkpoint."""
    from howfine.delta import Delta
    from howfine.merge import merge as run
    from howfine.widths import KEY

    opened = Delta.load(delta)
    loaded = options.base(base, opened, "cpu", "float32")
    path = run(opened, out, loaded, dtype=dtype)
    how = "Base.load" if hasattr(loaded.config, KEY) else "AutoModel.from_pretrained"
    facts = {"folder": str(path), "bytes": _bytes(path), "dtype": dtype}
    said = f"{path}: {facts['bytes']:,} bytes of weights in {dtype}; load it with {how}"
    options.show(as_json, facts, said)


def _bytes(folder: Path) -> int:
    """Of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


# long: an option takes a line or three
def cut(
    delta: options.DeltaFile,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    base: options.OwnBase = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of the units to keep, of a delta of all sizes.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Of a delta of all sizes the largest as fast, in ms here.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Of --latency-ms: inputs at a time; default: 1.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Of --latency-ms: tokens of an input; default: 64.")
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(
            metavar="TEXTS",
            help="Keep the tokens of these: a .txt file, or all of a task, its test split, too.",
        ),
    ] = None,
    least: Annotated[
        int | None,
        typer.Option(help="Of --vocabulary: how often a token has to be there; default: 1."),
    ] = None,
    data: options.DataDir = None,
    dtype: options.Dtype = "float32",
    as_json: options.AsJson = False,
) -> None:
    """Write base and delta as a smaller model, without the heads and neurons that are off.

    With --vocabulary also without the tokens that some texts don't use; then no unit need be off.
    """
    from dataclasses import asdict

    from howfine import pretrained, surgery
    from howfine.delta import Delta
    from howfine.errors import SettingError
    from howfine.latency import largest
    from howfine.slicing import sliced as run
    from howfine.timing import ROWS, TOKENS

    if keep is not None and latency_ms is not None:
        raise SettingError("--keep and --latency-ms both say a size; give one of them")
    if latency_ms is None and (rows is not None or tokens is not None):
        raise SettingError("--rows and --tokens are for --latency-ms; give that, too, or neither")
    if vocabulary is None and (least is not None or data is not None):
        raise SettingError("--least and --data are for --vocabulary; give that, too, or neither")
    opened = Delta.load(delta)
    texts = options.texts(vocabulary, data) if vocabulary is not None else None
    loaded = options.base(base, opened, "cpu", "float32")
    if latency_ms is not None:
        rows, tokens = ROWS if rows is None else rows, TOKENS if tokens is None else tokens
        with surgery.converted(loaded.towers, pretrained.dtype_of(dtype)):  # as it will run
            keep = largest(opened, loaded, latency_ms, rows, tokens).keep
    least = 1 if least is None else least
    done = run(opened, out, loaded, keep=keep, texts=texts, least=least, dtype=dtype)
    facts = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(done).items()}
    facts |= {"bytes": _bytes(done.folder), "dtype": dtype} | (
        {} if keep is None else {"keep": keep}
    )
    options.show(as_json, facts, _told(done, keep, f"{facts['bytes']:,} bytes in {dtype}"))


def _told(done: Sliced, keep: float | None, size: str) -> str:
    said = f"{done.folder}: {done.parameters:,} of {done.before:,} parameters, {size}; heads "
    said += f"{', '.join(map(str, done.heads))}; neurons {', '.join(map(str, done.neurons))}"
    said += f"; {done.tokens:,} tokens. " if done.tokens else ". "
    said += "AutoModel.from_pretrained" if done.plain else "howfine's Base.load"
    said += " loads it" + (f"; {done.readout} gives its answers" if done.readout else "")
    said += " (howfine evaluate wants its --task)" if done.readout else ""
    return said + (f"; {keep:g} of the units are kept" if keep is not None else "")


def export(
    delta: options.DeltaFile,
    out: Annotated[Path, typer.Argument(help="The .onnx file to write.")],
    base: options.OwnBase = None,
    pair: Annotated[bool, typer.Option("--pair", help="The task's inputs are two texts.")] = False,
    dtype: options.Dtype = "float32",
    as_json: options.AsJson = False,
) -> None:
    """Write base, delta and head as one ONNX file, and check that ONNX Runtime agrees."""
    from howfine.delta import Delta
    from howfine.export import export as run

    opened = Delta.load(delta)
    path = run(opened, out, options.base(base, opened, "cpu", "float32"), pair=pair, dtype=dtype)
    size = path.stat().st_size
    facts = {"file": str(path), "bytes": size, "labels": list(opened.labels)}
    options.show(as_json, facts, f"{path}: {size:,} bytes; ONNX Runtime gives the same outputs")
