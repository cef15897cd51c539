"""Files to a target: within so many bytes, of a density, or the smallest that keeps a score.

Each file is written and measured as it lies on disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from howfine import gain, harvest, streams
from howfine.align import is_matrix
from howfine.delta import Delta
from howfine.errors import SettingError
from howfine.evaluate import Score, evaluate, stated_on
from howfine.harvest import Tally, Weights
from howfine.head import Answer
from howfine.method import fitting, holding
from howfine.pair import Pair
from howfine.spread import Quantiser, Search
from howfine.streams import Stream
from howfine.task import Task

# Precision of the head beside each store: it is new, so it has no small difference to be rounded.
HEADS = {"steps": "int8", "sign": "int8", "bitdelta": "fp16", "fp16": "fp16", "fp32": "fp32"}
_CODINGS = 6  # passes over the models that look for a byte budget
# Share of a byte budget that is close enough; for a model whose passes take their time.
_TIGHT, _TIGHT_LARGE = 0.99, 0.95
_EVALUATIONS = 10


@dataclass(frozen=True)
class Asked:
    """What was asked for."""

    out: Path
    store: str
    bytes: int | None
    density: float | None
    loss: float | None
    task: Task | None
    split: str
    progress: bool
    gain: bool = True


@dataclass
class Work:
    """A pair, what is known of it, and the trial file."""

    asked: Asked
    pair: Pair
    answer: Answer
    weights: Weights
    trial: Path
    passes: int = 0
    teacher: gain.Teacher | None = None  # whose answers a factor is chosen by, if one is
    begin: float = 1.0  # where the search for it begins
    tried: list[tuple[int, float]] = field(default_factory=list)

    def delta(self, coded: list[Stream]) -> Delta:
        """Streams and the head as a delta."""
        head = streams.encode("readout", self.answer.head, HEADS[self.asked.store], self.pair.base)
        plain = any(stream.values is None for stream in coded)
        return Delta(
            base_name=self.pair.base.name,
            base_fingerprint=self.pair.base.fingerprint,
            method=fitting(holding("tensors" if plain else "entries"), self.pair.base),
            readout=self.answer.readout,
            labels=self.answer.labels,
            streams=(*coded, *head),
            score=_blank(self.asked) if self.answer.given(self.pair.base) else {},
            base_kind=self.pair.base.kind,
        )


def _blank(asked: Asked) -> dict[str, Any]:
    """About as long as a score deflated: a byte budget is to hold for the file with its score.

    The numbers have nothing in common that would deflate, and a digit more than a score's.
    """
    if asked.task is None:
        return {}
    on = stated_on(asked.task.name, asked.split, asked.task.by_name)
    digits = (-0.8274913, -0.1639057, -0.9458216)
    stated = {"metric": asked.task.metric, "value": digits[0], "interval": list(digits[1:])}
    return {**stated, "on": on, "n": len(asked.task.splits[asked.split])}


@dataclass(frozen=True)
class Made:
    """A delta, its bytes on disk and what it keeps."""

    delta: Delta
    size: int
    tally: Tally
    score: Score | None = None
    gain: float = 1.0


def reference_of(work: Work) -> Score:
    """The tuned model's own score, by a delta that holds all of it."""
    coded, _ = harvest.dense(work.pair, lambda path: "fp32", work.asked.progress)
    work.passes += 1
    head = streams.encode("readout", work.answer.head, "fp32", work.pair.base)
    whole = replace(work.delta(coded), streams=(*coded, *head))
    if work.asked.gain and work.asked.task is not None and work.asked.task.labels:
        work.teacher = gain.teacher_of(whole, work.pair.base, work.asked.task)
    return evaluate(whole, work.pair.base, work.asked.task, split=work.asked.split)


def made_of(work: Work, reference: Score | None) -> Made:
    """The file that was asked for. `reference` is the tuned model's score, for a loss of it."""
    asked = work.asked
    if asked.store in ("bitdelta", "fp16", "fp32") and not _targets(asked):
        return _whole(work)
    floor = work.delta([]).save(work.trial)  # bytes of a file without any entry
    spread = harvest.measured(work.pair, work.weights, asked.progress)
    work.passes += 1
    search = Search(spread)
    if asked.bytes is not None:
        _check_room(work, search, floor)
        return _with_score_within(work, search, asked.bytes, floor)
    if asked.loss is not None:
        assert reference is not None
        return _within_loss(work, search, asked.loss, reference)
    assert asked.density is not None
    found = search.of_density(asked.density, asked.store)
    if not found.kept:
        raise SettingError(_too_sparse(search, asked.density))
    return _sparse(work, found)


def _too_sparse(search: Search, density: float) -> str:
    """Why a density keeps nothing, and the nearest one that keeps something."""
    least = float(f"{1.006 * search.alike / search.total:.2e}")  # three digits, rounded up
    alike = f": the {search.alike:,} that moved most moved alike" if search.alike > 1 else ""
    instead = f"expected at least {least:g}, or" if least < 1 else "give"
    return (
        f"density {density:g} keeps none of {search.total:,} entries{alike}; {instead} a byte "
        "budget, which takes some of those that moved alike"
    )


