"""Texts as they are written, word by word, of several rows at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from howfine import writing
from howfine.base import Base
from howfine.errors import SettingError
from howfine.readout import Asked

Piece = tuple[int, str]
# Gets places of rows, and how each is to be written, before they are; gives what sees the tokens.
Watcher = Callable[[Sequence[tuple[int, Asked]]], Callable[[Tensor], bool]]


@dataclass
class _Row:
    """A text so far, and how much of it was given out."""

    place: int
    ends: list[int]
    most: int
    ids: list[int] = field(default_factory=list)
    told: int = 0
    done: bool = False


class Pieces:
    """Turns tokens of running generations into pieces of text, whole words at a time.

    A row's pieces together are its text, as `predict` gives it.
    """

    def __init__(self, base: Base, give: Callable[[Piece], None]) -> None:
        self._base, self._give = base, give
        self.stopped = self.cut = False

    def watch(self, rows: Sequence[tuple[int, Asked]]) -> Callable[[Tensor], bool]:
        """What sees the tokens of rows that are written together."""
        made = [
            _Row(place, writing.ends_of(self._base, asked), asked.most) for place, asked in rows
        ]

        def see(tokens: Tensor) -> bool:
            for row, token in zip(made, tokens.tolist(), strict=True):
                if not row.done:
                    self._step(row, token)
            return not self.stopped

        return see

    def _step(self, row: _Row, token: int) -> None:
        if token not in row.ends:
            row.ids.append(token)
        row.done = token in row.ends or len(row.ids) == row.most
        text = writing.text(self._base, row.ids)
        # What a last word will be is known when the next one begins.
        upto = len(text) if row.done else text.rfind(" ")
        if upto > row.told:
            self._give((row.place, text[row.told : upto]))
            row.told = upto


def stream(base: Base, run: Callable[[Watcher], Any], live: set[Pieces]) -> Iterator[Piece]:
    """Pieces of what `run` writes in a thread of its own; leaving the iterator stops the writing.

    It is among `live` meanwhile. Raises what `run` raises, SettingError where it was cut short.
    """
    found: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
    pieces = Pieces(base, found.put)

    def work() -> None:
        try:
            run(pieces.watch)
            found.put(_left() if pieces.cut else None)
        except BaseException as error:  # it is raised where the pieces are read
            found.put(error)

    thread = threading.Thread(target=work, daemon=True)
    live.add(pieces)
    thread.start()
    try:
        while (each := found.get()) is not None:
            if isinstance(each, BaseException):
                raise each
            yield each
    finally:
        pieces.stopped = True
        thread.join()
        live.discard(pieces)


def _left() -> SettingError:
    return SettingError(
        "these tasks' context was left while texts were written; read a stream to its end inside"
    )
