"""Full fine-tuning: every parameter trains. The ceiling that every smaller change is held against.

Devlin et al. 2019 for the recipe. Stored are the tensors that differ from the base at all: a
pooler that the readout never reads costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from howfine import whole
from howfine.base import Base
from howfine.change import Change
from howfine.method import Method, Probe, Tensors


@dataclass(frozen=True)
class Full(Method):
    """Train everything; there is nothing to set."""

    holds: ClassVar[Any] = "tensors"
    neutral: ClassVar[bool] = True

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        return whole.attach(base, base.paths())

    def pack(self, base: Base, change: Change) -> Tensors:
        return whole.pack(change)

    def stored(self, change: Change, store: str) -> Tensors:
        return whole.stored(change, store)

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        return whole.unpack(base, tensors)


EXAMPLE = Full()
