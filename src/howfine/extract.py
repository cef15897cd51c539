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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from howfine import harvest, pair, streams
from howfine.align import is_matrix
from howfine.base import Base
from howfine.delta import SUFFIX, Delta
from howfine.errors import SettingError, StorageError, TaskError, near
from howfine.evaluate import Score, evaluate
from howfine.harvest import Tally, Weights
from howfine.method import Tensors, holding
from howfine.pair import Answer, Pair
from howfine.probe import GradientProbe
from howfine.readout import Wired
from howfine.spread import Quantiser, Search
from howfine.streams import Stream
from howfine.task import Task

Store = Literal["steps", "sign", "bitdelta", "fp16", "fp32"]
Weigh = Literal["none", "fisher"]

# Precision of the head beside each store: it is new, so it has no small difference to be rounded.
_HEADS = {"steps": "int8", "sign": "int8", "bitdelta": "fp16", "fp16": "fp16", "fp32": "fp32"}
_WEIGHS = ("none", "fisher")
_CODINGS = 6  # passes over the models that look for a byte budget
# Share of a byte budget that is close enough; for a model whose passes take their time.
_TIGHT, _TIGHT_LARGE = 0.99, 0.95
_EVALUATIONS = 10
_FISHER_BATCH = 16


@dataclass(frozen=True)
class Extracted:
    """A finished extraction: the delta as stored, and what it keeps."""

    delta: Delta
    path: Path
    bytes: int
    kept: int  # entries that change
    entries: int  # of all tensors of the base
    error: float  # squared difference that the file lacks, over all of it
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


@dataclass(frozen=True)
class _Asked:
    """What was asked for."""

    out: Path
    store: str
    bytes: int | None
    density: float | None
    loss: float | None
    task: Task | None
    split: str
    progress: bool


@dataclass
class _Work:
    """A pair, what is known of it, and the trial file."""

    asked: _Asked
    pair: Pair
    answer: Answer
    weights: Weights
    trial: Path
    passes: int = 0
    tried: list[tuple[int, float]] = field(default_factory=list)

    def delta(self, coded: list[Stream]) -> Delta:
        """Streams and the head as a delta."""
        head = streams.encode("readout", self.answer.head, _HEADS[self.asked.store], self.pair.base)
        plain = any(stream.values is None for stream in coded)
        return Delta(
            base_name=self.pair.base.name,
            base_fingerprint=self.pair.base.fingerprint,
            method=holding("tensors" if plain else "entries"),
            readout=self.answer.readout,
            labels=self.answer.labels,
            streams=(*coded, *head),
            score=_blank(self.asked) if self.answer.head else {},
            base_kind=self.pair.base.kind,
        )


def _blank(asked: _Asked) -> dict[str, Any]:
    """As long as any score there: a byte budget holds for the file with its score in it."""
    if asked.task is None:
        return {}
    on, digits = f"{asked.task.name}/{asked.split}", -0.123457
    stated = {"metric": asked.task.metric, "value": digits, "interval": [digits, digits], "on": on}
    return {**stated, "n": len(asked.task.splits[asked.split])}


@dataclass(frozen=True)
class _Made:
    """A delta, its bytes on disk and what it keeps."""

    delta: Delta
    size: int
    tally: Tally
    score: Score | None = None


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
    progress: bool = False,
) -> Extracted:
    """Store what `after` changes of `before`, both streamed where their files allow, at `out`.

    `after` is a checkpoint, a folder with a PEFT LoRA adapter, or a delta file made on `before`.
    One target at most: `bytes`, the largest file that fits; `density`, the share of all entries
    that are kept at most; `loss`, the smallest file whose score on `task` is at least (1 - loss)
    times that of `after`. Stores `fp16`, `fp32` and `bitdelta` need none. A `task` alone scores the
    file. `weigh="fisher"` gives each tensor a step by the root of its mean squared gradient on the
    task's training split, taken at `after`.

    Raises SettingError for targets that don't fit together or can't be met, BaseError for models
    that don't belong together or hold NaN, StorageError. Nothing is left at `out` then.
    """
    start = time.perf_counter()
    found = Task.load(task) if isinstance(task, str) else task
    asked = _Asked(Path(out), store, bytes, density, loss, found, split, progress)
    _check(asked, weigh)
    base_loaded = found is not None
    opened = pair.opened(before, after, loaded=base_loaded)
    with _trial(asked.out) as trial:
        answer = _answering(opened.answer, asked)
        work = _Work(asked, opened, answer, {}, trial)
        if weigh == "fisher":
            work.weights = _fisher(work)
        reference = _reference(work) if asked.task and answer.head else None
        made = _made(work, reference)
        made = _scored(work, made) if asked.task and answer.head else made
        made.delta.save(asked.out)
    return Extracted(
        delta=Delta.load(asked.out),
        path=asked.out,
        bytes=asked.out.stat().st_size,
        kept=made.tally.kept,
        entries=made.tally.entries,
        error=made.tally.relative,
        score=made.score,
        reference=reference,
        head=bool(answer.head),
        left_out=opened.left_out,
        tried=tuple(work.tried),
        passes=work.passes,
        seconds=time.perf_counter() - start,
    )


