"""The order in which a training meets its examples."""

from __future__ import annotations

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class ByLength(LengthGroupedSampler):
    """Examples of similar length together, in an order that seed and epoch alone decide.

    A resumed training then meets the examples that it would have met, and several processes the
    batches that one process would have, each its part of them.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self._begin()
        self.set_epoch(0)

    def _begin(self) -> None:
        self._epoch, self._state = 0, torch.Generator().manual_seed(self.seed).get_state()

    def set_epoch(self, epoch: int) -> None:
        """Draw from where a training that began at epoch 0 stands now."""
        if epoch < self._epoch:
            self._begin()
        self.generator = torch.Generator()
        self.generator.set_state(self._state)
        for _ in range(epoch - self._epoch):
            list(self)
        self._epoch, self._state = epoch, self.generator.get_state()
