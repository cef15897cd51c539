"""tune: from a base, a task and a recipe to a delta, on transformers' Trainer."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from howfine import regions
from howfine import start as start_of
from howfine.base import Base
from howfine.container import write_atomically
from howfine.delta import SUFFIX, Delta, check_target
from howfine.errors import DeltaError, HowfineError, SettingError, StorageError, near
from howfine.evaluate import Score, evaluate
from howfine.loop import Fit
from howfine.recipe import Recipe
from howfine.start import Start
from howfine.task import Task

# Rows that are scored at a time: at most, and for each that is trained at a time.
_SCORED, _MORE = 64, 8


@dataclass(frozen=True)
class Tuned:
    """A finished run: its delta as stored, the dev score of that file, and what it cost."""

    delta: Delta
    path: Path
    bytes: int
    score: Score
    seconds: float  # training alone, of all phases
    steps: int  # of all phases
    peak_bytes: int  # growth of the process's memory over the loaded base, at its highest
    trainable: int  # parameters of the last phase
    changed: int  # entries of the base whose value is another with the file on

    def as_dict(self) -> dict[str, Any]:
        """Everything but the delta itself, as JSON types."""
        found = {k: v for k, v in vars(self).items() if k not in ("delta", "path", "score")}
        return {"file": str(self.path), "score": self.score.as_dict(), **found}


def tune(
    base: Base | str,
    task: Task | str,
    recipe: Recipe | str,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    split: str = "dev",
    work: str | Path | None = None,
    resume: bool = False,
    starts: str | Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> Tuned:
    """Fit a recipe and store the delta at `out`; the score is of the file, loaded again.

    `settings` override the recipe's. `work` keeps the training checkpoints, of which there are as
    many as `evaluations`; with `resume` the newest of them is picked up. `starts` keeps the deltas
    of earlier phases, for other trainings that begin with the same. Raises TrainingError where the
    loss or what was trained stops being finite, StorageError where a file can't be written,
    SettingError for settings that don't fit together.
    """
    recipe = (Recipe.load(recipe) if isinstance(recipe, str) else recipe).override(**settings)
    base = Base.load(base, kind=recipe.readout.kind) if isinstance(base, str) else base
    task = Task.load(task) if isinstance(task, str) else task
    recipe = recipe.of_task(task)
    short = re.sub(r"[^\w.]+", "-", task.name).strip("-")
    out = Path(out or f"runs/{short}-{recipe.name}{SUFFIX}")
    _check(task, split, seed, out)
    outside = regions.outside(recipe.outside, base)
    _check_work(recipe, work, resume)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(work or scratch)
        checkpoint = _claim(folder, _record(base, task, recipe, seed), resume)
        with (
            _phases_before(base, task, recipe, seed, _starts(starts, work, out)) as before,
            Fit(base, task, recipe, seed, folder, progress, before.start, outside) as fit,
        ):
            packed = _trained(fit, checkpoint, folder, split)
    main = fit.trainer.is_world_process_zero()
    score = _store(packed, out, base, task, split, recipe.training.batch_size) if main else None
    fit.trainer.accelerator.wait_for_everyone()
    delta = Delta.load(out)
    found = {"trainable": fit.trainable, "changed": regions.count(delta, base)}
    found["peak_bytes"] = max(before.peak_bytes, fit.peak_bytes)
    found["steps"] = before.steps + fit.trainer.state.global_step
    score = score or evaluate(delta, base, task, split=split)
    return Tuned(delta, out, out.stat().st_size, score, before.seconds + fit.seconds, **found)


@dataclass(frozen=True)
class _Before:
    """What the phases before the last one gave, and what they cost."""

    start: Start | None = None
    seconds: float = 0.0
    steps: int = 0
    peak_bytes: int = 0


def _starts(starts: str | Path | None, work: str | Path | None, out: Path) -> tuple[Path, bool]:
    """Where deltas of earlier phases go, and whether they stay there."""
    if starts or work:
        return Path(starts or f"{work}/starts"), True
    return out.with_name(f".{out.name}.starts"), False


@contextmanager
def _phases_before(
    base: Base, task: Task, recipe: Recipe, seed: int, kept: tuple[Path, bool]
) -> Iterator[_Before]:
    """What the last phase starts from; its files go when it is done, unless they are to stay."""
    folder, stay = kept
    try:
        yield _before(base, task, recipe, seed, folder)
    finally:
        if not stay:
            shutil.rmtree(folder, ignore_errors=True)


def _before(base: Base, task: Task, recipe: Recipe, seed: int, kept: Path) -> _Before:
    """Fit the phase before, as far as `kept` has not its delta, and start from that file."""
    first = recipe.start
    if first is None:
        return _Before()
    if isinstance(first, str):
        return _Before(start_of.of_file(first, base, recipe.readout, task.labels, recipe.method))
    record = json.dumps(_record(base, task, first, seed) | {"recipe": ""}, sort_keys=True)
    path = kept / f"{hashlib.sha256(record.encode()).hexdigest()[:16]}{SUFFIX}"
    costs = path.with_suffix(".json")
    if not costs.exists():
        _fit_phase(base, task, first, seed, path, costs)
    spent = json.loads(costs.read_text())
    start = start_of.of_delta(Delta.load(path), base, recipe.readout, task.labels, recipe.method)
    return _Before(start, **spent)


def _fit_phase(base: Base, task: Task, first: Recipe, seed: int, path: Path, costs: Path) -> None:
    """A phase as a file, and beside it what it and those before it cost."""
    outside = regions.outside(first.outside, base)
    earlier = _before(base, task, first, seed, path.parent)
    with (
        tempfile.TemporaryDirectory() as scratch,
        Fit(base, task, first, seed, Path(scratch), False, earlier.start, outside) as fit,
    ):
        packed = _trained(fit, None, Path(scratch))
    steps = earlier.steps + fit.trainer.state.global_step
    if fit.trainer.is_world_process_zero():
        packed.save(path)
        peak = max(earlier.peak_bytes, fit.peak_bytes)
        seconds = earlier.seconds + fit.seconds
        spent = {"seconds": seconds, "steps": steps, "peak_bytes": peak}
        write_atomically(costs, json.dumps(spent).encode())
    fit.trainer.accelerator.wait_for_everyone()


def _check(task: Task, split: str, seed: int, out: Path) -> None:
    """What is wrong here would come to light only after the training."""
    if split not in task.splits:
        raise SettingError(f"split {split!r} is unknown. {near(split, task.splits)}")
    if not 0 <= seed < 2**32:
        raise SettingError(f"seed {seed}: expected a whole number from 0 to 2**32 - 1")
    place = next(folder for folder in out.absolute().parents if os.path.exists(folder))
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise StorageError(
            f"{out} can't be written: {place} is no folder that one may write to; choose another"
        )
    check_target(out)


def _check_work(recipe: Recipe, work: str | Path | None, resume: bool) -> None:
    """What has no place without a folder of checkpoints."""
    if resume and not work:
        raise SettingError("resume needs the folder of the checkpoints; name it with --work")
    if resume and not recipe.training.evaluations:
        raise SettingError(
            "resume goes on from checkpoints, of which there are as many as evaluations, and those "
            "are 0; set --evaluations, such as 10"
        )
    if "tensorboard" in recipe.training.report_to and not work:
        raise SettingError(
            "report_to tensorboard writes beside the checkpoints; name a folder for them with "
            "--work"
        )


def _record(base: Base, task: Task, recipe: Recipe, seed: int) -> dict[str, Any]:
    """All that a training depends on, as JSON has it."""
    made_on = {"seed": seed, "base": base.fingerprint, "task": task.fingerprint}
    made_on |= {"dtype": str(base.dtype), "metric": task.metric}
    return dict(json.loads(json.dumps({**recipe.as_dict(), **made_on})))


def _claim(folder: Path, record: dict[str, Any], resume: bool) -> Path | None:
    """The newest checkpoint to go on from, if any; the folder then belongs to this training.

    Raises SettingError where it belongs to another one, which would be mixed up with this.
    """
    newest = max(_checkpoints(folder), default=(0, None))[1]
    owner = folder / "training.json"
    if newest and not resume:
        raise SettingError(
            f"{folder} holds the checkpoint {newest.name} of an earlier training; add --resume to "
            "go on with it, or name another folder with --work"
        )
    theirs = json.loads(owner.read_text()) if newest and owner.is_file() else {}
    if odd := sorted(key for key in theirs if theirs[key] != record.get(key)):
        raise SettingError(
            f"{folder} holds checkpoints of another training: {odd[0]} was {theirs.get(odd[0])}, "
            f"now it is {record.get(odd[0])}; repeat the same settings, or name another folder"
        )
    write_atomically(owner, (json.dumps(record, indent=2) + "\n").encode())
    return newest


def _checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """(step, path) of whole checkpoints: the state is what Trainer writes last of one."""
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and _is_json(path / "trainer_state.json"):
            yield int(step), path


def _is_json(path: Path) -> bool:
    """Whether a file is whole: Trainer opens its state before it fills it."""
    try:
        json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return False
    return True


def _trained(fit: Fit, checkpoint: Path | None, folder: Path, split: str = "dev") -> Delta:
    """Train on rows that the readout takes, as it does those of the split to be scored."""
    fit.check(("train", "dev", split))
    try:
        fit.train(checkpoint)
        return fit.pack()
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # of a network, such as a tracker's
        raise StorageError(
            f"training checkpoints can't be kept in {folder}: {error}; no delta was written. Free "
            "some space, or name another folder with --work"
        ) from error


def _store(packed: Delta, out: Path, base: Base, task: Task, split: str, batch_size: int) -> Score:
    """Score the delta as read back from a file, and write it with that score in its header.

    What stands at `out` is replaced once, at the very end, by the finished file. Where that fails,
    what was trained stays, in a file beside it that the error names.
    """
    name = out.name.removesuffix(SUFFIX)
    trial = out.with_name(f"{name}.unscored{SUFFIX}")
    packed.save(trial)
    told = f"the trained delta is kept at {trial}: score it with `howfine evaluate`"
    # No gradients are kept, so that more rows fit; few are trained at once where memory is short.
    rows = min(_SCORED, _MORE * batch_size)
    try:
        score = evaluate(Delta.load(trial), base, task, split=split, batch_size=rows)
        packed.with_score(score.stated()).save(out)
    except DeltaError:  # what it gives is no number
        trial.unlink()
        raise
    except HowfineError as error:
        raise type(error)(f"{error}; {told}") from error
    except BaseException as error:  # memory that is short, a user's Ctrl-C: nothing is to be lost
        error.add_note(told)
        raise
    trial.unlink()
    return score
