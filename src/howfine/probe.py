"""A task as seen through a readout: the questions a method may ask about the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from howfine import surgery
from howfine.base import Base
from howfine.batch import to_device
from howfine.method import Gradient, as_parameter
from howfine.readout import Wired
from howfine.task import Example

PROBE_BATCHES = 16

_SIZES: dict[Gradient, Callable[[Tensor], Tensor]] = {
    "magnitude": torch.abs,
    "square": torch.square,
    "mean": lambda gradient: gradient,
}


class GradientProbe:
    """Answers a method's questions about the data: see `howfine.method.Probe`."""

    def __init__(
        self,
        model: Wired,
        base: Base,
        examples: Sequence[Example],
        batch_size: int,
        start: Mapping[str, Tensor] | None = None,
        outside: Mapping[str, Tensor] | None = None,
        begun: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.base = model, base
        self.examples, self.batch_size = examples, batch_size
        self.start, self.outside = dict(start or {}), dict(outside or {})
        self.slots, self.begun = model.readout.slots, dict(begun or {})

    def gradients(
        self,
        base: Base,
        paths: list[str],
        of: Gradient = "magnitude",
        at: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Of the loss, per entry, over a few batches, dropout off: see `howfine.method.Probe`."""
        with ExitStack() as undo:
            parameters = {path: base.parameter(path) for path in paths}
            for path, weight in (at or {}).items():
                value = as_parameter(weight, base.parameter(path))
                undo.callback(surgery.replace(base.towers, path, value))
                if path in parameters:
                    parameters[path] = value
            return self._mean(parameters, of)

    def _mean(self, parameters: dict[str, nn.Parameter], of: Gradient) -> dict[str, Tensor]:
        base, size = self.base, _SIZES[of]
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
                        sums[path] += size(gradient.float()) / len(rows)
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
            self.model.train(was_training)
        return sums
