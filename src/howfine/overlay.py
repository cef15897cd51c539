"""Weights some of whose entries train: what reads them, and where the numbers are meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from howfine import entries, sampled, surgery
from howfine.base import Base
from howfine.change import Undo, all_or_nothing


class Overlay(nn.Module):
    """A weight with its trained entries in place; `values` are shared by all weights."""

    def __init__(self, weight: Tensor, index: Tensor, values: nn.Parameter, at: slice) -> None:
        super().__init__()
        self.values = values
        self.at = at
        self.index = index
        self.original = weight.detach().flatten()[index].float()
        self.shape = tuple(weight.shape)

    def now(self) -> Tensor:
        """The entries' values as trained so far, (k,)."""
        return self.original + self.values[self.at]

    def forward(self, weight: Tensor) -> Tensor:
        return sampled.Put.apply(weight, self.index, self.now())


class _InPlace:
    """Trained entries in the base's own memory, brought up to date before each use."""

    def __init__(self, overlay: Overlay, entries: entries.Entries) -> None:
        self.overlay, self.entries = overlay, entries
        shape = (overlay.shape[0], overlay.shape[1])
        index = overlay.index
        self.sampling = sampled.Sampling(shape, index // shape[1], index % shape[1])
        self._written: Tensor | None = None

    def refreshed(self) -> Tensor:
        """The weight as it is to be read now.

        Detached, with the parameter's version: a backward pass that comes after other values were
        written raises torch's own error about what was modified in place.
        """
        now = self.overlay.now().detach()
        if self._written is None or not torch.equal(now, self._written):
            self.entries.write(now.to(self.entries.parameter.dtype))
            self._written = now
        return self.entries.parameter.detach()


def _linear(module: nn.Module, place: _InPlace) -> Callable[..., Tensor]:
    transposed = isinstance(module, Conv1D)

    def forward(x: Tensor) -> Tensor:
        weight, values = place.refreshed(), place.overlay.values[place.overlay.at]
        return sampled.Linear.apply(x, values, weight, module.bias, place.sampling, transposed)

    return forward


def _embedding(module: nn.Embedding, place: _InPlace) -> Callable[..., Tensor]:
    padding = -1 if module.padding_idx is None else module.padding_idx

    def forward(ids: Tensor) -> Tensor:
        weight, values = place.refreshed(), place.overlay.values[place.overlay.at]
        return sampled.Embedding.apply(ids, values, weight, place.sampling, padding)

    return forward


def put_on(base: Base, overlays: Mapping[str, Overlay]) -> list[Undo]:
    """Let every reader of the weights see the trained entries.

    Linear layers and embeddings read their own weight, which holds them. A weight with several
    readers, or of a layer of another kind, is put together at each use.
    """
    short = {}
    for path in overlays:
        (module, name), *others = surgery.homes(base.towers, path)
        if not others and name == "weight" and (forward := _forward(module)) is not None:
            short[path] = (module, forward)
    held = {
        path: entries.sparse(part.index, part.now().detach(), part.shape)
        for path, part in overlays.items()
        if path in short
    }
    switch = entries.Switch(base, held)
    with all_or_nothing() as undo:
        undo.append(switch.off)
        switch.on()
        for path, overlay in overlays.items():
            undo.append(surgery.reweight(base.towers, path, overlay))
            if path in short:
                module, forward = short[path]
                place = _InPlace(overlay, switch.entries[path])
                undo.append(surgery.rewire(module, forward(module, place)))
    return undo


def _forward(module: nn.Module) -> Callable[..., Any] | None:
    """What makes this layer's short way; None where it has none."""
    kind = type(module)  # exactly: a subclass may compute something else
    if kind in (nn.Linear, Conv1D):
        return _linear
    if kind is nn.Embedding and module.max_norm is None:
        return _embedding
    return None
