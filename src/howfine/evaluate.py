"""Scores and predictions, always of a delta as it is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from howfine import checks
from howfine.base import Base
from howfine.batch import to_device
from howfine.calibration import calibration, temperature, tempered
from howfine.delta import Delta
from howfine.errors import SettingError, TaskError, near
from howfine.metrics import METRICS, bootstrap_interval, scores
from howfine.readout import Wired
from howfine.task import Example, Task

# What follows a task's name in a header where that does not load the same examples again.
_CHOSEN = " (columns or splits of its own)"


@dataclass(frozen=True)
class Score:
    """A metric on a split, with the 95 % bootstrap interval over its examples."""

    metric: str
    value: float
    interval: tuple[float, float]
    split: str
    n: int
    task: str
    # Every score the task is known by: an F1 comes with its accuracy.
    scores: dict[str, float]
    # Predictions in the split's order: class indices, scores for regression, or texts.
    predictions: np.ndarray = field(repr=False, compare=False)
    # Expected calibration error and what it is made of: `howfine.calibration.calibration`. None for
    # regression and texts. With a temperature asked for, `temperature` in it says what it changed.
    calibration: dict[str, Any] | None = None
    # Whether the task's name alone loads these examples.
    by_name: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Everything but the predictions, as JSON types."""
        found = asdict(self)
        del found["predictions"], found["by_name"]
        return {**found, "interval": list(self.interval)}

    def stated(self) -> dict[str, Any]:
        """What a delta's header says of it."""
        return {
            "metric": self.metric,
            "value": round(self.value, 6),
            "interval": [round(edge, 6) for edge in self.interval],
            "on": stated_on(self.task, self.split, self.by_name),
            "n": self.n,
        }


def stated_on(task: str, split: str, by_name: bool) -> str:
    """How a header names a split; `by_name`: whether the task's name alone loads it."""
    return f"{task}{'' if by_name else _CHOSEN}/{split}"


def evaluate(
    delta: Delta | str | Path,
    base: Base | None = None,
    task: Task | str | None = None,
    *,
    split: str = "test",
    batch_size: int = 64,
    progress: bool = False,
    data: str | Path | None = None,
    temperature_from: str | None = None,
) -> Score:
    """Score a delta (or a file) on a split of a task, by default the one it was trained for.

    `temperature_from` names another split on which to fit a temperature; the score stays what it
    is, its `calibration` says how the calibration error changes. Raises DeltaError for a damaged
    file, WrongBase, TaskError where labels don't match, SettingError for unknown splits and for a
    temperature that can't be fitted.
    """
    delta, base = opened(delta, base)
    delta.check_head(base)
    if not isinstance(task, Task):
        task = Task.load(task or task_of(delta), data=data)
    _check_splits(task, split, temperature_from)
    if tuple(task.labels) != delta.labels:
        raise TaskError(
            f"task {task.name} has labels {list(task.labels)}, the delta was trained for "
            f"{list(delta.labels)}; evaluate it on a task with the same labels"
        )
    checks.answerable(task, delta.readout.gives, "the delta's readout")
    asked = [split] if temperature_from is None else [split, temperature_from]
    with delta.applied(base) as model:
        run = partial(logits, model, base, batch_size=batch_size, progress=progress)
        found = [run(task.splits[name]) for name in asked]
        predictions = model.readout.predictions(base, found[0])
        shares = [model.readout.probabilities(each).numpy() for each in found if task.labels]
        likelihoods = run(task.splits[split], labelled=True) if model.readout.writes else None
    result = score(task, split, predictions, shares[0] if shares else None)
    if likelihoods is not None:
        result = replace(result, scores={**result.scores, "perplexity": _perplexity(likelihoods)})
    if temperature_from is None or result.calibration is None:
        return result
    gained = _temperature(task, split, temperature_from, *shares)
    return replace(result, calibration={**result.calibration, "temperature": gained})


def _perplexity(likelihoods: torch.Tensor) -> float:
    """Of (n, 2) sums of negative log-likelihoods and numbers of tokens: per token, all together."""
    total, tokens = likelihoods.double().sum(0).tolist()
    return float(np.exp(total / tokens))


def _check_splits(task: Task, split: str, temperature_from: str | None) -> None:
    for name in filter(None, (split, temperature_from)):
        if name not in task.splits:
            raise SettingError(f"split {name!r} is unknown. {near(name, task.splits)}")
    if temperature_from is None:
        return
    if not task.labels:
        raise SettingError(
            f"task {task.name} has no classes, and other answers have no confidence; leave the "
            "temperature out"
        )
    if temperature_from == split:
        raise SettingError(
            f"the temperature is to be fitted on {split}, the split that is scored, which would "
            "flatter it; name another split"
        )


