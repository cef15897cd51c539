"""howfine compose: the command line of `howfine.compose`. Heavy imports inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from howfine import options

app = typer.Typer(
    help="Join, subtract, scale and compare deltas made on one base.", no_args_is_help=True
)

Files = Annotated[list[Path], typer.Argument(help="*.delta.safetensors files of one base.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The delta file to write.")]
HeadOf = Annotated[
    str | None,
    typer.Option("--head", help="Whose readout: a file, its number, or none for no head."),
]
Store = Annotated[
    str | None,
    typer.Option(help="Round all values to a precision such as fp16, instead of keeping them."),
]


@app.command()
def union(
    files: Files,
    out: Out,
    on_overlap: Annotated[
        str | None,
        typer.Option(
            help="Where several change an entry: refuse (default), first, last, mean or sum."
        ),
    ] = None,
    head: HeadOf = None,
    store: Store = None,
    base: options.OwnBase = None,
    as_json: options.AsJson = False,
) -> None:
    """The changes of all files. Exact where no two change the same entry."""
    asked = {"on_overlap": on_overlap, "head": _head(head, files)}
    _write("union", files, out, store, base, as_json, asked)


@app.command()
def difference(
    files: Files,
    out: Out,
    head: HeadOf = None,
    store: Store = None,
    base: options.OwnBase = None,
    as_json: options.AsJson = False,
) -> None:
    """The first file's change without the entries that another one changes. Exact."""
    _write("difference", files, out, store, base, as_json, {"head": _head(head, files)})


@app.command("sum")
def scaled_sum(
    files: Files,
    out: Out,
    weights: Annotated[
        str | None, typer.Option(help="A weight for each file: 0.7,0.3 (default: 1 each).")
    ] = None,
    head: HeadOf = None,
    store: Store = None,
    base: options.OwnBase = None,
    as_json: options.AsJson = False,
) -> None:
    """Scaled changes added up: task arithmetic, or interpolation where weights sum to 1."""
    numbers = None if weights is None else [_number(part) for part in weights.split(",")]
    asked = {"weights": numbers, "head": _head(head, files)}
    _write("sum", files, out, store, base, as_json, asked)


@app.command(context_settings={"ignore_unknown_options": True})  # for a factor such as -0.5
def scale(
    file: options.DeltaFile,
    by: Annotated[str, typer.Argument(help="The factor; not 0.")],
    out: Out,
    store: Store = None,
    base: options.OwnBase = None,
    as_json: options.AsJson = False,
) -> None:
    """A change times a number."""
    _write("scale", [file], out, store, base, as_json, {"by": _number(by)})


@app.command()
def negate(
    file: options.DeltaFile,
    out: Out,
    store: Store = None,
    base: options.OwnBase = None,
    as_json: options.AsJson = False,
) -> None:
    """The opposite change."""
    _write("negate", [file], out, store, base, as_json, {})


@app.command()
def overlap(files: Files, base: options.OwnBase = None, as_json: options.AsJson = False) -> None:
    """Which share of the entries that one file changes another one changes too."""
    from dataclasses import asdict

    from howfine.compose import overlap as run

    rows = run(files, _base(base, files))
    said = [f"{'entries':>10} {'shared':>10} {'share':>8} {'chance':>8}  of what, changed by what"]
    for row in rows:
        numbers = f"{row.count:>10,} {row.shared:>10,} {row.share:>8.4f} {row.chance:>8.4f}"
        said.append(f"{numbers}  {row.of}, {row.by}")
    options.show(as_json, [asdict(row) for row in rows], "\n".join(said))


def _base(name: str | None, files: list[Path]) -> Any:
    from howfine.delta import Delta

    return options.base(name, Delta.load(files[0]), "cpu", "float32")


def _write(
    operation: str,
    files: list[Path],
    out: Path,
    store: str | None,
    base: str | None,
    as_json: bool,
    asked: dict[str, Any],
) -> None:
    """Compose and store; say how many bytes, and what rounding cost."""
    from howfine.compose import compose, stored
    from howfine.delta import check_target

    check_target(out)
    loaded = _base(base, files)
    made, error = compose(operation, files, loaded, **asked), 0.0
    if store is not None:
        made, error = stored(made, loaded, store)
    size = made.save(out)
    result = {"file": str(out), "bytes": size, "operation": operation, "rounding": error}
    rounded = f", rounded to {store}: a weight is off by {error:.2g} at most" if store else ""
    without = "a score: evaluate it with --task"
    if made.lacks_head(loaded):
        without = "a head: start from it, merge it, or compose it"
    said = f"{out}: {size:,} bytes{rounded}. Without {without}"
    options.show(as_json, result, said)


def _head(asked: str | None, files: list[Path]) -> int | Literal["none"] | None:
    """Index of the file that --head names, or counts from 1; or none, as a word."""
    from howfine.errors import SettingError

    if asked is None:
        return None
    if Path(asked) in files:
        return files.index(Path(asked))
    if asked.isdecimal() and 1 <= int(asked) <= len(files):
        return int(asked) - 1
    if asked == "none":
        return "none"
    raise SettingError(
        f"--head {asked}: expected one of the files, its number from 1 to {len(files)}, or none"
    )


def _number(text: str) -> float:
    from howfine.errors import SettingError

    try:
        return float(text)
    except ValueError:
        raise SettingError(f"{text!r} is no number; give one such as 0.5") from None
