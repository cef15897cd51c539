"""extract: from a base and a tuned model to the smallest delta that says the difference.

To a byte budget, a density, or a stated loss of score on a task. See `howfine.spread` for what is
kept and how it is rounded, `howfine.harvest` for how it is coded.

Two controls of the literature are there to compare with. `store="sign"` with a density is ComPEFT
(Yadav et al. 2023): the largest magnitudes as signs with one scale, here the one of least squared
error. `store="bitdelta"` is BitDelta (Liu et al. 2024): signs of every entry of the blocks'
matrices with a scale each, halves for all else, without the training of scales.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from howfine import pair
from howfine.base import Base
from howfine.delta import Delta, check_target
from howfine.errors import SettingError, TaskError, near
from howfine.evaluate import Score
from howfine.harvest import Weights
from howfine.head import Answer
from howfine.method import Tensors
from howfine.pair import Pair
from howfine.probe import GradientProbe
from howfine.readout import Wired
from howfine.targets import HEADS, Asked, Made, Work, made_of, reference_of, scored
from howfine.task import Task

Store = Literal["steps", "sign", "bitdelta", "fp16", "fp32"]
Weigh = Literal["none", "fisher"]

_WEIGHS = ("none", "fisher")
_FISHER_BATCH = 16


@dataclass(frozen=True)
class Extracted:
    """A finished extraction: the delta as stored, and what it keeps."""

    delta: Delta
    path: Path
    bytes: int
    kept: int  # entries that change
    entries: int  # of all tensors of the base
    error: float  # squared difference that the file lacks, over all of it; before the gain
    gain: float  # factor on what is kept, 1 where none was chosen
    score: Score | None  # of the file, where a task was given
    reference: Score | None  # of the tuned model itself
    head: bool  # whether the file can answer; without a head it can be merged
    left_out: tuple[str, ...]  # tensors of the tuned model outside the base
    tried: tuple[tuple[int, float], ...]  # (bytes, score) of every file that was evaluated
    passes: int  # over the two models
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Everything but the delta itself, as JSON types."""
        found = {k: v for k, v in vars(self).items() if k not in ("delta", "path")}
        scores = {k: v.as_dict() if v else None for k, v in found.items() if k in _SCORES}
        return {"file": str(self.path), **found, **scores}


_SCORES = ("score", "reference")


def extract(
    before: str | Base,
    after: str | Path,
    out: str | Path,
    *,
    bytes: int | None = None,
    density: float | None = None,
    loss: float | None = None,
    task: Task | str | None = None,
    split: str = "dev",
    store: Store = "steps",
    weigh: Weigh = "none",
    gain: bool = True,
    progress: bool = False,
) -> Extracted:
    """Store what `after` changes of `before`, both streamed where their files allow, at `out`.

    `after` is a checkpoint, a folder with a PEFT LoRA adapter, or a delta file made on `before`.
    One target at most: `bytes`, the largest file that fits; `density`, the share of all entries
    that are kept at most; `loss`, the smallest file whose score on `task` is at least (1 - loss)
    times that of `after`. Stores `fp16`, `fp32` and `bitdelta` need none. A `task` alone scores the
    file; what is kept is then scaled by the one factor that brings the file's answers to texts of
    its training split closest to those of `after`, unless `gain` is False (see `howfine.gain`).
    `weigh="fisher"` gives each tensor a step by the root of its mean squared gradient on the
    task's training split, taken at `after`.

    Raises SettingError for targets that don't fit together or can't be met, BaseError for models
    that don't belong together or hold NaN, StorageError. Nothing is left at `out` then.
    """
    start = time.perf_counter()
    found = Task.load(task) if isinstance(task, str) else task
    asked = Asked(Path(out), store, bytes, density, loss, found, split, progress, gain)
    _check(asked, weigh)
    check_target(asked.out)
    base_loaded = found is not None
    opened = pair.opened(before, after, loaded=base_loaded)
    with _trial(asked.out) as trial:
        answer = _answering(opened, asked)
        work = Work(asked, opened, answer, {}, trial)
        scores = asked.task is not None and answer.given(opened.base)
        reference = reference_of(work) if scores else None  # first: it checks
        if weigh == "fisher":
            work.weights = _fisher(work)
        made = made_of(work, reference)
        made = scored(work, made) if scores else made
        made.delta.save(asked.out)
    return _result(work, made, reference, time.perf_counter() - start)


def _result(work: Work, made: Made, reference: Score | None, seconds: float) -> Extracted:
    return Extracted(
        delta=Delta.load(work.asked.out),
        path=work.asked.out,
        bytes=work.asked.out.stat().st_size,
        kept=made.tally.kept,
        entries=made.tally.entries,
        error=made.tally.relative,
        gain=made.gain,
        score=made.score,
        reference=reference,
        head=work.answer.given(work.pair.base),
        left_out=work.pair.left_out,
        tried=tuple(work.tried),
        passes=work.passes,
        seconds=seconds,
    )


