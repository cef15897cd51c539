"""One block of a model at a time, on many batches: those below it give again what they gave.

A method that works through the layers from the bottom, and looks at one of them on every batch, has
each block computed a few times instead of once for every block above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from howfine import surgery
from howfine.base import Base
from howfine.batch import Batch
from howfine.method import Probe

# By batch, what a block gave in each of its calls: several where layers share it.
Given = list[list[Any]]


class Replay:
    """A model with the weights `at`, whose blocks run in the order of their numbers.

    `at` may change in between, for blocks that are still to come.
    """

    def __init__(self, base: Base, probe: Probe, at: Mapping[str, Tensor], rows: int) -> None:
        self.base, self.probe, self.at, self.rows = base, probe, dict(at), rows
        names = (base.anatomy.block_path(number) for number in range(base.depth))
        self.blocks = [base.towers.get_submodule(base.body_prefix + name) for name in names]
        self._given: dict[int, Given] = {}  # by stack, of its highest block that is done

    def block(self, number: int, done: bool = False) -> Iterator[Batch]:
        """Run a block on every batch. With `done`, what it gives now goes to the one above it."""
        stack = self.base.anatomy.stack_of(number).first
        made: Given = [[]]
        with ExitStack() as undo:
            for each, module in enumerate(self.blocks):
                own = self.base.anatomy.stack_of(each).first
                if own > stack:  # its states are of another shape
                    continue
                if each == number:
                    forward: Callable[..., Any] = _noting(module.forward, made)
                else:  # above it in its stack, anything will do
                    above = own == stack and each > number
                    forward = _Again(made if above else self._given[own], made)
                undo.callback(surgery.rewire(module, forward))
            for batch in self.probe.runs(self.base, self.at, rows=self.rows):
                yield batch
                made.append([])
        if done:
            self._given[stack] = made


def _noting(forward: Callable[..., Any], made: Given) -> Callable[..., Any]:
    """A block's own forward, which notes what it gives."""

    def run(*args: Any, **kwargs: Any) -> Any:
        made[-1].append(forward(*args, **kwargs))
        return made[-1][-1]

    return run


class _Again:
    """Stands in for a block: gives what another one gave in its call of that number."""

    def __init__(self, given: Given, made: Given) -> None:
        self.given, self.made, self.last = given, made, (-1, 0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = len(self.made) - 1
        self.last = (batch, self.last[1] + 1 if self.last[0] == batch else 0)
        return self.given[batch][self.last[1]]
