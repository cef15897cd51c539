"""Compose: deltas on one base joined, taken apart, scaled and compared. See docs/compose.md.

A delta's change is δ = θ' - θ, its new values less the base's. Where one operand alone changes an
entry, its new value is copied, bit for bit: unions of disjoint grafts (Panigrahi et al. 2023), and
differences, have no arithmetic in them. Scaled sums θ + Σ w δ (task arithmetic, Ilharco et al.
2023; with weights that sum to 1 the interpolation of Wortsman et al. 2022) are rounded once.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from howfine import joining, regions, streams
from howfine.base import Base, TwoTowers
from howfine.codec import PRECISIONS
from howfine.delta import Delta
from howfine.entries import filled, flat_entries
from howfine.errors import DeltaError, SettingError, near
from howfine.head import no_answer
from howfine.joining import OnOverlap
from howfine.method import Method, Tensors, fitting, holding
from howfine.operands import Operand, flat, operands
from howfine.regions import differs
from howfine.streams import Stream

Deltas = Sequence[Delta | str | Path]
# Whose readout: the index of a delta, "none" for no head, None for the first where labels agree.
HeadOf = int | Literal["none"] | None


def compose(operation: str, deltas: Deltas, base: Base | None = None, **options: Any) -> Delta:
    """One delta from several on one base: `operation` is union, difference, sum, scale or negate.

    The options are those of the function of that name here (`scaled_sum` for sum). Raises
    SettingError for an unknown one, and what that function raises.
    """
    if operation not in OPERATIONS:
        raise SettingError(f"operation {operation!r} is unknown. {near(operation, OPERATIONS)}")
    return OPERATIONS[operation](deltas, base, **options)


def union(
    deltas: Deltas,
    base: Base | None = None,
    *,
    on_overlap: OnOverlap | None = None,
    head: HeadOf = None,
) -> Delta:
    """The changes of all deltas; of masks, what any of them drops.

    Where several change an entry: refuse (None, too), take the `first` or `last` one's value, or θ
    plus the `mean` or `sum` of their δ there. Masks have no values to choose from, and take None.
    `head` is the index of the delta whose readout is taken: the first one's by default, if all have
    the same labels. With "none" there is no head, as in the start of a training for another task.
    Raises SettingError, DeltaError, WrongBase.
    """
    if on_overlap is not None and on_overlap not in get_args(OnOverlap):
        raise SettingError(
            f"on_overlap {on_overlap!r} is unknown. {near(on_overlap, get_args(OnOverlap))}"
        )
    base, given = operands(deltas, base)
    if _are_masks(given):
        if on_overlap is not None:
            raise SettingError(
                f"on_overlap {on_overlap!r} says which value an entry gets, and {given[0].name} is "
                "a mask, which has none: what either mask drops is dropped. Leave it out"
            )
        return _of_masks(base, given, joining.masks(given, differ=False), head)
    rule = on_overlap or "refuse"
    return _result(base, given, joining.join(base, given, [1.0] * len(given), rule), head)


def scaled_sum(
    deltas: Deltas,
    base: Base | None = None,
    *,
    weights: Sequence[float] | None = None,
    head: HeadOf = None,
) -> Delta:
    """θ + Σ w_i δ_i, one weight a delta (1 each by default). `head` is as for `union`.

    Summed in float64 and rounded once to float32. Raises SettingError for weights that are not
    finite or not one a delta, DeltaError, WrongBase.
    """
    weights = [1.0] * len(deltas) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(deltas) or not all(map(math.isfinite, weights)):
        raise SettingError(
            f"weights {weights} for {len(deltas)} deltas: expected one finite number each"
        )
    base, given = operands(deltas, base)
    if _are_masks(given):
        raise DeltaError(
            f"{given[0].name} drops weights; a share of a dropped weight is no mask, so masks have "
            "unions and differences only"
        )
    return _result(base, given, joining.join(base, given, weights, "sum"), head)


def scale(deltas: Deltas, base: Base | None = None, *, by: float) -> Delta:
    """θ + by · δ of one delta. Raises SettingError for 0 (the base itself) and for NaN."""
    if len(deltas) != 1:
        raise SettingError(f"{len(deltas)} deltas to scale, expected one; for more use a sum")
    if by == 0:
        raise SettingError("scaled by 0 a change is none: use the base itself")
    return scaled_sum(deltas, base, weights=[by])


def negate(deltas: Deltas, base: Base | None = None) -> Delta:
    """θ - δ of one delta."""
    return scale(deltas, base, by=-1.0)


def difference(deltas: Deltas, base: Base | None = None, *, head: HeadOf = None) -> Delta:
    """The first delta without the entries that any other one changes, whatever their values.

    Of masks, what the first one drops and no other does. `head` is as for `union`. Raises
    SettingError where nothing is left, DeltaError, WrongBase.
    """
    base, given = operands(deltas, base)
    if _are_masks(given):
        return _of_masks(base, given, joining.masks(given, differ=True), head)
    lose: dict[str, Tensor] = {}
    for path in given[0].tensors:
        for operand in given[1:]:
            mask = operand.changed(base, path)
            idle = given[0].idle(base, path)
            if idle is not None and path in operand.tensors and operand.tensors[path].is_sparse:
                # Rounded to no change: it goes with the one whose it was.
                idle = idle & operand.listed(path)
                mask = idle if mask is None else mask | idle
            if mask is not None:
                lose[path] = mask | lose.get(path, torch.zeros_like(mask))
    return _result(base, given, joining.remade(base, given[0], lose), head)


def stored(delta: Delta, base: Base, store: str) -> tuple[Delta, float]:
    """(the delta with all values in another precision, the largest error in a weight by that).

    Raises SettingError for an unknown precision, and where it does not hold the values.
    """
    if store not in PRECISIONS:
        raise SettingError(f"store {store!r} is unknown. {near(store, PRECISIONS)}")
    before, head = delta.tensors(base)
    made = (
        *streams.encode("method", before, store, base),
        *streams.encode("readout", head, store, base),
    )
    after = streams.decode(made, base)["method"]
    errors = [
        _apart(base.original(path), after.get(path), tensor)
        for path, tensor in before.items()
        if tensor.is_floating_point() and flat(tensor).numel()
    ]
    return replace(delta, streams=made, score={}), max(errors, default=0.0)


def _apart(original: Tensor, one: Tensor | None, other: Tensor) -> float:
    """The largest difference of two changes of a tensor, where either is given."""
    return float((filled(original, one) - filled(original, other)).abs().max())


OPERATIONS: Mapping[str, Callable[..., Delta]] = {
    "union": union,
    "difference": difference,
    "sum": scaled_sum,
    "scale": scale,
    "negate": negate,
}


@dataclass(frozen=True)
class Overlap:
    """How many of the entries that `of` changes `by` changes too."""

    by: str
    of: str
    shared: int
    # Entries that `of` changes.
    count: int
    # shared / count; |a ∩ b| / |b| for a = by, b = of.
    share: float
    # The share of entries drawn at random from the tensors that either changes: `regions.chance`.
    chance: float


def overlap(deltas: Deltas, base: Base | None = None) -> list[Overlap]:
    """Every ordered pair of deltas and what they share (Panigrahi et al. 2023, section 5).

    Raises DeltaError, WrongBase, and SettingError for a delta alone and one that changes nothing.
    """
    if len(deltas) < 2:
        raise SettingError(
            f"{len(deltas)} of the two or more deltas that an overlap is of: give another one"
        )
    base, given = operands(deltas, base)
    found = [operand.region(base) for operand in given]
    for operand, region in zip(given, found, strict=True):
        if not region:
            raise SettingError(f"{operand.name} changes nothing of the base: no overlap")
    return [
        Overlap(
            by=a.name,
            of=b.name,
            shared=round(regions.overlap(found[i], found[j]) * regions.size(found[j])),
            count=regions.size(found[j]),
            share=regions.overlap(found[i], found[j]),
            chance=regions.chance(found[i], found[j]),
        )
        for i, a in enumerate(given)
        for j, b in enumerate(given)
        if i != j
    ]


def _are_masks(given: Sequence[Operand]) -> bool:
    """Whether all are masks. Raises DeltaError for masks among others."""
    masks = [operand.name for operand in given if operand.kind == "masks"]
    others = [operand.name for operand in given if operand.kind in ("entries", "tensors")]
    if masks and others:
        raise DeltaError(
            f"{masks[0]} drops weights, {others[0]} changes their values: what both mean together "
            "is undefined. Compose masks with masks"
        )
    return bool(masks)


def _of_masks(base: Base, given: Sequence[Operand], kept: Tensors, head: HeadOf) -> Delta:
    made = streams.encode("method", kept, "fp32", base)
    return _result(base, given, made, head, joining.reader_of(base, given, kept))


def _result(
    base: Base,
    given: Sequence[Operand],
    found: Sequence[Stream],
    head: HeadOf,
    method: Method | None = None,
) -> Delta:
    """The delta of these streams and of one operand's readout, or none; it has no score yet."""
    chosen = given[0 if head == "none" else _head(given, head)].delta
    if head == "none":
        mine = tuple(each for each in chosen.streams if not each.name.startswith("readout/"))
        # Two towers are read by one readout alone, whose head is left out.
        none = chosen if isinstance(base, TwoTowers) else no_answer()
        chosen = replace(chosen, readout=none.readout, labels=none.labels, streams=mine)
    whole = any(stream.values is None for stream in found)
    made = Delta(
        base_name=chosen.base_name,
        base_fingerprint=max((o.delta.base_fingerprint for o in given), key=len),
        method=method or fitting(holding("tensors" if whole else "entries"), base),
        readout=chosen.readout,
        labels=chosen.labels,
        streams=(*found, *(s for s in chosen.streams if s.name.startswith("readout/"))),
        base_kind=chosen.base_kind,
    )
    tensors, _ = made.tensors(base)
    if not all(flat(tensor).isfinite().all() for tensor in tensors.values()):
        raise SettingError("the result has values beyond a float32; give smaller weights")
    if not any(_moves(base, path, tensor) for path, tensor in tensors.items()):
        raise SettingError(
            f"nothing is left of {', '.join(operand.name for operand in given)}: the result is the "
            "base itself"
        )
    return made


def _moves(base: Base, path: str, tensor: Tensor) -> bool:
    """Whether new values, or a mask, differ from the base's."""
    if tensor.dtype == torch.bool:
        return not tensor.all()
    original = base.original(path).flatten().float().cpu()
    if tensor.is_sparse:
        original = original[flat_entries(tensor)[0]]
    return bool(differs(flat(tensor), original).any())


def _head(given: Sequence[Operand], head: int | None) -> int:
    if head is not None:
        counts = isinstance(head, numbers.Integral) and not isinstance(head, bool)
        if not counts or not 0 <= head < len(given):
            raise SettingError(
                f"head {head!r}: expected the index of a delta, 0 to {len(given) - 1}, or none"
            )
        return head
    first = given[0]
    for operand in given[1:]:
        if operand.delta.labels != first.delta.labels:
            raise SettingError(
                f"{first.name} answers {list(first.delta.labels)}, {operand.name} "
                f"{list(operand.delta.labels)}; a delta has one readout: say whose with head"
            )
    return 0
