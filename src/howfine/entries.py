"""Changes made of some entries of the base's tensors: packed, and switched on and off in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from howfine.base import Base
from howfine.change import Change, all_or_nothing
from howfine.errors import DamagedDelta, SettingError
from howfine.method import Tensors


def flat_entries(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(row-major indices ascending, values) of a sparse tensor, (k,) each."""
    tensor = tensor.coalesce()
    index = torch.zeros(tensor._nnz(), dtype=torch.long, device=tensor.device)
    for axis, size in enumerate(tensor.shape):
        index = index * size + tensor.indices()[axis]
    return index, tensor.values()


def sparse(index: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A sparse tensor of `shape` from row-major indices ascending and values, (k,) each.

    Raises SettingError where an index stands twice or out of order: no file could say that.
    """
    if not bool((index[1:] > index[:-1]).all()):
        raise SettingError(
            f"{len(index):,} changed entries of a tensor of shape {shape}: found indices that "
            "repeat or fall, expected them in ascending order"
        )
    where = torch.stack(torch.unravel_index(index, shape))
    return torch.sparse_coo_tensor(where, values, shape, is_coalesced=True, check_invariants=False)


def changed(original: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """The sparse tensor of those new values (k,) that differ from `original` at their places."""
    real = values != original.flatten()[index]
    return sparse(index[real], values[real], tuple(original.shape))


def filled(original: Tensor, tensor: Tensor | None) -> Tensor:
    """All values (n,) of a tensor: where some entries are given, or none, the original's else."""
    if tensor is not None and not tensor.is_sparse:
        return tensor.flatten()
    found = original.flatten().float().cpu()
    if tensor is None:
        return found
    index, values = flat_entries(tensor)
    return found.index_put((index.cpu(),), values.float().cpu())


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
class Entries:
    """New values of some entries of one parameter, by row-major index."""

    parameter: nn.Parameter
    flat: Tensor | None  # the parameter's memory as one row, where it lies so
    index: Tensor
    new: Tensor
    old: Tensor

    def write(self, values: Tensor) -> None:
        """Put `values` at the places, wherever and in whatever format the parameter is by now."""
        flat = self.flat
        if not self.parameter.is_inference():
            # What was computed with the values before has no gradient any more: autograd says so.
            torch.autograd.graph.increment_version(self.parameter)
        if flat is not None and flat.data_ptr() == self.parameter.data_ptr():
            flat.scatter_(0, self.index, values)
            return
        data = self.parameter.data  # moved or cast since
        index, values = self.index.to(data.device), values.to(data.device, data.dtype)
        if data.is_contiguous():
            data.view(-1).scatter_(0, index, values)  # a third of index_put_'s time
        else:
            data[torch.unravel_index(index, data.shape)] = values


class Switch:
    """New values for some entries of a base, put on and taken off by writing just those entries.

    The old values are kept, so that going back is exact whatever the number format.
    """

    def __init__(self, base: Base, tensors: Tensors) -> None:
        self._base = base
        self.entries: dict[str, Entries] = {}
        for path, tensor in tensors.items():
            parameter, original = base.parameter(path), base.original(path)
            index, new = flat_entries(tensor)
            index, new = index.to(original.device), new.to(original.device, original.dtype)
            flat = parameter.data.view(-1) if parameter.is_contiguous() else None
            old = original.flatten()[index]
            self.entries[path] = Entries(parameter, flat, index, new, old)

    def on(self) -> None:
        """Write the new values, unless they are on.

        Raises SettingError where another switch has an entry in use.
        """
        if self in self._base.switches:
            return
        for other in self._base.switches:
            for path in self.entries.keys() & other.entries.keys():
                shared = torch.isin(self.entries[path].index, other.entries[path].index)
                if shared.any():
                    raise SettingError(
                        f"entries in use by another delta: {int(shared.sum()):,} of {path}; take "
                        "that one off first, or join the two with howfine compose"
                    )
        self._base.switches.append(self)  # first: who interrupts the writing can still go back
        for entry in self.entries.values():
            entry.write(entry.new)

    def off(self) -> None:
        """Write the old values back, unless they are there."""
        if self not in self._base.switches:
            return
        for entry in self.entries.values():
            entry.write(entry.old)
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
    switch = Switch(base, tensors)
    with all_or_nothing() as undo:
        undo.append(switch.off)
        switch.on()
        return Change({}, undo, parts={"switch": switch})
