"""Changes made of some entries of the base's tensors: packed, and switched on and off in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from howfine import surgery
from howfine.base import Base
from howfine.change import Change, Undo, all_or_nothing
from howfine.errors import DamagedDelta, SettingError
from howfine.method import Tensors, as_parameter


def flat_entries(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(row-major indices ascending, values) of a sparse tensor, (k,) each."""
    tensor = tensor.coalesce()
    index = torch.zeros(tensor._nnz(), dtype=torch.long, device=tensor.device)
    for axis, size in enumerate(tensor.shape):
        index = index * size + tensor.indices()[axis]
    return index, tensor.values()


def sparse(index: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A sparse tensor of `shape` from row-major indices ascending and values, (k,) each."""
    where = torch.stack(torch.unravel_index(index, shape))
    return torch.sparse_coo_tensor(where, values, shape, is_coalesced=True, check_invariants=False)


def changed(original: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """The sparse tensor of those new values (k,) that differ from `original` at their places."""
    real = values != original.flatten()[index]
    return sparse(index[real], values[real], tuple(original.shape))


def strongest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Row-major indices, ascending, of the `count` largest scores over all tensors together.

    Ties go to the earlier entry, so the count is exact and the same every time.
    """
    together = torch.cat([score.flatten().float().cpu() for score in scores.values()])
    if not 0 < count <= len(together):
        raise SettingError(
            f"{count:,} entries to choose, of {len(together):,}; give a density above 0 and up to 1"
        )
    edge = together.kthvalue(len(together) - count + 1).values
    chosen = together > edge
    ties = (together == edge).nonzero().flatten()
    chosen[ties[: count - int(chosen.count_nonzero())]] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    return {path: part.nonzero().flatten() for path, part in zip(scores, parts, strict=True)}


@dataclass(frozen=True)
class _Entries:
    """New values of some entries of one parameter, by row-major index."""

    flat: Tensor  # the parameter's own memory, (n,)
    index: Tensor
    new: Tensor
    old: Tensor


class Switch:
    """New values for some entries of a base, put on and taken off by writing just those entries.

    The old values are kept, so that going back is exact whatever the number format.
    """

    def __init__(self, base: Base, tensors: Tensors) -> None:
        self._base = base
        self.entries: dict[str, _Entries] = {}
        for path, tensor in tensors.items():
            parameter = base.parameter(path)
            flat = parameter.data.view(-1)
            index, new = flat_entries(tensor)
            index, new = index.to(flat.device), new.to(flat.device, flat.dtype)
            old = base.original(path).flatten()[index]
            self.entries[path] = _Entries(flat, index, new, old)

    def on(self) -> None:
        """Write the new values. Raises SettingError where another switch has an entry in use."""
        for other in self._base.switches:
            for path in self.entries.keys() & other.entries.keys():
                shared = torch.isin(self.entries[path].index, other.entries[path].index)
                if shared.any():
                    raise SettingError(
                        f"entries in use by another delta: {int(shared.sum()):,} of {path}; take "
                        "that one off first, or join the two with howfine compose"
                    )
        for entry in self.entries.values():
            entry.flat.scatter_(0, entry.index, entry.new)  # a third of index_put_'s time
        self._base.switches.append(self)

    def off(self) -> None:
        """Write the old values back."""
        for entry in self.entries.values():
            entry.flat.scatter_(0, entry.index, entry.old)
        self._base.switches.remove(self)


def unpack(base: Base, tensors: Tensors) -> Change:
    """Put packed entries on, in place; the Change's `switch` part turns them off and on.

    Raises DamagedDelta for a path or shape that the base has not.
    """
    known = set(base.paths())
    for path, tensor in tensors.items():
        fits = path in known and tensor.is_sparse and tensor.shape == base.parameter(path).shape
        if not fits or not tensor.is_floating_point():
            raise DamagedDelta(
                f"delta holds entries of {path!r} of shape {tuple(tensor.shape)} "
                f"({tensor.dtype}), which the base {base.name} has not; the file is damaged, or "
                "made for another model"
            )
    in_place = {p: t for p, t in tensors.items() if base.parameter(p).is_contiguous()}
    with all_or_nothing() as undo:
        for path in tensors.keys() - in_place.keys():
            undo.append(_replace(base, path, tensors[path]))
        switch = Switch(base, in_place)
        switch.on()
        undo.append(switch.off)
        return Change({}, undo, parts={"switch": switch})


def _replace(base: Base, path: str, tensor: Tensor) -> Undo:
    """The same for a parameter whose memory can't be written as one row: a copy takes its place."""
    index, new = flat_entries(tensor)
    value = base.original(path).flatten()
    value = value.index_put((index.to(value.device),), new.to(value.device, value.dtype))
    parameter = base.parameter(path)
    return surgery.replace(base.towers, path, as_parameter(value.view(parameter.shape), parameter))
