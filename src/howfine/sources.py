"""Sources of tensors made of others: under other names, or filled up from a second one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from howfine.checkpoint import CHUNK, Source

Array = npt.NDArray[Any]


class Named:
    """A Source under other names; a name that stands for nothing is a tensor of zeros."""

    def __init__(self, source: Source, names: Mapping[str, str], shapes: Mapping[str, Any]) -> None:
        self.source, self._names, self._shapes = source, dict(names), dict(shapes)

    def names(self) -> list[str]:
        """The paths, in the base's order."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """As the base has it."""
        return tuple(self._shapes[name])

    def dtype(self, name: str) -> str:
        """As Source.dtype."""
        return self.source.dtype(self._names[name]) if name in self._names else "F32"

    def chunks(self, name: str, entries: int = CHUNK) -> Iterator[Array]:
        """As Source.chunks."""
        if name in self._names:
            yield from self.source.chunks(self._names[name], entries)
            return
        for left in range(math.prod(self.shape(name)), 0, -entries):
            yield np.zeros(min(entries, left), np.float32)


class Patched:
    """One Source, and another where the first says nothing."""

    def __init__(self, below: Source, above: Source, known: set[str]) -> None:
        self._below, self._above, self._known = below, above, known

    def names(self) -> list[str]:
        """As Source.names."""
        return self._below.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """As Source.shape."""
        return self._below.shape(name)

    def dtype(self, name: str) -> str:
        """As Source.dtype."""
        return self._below.dtype(name)

    def chunks(self, name: str, entries: int = CHUNK) -> Iterator[Array]:
        """As Source.chunks."""
        return (self._above if name in self._known else self._below).chunks(name, entries)