def _check(asked: Asked, weigh: str) -> None:
    targets = {"bytes": asked.bytes, "density": asked.density, "loss": asked.loss}
    given = [name for name, value in targets.items() if value is not None]
    if asked.store not in HEADS:
        raise SettingError(f"store {asked.store!r} is unknown. {near(asked.store, HEADS)}")
    if weigh not in _WEIGHS:
        raise SettingError(f"weigh {weigh!r} is unknown. {near(weigh, _WEIGHS)}")
    if len(given) > 1:
        raise SettingError(f"{' and '.join(given)} are targets of their own; give one of them")
    if not given and asked.store in ("steps", "sign"):
        raise SettingError(
            f"store {asked.store!r} needs a target: give bytes, density or loss, or store 'fp32' "
            "for every entry that differs"
        )
    if given and asked.store == "bitdelta":
        raise SettingError(f"store 'bitdelta' keeps every entry; leave {given[0]} out")
    if not given and weigh != "none":  # the stores that need no target
        raise SettingError(
            f"weigh {weigh!r} decides which entries are kept and how finely; without a target "
            f"store {asked.store!r} keeps all alike: give bytes, density or loss, or weigh none"
        )
    if asked.density is not None and not 0 < asked.density < 1:
        raise SettingError(f"density: found {asked.density}, expected a share above 0 and below 1")
    if asked.loss is not None and not 0 <= asked.loss < 1:
        raise SettingError(f"loss: found {asked.loss}, expected a share from 0 to below 1")
    if asked.task is None and (asked.loss is not None or weigh != "none"):
        raise SettingError("a loss of score and Fisher weights are measured on a task; give one")
    if asked.task is not None and asked.split not in asked.task.splits:
        raise SettingError(
            f"split {asked.split!r} is unknown. {near(asked.split, asked.task.splits)}"
        )


@contextmanager
def _trial(out: Path) -> Iterator[Path]:
    """Where files are written to be measured; gone afterwards."""
    trial = out.with_name(f".{out.name}.trial")
    try:
        yield trial
    finally:
        trial.unlink(missing_ok=True)


def _answering(opened: Pair, asked: Asked) -> Answer:
    """The answer, with the task's class names where the model has none of its own."""
    answer = opened.answer
    if asked.task is None:
        return answer
    if not answer.given(opened.base):
        if asked.loss is None:
            return answer
        raise SettingError(
            "a loss of score needs a head, and the tuned model has none that a linear classifier "
            "on its body expresses; give a delta file that has one, or a byte budget or density"
        )
    plain = all(label == f"LABEL_{at}" for at, label in enumerate(answer.labels))
    if plain and len(answer.labels) == len(asked.task.labels):
        answer = replace(answer, labels=tuple(asked.task.labels))
    if answer.labels != tuple(asked.task.labels):
        raise TaskError(
            f"task {asked.task.name} has labels {list(asked.task.labels)}, the tuned model "
            f"{list(answer.labels)}; give the task that it was tuned for"
        )
    return answer


def _fisher(work: Work) -> Weights:
    """Root of each tensor's mean squared gradient over their geometric mean, in quarter octaves.

    Within 2^-8 and 2^8. Taken of the batch's mean loss, as elsewhere in howfine. Tensors that the
    task never reads have weight 0: nothing of them is kept.
    """
    base, task, answer = work.pair.base, work.asked.task, work.answer
    assert task is not None
    if not answer.given(base):
        raise SettingError("Fisher weights need a head, which the tuned model has not; weigh none")
    head = answer.readout.unpack(base, answer.labels, answer.head)
    wired = Wired(base, answer.readout, head)
    probe = GradientProbe(wired, base, task.splits["train"], _FISHER_BATCH)
    found = probe.gradients(base, base.paths(), "square", at=_tuned(work.pair))
    roots = {path: math.sqrt(float(value.double().mean())) for path, value in found.items()}
    seen = [math.log2(root) for root in roots.values() if root]
    middle = sum(seen) / max(len(seen), 1)
    quarters = {p: round(4 * (math.log2(r) - middle)) for p, r in roots.items() if r}
    return {p: 2 ** (max(-32, min(32, quarters[p])) / 4) if p in quarters else 0.0 for p in roots}


def _tuned(opened: Pair) -> Tensors:
    found = {}
    for path in opened.base.paths():
        flat = torch.cat([torch.from_numpy(new.copy()) for _, new in opened.chunks(path)])
        found[path] = flat.view(opened.before.shape(path))
    return found
