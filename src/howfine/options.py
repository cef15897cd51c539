"""Options that the commands share, and what they do with them."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

BaseName = Annotated[
    str | None,
    typer.Option(help="'minilm' (embedded), a Hugging Face name, or a folder."),
]
OwnBase = Annotated[
    str | None,
    typer.Option(
        help="Where the base is: a name or a folder; default: as it was named in training."
    ),
]
TaskName = Annotated[
    str,
    typer.Option(
        help="'rotten-tomatoes' (embedded), a GLUE name, a data file or folder, a hub name."
    ),
]
DataDir = Annotated[
    Path | None, typer.Option("--data", help="Folder of datasets (or HOWFINE_DATA).")
]
TextColumns = Annotated[
    str | None, typer.Option("--text", help="Text column, or two with a comma.")
]
LabelColumn = Annotated[str | None, typer.Option("--label", help="Label column.")]
Shots = Annotated[int | None, typer.Option(help="Train on so many of each class, drawn by --seed.")]
Teacher = Annotated[str | None, typer.Option(help="A delta file: learn what it answers for train.")]
Resume = Annotated[bool, typer.Option(help="Go on from the newest checkpoint in --work.")]
TargetColumn = Annotated[
    str | None,
    typer.Option("--target", help="Column of texts to be written, for a model to learn."),
]
FormName = Annotated[
    str | None,
    typer.Option("--form", help="What rows are made of: table, translation, dialogue …"),
]
ImageColumn = Annotated[
    str | None,
    typer.Option("--image", help="Column of pictures; --text then names their captions."),
]
Work = Annotated[Path | None, typer.Option(help="Folder for training checkpoints.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps …")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16: of the base's weights.")]
DeltaFile = Annotated[Path, typer.Argument(help="A *.delta.safetensors file.")]
Split = Annotated[str, typer.Option(help="train, dev or test.")]
TemperatureFrom = Annotated[
    str | None,
    typer.Option(help="Fit a temperature on this split, and say what it does to the ECE."),
]


def study(
    base: str,
    task: dict[str, Any],
    plan: str,
    out: Path,
    storage: str | None,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Run a study and report it: what `study` and `demo` have in common."""
    from howfine.base import Base
    from howfine.plan import Plan
    from howfine.report import report as write_report
    from howfine.study import study as run

    loaded = Base.load(base, kind=Plan.load(plan).kind, device=device, dtype=dtype)
    found = load_task(task)
    facts = {"task": task, "command": shlex.join(["howfine", *sys.argv[1:]])}
    run(loaded, found, plan, out=out, storage=storage, progress=not as_json, facts=facts)
    result = write_report(out, base=loaded, task=found)
    show(as_json, result, f"{result['sentence']}\n{out / 'report.html'}")


def stated_task(
    name: str,
    data: Path | None = None,
    text: str | None = None,
    label: str | None = None,
    target: str | None = None,
    form: str | None = None,
    image: str | None = None,
    **subset: int | None,
) -> dict[str, Any]:
    """The task that --task and the options of its columns name, for Task.load."""
    given = {"name_or_path": name, "data": str(data) if data else None}
    given |= {"text": text, "label": label, "target": target, "form": form, "image": image}
    stated: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    sizes = {split: size for split, size in subset.items() if size is not None}
    return {**stated, "subset": sizes} if sizes else stated


def load_task(stated: dict[str, Any]) -> Any:
    """The task that `stated_task` describes."""
    from howfine.task import Task

    options = {key: value for key, value in stated.items() if key != "subset"}
    return Task.load(**options).subset(**stated.get("subset", {}))


def texts(name: str, data: Path | None) -> Any:
    """The lines of a .txt file, or else what a task's examples say; read as they are asked for."""
    from howfine.errors import SettingError
    from howfine.vocabulary import texts_of

    if not name.endswith(".txt"):
        return texts_of(load_task(stated_task(name, data)))
    try:
        return Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(
            f"texts {name} can't be read: {error}; give a file in UTF-8 with one text a line, or "
            "a task's name"
        ) from error


def base(name: str | None, delta: Any, device: str, dtype: str) -> Any:
    """The base named, or else the delta's own."""
    from howfine.base import Base

    return Base.load(name or delta.base_name, kind=delta.base_kind, device=device, dtype=dtype)


def settings(extra: list[str]) -> dict[str, Any]:
    """`--learning-rate 1e-3` and `--learning-rate=1e-3` as {"learning_rate": "1e-3"}."""
    from howfine.errors import SettingError

    found: dict[str, Any] = {}
    rest = list(extra)
    while rest:
        flag, inline, value = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise SettingError(f"argument {flag!r}: expected a flag such as --learning-rate 1e-3")
        if not inline:
            if not rest or rest[0].startswith("--"):
                raise SettingError(f"flag {flag} needs a value, such as {flag} 1")
            value = rest.pop(0)
        found[flag[2:].replace("-", "_")] = value
    return found


def setting(entry: dict[str, Any]) -> str:
    """A setting as the flag it is, its help and what it is left out."""
    flag = f"--{entry['name'].replace('_', '-')}"
    return f"  {flag:<26}{entry['help']} (default {entry['default']!r})"


def tuned(found: Any) -> str:
    """A finished training in words."""
    trained = f"{found.trainable:,} trainable parameters, {found.seconds:.0f} s"
    # What stands beside the base, such as a prefix, changes no entry of it.
    changed = f"{found.changed:,} entries changed, " if found.changed else ""
    return f"{found.path}: {found.bytes:,} bytes, {said(found.score)}, {changed}{trained}"


def cell(value: Any) -> str:
    """A value in a line with tabs between: a text's own tabs and line ends are written out."""
    return str(value).replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")


def said(score: Any) -> str:
    """A score in words."""
    low, high = score.interval
    value = f"{score.metric} {score.value:.4f} [{low:.4f}, {high:.4f}]"
    return f"{value} on {score.n} of {score.split}{_calibration_said(score.calibration)}"


def _calibration_said(found: dict[str, Any] | None) -> str:
    """The expected calibration error, and what a temperature makes of it if one was fitted."""
    if found is None:
        return ""
    said = f", ECE {found['ece']:.4f}"
    if after := found.get("temperature"):
        at = f"temperature {after['value']:.3g}, fitted on {after['fitted_on']}"
        said += f" ({after['ece']:.4f} at {at})"
    return said


# Where torchrun, MPICH and Open MPI tell each process which one it is.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")


def show(as_json: bool, result: Any, said: str) -> None:
    """Print the result, as JSON or in words; of several processes, the first one speaks."""
    if all(os.environ.get(name, "0") == "0" for name in _RANKS):
        typer.echo(_json(result) if as_json else said)


def _json(result: Any) -> str:
    """JSON has no infinity and no NaN: such a value is null."""
    return json.dumps(_finite(result), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
