"""Regions: which entries of a base a delta changes, where they lie, and what several share.

The measures for several tasks are those of skill localisation (Panigrahi et al. 2023): overlap of
two regions, and the share of a task's gain that another task's region brings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from howfine import container
from howfine.base import Base
from howfine.delta import Delta
from howfine.errors import SettingError, WrongBase
from howfine.start import weight_at

# Boolean masks by the path of the base's parameter, true for a changed entry; no path without one.
Region = dict[str, Tensor]


def differs(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors differ, as float32, in at least one bit: what a change of an entry is."""
    pair = (each.detach().float().contiguous().view(torch.int32) for each in (one, other))
    return torch.ne(*pair)


def support(delta: Delta, base: Base) -> Region:
    """The entries whose value with the delta on differs from the base's (`differs`).

    Of whatever method. What the file stores takes no part: a few numbers through a map (`subspace`)
    change nearly every entry of the tensors they reach. Raises WrongBase for a delta of another
    base, DamagedDelta for one that can't be decoded.
    """
    with delta.changed(base):
        found = {p: differs(weight_at(base, p), base.original(p)) for p in base.paths()}
    return {path: mask.cpu() for path, mask in found.items() if bool(mask.any())}


def count(delta: Delta, base: Base) -> int:
    """How many entries `support` has, with a mask of one tensor at a time in memory.

    Raises WrongBase for a delta of another base, DamagedDelta for one that can't be decoded.
    """
    with delta.changed(base):
        each = (differs(weight_at(base, p), base.original(p)) for p in base.paths())
        return sum(int(mask.count_nonzero()) for mask in each)


def outside(files: Sequence[str], base: Base) -> Region:
    """All entries that any of these delta files changes: the region to keep out of.

    Raises SettingError for a file that is no delta, or one of another base.
    """
    union: Region = {}
    for file in files:
        if not container.is_delta(Path(file)):
            raise SettingError(
                f"outside {file!r} is no delta file; name those whose regions to keep"
            )
        delta = Delta.load(file)
        try:
            delta.check_base(base)
        except WrongBase as error:
            raise SettingError(
                f"outside {file!r} is a support file of another base: its places mean nothing on "
                f"{base.name}; {error}"
            ) from error
        for path, mask in support(delta, base).items():
            union[path] = union[path] | mask if path in union else mask
    return union


def size(region: Mapping[str, Tensor]) -> int:
    """How many entries a region has."""
    return sum(int(mask.count_nonzero()) for mask in region.values())


def overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """|γ₁ ∩ γ₂| / |γ₂|: how much of the second region lies in the first; NaN where it is empty.

    Two unrelated regions overlap by `chance`.
    """
    both = sum(int((first[p] & mask).count_nonzero()) for p, mask in second.items() if p in first)
    return both / size(second) if size(second) else math.nan


def chance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """|γ₁| / d: the overlap by `first` of a second region drawn at random; NaN for none at all.

    d is the number of entries of the tensors that either of the two regions changes.
    """
    among = sum(mask.numel() for mask in {**first, **second}.values())
    return size(first) / among if among else math.nan


def effect(
    grafted: Sequence[Sequence[float]], before: Sequence[float], tuned: Sequence[float]
) -> list[list[float]]:
    """Share of each task's gain that each region brings, from scores.

    Rel(i, t) = (P(γᵢ, t) - P(pre, t)) / (P(ft, t) - P(pre, t)), a row for each region i, a column
    for each task t (Panigrahi et al. 2023). `grafted` holds P(γᵢ, t), `before` the base's scores
    and `tuned` the fine-tuned model's. NaN for a task without any gain.
    """
    if any(len(row) != len(before) for row in (*grafted, tuned)):
        lengths = [len(row) for row in (*grafted, tuned)]
        raise SettingError(
            f"effect: found rows of {lengths} scores, expected {len(before)} in each, a task each"
        )
    return [
        [
            (score - low) / (high - low) if high != low else math.nan
            for score, low, high in zip(row, before, tuned, strict=True)
        ]
        for row in grafted
    ]


@dataclass(frozen=True)
class Place:
    """Changed entries of one part of one layer."""

    layer: int | None  # None outside the blocks
    part: str  # see howfine.anatomy: a matrix's letter, norm, bias, embedding, …
    changed: int
    entries: int  # of all tensors of that part, changed or not

    @property
    def share(self) -> float:
        """Changed entries over all."""
        return self.changed / self.entries

    def as_dict(self) -> dict[str, Any]:
        """As JSON types, with the share."""
        return {**asdict(self), "share": self.share}


def where_changed(delta: Delta, base: Base) -> list[Place]:
    """A row for every part of every layer that has a changed entry, in the base's order."""
    return [place for place in everywhere(delta, base) if place.changed]


def everywhere(delta: Delta, base: Base) -> list[Place]:
    """A row for every part of every layer, changed or not, in the base's order."""
    region = support(delta, base)
    changed: dict[tuple[int | None, str], int] = {}
    entries: dict[tuple[int | None, str], int] = {}
    for path in base.paths():
        place = base.place(path)
        entries[place] = entries.get(place, 0) + base.parameter(path).numel()
        found = int(region[path].count_nonzero()) if path in region else 0
        changed[place] = changed.get(place, 0) + found
    return [Place(*place, changed[place], entries[place]) for place in entries]
