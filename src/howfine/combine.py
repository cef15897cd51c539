"""combine: several tasks' changes on one base, and batches whose rows are of different tasks.

Changes that can be told apart row by row (adapters, prefixes, prompts, and those of the readout
alone) share one forward pass of the base, or the passes in which texts are written; of any other
kind each has passes of its own, in which it is put on and taken off again. Either way a row's
answer is what it is alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from howfine import checks, passes, streaming, writing
from howfine.base import Base
from howfine.batch import Batch
from howfine.change import Change, all_or_nothing
from howfine.delta import Delta
from howfine.errors import SettingError, WrongBase, near
from howfine.evaluate import examples_of
from howfine.method import Method, Tensors
from howfine.passes import Worn
from howfine.readout import Wired
from howfine.task import Example

_HELD = "_howfine_combined"
Texts = str | tuple[str, str] | Example
Named = Mapping[str, Delta | str | Path] | Iterable[tuple[str, Delta | str | Path]]


def combine(deltas: Named, base: Base | None = None, *, strict: bool = False) -> Combined:
    """Several tasks on one base, by the names given: a mapping, or pairs. A context manager.

    The base is changed on entering it, and as it was on leaving it.

        with howfine.combine({"mood": "sst2.delta.safetensors", "same": other}) as tasks:
            tasks.predict([("mood", "a gripping film"), ("same", ("one text", "another"))])

    With `strict` no pass is shared: each row's answer is bit for bit what it is alone in a batch
    with the others of its task. Raises SettingError for no deltas or two of one name, WrongBase
    where their bases differ, DeltaError for a damaged file or one without a head.
    """
    opened: dict[str, Delta] = {}
    for pair in deltas.items() if isinstance(deltas, Mapping) else deltas:
        name, each = _pair(pair, "a name and a delta")
        if name in opened:
            raise SettingError(f"two deltas are named {name!r}; give each a name of its own")
        opened[name] = each if isinstance(each, Delta) else Delta.load(each)
    if not opened:
        raise SettingError("no delta was given; give one or more, by name")
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
        self.base = base
        self._check_free()
        self._lock = threading.RLock()  # the base's modules are everyone's
        self._strict = strict
        self._open: bool | None = None  # None before the context is entered
        self._streams: set[streaming.Pieces] = set()
        self._tasks: dict[str, Worn] = {}
        for number, (name, delta) in enumerate(deltas.items()):
            tensors, head = delta.tensors(base)
            made = delta.readout.unpack(base, delta.labels, head).eval()
            takes = delta.method.takes(base, tensors)
            self._tasks[name] = Worn(number, delta, tensors, made, takes)
        self._shared: set[str] = set()
        self._changes: list[Change] | None = None

    def _check_free(self) -> None:
        if _HELD in self.base.tower.__dict__:
            raise SettingError(
                "tasks are combined on this base already, whose rows are numbered from 0 as these "
                "would be; leave that one first, or give all tasks to one"
            )

    def _share(self) -> None:
        """Find out which tasks can share a pass, and put their changes on."""
        self._shared = {
            n for n, t in self._tasks.items() if not t.tensors and passes.shares(self.base, t)
        }
        with all_or_nothing() as undo:
            changes = []
            for kind in self._kinds():
                if (change := self._wear(kind)) is not None:
                    undo.append(change.remove)
                    changes.append(change)
                    self._shared |= {n for n, t in self._of(kind).items() if t.tensors}
            self._changes = changes

    def _kinds(self) -> list[type[Method]]:
        shared = [t for t in self._tasks.values() if t.tensors and passes.shares(self.base, t)]
        found = {type(task.delta.method) for task in shared}
        return sorted(found, key=lambda kind: kind.__name__)

    def _of(self, kind: type[Method]) -> dict[str, Worn]:
        tasks = {n: t for n, t in self._tasks.items() if passes.shares(self.base, t)}
        return {n: t for n, t in tasks.items() if type(t.delta.method) is kind}

    def _wear(self, kind: type[Method]) -> Change | None:
        worn: dict[int, tuple[Any, Tensors]] = {
            task.number: (task.delta.method, task.tensors)
            for task in self._of(kind).values()
            if task.tensors
        }
        return kind.wear(self.base, worn, len(self._tasks))

    def outputs(self, rows: Sequence[tuple[str, Texts]]) -> list[Tensor]:
        """The readouts' outputs, one for each row, in order; shapes differ from task to task.

        Raises SettingError for an unknown task and outside of the context, TaskError for what a
        task can't read, DeltaError for outputs of NaN.
        """
        with self._lock:
            return self._outputs(_listed(rows))

    def stream(self, rows: Sequence[tuple[str, Texts]]) -> Iterator[tuple[int, str]]:
        """Texts as they are written: (number of the row, the next of its words).

        A row's pieces together are its text. Raises SettingError for tasks that write nothing, or
        by a beam search, and what `outputs` raises.
        """
        rows = _listed(rows)
        for name in dict.fromkeys(_pair(row, "a task and a text")[0] for row in rows):
            asked = self._task(name).asked
            if asked is None or asked.beams > 1:
                how = "writes no text" if asked is None else "searches with beams until the end"
                raise SettingError(
                    f"task {name!r} {how}, so that nothing can be told before; use predict, or "
                    "leave its rows out"
                )

        def run(watcher: streaming.Watcher) -> None:
            with self._lock:
                self._outputs(rows, watcher)

        return streaming.stream(self.base, run, self._streams)

    def _task(self, name: str) -> Worn:
        if name not in self._tasks:
            raise SettingError(f"task {name!r} is unknown. {near(name, self._tasks)}")
        return self._tasks[name]

    def _outputs(
        self, rows: Sequence[tuple[str, Texts]], watcher: streaming.Watcher | None = None
    ) -> list[Tensor]:
        self._check_open()
        asked: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            name, _ = _pair(row, "a task and a text")
            self._task(name)
            asked.setdefault(name, []).append(place)
        batches: dict[str, Batch] = {}
        for name, places in asked.items():
            with passes.naming(name):
                examples = examples_of([rows[place][1] for place in places])
                batches[name] = passes.collated(self.base, self._tasks[name], examples)
        found: dict[str, Tensor] = {}
        with torch.inference_mode():
            shared = {name: batch for name, batch in batches.items() if name in self._shared}
            for together in self._together(shared):
                with self._watched(together, asked, watcher), passes.naming(*together):
                    found |= self._run(together)
            for name in [name for name in batches if name not in self._shared]:
                with self._watched([name], asked, watcher), passes.naming(name):
                    found[name] = self._apart(self._tasks[name], batches[name])
        ordered: list[Any] = [None] * len(rows)
        for name, places in asked.items():
            outputs = found[name].float().cpu()
            with passes.naming(name):
                odd = int((~torch.isfinite(outputs)).any(-1).sum())
                checks.finite(odd, len(places), self.base.name)
            for place, output in zip(places, outputs, strict=True):
                ordered[place] = output
        return ordered

    def _watched(
        self, names: Iterable[str], asked: Mapping[str, list[int]], watcher: Any
    ) -> ExitStack:
        """Let a stream see what is written for the rows of some tasks."""
        undo = ExitStack()
        if watcher is not None:
            rows = [(place, self._tasks[name].asked) for name in names for place in asked[name]]
            undo.enter_context(writing.watched(watcher(rows)))
        return undo

    def predict(self, rows: Sequence[tuple[str, Texts]]) -> list[dict[str, Any]]:
        """Answers of (task, text) rows, as `howfine.predict` gives them for one task."""
        rows, answers = _listed(rows), []
        for (name, _), output in zip(rows, self.outputs(rows), strict=True):
            delta = self._tasks[name].delta
            told = delta.readout.told(self.base, delta.labels, output.unsqueeze(0))
            answers.append({"task": name, **told[0]})
        return answers

    def _together(self, batches: Mapping[str, Batch]) -> Iterator[dict[str, Batch]]:
        """Batches that share a pass: those that are read by the axes of their masks, and texts."""
        read = {n: b for n, b in batches.items() if self._tasks[n].asked is None}
        for axes in (2, 4):
            alike = {n: b for n, b in read.items() if b.inputs["attention_mask"].ndim == axes}
            if alike:
                yield alike
        written = {n: b for n, b in batches.items() if n not in read}
        yield from passes.alike(self.base, self._tasks, written)

    def run(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """Outputs of collated batches, by task, in one pass.

        Raises SettingError for tasks that can't share one.
        """
        with self._lock, torch.inference_mode():
            if batches.keys() - self._shared or len(list(self._together(batches))) != 1:
                raise SettingError(
                    f"the tasks {', '.join(batches)} have no pass in common; use outputs or "
                    "predict, which give each its own"
                )
            return self._run(batches)

    def _run(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        self._check_open()
        if any(self._tasks[name].asked is not None for name in batches):
            return passes.write(self.base, self._tasks, batches, len(self._tasks))
        return passes.read(self.base, self._tasks, batches)

    def _apart(self, task: Worn, batch: Batch) -> Tensor:
        """Outputs of a task whose change has a pass of its own."""
        self._take_off()
        try:
            with task.delta.method.unpack(self.base, task.tensors):
                model = Wired(self.base, task.delta.readout, task.head).eval()
                found: Tensor = model(**batch.as_kwargs())["logits"]
        finally:
            if self._shared:
                self._share()
        return found

    def _check_open(self) -> None:
        if self._open is None:
            raise SettingError("these tasks' context was not entered; write `with … as tasks:`")
        if not self._open:
            raise SettingError("these tasks' context was left; combine them anew")

    def _take_off(self) -> None:
        for change in reversed(self._changes or []):
            change.remove()
        self._changes = None

    def __enter__(self) -> Combined:
        with self._lock:
            if self._open is None:
                self._check_free()
                if not self._strict:
                    self._share()
                self.base.tower.__dict__[_HELD] = self._open = True
            self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        for each in list(self._streams):
            each.stopped = each.cut = True
        with self._lock:  # what is written ends before its modules go
            if self._open:
                self._open = False
                self._take_off()
                self.base.tower.__dict__.pop(_HELD, None)


def _listed(rows: Any) -> list[tuple[str, Texts]]:
    try:
        return list(rows)
    except TypeError:
        raise SettingError(
            f"found {rows!r:.80}, expected rows: pairs of a task and a text"
        ) from None


def _pair(found: Any, of: str) -> tuple[str, Any]:
    if isinstance(found, tuple | list) and len(found) == 2 and isinstance(found[0], str):
        return found[0], found[1]
    raise SettingError(f"found {found!r:.80}, expected a pair of {of}, such as ('mood', …)")