def _targets(asked: Asked) -> bool:
    return any(value is not None for value in (asked.bytes, asked.density, asked.loss))


def _whole(work: Work) -> Made:
    base, store = work.pair.base, work.asked.store

    def precision(path: str) -> str:
        return ("sign" if is_matrix(*base.place(path)) else "fp16") if signs else store

    signs = store == "bitdelta"
    harvest.measured(work.pair, {}, work.asked.progress)  # what is wrong with the models
    coded, tally = harvest.dense(work.pair, precision, work.asked.progress)
    work.passes += 2
    return _saved(work, coded, tally)


def _sparse(work: Work, quantiser: Quantiser) -> Made:
    coded, tally = harvest.sparse(work.pair, quantiser, work.weights, work.asked.progress)
    work.passes += 1
    return _saved(work, coded, tally)


def _saved(work: Work, coded: list[Stream], tally: Tally) -> Made:
    delta = work.delta(coded)
    return Made(delta, delta.save(work.trial), tally)


def _check_room(work: Work, search: Search, floor: int) -> None:
    """Raises SettingError where a budget is not above the bytes of a file without any entry."""
    if work.asked.bytes is not None and work.asked.bytes <= floor:
        least = _sparse(work, search.one(work.asked.store)).size
        raise SettingError(
            f"bytes: found {work.asked.bytes:,}, but header and head alone take {floor:,}; give at "
            f"least {least:,}"
        )


def _with_score_within(work: Work, search: Search, budget: int, floor: int) -> Made:
    """The largest file that is within a budget with its score in it, where it has one."""
    left = budget
    while True:
        made = _within_bytes(work, search, left, floor)
        if work.asked.task is not None and work.answer.given(work.pair.base):
            made = scored(work, made)
        if made.size <= budget:
            return made
        left -= made.size - budget  # the score took more than its blank


def _within_bytes(work: Work, search: Search, budget: int, floor: int) -> Made:
    """The largest file within a budget: estimate, code, correct the estimate."""
    best: Made | None = None
    bits = 8.0 * max(budget - floor, 1)
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
        bits *= aim * max(budget - floor, 1) / max(made.size - floor, 1)
    if best is not None and best.tally.kept:
        return best
    smallest = _sparse(work, search.one(work.asked.store))
    if smallest.size > budget:
        raise SettingError(
            f"bytes: found {work.asked.bytes:,}; header and head take {floor:,}, and no entry fits "
            f"beside them; give at least {smallest.size + (work.asked.bytes or budget) - budget:,}"
        )
    return smallest


def _within_loss(work: Work, search: Search, loss: float, reference: Score) -> Made:
    """The smallest file whose score holds, by bisection over the logarithm of its bits."""
    least = (1 - loss) * reference.value
    if reference.value <= 0:
        raise SettingError(
            f"the tuned model itself has {reference.metric} {reference.value:.4f}: a share of it "
            "means nothing; give the task that it was tuned for, or a byte budget"
        )
    store = work.asked.store
    low, high = 256.0, _most_bits(search, store)
    best = scored(work, _sparse(work, search.within(high, store)))
    if best.score is None or best.score.value < least:
        found = best.score.value if best.score else math.nan
        raise SettingError(
            f"store {store!r} at {best.size:,} bytes has {reference.metric} {found:.4f}, expected "
            f"at least {least:.4f}, {1 - loss:g} of the tuned model's {reference.value:.4f}; allow "
            "a larger loss, or store 'fp32'"
        )
    for _ in range(_EVALUATIONS - 1):
        middle = math.sqrt(low * high)
        made = scored(work, _sparse(work, search.within(middle, store)))
        assert made.score is not None
        if made.score.value >= least:
            high, best = middle, min(best, made, key=lambda one: one.size)
        else:
            low = middle
    return best


def _most_bits(search: Search, store: str) -> float:
    """Bits beyond which a score can't be told from the tuned model's."""
    return search.near(1e-3) if store == "steps" else search.within(math.inf, store).bits


def scored(work: Work, made: Made) -> Made:
    """With a factor where one is to be chosen, and the score of the file, loaded again."""
    if made.score is not None:
        return made
    delta, factor = made.delta, 1.0
    if work.teacher is not None:
        delta, factor = gain.best(delta, work.teacher, work.begin)
        work.begin = factor  # the next file is of about this size
    delta.save(work.trial)
    loaded = Delta.load(work.trial)
    score = evaluate(loaded, work.pair.base, work.asked.task, split=work.asked.split)
    delta = delta.with_score(score.stated())
    size = delta.save(work.trial)
    work.tried.append((size, score.value))
    return Made(delta, size, made.tally, score, factor)
