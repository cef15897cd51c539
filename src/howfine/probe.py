"""A task as seen through a readout: the questions a method may ask about the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from howfine.base import Base
from howfine.batch import to_device
from howfine.readout import Wired
from howfine.task import Example

PROBE_BATCHES = 16


class GradientProbe:
    """Answers a method's questions about the data: see `howfine.method.Probe`."""

    def __init__(
        self, model: Wired, base: Base, examples: Sequence[Example], batch_size: int
    ) -> None:
        self.model, self.base = model, base
        self.examples, self.batch_size = examples, batch_size

    def gradients(self, base: Base, paths: list[str]) -> dict[str, Tensor]:
        """Mean |∂loss/∂θ| per entry over a few batches, dropout off, at the current base."""
        parameters = {path: base.parameter(path) for path in paths}
        sums = {path: torch.zeros_like(p, dtype=torch.float32) for path, p in parameters.items()}
        was_training = self.model.training
        self.model.eval()
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        rows = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        rows = rows[:PROBE_BATCHES]
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        try:
            for chosen in rows:
                batch = self.model.readout.collate(base, [self.examples[i] for i in chosen])
                fields = to_device(batch.as_kwargs(), base.device)
                loss = self.model(**fields)["loss"]
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for path, gradient in zip(parameters, found, strict=True):
                    if gradient is not None:  # a pooler that the readout never reads
                        sums[path] += gradient.float().abs() / len(rows)
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
            self.model.train(was_training)
        return sums
