"""tune: from a base, a task and a recipe to a delta, on transformers' Trainer."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from howfine.base import Base
from howfine.delta import SUFFIX, Delta
from howfine.evaluate import Score, evaluate
from howfine.loop import Fit
from howfine.recipe import Recipe
from howfine.task import Task


@dataclass(frozen=True)
class Tuned:
    """A finished run: its delta as stored, the dev score of that file, and what it cost."""

    delta: Delta
    path: Path
    bytes: int
    score: Score
    seconds: float  # training alone
    steps: int
    peak_bytes: int  # growth of the process's memory over the loaded base, at its highest
    trainable: int  # parameters

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
    progress: bool = False,
    **settings: Any,
) -> Tuned:
    """Fit a recipe and store the delta at `out`; the score is of the file, loaded again.

    `settings` override the recipe's. `work` keeps the training checkpoints; with `resume` the
    newest of them is picked up. Raises TrainingError where the loss stops being finite.
    """
    recipe = (Recipe.load(recipe) if isinstance(recipe, str) else recipe).override(**settings)
    base = Base.load(base, kind=recipe.readout.kind) if isinstance(base, str) else base
    task = Task.load(task) if isinstance(task, str) else task
    out = (
        Path(out) if out else Path("runs") / f"{task.name.replace('/', '-')}-{recipe.name}{SUFFIX}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(work) if work else Path(scratch)
        fit = Fit(base, task, recipe, seed, folder, progress)
        with fit.change:
            fit.train(resume)
            packed = fit.pack()
    if fit.trainer.is_world_process_zero():
        _store(packed, out, base, task, split)
    fit.trainer.accelerator.wait_for_everyone()
    delta = Delta.load(out)
    return Tuned(
        delta=delta,
        path=out,
        bytes=out.stat().st_size,
        score=evaluate(delta, base, task, split=split),
        seconds=fit.seconds,
        steps=fit.trainer.state.global_step,
        peak_bytes=fit.peak_bytes,
        trainable=fit.trainable,
    )


def _store(packed: Delta, out: Path, base: Base, task: Task, split: str) -> None:
    """Write, read back, score what was read, and write that score into the header."""
    packed.save(out)
    score = evaluate(Delta.load(out), base, task, split=split)
    low, high = score.interval
    stated = {
        "metric": score.metric,
        "value": round(score.value, 6),
        "interval": [round(low, 6), round(high, 6)],
        "on": f"{task.name}/{split}",
        "n": score.n,
    }
    packed.with_score(stated).save(out)
