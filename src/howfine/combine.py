"""combine: several tasks' changes on one base, and batches whose rows are of different tasks.

Changes that can be told apart row by row (adapters, prefixes, prompts, and those of the readout
alone) share one forward pass of the base; of any other kind each has a pass of its own, in which it
is put on and taken off again. Either way a row's answer is what it is alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from howfine import mixed, surgery
from howfine.base import Base
from howfine.batch import Batch, running, to_device
from howfine.change import Change, all_or_nothing
from howfine.delta import Delta
from howfine.errors import SettingError, TaskError, WrongBase, near
from howfine.evaluate import examples_of
from howfine.method import Method, Tensors
from howfine.readout import Head, Wired
from howfine.task import Example

_HELD = "_howfine_combined"
Texts = str | tuple[str, str]


@dataclass
class _Worn:
    """One task's change: its number in a batch's rows, what it holds, and its head."""

    number: int
    delta: Delta
    tensors: Tensors
    head: Head
    takes: int


def combine(
    deltas: Mapping[str, Delta | str | Path], base: Base | None = None, *, strict: bool = False
) -> Combined:
    """Several tasks on one base, by the names given. A context manager.

        with howfine.combine({"mood": "sst2.delta.safetensors", "same": other}) as tasks:
            tasks.predict([("mood", "a gripping film"), ("same", ("one text", "another"))])

    With `strict` no pass is shared: each row's answer is bit for bit what it is alone in a batch
    with the others of its task. Raises SettingError for no deltas, WrongBase where their bases
    differ, DeltaError for a damaged file or one without a head.
    """
    if not deltas:
        raise SettingError("no delta was given; give one or more, by name")
    opened = {
        name: each if isinstance(each, Delta) else Delta.load(each) for name, each in deltas.items()
    }
    first = next(iter(opened.values()))
    if base is None:
        base = Base.load(first.base_name, kind=first.base_kind)
    for name, delta in opened.items():
        if delta.base_kind != base.kind:
            raise WrongBase(
                f"{name!r} was made on a base of kind {delta.base_kind}, and this is one of kind "
                f"{base.kind}; combine changes of one kind"
            )
        delta.check_head(base)
    return Combined(base, opened, strict)


class Combined:
    """Tasks on one base: see `combine`."""

    def __init__(self, base: Base, deltas: Mapping[str, Delta], strict: bool) -> None:
        held = base.tower.__dict__
        if _HELD in held:
            raise SettingError(
                "tasks are combined on this base already, whose rows are numbered from 0 as these "
                "would be; leave that one first, or give all tasks to one"
            )
        self.base = base
        self._lock = threading.RLock()  # the base's modules are everyone's
        self._open = True
        self._tasks: dict[str, _Worn] = {}
        for number, (name, delta) in enumerate(deltas.items()):
            tensors, head = delta.tensors(base)
            made = delta.readout.unpack(base, delta.labels, head).eval()
            takes = delta.method.takes(base, tensors)
            self._tasks[name] = _Worn(number, delta, tensors, made, takes)
        self._shared: set[str] = set()
        self._changes: list[Change] | None = None
        if not strict:
            self._share()
        held[_HELD] = True

    def _share(self) -> None:
        """Find out which tasks can share a pass, and put their changes on."""
        self._shared = {n for n, t in self._tasks.items() if not t.tensors and _reads(t)}
        with all_or_nothing() as undo:
            changes = []
            for kind in self._kinds():
                if (change := self._wear(kind)) is not None:
                    undo.append(change.remove)
                    changes.append(change)
                    self._shared |= {n for n, t in self._of(kind).items() if t.tensors}
            self._changes = changes

    def _kinds(self) -> list[type[Method]]:
        found = {type(t.delta.method) for t in self._tasks.values() if t.tensors and _reads(t)}
        return sorted(found, key=lambda kind: kind.__name__)

    def _of(self, kind: type[Method]) -> dict[str, _Worn]:
        tasks = self._tasks.items()
        return {n: t for n, t in tasks if type(t.delta.method) is kind and _reads(t)}

    def _wear(self, kind: type[Method]) -> Change | None:
        worn: dict[int, tuple[Any, Tensors]] = {
            task.number: (task.delta.method, task.tensors)
            for task in self._of(kind).values()
            if task.tensors
        }
        return kind.wear(self.base, worn, len(self._tasks))

    def outputs(self, rows: Sequence[tuple[str, Texts]]) -> list[Tensor]:
        """The readouts' outputs, one for each row, in order; shapes differ from task to task.

        Raises SettingError for an unknown task and after the context was left, TaskError for what a
        task can't read.
        """
        with self._lock:
            return self._outputs(rows)

    def _outputs(self, rows: Sequence[tuple[str, Texts]]) -> list[Tensor]:
        self._check_open()
        asked: dict[str, list[int]] = {}
        for place, (name, _) in enumerate(rows):
            if name not in self._tasks:
                raise SettingError(f"task {name!r} is unknown. {near(name, self._tasks)}")
            asked.setdefault(name, []).append(place)
        examples: dict[str, list[Example]] = {}
        for name, places in asked.items():
            try:
                examples[name] = examples_of([rows[place][1] for place in places])
            except TaskError as error:
                raise TaskError(f"task {name!r}: {error}") from None
        with torch.inference_mode():
            found = self._together({n: e for n, e in examples.items() if n in self._shared})
            for name, own in examples.items():
                if name not in self._shared:
                    found[name] = self._apart(self._tasks[name], own)
        ordered: list[Any] = [None] * len(rows)
        for name, places in asked.items():
            for place, output in zip(places, found[name].float().cpu(), strict=True):
                ordered[place] = output
        return ordered

    def predict(self, rows: Sequence[tuple[str, Texts]]) -> list[dict[str, Any]]:
        """Answers of (task, text) rows, as `howfine.predict` gives them for one task."""
        answers = []
        for (name, _), output in zip(rows, self.outputs(rows), strict=True):
            delta = self._tasks[name].delta
            told = delta.readout.told(self.base, delta.labels, output.unsqueeze(0))
            answers.append({"task": name, **told[0]})
        return answers

    def _together(self, examples: Mapping[str, Sequence[Example]]) -> dict[str, Tensor]:
        """Outputs of tasks that share a pass; masks of another kind have one of their own."""
        batches = {name: self._collated(name, own) for name, own in examples.items()}
        found: dict[str, Tensor] = {}
        for axes in (2, 4):
            alike = {n: b for n, b in batches.items() if b.inputs["attention_mask"].ndim == axes}
            if alike:
                found |= self.run(alike)
        return found

    def _collated(self, name: str, examples: Sequence[Example]) -> Batch:
        """A task's own batch, texts cut as they are when its change is on alone."""
        task, base = self._tasks[name], self.base
        before = base.reserved
        base.reserved = task.takes
        try:
            batch = task.delta.readout.collate(base, examples, labelled=False)
        finally:
            base.reserved = before
        fields = to_device(batch.as_kwargs(), base.device)
        return Batch.from_kwargs(fields)

    def run(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """Outputs of collated batches, by task, in one pass: of tasks that can share one."""
        with self._lock:
            return self._run(batches)

    def _run(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        self._check_open()
        base = self.base
        numbers = [self._tasks[name].number for name in batches]
        merged = mixed.merged(base, list(batches.values()), numbers)
        with running(merged):
            state = base.body(**merged.inputs)
        found, start = {}, 0
        for name, batch in batches.items():
            rows, length = batch.inputs["input_ids"].shape
            with _replayed(base, state, slice(start, start + rows), length):
                found[name] = self._tasks[name].head(base.towers, batch)
            start += rows
        return found

    def _apart(self, task: _Worn, examples: Sequence[Example]) -> Tensor:
        """Outputs of a task whose change has a pass of its own."""
        self._take_off()
        try:
            with task.delta.method.unpack(self.base, task.tensors):
                model = Wired(self.base, task.delta.readout, task.head).eval()
                batch = task.delta.readout.collate(self.base, examples, labelled=False)
                found: Tensor = model(**to_device(batch.as_kwargs(), self.base.device))["logits"]
        finally:
            if self._shared:
                self._share()
        return found

    def _check_open(self) -> None:
        if not self._open:
            raise SettingError("these tasks' context was left; combine them anew")

    def _take_off(self) -> None:
        for change in reversed(self._changes or []):
            change.remove()
        self._changes = None

    def __enter__(self) -> Combined:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._open = False
            self._take_off()
            self.base.tower.__dict__.pop(_HELD, None)


def _reads(task: _Worn) -> bool:
    """Whether its answers are read from one pass; those that are written take one a token."""
    return not task.delta.readout.writes


@contextmanager
def _replayed(base: Base, state: Any, rows: slice, length: int) -> Iterator[None]:
    """Let the body give some rows of a state that it computed before."""
    pooled = getattr(state, "pooler_output", None)
    part = SimpleNamespace(
        last_hidden_state=state.last_hidden_state[rows, :length],
        pooler_output=None if pooled is None else pooled[rows],
    )
    with ExitStack() as undo:
        undo.callback(surgery.rewire(base.body, lambda **_: part))  # type: ignore[arg-type]
        yield
