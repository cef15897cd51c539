"""One factor on all that a sparse change moves, chosen so that answers come closest to a model's.

The scale of least squared error says the kept entries right and leaves out what the others did: a
file of few entries answers too much like the base. ComPEFT (Yadav et al. 2023, section 2) makes up
for that with a factor found on labelled validation rows. Here it is the one of least KL divergence
from the tuned model's answers to texts of the training split, which needs no labels, keeps the rows
that a score is stated on out of the choice, and is smooth where a score moves in steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from howfine.base import Base
from howfine.delta import Delta
from howfine.evaluate import logits
from howfine.task import Example, Task

TEXTS = 256
# Factors tried are powers of this one.
_RATIO = 2.0 ** (1 / 3)
_LOWEST, _HIGHEST = -3, 30  # its exponents: from 1/2 to 1024


@dataclass(frozen=True)
class Teacher:
    """A model's answers to some texts."""

    base: Base
    examples: Sequence[Example]
    shares: Tensor  # (texts, classes), float64

    def divergence(self, delta: Delta) -> float:
        """Mean KL(teacher ‖ delta) over the texts, in nats."""
        found = _shares(delta, self.base, self.examples).clamp_min(1e-12)
        wanted = self.shares.clamp_min(1e-12)
        return float((self.shares * (wanted.log() - found.log())).sum(-1).mean())


def teacher_of(delta: Delta, base: Base, task: Task) -> Teacher:
    """The answers of a delta, such as one that holds all of a tuned model."""
    rows = task.splits["train"]
    examples = task.subset(train=min(TEXTS, len(rows))).splits["train"]
    return Teacher(base, examples, _shares(delta, base, examples))


def _shares(delta: Delta, base: Base, examples: Sequence[Example]) -> Tensor:
    with delta.applied(base) as model, torch.no_grad():
        return delta.readout.probabilities(logits(model, base, examples))


def scaled(delta: Delta, factor: float) -> Delta | None:
    """With all kept differences times `factor`, exact in the scales; None where it has no scales.

    The head is left as it is.
    """
    streams, found = [], False
    for stream in delta.streams:
        if stream.name.startswith("method/") and stream.values and stream.values.params:
            params = tuple(float(np.float32(factor * scale)) for scale in stream.values.params)
            stream = replace(stream, values=replace(stream.values, params=params))
            found = True
        streams.append(stream)
    return replace(delta, streams=tuple(streams)) if found else None


def best(delta: Delta, teacher: Teacher, begin: float = 1.0) -> tuple[Delta, float]:
    """(the delta with its best factor, that factor): downhill from where it is better of `begin`
    and 1, in both directions.

    From `begin` alone a search may end far off: what was right for a file of few entries makes one
    of many answer beyond recall, where no factor near it is better. The delta itself where it has
    no scales.
    """
    if scaled(delta, 1.0) is None:
        return delta, 1.0
    tried: dict[int, float] = {}

    def at(exponent: int) -> float:
        if not _LOWEST <= exponent <= _HIGHEST:
            return float("inf")
        if exponent not in tried:
            changed = scaled(delta, _RATIO**exponent)
            assert changed is not None
            tried[exponent] = teacher.divergence(changed)
        return tried[exponent]

    here = min((round(np.log(begin) / np.log(_RATIO)), 0), key=at)
    for direction in (1, -1):
        while at(here + direction) < at(here):
            here += direction
    chosen = scaled(delta, _RATIO**here)
    assert chosen is not None
    return chosen, _RATIO**here
