"""Start: the weights and the head that a fit goes on from, instead of the bare base.

Of an earlier phase, as stored in its delta file, or of another checkpoint of the architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from howfine import container, pretrained
from howfine.base import Base
from howfine.delta import Delta, only_weights
from howfine.errors import BaseError, SettingError
from howfine.method import Method
from howfine.readout import Head, Labels, Readout


@dataclass(frozen=True)
class Start:
    """Weights by path where they differ from the base's, and a trained head where there is one."""

    weights: Mapping[str, Tensor]
    head: Head | None = None
    # What a delta of the same method holds, where that is no weights.
    begun: Mapping[str, Tensor] = field(default_factory=dict)


def of_file(
    path: str | Path, base: Base, readout: Readout, labels: Labels, method: Method
) -> Start:
    """The start in a delta file, or in a checkpoint folder of the base's architecture.

    Raises SettingError where there is neither, DeltaError and WrongBase for a delta that can't be
    used here, BaseError for a checkpoint of other shapes or with NaN.
    """
    path = Path(path)
    if container.is_delta(path):
        return of_delta(Delta.load(path), base, readout, labels, method)
    if not path.is_dir():
        raise SettingError(
            f"start {str(path)!r} is neither a recipe, nor a delta file, nor the folder of a "
            "checkpoint; name one of them"
        )
    return Start(_of_checkpoint(path, base))


def of_delta(delta: Delta, base: Base, readout: Readout, labels: Labels, method: Method) -> Start:
    """The start that a delta is, decoded as evaluation decodes it; its head where it has one.

    A delta of the same method as the fit's, where that goes on from its own kind, may be of another
    task: its head is then left behind.
    """
    if type(delta.method) is type(method) and method.start == "own":
        return _of_own(delta, base, readout, labels, method)
    with delta.changed(base) as head:
        only_weights(
            base, "which a fit of another change can't go on from; start from one of weights"
        )
        found = {path: weight_at(base, path).clone() for path in base.paths()}
    known = delta.labels == labels and delta.readout == readout.settled(base, labels)
    if head is not None and head.state_dict() and not known:
        raise SettingError(
            f"the delta to start from answers {list(delta.labels)} by {delta.readout}, this fit "
            f"{list(labels)} by {readout.settled(base, labels)}: its head would mean something "
            "else; start from one of the same task and readout"
        )
    moved = {p: w for p, w in found.items() if not torch.equal(w, base.original(p))}
    return Start(moved, head if known and readout.goes_on else None)


def _of_own(delta: Delta, base: Base, readout: Readout, labels: Labels, method: Method) -> Start:
    for name in method.meaning:
        theirs, ours = getattr(delta.method, name), getattr(method, name)
        if theirs != ours:
            raise SettingError(
                f"the delta to start from has {name} {theirs!r}, and this fit {ours!r}: its "
                f"tensors would mean something else; set {name} as it has it"
            )
    tensors, head = delta.tensors(base)
    same = delta.labels == labels and delta.readout == readout.settled(base, labels)
    known = same and readout.goes_on and bool(head)
    return Start({}, readout.unpack(base, labels, head) if known else None, tensors)


def weight_at(base: Base, path: str) -> Tensor:
    """The weight that a forward pass reads at a path of the base, whatever is put on it."""
    owner, _, name = path.rpartition(".")
    weight: Tensor = getattr(base.towers.get_submodule(owner), name)
    return weight.detach()


def _of_checkpoint(folder: Path, base: Base) -> dict[str, Tensor]:
    tower, _, _ = pretrained.read(str(folder), base.kind, None)
    theirs = {f"{base.tower_name}.{name}": value for name, value in tower.named_parameters()}
    moved = {}
    for path in base.paths():
        ours, found = base.parameter(path), theirs.get(path)
        if found is None or found.shape != ours.shape:
            shape = "nothing" if found is None else tuple(found.shape)
            raise BaseError(
                f"{folder} has {shape} at {path}, where {base.name} has {tuple(ours.shape)}: it is "
                "another architecture or vocabulary; start from a checkpoint tuned from this base"
            )
        value = found.detach().to(ours.device, ours.dtype)
        if not torch.isfinite(value).all():
            raise BaseError(
                f"{folder}: {path} holds NaN or infinity; get a checkpoint whose training did not "
                "diverge"
            )
        if not torch.equal(value, ours):
            moved[path] = value
    return moved