def _temperature(
    task: Task, split: str, fitted_on: str, shares: np.ndarray, others: np.ndarray
) -> dict[str, Any]:
    """The temperature fitted on another split's probabilities, and the errors it leaves here."""
    value = temperature(others, task.targets(fitted_on))
    after = calibration(tempered(shares, value), task.targets(split))
    left = {name: after[name] for name in ("ece", "ece_10", "confidence")}
    return {"value": round(value, 6), "fitted_on": fitted_on, **left}


def task_of(delta: Delta) -> str:
    """Name of the task a delta was trained for, where that loads the examples it was scored on.

    Raises TaskError for a header without a name, and for a task that was loaded with options of
    its own: under its name other rows may be the test split's, among them some trained on.
    """
    name = str(delta.score.get("on", "")).rpartition("/")[0]
    if not name:
        raise TaskError("the delta's header names no task; say which one to evaluate it on")
    if name.endswith(_CHOSEN):
        raise TaskError(
            f"the delta was trained on {name.removesuffix(_CHOSEN)} with columns, splits or a seed "
            "that its header does not hold; name the task with the same options"
        )
    return name


def score(
    task: Task, split: str, predictions: np.ndarray, probabilities: np.ndarray | None = None
) -> Score:
    """Predictions of a whole split as a Score, with its calibration where probabilities are given.

    `probabilities` has shape (n, classes), and is left out for regression.
    """
    targets = task.targets(split)
    metric = METRICS[task.metric]
    interval = bootstrap_interval(metric, [predictions], targets)
    return Score(
        metric=task.metric,
        value=float(metric.function(predictions, targets)),
        interval=(float(interval[0]), float(interval[1])),
        split=split,
        n=len(targets),
        task=task.name,
        scores=scores(task.metric, predictions, targets),
        predictions=predictions,
        calibration=None if probabilities is None else calibration(probabilities, targets),
        by_name=task.by_name,
    )


def predict(
    delta: Delta | str | Path,
    texts: Sequence[str | tuple[str, str] | Example],
    base: Base | None = None,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Answers for texts: `label` and `probability` of each, `score` for regression, or `text`.

    Each is one text, or each a pair; or an Example, whatever it is made of. Raises TaskError for a
    mixture, DeltaError for a damaged file, WrongBase.
    """
    delta, base = opened(delta, base)
    examples = examples_of(texts)
    if not examples:
        return []
    with delta.applied(base) as model:
        outputs = logits(model, base, examples, batch_size=batch_size, progress=progress)
        return model.readout.told(base, delta.labels, outputs)


def examples_of(texts: Sequence[str | tuple[str, str] | Example]) -> list[Example]:
    """Texts, or pairs of texts, as examples.

    Raises TaskError for a mixture, for others and for half a character, SettingError for one text.
    """
    checks.several("texts", texts)
    examples = [
        text if isinstance(text, Example) else Example(texts=_texts(text), label=0)
        for text in texts
    ]
    counts = sorted({len(example.texts) for example in examples})
    if counts not in ([], [1], [2]):
        found = " and ".join(map(str, counts))
        raise TaskError(
            f"found inputs of {found} texts, expected one text in each, or a pair in each; take "
            "surplus tabs out"
        )
    checks.encodable("what is asked", examples)
    return examples


def _texts(found: Any) -> tuple[str, ...]:
    texts = (found,) if isinstance(found, str) else found
    if isinstance(texts, tuple | list) and all(isinstance(text, str) for text in texts):
        return tuple(texts)
    raise TaskError(f"found {found!r:.80}, expected a text, a pair of texts or an Example")


def opened(delta: Delta | str | Path, base: Base | None) -> tuple[Delta, Base]:
    """A delta from its file, and the base it names if none is given."""
    if not isinstance(delta, Delta):
        delta = Delta.load(delta)
    if base is None:
        base = Base.load(delta.base_name, kind=delta.base_kind)
    return delta, base


@torch.inference_mode()
def logits(
    model: Wired,
    base: Base,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    progress: bool = False,
    labelled: bool = False,
) -> torch.Tensor:
    """Outputs of the model, float32 on the CPU, in the examples' order.

    With `labelled` those that a loss is made of, where they are others. Examples of similar length
    share a batch, which saves most of the padding; captions of one picture do, which is then
    encoded once. Raises DeltaError where outputs are NaN or infinite.
    """
    order = sorted(range(len(examples)), key=lambda number: _place(examples[number]))
    parts = []
    for rows in tqdm(list(_batches(order, batch_size)), desc="predict", disable=not progress):
        batch = model.readout.collate(base, [examples[i] for i in rows], labelled=labelled)
        fields = to_device(batch.as_kwargs(), base.device)
        parts.append(model(**fields)["logits"].float().cpu())
    outputs = torch.cat(parts)
    checks.finite(int((~torch.isfinite(outputs)).any(-1).sum()), len(order), base.name)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return outputs[back]


def _place(example: Example) -> tuple[int, int]:
    """By what examples are put side by side: their picture, then their length."""
    seen = example.picture.digest if example.picture else 0
    return seen, sum(map(len, example.texts))


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
