"""The command line: thin. Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="howfine",
    help="How small can the task-specific change of a pretrained model be? Measure it, find it, "
    "store it, use it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

BaseName = Annotated[
    str | None,
    typer.Option(help="'minilm' (embedded), a Hugging Face name, or a folder."),
]
TaskName = Annotated[
    str,
    typer.Option(help="'rotten-tomatoes' (embedded), a GLUE name, a data file or folder, a hub name."),
]
DataDir = Annotated[
    Path | None, typer.Option("--data", help="Folder of datasets (or HOWFINE_DATA).")
]
TextColumns = Annotated[
    str | None, typer.Option("--text", help="Text column, or two with a comma.")
]
LabelColumn = Annotated[str | None, typer.Option("--label", help="Label column.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps …")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16: of the base's weights.")]
DeltaFile = Annotated[Path, typer.Argument(help="A *.delta.safetensors file.")]
Split = Annotated[str, typer.Option(help="train, dev or test.")]
# Settings of the recipe, its method and readout come as flags of their own: --learning-rate 1e-3.
_OPEN: Any = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=_OPEN)
def tune(
    context: typer.Context,
    recipe: Annotated[str, typer.Option(help="A recipe or method by name, or a YAML file.")],
    base: BaseName = "minilm",
    task: TaskName = "rotten-tomatoes",
    out: Annotated[Path | None, typer.Option(help="The delta file to write.")] = None,
    seed: int = 0,
    train_size: Annotated[int | None, typer.Option(help="Train on so many examples.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for training checkpoints.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in --work.")] = False,
    data: DataDir = None,
    text: TextColumns = None,
    label: LabelColumn = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Fine-tune by a recipe and store the change as a delta file.

    Every setting of the recipe's training, method and readout is a flag too, such as
    --learning-rate 1e-3 --initial-sparsity 0.1; `howfine methods NAME` lists them.
    """
    from howfine.base import Base
    from howfine.recipe import Recipe
    from howfine.tune import tune as run

    chosen = Recipe.load(recipe).override(**_settings(context.args))
    found = _task(task, data, text, label)
    if train_size:
        found = found.subset(train=train_size)
    loaded = Base.load(base or "minilm", kind=chosen.readout.kind, dtype=dtype, device=device)
    tuned = run(
        loaded, found, chosen, out=out, seed=seed, work=work, resume=resume, progress=not as_json
    )
    result = {
        "file": str(tuned.path),
        "bytes": tuned.bytes,
        "score": tuned.score.as_dict(),
        "seconds": tuned.seconds,
        "steps": tuned.steps,
        "peak_bytes": tuned.peak_bytes,
        "trainable": tuned.trainable,
    }
    _show(
        as_json,
        result,
        f"{tuned.path}: {tuned.bytes:,} bytes, {_said(tuned.score)}, "
        f"{tuned.trainable:,} trainable parameters, {tuned.seconds:.0f} s",
    )


