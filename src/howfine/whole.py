"""Changes made of whole tensors: train copies of some parameters, store those that moved."""

from __future__ import annotations

import torch
from torch import nn

from howfine import surgery
from howfine.base import Base
from howfine.change import Change
from howfine.errors import DamagedDelta
from howfine.method import Tensors, as_parameter


def attach(base: Base, paths: list[str]) -> Change:
    """Put a trainable copy in place of each parameter named; the originals wait in the undo."""
    originals = {path: base.parameter(path) for path in paths}
    trainable, undo = {}, []
    for path in paths:
        trainable[path], back = surgery.trainable_copy(base.towers, path)
        undo.append(back)
    return Change(trainable, undo, parts={"originals": originals})


def pack(change: Change) -> Tensors:
    """The trained tensors that differ from the base's in at least one bit."""
    originals: dict[str, nn.Parameter] = change.parts["originals"]
    return {
        path: value.detach().clone()
        for path, value in change.trainable.items()
        if not torch.equal(value, originals[path])
    }


def unpack(base: Base, tensors: Tensors) -> Change:
    """Put stored tensors in place. Raises DamagedDelta for a path or shape the base lacks."""
    known = set(base.paths())
    undo = []
    for path, value in tensors.items():
        if path not in known or value.shape != base.parameter(path).shape:
            raise DamagedDelta(
                f"delta holds {path!r} of shape {tuple(value.shape)}, which the base "
                f"{base.name} has not; the file is damaged, or made for another model"
            )
        undo.append(surgery.replace(base.towers, path, as_parameter(value, base.parameter(path))))
    return Change({}, undo)
