"""Change: what a method put on a base, and how to take it off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import nn

Undo = Callable[[], None]


@contextmanager
def all_or_nothing() -> Iterator[list[Undo]]:
    """A list for undos; an error inside undoes them all, last first, and goes on its way."""
    done: list[Undo] = []
    try:
        yield done
    except BaseException:
        while done:
            done.pop()()
        raise


class Change:
    """The trainable parameters a method put on a base, and the undo that takes them off.

    `trainable` maps a path to a Parameter that lives in the base's module tree (where a path has
    several, "path:name" each); `parts` holds
    whatever else the method needs to pack them (it is the method's own affair). Removing a change
    puts the very same Parameter objects back; it never subtracts. A change is a context manager:

        with method.attach(base) as change:
            ...
    """

    def __init__(
        self,
        trainable: Mapping[str, nn.Parameter],
        undo: list[Undo],
        parts: Mapping[str, Any] | None = None,
    ) -> None:
        self.trainable = dict(trainable)
        self.parts = dict(parts or {})
        self._undo = list(undo)

    def finally_do(self, undo: Undo) -> None:
        """Add what must run last when the change is removed."""
        self._undo.insert(0, undo)

    def remove(self) -> None:
        """Take the change off, last part first. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Change:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()