@app.command()
def evaluate(
    delta: DeltaFile,
    base: BaseName = None,
    task: Annotated[str | None, typer.Option(help="As for tune; default: the delta's own.")] = None,
    split: Split = "test",
    data: DataDir = None,
    text: TextColumns = None,
    label: LabelColumn = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Score a delta file on a task."""
    from howfine.delta import Delta
    from howfine.evaluate import evaluate as run

    opened = Delta.load(delta)
    name = task or str(opened.score.get("on", "rotten-tomatoes")).rpartition("/")[0]
    loaded = _base(base, opened, device, dtype)
    score = run(
        opened, loaded, _task(name, data, text, label), split=split, progress=not as_json
    )
    result = {"file": str(delta), "bytes": delta.stat().st_size, **score.as_dict()}
    result["score"] = result.pop("value")
    _show(as_json, result, _said(score))


@app.command()
def predict(
    delta: DeltaFile,
    texts: Annotated[list[str], typer.Argument(help="Texts; '-' reads lines from standard input.")],
    base: BaseName = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Answer for texts. A pair of texts is one argument with a tab between the two."""
    from howfine.delta import Delta
    from howfine.evaluate import predict as run

    lines = [line.rstrip("\n") for line in sys.stdin] if texts == ["-"] else texts
    pairs: list[Any] = [tuple(line.split("\t")) if "\t" in line else line for line in lines]
    opened = Delta.load(delta)
    answers = run(opened, pairs, _base(base, opened, device, dtype))
    said = "\n".join(
        f"{answer.get('label', answer.get('score'))}\t{answer.get('probability', '')}\t{line}"
        for answer, line in zip(answers, lines, strict=True)
    )
    _show(as_json, answers, said)


@app.command()
def distance(
    before: Annotated[str, typer.Argument(help="A checkpoint folder or file, or a base's name.")],
    after: Annotated[str, typer.Argument(help="A checkpoint, or a delta file made on BEFORE.")],
    references: Annotated[bool, typer.Option(help="Random-initialisation references too.")] = True,
    as_json: AsJson = False,
) -> None:
    """Measure how far fine-tuning moved a model: L1 and angle, matrix by matrix."""
    from dataclasses import asdict

    from howfine.compare import compare

    rows = compare(before, after, references=references)
    header = f"{'matrix':<58}{'mean|d|':>11}{'relative':>10}{'angle/π':>9}{'changed':>9}"
    said = [header] + [
        f"{row.path:<58}{row.mean_abs:>11.2e}{row.relative:>10.4f}{row.angle:>9.4f}{row.changed:>9.2%}"
        for row in rows
    ]
    _show(as_json, [asdict(row) for row in rows], "\n".join(said))


@app.command()
def inspect(delta: DeltaFile, as_json: AsJson = False) -> None:
    """Account for every byte of a delta file."""
    from dataclasses import asdict

    from howfine.cost import parts
    from howfine.delta import Delta

    opened = Delta.load(delta)
    found = parts(delta)
    total = sum(part.bytes for part in found)
    result = {
        "file": str(delta),
        "bytes": delta.stat().st_size,
        "header": opened.header(),
        "parts": [asdict(part) for part in found],
    }
    lines = [json.dumps(opened.header(), indent=2, ensure_ascii=False)]
    lines += [f"{'bytes':>12}  {'coding':<10}{'entries':>12}{'kept':>12}{'bound':>12}  part"]
    for part in found:
        kept = "" if part.kept is None else f"{part.kept:,}"
        bound = "" if part.bound_bytes is None else f"{part.bound_bytes:,.0f}"
        lines.append(
            f"{part.bytes:>12,}  {part.coding:<10}{part.entries:>12,}{kept:>12}{bound:>12}  {part.name}"
        )
    lines.append(f"{total:>12,}  in all (the file has {delta.stat().st_size:,})")
    _show(as_json, result, "\n".join(lines))


@app.command()
def merge(
    delta: DeltaFile,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    base: BaseName = None,
    as_json: AsJson = False,
) -> None:
    """Write base and delta as a plain Hugging Face checkpoint."""
    from howfine.delta import Delta
    from howfine.merge import merge as run

    opened = Delta.load(delta)
    path = run(opened, out, _base(base, opened, "cpu", "float32"))
    _show(as_json, {"folder": str(path)}, f"{path}: load it with AutoModel.from_pretrained")


@app.command()
def study(
    base: BaseName = "minilm",
    task: TaskName = "rotten-tomatoes",
    plan: Annotated[str, typer.Option(help="A plan by name, or a YAML file.")] = "default",
    out: Annotated[Path, typer.Option(help="Folder for runs, deltas and the report.")] = Path("runs/study"),
    storage: Annotated[str | None, typer.Option(help="Optuna database URL, to share a study.")] = None,
    train_size: Annotated[int | None, typer.Option(help="Train on so many examples.")] = None,
    data: DataDir = None,
    text: TextColumns = None,
    label: LabelColumn = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Find the smallest change that still does the task, and report it.

    Run it again to go on after a stop, or beside itself to share the work.
    """
    found = _task(task, data, text, label)
    if train_size:
        found = found.subset(train=train_size)
    _study(base or "minilm", found, plan, out, storage, device, dtype, as_json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A study's folder.")],
    as_json: AsJson = False,
) -> None:
    """Write report.html, report.json and report.md from a study's stored results."""
    from howfine.report import report as run

    result = run(folder)
    _show(as_json, result, f"{result['sentence']}\n{folder / 'report.html'}")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method's settings.")] = None,
    as_json: AsJson = False,
) -> None:
    """List methods and their settings."""
    from howfine.catalogue import catalogue

    found = catalogue(name)
    lines = []
    for entry in found:
        lines.append(f"{entry['name']}: {entry['summary']}")
        for setting in entry["settings"] if name else []:
            flag = f"--{setting['name'].replace('_', '-')}"
            lines.append(f"  {flag:<22}{setting['help']} (default {setting['default']!r})")
    _show(as_json, found, "\n".join(lines))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo.")] = Path("runs/demo"),
    as_json: AsJson = False,
) -> None:
    """A small study on the embedded base and task: a few minutes on two cores."""
    found = _task("rotten-tomatoes", None, None, None)
    _study("minilm", found.subset(train=1500, dev=500), "demo", out, None, "cpu", "float32", as_json)


def _study(
    base: str,
    task: Any,
    plan: str,
    out: Path,
    storage: str | None,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    from howfine.base import Base
    from howfine.report import report as write_report
    from howfine.study import study as run

    loaded = Base.load(base, device=device, dtype=dtype)
    run(loaded, task, plan, out=out, storage=storage, progress=not as_json)
    result = write_report(out, base=loaded, task=task)
    _show(as_json, result, f"{result['sentence']}\n{out / 'report.html'}")


def _task(name: str, data: Path | None, text: str | None, label: str | None) -> Any:
    from howfine.task import Task

    columns = [part.strip() for part in text.split(",")] if text else None
    return Task.load(name, text=columns, label=label, data=data)


def _base(name: str | None, delta: Any, device: str, dtype: str) -> Any:
    from howfine.base import Base

    return Base.load(name or delta.base_name, kind=delta.base_kind, device=device, dtype=dtype)


def _settings(extra: list[str]) -> dict[str, Any]:
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


def _said(score: Any) -> str:
    low, high = score.interval
    return f"{score.metric} {score.value:.4f} [{low:.4f}, {high:.4f}] on {score.n} of {score.split}"


def _show(as_json: bool, result: Any, said: str) -> None:
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else said)


def main() -> None:
    """Run a command; an expected error is one sentence on standard error and its exit code."""
    from howfine.errors import HowfineError

    try:
        app()
    except HowfineError as error:
        typer.echo(f"howfine: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
