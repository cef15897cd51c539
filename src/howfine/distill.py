"""Sentence-level distillation: a student learns the texts that a teacher writes.

Kim & Rush 2016, "Sequence-level knowledge distillation"; Lin, Madotto & Fung 2020 for adapters: a
narrow change learns a teacher's texts, which are of fewer shapes than people's, more easily. Only
train is written anew; dev and test stay what they are.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from howfine import container, fingerprint, plugins
from howfine.base import Base
from howfine.checks import GENERATION
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
    """The task with what a teacher writes in the place of train's targets, one row a source.

    The teacher is a delta file, put on `base` where it was made on that; or a whole model (a folder
    or a name of the hub), which then reads its input as `readout` says. Its texts are kept in the
    folder `cache` (default: howfine's own in the user's cache) under the fingerprints of task and
    teacher. A source for which it writes nothing keeps its own target.

    Raises TaskError for a task of other answers, SettingError for a teacher that writes none.
    """
    if task.kind != GENERATION:
        raise TaskError(
            f"task {task.name} has no texts to be written, so a teacher's would teach nothing; "
            "leave the teacher out"
        )
    taught = _Teacher(teacher, base, readout.of_task(task) if readout else None)
    sources = _sources(task)
    path = _kept(cache) / f"{taught.key(task)}.json"
    texts = _known(path, len(sources))
    if texts is None:
        texts = taught.write(sources, batch_size, progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(texts) + "\n").encode())
    rows = [
        replace(row, targets=(text,)) if text else row
        for row, text in zip(sources, texts, strict=True)
    ]
    silent = sum(not text for text in texts)
    told = f"{task.provenance}; {len(rows):,} train targets written by {Path(teacher).name}"
    told += f", {silent} kept where it wrote nothing" if silent else ""
    return replace(task, splits={**task.splits, "train": rows}, provenance=told)


def _sources(task: Task) -> list[Example]:
    """Train's rows, the first of each source."""
    rows: dict[tuple[object, ...], Example] = {}
    for row in task.splits["train"]:
        rows.setdefault((row.texts, row.segments), row)
    return list(rows.values())


def _kept(cache: str | Path | None) -> Path:
    return Path(cache) if cache else fingerprint.cache_folder() / "distilled"


def _known(path: Path, count: int) -> list[str] | None:
    """Texts that were written before; None where there are none, or a torn file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) and len(found) == count else None


class _Teacher:
    """A delta file with its base, or a whole model with a readout."""

    def __init__(self, name: str | Path, base: Base | None, readout: Readout | None) -> None:
        self._name, self._delta = str(name), None
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
        if not self._readout.writes:
            raise SettingError(
                f"the teacher {str(name)!r} writes no texts, so there is nothing to learn from it; "
                "name one whose readout writes"
            )
        if self._delta is None and self._readout.attach(self._base, ()).state_dict():
            raise SettingError(
                f"the teacher {str(name)!r} is a whole model, and its readout has vectors of its "
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

    def write(self, sources: list[Example], batch_size: int, progress: bool) -> list[str]:
        """A text for each source."""
        base, read = self._base, self._readout

        def written(model: Wired) -> list[str]:
            found = logits(model, base, sources, batch_size=batch_size, progress=progress)
            return [str(text) for text in read.predictions(base, found)]

        if self._delta is None:
            return written(Wired(base, read, read.attach(base, ())).eval())
        with self._delta.applied(base) as model:
            return written(model)


def _like(base: Base | None, name: str, kind: str) -> Base:
    """Another base, on the device and in the number format of the student's."""
    if base is None:
        return Base.load(name, kind=kind)
    dtype = str(base.dtype).removeprefix("torch.")
    return Base.load(name, kind=kind, dtype=dtype, device=str(base.device))
