"""Changes made of whole tensors: train copies of some parameters, store those that moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from howfine import gates, surgery
from howfine.base import Base
from howfine.change import Change, all_or_nothing
from howfine.codec import rounded
from howfine.errors import DamagedDelta, SettingError
from howfine.method import Tensors, as_parameter


def going_on(base: Base, selectors: tuple[str, ...], start: Mapping[str, Tensor]) -> list[str]:
    """Paths of what trains beside something else. Raises SettingError where a start would be lost.

    `start` is the weights that it goes on from, where they differ from the base's.
    """
    training = base.choose(selectors) if selectors else []
    check_kept(base, start, training, "beside")
    return training


def check_kept(base: Base, start: Mapping[str, Tensor], paths: Sequence[str], setting: str) -> None:
    """Refuse a start that changed what is not at `paths`, as `setting` names them."""
    others = sorted(start.keys() - set(paths))
    if left := [path for path in others if bool((start[path] != base.original(path)).any())]:
        raise SettingError(
            f"the start is a change of {left[0]} and {len(left) - 1} others, which would be left "
            f"out of the file; name them in {setting}, such as {setting}=all, or take another start"
        )


def attach(
    base: Base,
    paths: list[str],
    start: Mapping[str, Tensor] | None = None,
    *,
    trains: bool = True,
    outside: Mapping[str, Tensor] | None = None,
) -> Change:
    """Put a trainable copy in place of each parameter named; the originals wait in the undo.

    Copies begin at the weights of `start` where that has them. Where they are set and not trained
    (not `trains`), their number format may be any. Entries of `outside` (bool, by path) stay what
    they begin as.
    """
    originals = {path: base.parameter(path) for path in paths}
    if trains:
        check_format(base, paths)
    trainable, held = {}, {}
    with all_or_nothing() as undo:
        for path in paths:
            trainable[path], back = surgery.trainable_copy(base.towers, path)
            undo.append(back)
        with torch.no_grad():
            for path, value in (start or {}).items():
                trainable[path].copy_(value)
        for path in paths:
            if outside and path in outside:
                held[path] = _Held(outside[path], trainable[path])
                undo.append(surgery.reweight(base.towers, path, held[path]))
        return Change(trainable, undo, parts={"originals": originals, "held": held})


class _Held(nn.Module):
    """A weight, of which some entries are what they were when training began.

    They have no gradient. The optimiser may still decay what is under them, which nothing reads.
    """

    def __init__(self, mask: Tensor, value: Tensor) -> None:
        super().__init__()
        self.mask, self.value = mask.to(value.device), value.detach().clone()

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, self.value, weight)


def _trained(change: Change) -> Tensors:
    """What the model reads of each trained tensor."""
    found, held = {}, change.parts.get("held", {})
    for path, parameter in change.trainable.items():
        value = parameter.detach()
        found[path] = held[path](value) if path in held else value.clone()
    return found


def check_format(base: Base, paths: list[str]) -> None:
    """Refuse half-precision weights: steps of fine-tuning are smaller than those can hold."""
    half = [path for path in paths if base.parameter(path).dtype != torch.float32]
    if half:
        raise SettingError(
            f"{half[0]} is in {base.parameter(half[0]).dtype}: most updates would be rounded away. "
            "Load the base in float32 and train in mixed precision (--precision bf16)"
        )


def pack(change: Change) -> Tensors:
    """The trained tensors that differ from the base's in at least one bit."""
    originals: dict[str, nn.Parameter] = change.parts["originals"]
    return {
        path: value
        for path, value in _trained(change).items()
        if not torch.equal(value, originals[path])
    }


def stored(change: Change, store: str, mine: Mapping[str, Tensor] | None = None) -> Tensors:
    """The trained tensors as a file gives them back: the base's plus a rounded difference.

    Of those that `mine` names, only what it has True for is stored: it spreads over the tensor.
    """
    originals: dict[str, nn.Parameter] = change.parts["originals"]
    found = {}
    for path, value in _trained(change).items():
        apart = value - originals[path].detach()
        if mine is not None and path in mine:
            apart = gates.drop(apart, mine[path])
        found[path] = originals[path] + rounded(apart, store).to(value.device)
    return found


def unpack(base: Base, tensors: Tensors) -> Change:
    """Put stored tensors in place. Raises DamagedDelta for a path or shape the base lacks."""
    known = set(base.paths())
    with all_or_nothing() as undo:
        for path, value in tensors.items():
            fits = path in known and value.shape == base.parameter(path).shape
            if not fits or not value.is_floating_point():
                raise DamagedDelta(
                    f"delta holds {path!r} of shape {tuple(value.shape)} ({value.dtype}), which "
                    f"the base {base.name} has not; the file is damaged, or made for another model"
                )
            value = as_parameter(value, base.parameter(path))
            undo.append(surgery.replace(base.towers, path, value))
        return Change({}, undo)
