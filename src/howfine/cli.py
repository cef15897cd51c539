"""The command line: thin. Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from howfine import cli_compose, options
from howfine.cli_align import align, search
from howfine.cli_extract import extract
from howfine.cli_inspect import inspect
from howfine.cli_models import cut, export, merge
from howfine.cli_zero_shot import meta_train, zero_shot

app = typer.Typer(
    name="howfine",
    help="How small can the task-specific change of a pretrained model be? Measure it, find it, "
    "store it, use it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(cli_compose.app, name="compose")

# Settings of the recipe, its method and readout come as flags of their own: --learning-rate 1e-3.
_OPEN: Any = {"allow_extra_args": True, "ignore_unknown_options": True}


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("howfine"))
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    pass


# long: an option takes a line or three
@app.command(context_settings=_OPEN)
def tune(
    context: typer.Context,
    recipe: Annotated[str, typer.Option(help="A recipe or method by name, or a YAML file.")],
    base: options.BaseName = "minilm",
    task: options.TaskName = "rotten-tomatoes",
    out: Annotated[Path | None, typer.Option(help="The delta file to write.")] = None,
    seed: int = 0,
    train_size: Annotated[int | None, typer.Option(help="Train on so many examples.")] = None,
    shots: options.Shots = None,
    teacher: options.Teacher = None,
    work: options.Work = None,
    resume: options.Resume = False,
    data: options.DataDir = None,
    text: options.TextColumns = None,
    label: options.LabelColumn = None,
    target: options.TargetColumn = None,
    form: options.FormName = None,
    image: options.ImageColumn = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune by a recipe and store the change as a delta file.

    Every setting of the recipe's training, method and readout is a flag too, such as
    --learning-rate 1e-3 --initial-sparsity 0.1; `howfine methods RECIPE` lists them.
    """
    from howfine.base import Base
    from howfine.delta import check_target
    from howfine.distill import distilled
    from howfine.recipe import Recipe
    from howfine.tune import tune as run

    chosen = Recipe.load(recipe).override(**options.settings(context.args))
    found = options.load_task(
        options.stated_task(task, data, text, label, target, form, image, train=train_size)
    )
    found = found if shots is None else found.shots(shots, seed)
    loaded = Base.load(base or "minilm", kind=chosen.readout.kind, dtype=dtype, device=device)
    if teacher is not None:
        if out is not None:
            check_target(out)  # before the teacher reads all of train
        found = distilled(found, teacher, loaded, readout=chosen.readout, progress=not as_json)
    tuned = run(
        loaded, found, chosen, out=out, seed=seed, work=work, resume=resume, progress=not as_json
    )
    options.show(as_json, tuned.as_dict(), options.tuned(tuned))


@app.command()
def evaluate(
    delta: options.DeltaFile,
    base: options.OwnBase = None,
    task: Annotated[str | None, typer.Option(help="As for tune; default: the delta's own.")] = None,
    split: options.Split = "test",
    temperature_from: options.TemperatureFrom = None,
    data: options.DataDir = None,
    text: options.TextColumns = None,
    label: options.LabelColumn = None,
    target: options.TargetColumn = None,
    form: options.FormName = None,
    image: options.ImageColumn = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    as_json: options.AsJson = False,
) -> None:
    """Score a delta file on a task, with the calibration error (ECE) of its probabilities."""
    from howfine.delta import Delta
    from howfine.evaluate import evaluate as run
    from howfine.evaluate import task_of

    opened = Delta.load(delta)
    name = task or task_of(opened)
    loaded = options.base(base, opened, device, dtype)
    found = options.load_task(options.stated_task(name, data, text, label, target, form, image))
    score = run(
        *(opened, loaded, found),
        split=split,
        progress=not as_json,
        temperature_from=temperature_from,
    )
    result = {"file": str(delta), "bytes": delta.stat().st_size, **score.as_dict()}
    result["score"] = result.pop("value")
    options.show(as_json, result, options.said(score))