def _check(asked: _Asked, weigh: str) -> None:
    targets = {"bytes": asked.bytes, "density": asked.density, "loss": asked.loss}
    given = [name for name, value in targets.items() if value is not None]
    if asked.store not in _HEADS:
        raise SettingError(f"store {asked.store!r} is unknown. {near(asked.store, _HEADS)}")
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
    """Where files are written to be measured; gone afterwards. Raises StorageError for no place."""
    if out.exists() and not out.is_file():
        raise StorageError(f"{out} is there and no regular file; name another path to write to")
    if not out.name.endswith(SUFFIX):
        raise SettingError(f"{out}: a delta file is called NAME{SUFFIX}; name it so")
    trial = out.with_name(f".{out.name}.trial")
    try:
        yield trial
    finally:
        trial.unlink(missing_ok=True)


def _answering(answer: Answer, asked: _Asked) -> Answer:
    """The answer, with the task's class names where the model has none of its own."""
    if asked.task is None:
        return answer
    if not answer.head:
        if asked.loss is None:
            return answer
        raise SettingError(
            "a loss of score needs a head, and the tuned model has none that a linear classifier "
            "on its body expresses; give a delta file, or a byte budget or density"
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


def _reference(work: _Work) -> Score:
    """The tuned model's own score, by a delta that holds all of it."""
    coded, _ = harvest.dense(work.pair, lambda path: "fp32", work.asked.progress)
    work.passes += 1
    head = streams.encode("readout", work.answer.head, "fp32", work.pair.base)
    whole = replace(work.delta(coded), streams=(*coded, *head), method=holding("tensors"))
    return evaluate(whole, work.pair.base, work.asked.task, split=work.asked.split)


def _made(work: _Work, reference: Score | None) -> _Made:
    asked = work.asked
    if asked.store in ("bitdelta", "fp16", "fp32") and not _targets(asked):
        return _whole(work)
    floor = _floor(work)
    spread = harvest.measured(work.pair, work.weights, asked.progress)
    work.passes += 1
    search = Search(spread)
    if asked.bytes is not None:
        return _within_bytes(work, search, asked.bytes, floor)
    if asked.loss is not None:
        assert reference is not None
        return _within_loss(work, search, asked.loss, reference)
    assert asked.density is not None
    found = search.of_density(asked.density, asked.store)
    if not found.kept:
        raise SettingError(
            f"density {asked.density:g} keeps none of {search.total:,} entries; expected at least "
            f"{1 / search.total:.1e}, or more where many entries moved alike"
        )
    return _sparse(work, found)


def _targets(asked: _Asked) -> bool:
    return any(value is not None for value in (asked.bytes, asked.density, asked.loss))


def _whole(work: _Work) -> _Made:
    base, store = work.pair.base, work.asked.store

    def precision(path: str) -> str:
        return ("sign" if is_matrix(*base.place(path)) else "fp16") if signs else store

    signs = store == "bitdelta"
    harvest.measured(work.pair, {}, work.asked.progress)  # what is wrong with the models
    coded, tally = harvest.dense(work.pair, precision, work.asked.progress)
    work.passes += 2
    return _saved(work, coded, tally)


def _sparse(work: _Work, quantiser: Quantiser) -> _Made:
    coded, tally = harvest.sparse(work.pair, quantiser, work.weights, work.asked.progress)
    work.passes += 1
    return _saved(work, coded, tally)


def _saved(work: _Work, coded: list[Stream], tally: Tally) -> _Made:
    delta = work.delta(coded)
    return _Made(delta, delta.save(work.trial), tally)


def _floor(work: _Work) -> int:
    """Bytes of a file without any entry. Raises SettingError where a budget is not above them."""
    floor = work.delta([]).save(work.trial)
    if work.asked.bytes is not None and work.asked.bytes <= floor:
        raise SettingError(
            f"bytes: found {work.asked.bytes:,}, but header and head alone take {floor:,}; give "
            "more"
        )
    return floor


def _within_bytes(work: _Work, search: Search, budget: int, floor: int) -> _Made:
    """The largest file within a budget: estimate, code, correct the estimate."""
    best: _Made | None = None
    bits = 8.0 * (budget - floor)
    last: Quantiser | None = None
    tight = _TIGHT if search.total <= harvest.MOST_JOINED else _TIGHT_LARGE
    for attempt in range(4 * _CODINGS):
        chosen = search.within(bits, work.asked.store)
        if chosen == last and best is not None:  # more bytes would gain nothing
            break
        made, last = _sparse(work, chosen), chosen
        if made.size <= budget:
            best = min(filter(None, (best, made)), key=lambda one: one.tally.error)
            if attempt + 1 >= _CODINGS or made.size >= tight * budget:
                break
        aim = (1 + tight) / 2 if attempt < _CODINGS else 0.9 ** (attempt - _CODINGS + 1)
        bits *= aim * (budget - floor) / max(made.size - floor, 1)
    if best is None or not best.tally.kept:
        raise SettingError(
            f"bytes: found {budget:,}; header and head take {floor:,}, and no entry fits beside "
            "them; give more"
        )
    return best


def _within_loss(work: _Work, search: Search, loss: float, reference: Score) -> _Made:
    """The smallest file whose score holds, by bisection over the logarithm of its bits."""
    least = (1 - loss) * reference.value
    if reference.value <= 0:
        raise SettingError(
            f"the tuned model itself has {reference.metric} {reference.value:.4f}: a share of it "
            "means nothing; give the task that it was tuned for, or a byte budget"
        )
    store = work.asked.store
    low, high = math.log(256.0), math.log(_most_bits(search, store))
    best = _scored(work, _sparse(work, search.within(math.exp(high), store)))
    if best.score is None or best.score.value < least:
        found = best.score.value if best.score else math.nan
        raise SettingError(
            f"store {store!r} at {best.size:,} bytes has {reference.metric} {found:.4f}, expected "
            f"at least {least:.4f}, {1 - loss:g} of the tuned model's {reference.value:.4f}; allow "
            "a larger loss, or store 'fp32'"
        )
    for _ in range(_EVALUATIONS - 1):
        middle = (low + high) / 2
        made = _scored(work, _sparse(work, search.within(math.exp(middle), store)))
        assert made.score is not None
        if made.score.value >= least:
            high, best = middle, min(best, made, key=lambda one: one.size)
        else:
            low = middle
    return best


def _most_bits(search: Search, store: str) -> float:
    """Bits beyond which a score can't be told from the tuned model's."""
    return search.near(1e-3) if store == "steps" else search.changed(store).bits


def _scored(work: _Work, made: _Made) -> _Made:
    """With the score of the file, loaded again."""
    if made.score is not None:
        return made
    made.delta.save(work.trial)
    loaded = Delta.load(work.trial)
    score = evaluate(loaded, work.pair.base, work.asked.task, split=work.asked.split)
    delta = made.delta.with_score(score.stated())
    size = delta.save(work.trial)
    work.tried.append((size, score.value))
    return _Made(delta, size, made.tally, score)


def _fisher(work: _Work) -> Weights:
    """Root of each tensor's mean squared gradient over their geometric mean, in quarter octaves.

    Within 2^-8 and 2^8. Taken of the batch's mean loss, as elsewhere in howfine. Tensors that the
    task never reads have weight 0: nothing of them is kept.
    """
    base, task, answer = work.pair.base, work.asked.task, work.answer
    assert task is not None
    if not answer.head:
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
