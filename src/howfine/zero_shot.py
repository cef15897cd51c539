"""zero-shot: answers of a base that marks the right one of several options, with no training.

And meta-train, which makes such a base of a masked language model.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from howfine import checks
from howfine.base import Base
from howfine.delta import SUFFIX
from howfine.errors import BaseError, SettingError, StorageError, TaskError
from howfine.evaluate import Score, examples_of, logits
from howfine.merge import HEAD_CONFIG, merge
from howfine.readout import Readout, Wired, readouts
from howfine.recipe import Recipe
from howfine.task import Task
from howfine.tune import tune

RECIPE = "unimc"


def zero_shot(
    base: Base | str,
    texts: Sequence[str | tuple[str, str]],
    options: Sequence[str],
    *,
    question: str = "",
    batch_size: int = 32,
    progress: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:
    """For each text its most probable option, and the probability of every option.

    Good answers need a base that was trained so: see `meta_train`. `settings` are the readout's;
    without them those hold that the base was trained with, where its folder says them.
    Raises SettingError for a base without a masked language model and for two equal options,
    TaskError for a text that holds the mask token and for an Example with options of its own.
    """
    checks.several("texts", texts)
    checks.several("options", options)
    if len(options) < 2:
        raise SettingError(f"found {len(options)} options, expected what may be answered: several")
    known: Any = Recipe.load(RECIPE).readout
    if unknown := set(settings) - {field.name for field in fields(known)}:
        raise SettingError(f"zero_shot has no setting {', '.join(sorted(unknown))}: nothing trains")
    base = Base.load(base, kind=known.kind) if isinstance(base, str) else base
    told = _trained_with(base, known) | settings | {"question": question}
    read = Recipe.load(RECIPE).override(options=tuple(options), **told).readout
    model = Wired(base, read, read.attach(base, tuple(options))).eval()
    examples = examples_of(texts)
    for number, example in enumerate(examples, 1):
        if example.options:
            raise TaskError(
                f"input {number} is an Example with options of its own, and those of all are asked "
                "for; take them out of it, or ask with them as the options"
            )
    if not examples:
        return []
    outputs = logits(model, base, examples, batch_size=batch_size, progress=progress)
    chosen, shares = read.predict(outputs), read.probabilities(outputs)
    return [
        {
            "option": options[int(index)],
            "probability": float(row[int(index)]),
            "probabilities": dict(zip(options, map(float, row), strict=True)),
        }
        for index, row in zip(chosen, shares, strict=True)
    ]


def _trained_with(base: Base, read: Readout) -> dict[str, Any]:
    """What `meta_train` was told of inputs and answers, as `merge` wrote it beside the weights."""
    path = Path(base.name) / HEAD_CONFIG
    try:
        ((kind, stated),) = json.loads(path.read_text())["readout"].items()
        if readouts().get(kind) is not type(read):  # of a model that was tuned to classes, say
            return {}
        return {name: stated[name] for name in ("answers", "max_length", "apart") if name in stated}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BaseError(
            f"{path} is not what merge wrote ({error}); make the folder again, or remove the file"
        ) from error


def meta_train(
    base: Base | str,
    task: Task | str,
    out: str | Path,
    *,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> Score:
    """Train a base on questions with options of their own; the folder it writes is for `zero_shot`.

    Yang et al. 2022 (UniMC), §3.2: the whole model learns by the recipe `unimc`, of which
    `settings` are. The folder `out` is a plain Hugging Face checkpoint of a masked language model;
    the score is of dev. Raises TaskError for a task without such options, StorageError where `out`
    exists, and what `tune` raises.
    """
    task = Task.load(task) if isinstance(task, str) else task
    if os.path.exists(out):
        raise StorageError(f"{out} exists already; choose another folder or remove it first")
    if not all(row.options for row in task.splits["train"]):
        raise TaskError(
            f"task {task.name} has examples without options of their own, expected questions such "
            "as those of mc/commonsenseqa; for a task of classes use `tune --recipe unimc`"
        )
    recipe = Recipe.load(RECIPE).override(**settings)
    base = Base.load(base, kind=recipe.readout.kind) if isinstance(base, str) else base
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"choice{SUFFIX}"
        done = tune(base, task, recipe, out=path, seed=seed, progress=progress)
        merge(done.delta, out, base)
    return done.score