@app.command()
def predict(
    delta: options.DeltaFile,
    texts: Annotated[list[str], typer.Argument(help="Texts; '-' reads lines from standard input.")],
    base: options.OwnBase = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    as_json: options.AsJson = False,
) -> None:
    """Answer for texts. A pair of texts is one argument with a tab between the two.

    An empty text, or line, is answered like any other.
    """
    from howfine.delta import Delta
    from howfine.evaluate import predict as run

    lines = [line.rstrip("\n") for line in sys.stdin] if texts == ["-"] else texts
    pairs: list[Any] = [tuple(line.split("\t")) if "\t" in line else line for line in lines]
    opened = Delta.load(delta)
    answers = run(opened, pairs, options.base(base, opened, device, dtype))
    said = "\n".join(
        "\t".join(map(options.cell, [*answer.values(), *([""] if "score" in answer else []), line]))
        for answer, line in zip(answers, lines, strict=True)
    )
    options.show(as_json, answers, said)


@app.command()
def distance(
    before: Annotated[str, typer.Argument(help="A checkpoint folder or file, or a base's name.")],
    after: Annotated[str, typer.Argument(help="A checkpoint, or a delta file made on BEFORE.")],
    references: Annotated[bool, typer.Option(help="Random-initialisation references too.")] = True,
    as_json: options.AsJson = False,
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
    options.show(as_json, [asdict(row) for row in rows], "\n".join(said))


app.command()(extract)
app.command()(inspect)
app.command(context_settings=_OPEN)(align)
app.command()(search)
app.command("zero-shot")(zero_shot)
app.command("meta-train", context_settings=_OPEN)(meta_train)
app.command()(merge)
app.command("slice")(cut)
app.command()(export)


@app.command()
def study(
    base: options.BaseName = "minilm",
    task: options.TaskName = "rotten-tomatoes",
    plan: Annotated[str, typer.Option(help="A plan by name, or a YAML file.")] = "default",
    out: Annotated[Path, typer.Option(help="Folder for runs, deltas and the report.")] = Path(
        "runs/study"
    ),
    storage: Annotated[
        str | None, typer.Option(help="Optuna database URL, to share a study.")
    ] = None,
    train_size: Annotated[int | None, typer.Option(help="Train on so many examples.")] = None,
    data: options.DataDir = None,
    text: options.TextColumns = None,
    label: options.LabelColumn = None,
    target: options.TargetColumn = None,
    form: options.FormName = None,
    image: options.ImageColumn = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    as_json: options.AsJson = False,
) -> None:
    """Find the smallest change that still does the task, and report it.

    Run it again to go on after a stop, or beside itself to share the work.
    """
    found = options.stated_task(task, data, text, label, target, form, image, train=train_size)
    options.study(base or "minilm", found, plan, out, storage, device, dtype, as_json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A study's folder.")],
    as_json: options.AsJson = False,
) -> None:
    """Write report.html, report.json and report.md from a study's stored results."""
    from howfine.report import report as run

    result = run(folder)
    options.show(as_json, result, f"{result['sentence']}\n{folder / 'report.html'}")


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="A method or a recipe, whose settings are shown.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """List methods and recipes, or all settings of one: each is a flag of `tune`."""
    from howfine.catalogue import catalogue

    found = catalogue(name)
    lines = []
    for entry in found:
        lines.append(f"{entry['name']}: {entry['summary']}")
        if name is None:
            lines += [f"  {key:<12} {about}" for key, about in entry["recipes"].items()]
            continue
        for part in ("settings", "readout", "training"):
            lines += [f"{part}:"] if part != "settings" else []
            lines += map(options.setting, entry[part])
    options.show(as_json, found, "\n".join(lines))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo.")] = Path("runs/demo"),
    as_json: options.AsJson = False,
) -> None:
    """A small study on the embedded base and task: a few minutes on two cores."""
    found = options.stated_task("rotten-tomatoes", train=720, dev=300)
    options.study("minilm", found, "demo", out, None, "cpu", "float32", as_json)


def main() -> None:
    """Run a command; an expected error is one sentence on standard error and its exit code."""
    from howfine.errors import HowfineError

    # Standard error is for one's own sentence; what transformers thinks of a loop is in its log.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except HowfineError as error:
        for bar in _progress_bars():
            bar.close()  # the sentence has a line of its own
        typer.echo(f"howfine: {error}", err=True)
        sys.exit(error.exit_code)


def _progress_bars() -> list[Any]:
    """Those on the terminal, which an error has left unfinished; transformers' among them."""
    drawn = sys.modules.get("tqdm")
    return list(getattr(drawn.tqdm, "_instances", ())) if drawn else []


if __name__ == "__main__":
    main()
