"""Distillation: a student learns what a teacher answers for the training examples.

Of texts, those that a teacher writes (Kim & Rush 2016, "Sequence-level knowledge distillation";
Lin, Madotto & Fung 2020 for adapters): they are of fewer shapes than people's, so that a narrow
change may learn them more easily. Of classes, the teacher's probabilities beside the labels
(Hinton, Vinyals & Dean 2015, "Distilling the knowledge in a neural network", at temperature 1); of
scores, its scores. Only train gets other answers; dev and test stay what they are.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from howfine import container, fingerprint, plugins
from howfine.base import Base
from howfine.checks import ALIGNMENT, GENERATION, answerable
from howfine.container import write_atomically
from howfine.delta import Delta
from howfine.errors import SettingError, TaskError
from howfine.evaluate import logits
from howfine.readout import Readout, Wired
from howfine.task import Example, Task


def distilled(
    task: Task,
    teacher: str | Path,
    base: Base | None = None,
    *,
    readout: Readout | None = None,
    cache: str | Path | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Task:
    """The task with what a teacher answers for train.

    Texts that it writes come in the place of the targets, one row a source; where it writes none,
    a source keeps its own. Probabilities of classes, and scores, come beside the labels
    (`Example.taught`, `Training.teacher_share`).

    The teacher is a delta file, put on `base` where it was made on that; or a whole model (a folder
    or a name of the hub), which then reads its input as `readout` says. Its answers are kept in the
    folder `cache` (default: howfine's own in the user's cache) under the fingerprints of task and
    teacher.

    Raises TaskError for a teacher of other answers or labels, SettingError for one that can't be
    used.
    """
    taught = _Teacher(teacher, base, readout.of_task(task) if readout else None, task)
    writes = task.kind == GENERATION
    rows = _sources(task) if writes else list(task.splits["train"])
    path = _kept(cache) / f"{taught.key(task)}.json"
    answers = _known(path, len(rows))
    if answers is None:
        answers = taught.answers(rows, batch_size, progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(answers) + "\n").encode())
    told = f"{task.provenance}; {len(rows):,} train "
    if writes:
        told += f"targets written by {Path(teacher).name}"
        silent = sum(not text for text in answers)
        told += f", {silent} kept where it wrote nothing" if silent else ""
    else:
        told += f"examples answered by {Path(teacher).name}"
    learned = [_learned(row, answer) for row, answer in zip(rows, answers, strict=True)]
    return replace(task, splits={**task.splits, "train": learned}, provenance=told)


def _learned(row: Example, answer: str | list[float]) -> Example:
    """An example with what a teacher answers."""
    if isinstance(answer, str):
        return replace(row, targets=(answer,)) if answer else row
    return replace(row, taught=tuple(answer))


def _sources(task: Task) -> list[Example]:
    """Train's rows, the first of each source."""
    rows: dict[tuple[object, ...], Example] = {}
    for row in task.splits["train"]:
        rows.setdefault((row.texts, row.segments), row)
    return list(rows.values())


def _kept(cache: str | Path | None) -> Path:
    return Path(cache) if cache else fingerprint.cache_folder() / "distilled"


def _known(path: Path, count: int) -> list[Any] | None:
    """Answers that were given before; None where there are none, or a torn file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) and len(found) == count else None


class _Teacher:
    """A delta file with its base, or a whole model with a readout."""

    def __init__(
        self, name: str | Path, base: Base | None, readout: Readout | None, task: Task
    ) -> None:
        self._name, self._delta, self._labels = str(name), None, tuple(task.labels)
        if container.is_delta(Path(name)):
            self._delta = Delta.load(name)
            own = base is not None and base.fingerprint.startswith(self._delta.base_fingerprint)
            named, kind = self._delta.base_name, self._delta.base_kind
            self._base = base if own and base else _like(base, named, kind)
            self._readout = self._delta.readout
        elif str(name).endswith(".safetensors"):
            raise SettingError(f"there is no teacher {str(name)!r}; correct the path")
        elif readout is not None:
            self._base, self._readout = _like(base, str(name), readout.kind), readout
        else:
            raise SettingError(
                f"teacher {str(name)!r} is no delta file; name one, or say by which readout a "
                "whole model reads its input"
            )
        self._check(task)

    def _check(self, task: Task) -> None:
        """Refuse a teacher of other answers, and one that is not all there."""
        if task.kind == ALIGNMENT:
            raise TaskError(
                f"task {task.name} has pictures and captions to be aligned, for which a teacher "
                "has no answers; leave the teacher out"
            )
        answerable(task, self._readout.gives, f"the teacher {self._name!r}")
        if self._delta is not None and self._delta.labels != self._labels:
            raise TaskError(
                f"task {task.name} has labels {list(self._labels)}, the teacher {self._name!r} was "
                f"trained for {list(self._delta.labels)}; give one of the same labels"
            )
        if self._delta is None and self._readout.attach(self._base, self._labels).state_dict():
            raise SettingError(
                f"the teacher {self._name!r} is a whole model, and its readout has vectors of its "
                "own, which no model holds; give a delta, or a readout without"
            )

    def key(self, task: Task) -> str:
        """What its texts hang on."""
        name = plugins.name_of("readouts", Readout, self._readout)
        base = self._base
        words = hashlib.sha256(json.dumps(sorted(base.tokenizer.get_vocab().items())).encode())
        told = [
            *(task.fingerprint, base.fingerprint, str(base.dtype), words.hexdigest()),
            fingerprint.of_path(Path(self._name)),
            *(name, plugins.settings_of(self._readout)),
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]

    def answers(self, rows: list[Example], batch_size: int, progress: bool) -> list[Any]:
        """A text for each row, or the logarithms of its classes' probabilities, or its score."""
        base, read = self._base, self._readout

        def answered(model: Wired) -> list[Any]:
            found = logits(model, base, rows, batch_size=batch_size, progress=progress)
            if read.writes:
                return [str(text) for text in read.predictions(base, found)]
            if self._labels:
                return read.probabilities(found).log().float().tolist()
            return [[float(score)] for score in read.predictions(base, found)]

        if self._delta is None:
            return answered(Wired(base, read, read.attach(base, self._labels)).eval())
        with self._delta.applied(base) as model:
            return answered(model)


def _like(base: Base | None, name: str, kind: str) -> Base:
    """Another base, on the device and in the number format of the student's."""
    if base is None:
        return Base.load(name, kind=kind)
    dtype = str(base.dtype).removeprefix("torch.")
    return Base.load(name, kind=kind, dtype=dtype, device=str(base.device))
