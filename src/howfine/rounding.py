"""Rounding-aware training: the last steps are taken with values as the file will hold them.

The optimiser goes on stepping the unrounded values, with gradients taken at the rounded ones (the
straight-through estimator; BinaryConnect, Courbariaux et al. 2015, algorithm 1). What is stored
then scores what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from howfine.change import Change
from howfine.codec import rounded
from howfine.method import Method
from howfine.readout import Head

# What rounds so finely that training does not feel it.
FINE = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Rounding:
    """Which trained parameters are rounded, and how they are stored."""

    method: Method
    change: Change
    head: Head
    store: str
    # Share of the steps, the last ones, that are taken so.
    share: float

    @property
    def coarse(self) -> bool:
        """Whether what is stored differs enough from what is trained to matter."""
        return self.store not in FINE

    def due(self, progress: float) -> bool:
        """Whether a step at `progress` (0 to 1) of the training is one of them."""
        return self.coarse and progress >= 1 - self.share

    @contextmanager
    def stored(self) -> Iterator[None]:
        """The trained parameters as they are when stored; on leaving as they were."""
        values = list(self._values())  # all of them before the first is put in place
        swapped = [(parameter, parameter.data) for parameter, _ in values]
        try:
            for parameter, value in values:
                parameter.data = value.to(parameter.device, parameter.dtype)
            yield
        finally:
            for parameter, before in swapped:
                parameter.data = before

    @torch.no_grad()
    def _values(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for name, value in self.method.stored(self.change, self.store).items():
            yield self.change.trainable[name], value
        for parameter in self.head.parameters():
            yield parameter, rounded(parameter, self.store)
