"""Joining: the streams of several deltas' changes together, and of what is left of one.

Values that are copied keep their coding. So a union of quantised deltas is as small as its parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from howfine.base import Base
from howfine.entries import changed, flat_entries
from howfine.errors import DamagedDelta, DeltaError, SettingError
from howfine.method import Method, Tensors
from howfine.operands import Operand, flat
from howfine.recode import precision_of, recode
from howfine.regions import differs
from howfine.streams import Stream, decode, encode

OnOverlap = Literal["refuse", "first", "last", "mean", "sum"]
# Tensors that a refusal lists.
_LISTED = 4
# A share changed beyond which places and values take as much as whole tensors do, and ten times the
# time to code.
_MOST = 0.9


def join(
    base: Base, given: Sequence[Operand], weights: Sequence[float], rule: OnOverlap
) -> list[Stream]:
    """All changes, each times its weight; `rule` says what holds where several change an entry.

    Entries if all operands are, whole tensors if all are those; of both, whichever takes fewer
    bytes. Raises SettingError where the rule is to refuse.
    """
    live = [(o, w) for o, w in zip(given, weights, strict=True) if w and o.kind != "nothing"]
    found = _joined(base, live, rule)
    mixed = {operand.kind for operand, _ in live} == {"entries", "tensors"}
    if mixed and _few([operand for operand, _ in live], base):
        # A few entries of a large matrix would be all of it.
        single = [(_of_entries(operand, base), weight) for operand, weight in live]
        found = min(found, _joined(base, single, rule), key=lambda made: sum(s.size for s in made))
    return found


def _few(given: Sequence[Operand], base: Base) -> bool:
    """Whether entries may take fewer bytes: less than `_MOST` of all tensors together change."""
    sizes = {path: tensor.numel() for operand in given for path, tensor in operand.tensors.items()}
    masks = (operand.changed(base, path) for operand in given for path in operand.tensors)
    return sum(int(mask.sum()) for mask in masks if mask is not None) < _MOST * sum(sizes.values())


def _of_entries(operand: Operand, base: Base) -> Operand:
    """The same change as new values of the entries that it changes."""
    tensors = {}
    for path in operand.tensors:
        mask = operand.changed(base, path)
        if mask is not None:
            index = mask.nonzero().flatten()
            new = operand.values(base, path)[index]
            tensors[path] = changed(base.original(path).float().cpu(), index, new)
    made = _exactly(base, tensors, _common([operand])) or encode("method", tensors, "fp32", base)
    delta = replace(operand.delta, streams=tuple(made))
    return replace(operand, kind="entries", tensors=tensors, delta=delta)


def _common(given: Sequence[Operand]) -> str:
    """The precision of all streams, or else float32."""
    used = {precision_of(stream) for operand in given for stream in operand.streams}
    return used.pop() if len(used) == 1 else "fp32"


def _joined(base: Base, live: list[tuple[Operand, float]], rule: OnOverlap) -> list[Stream]:
    """Entries if all operands are, else whole tensors."""
    whole = any(operand.kind == "tensors" for operand, _ in live)
    lose, fresh = _resolved(base, live, rule, whole)
    skip = set(fresh) if whole else None  # the change of any entries is in fresh then
    found = [
        stream
        for (operand, weight), lost in zip(live, lose, strict=True)
        for stream in remade(base, operand, lost, weight, skip)
    ]
    common = _common([operand for operand, _ in live])
    added = _exactly(base, fresh, common)
    found += encode("method", fresh, "fp32", base) if added is None else added
    return found if whole else _smallest(base, found, common)


def remade(
    base: Base,
    operand: Operand,
    lose: Mapping[str, Tensor],
    times: float = 1.0,
    skip: set[str] | None = None,
) -> list[Stream]:
    """An operand's streams without the change of some entries, and scaled: see `recode`.

    With `skip`, whole tensors alone, without those of its paths.
    """
    found = []
    for stream in operand.streams:
        whole = stream.values is None
        path = stream.name.partition("/")[2]
        if skip is not None and (path in skip or not whole):
            continue
        again = recode(stream, base, lose, times)
        found += [] if again is None else [again]
    return found


def _resolved(
    base: Base, live: list[tuple[Operand, float]], rule: OnOverlap, whole: bool
) -> tuple[list[dict[str, Tensor]], Tensors]:
    """(by operand, the entries that it gives up; new values where operands meet)."""
    lose: list[dict[str, Tensor]] = [{} for _ in live]
    fresh: Tensors = {}
    clashes: dict[str, int] = {}
    for path in base.paths():
        masks = {i: operand.changed(base, path) for i, (operand, _) in enumerate(live)}
        held = {i: mask for i, mask in masks.items() if mask is not None}
        shared = sum((m.int() for m in held.values()), torch.zeros(1)) > 1
        meet = bool(shared.any())
        if meet:
            clashes[path] = int(shared.count_nonzero())
        if whole and held and (len(held) > 1 or live[next(iter(held))][0].tensors[path].is_sparse):
            shape = base.parameter(path).shape
            fresh[path] = _combined(base, path, live, held, rule).view(shape)
        elif meet and rule in ("mean", "sum"):
            index = shared.nonzero().flatten()
            new = _combined(base, path, live, held, rule)[index]
            fresh[path] = changed(base.original(path).float().cpu(), index, new)
            for i, mask in held.items():
                lose[i][path] = mask & shared
        elif meet:
            taken = torch.zeros_like(shared)
            for i in _by_rank(held, rule):
                lose[i][path] = held[i] & taken
                taken |= held[i]
        if not whole:
            _without_idle(base, path, [operand for operand, _ in live], lose)
    if clashes and rule == "refuse":
        raise SettingError(_refusal([operand.name for operand, _ in live], clashes))
    return lose, fresh


def _without_idle(
    base: Base, path: str, live: list[Operand], lose: list[dict[str, Tensor]]
) -> None:
    """Let operands lose entries that they list with the base's own value, where others list them.

    No stream is to say again what another one does.
    """
    for i, operand in enumerate(live):
        idle = operand.idle(base, path)
        if idle is None:
            continue
        others = [other for j, other in enumerate(live) if j != i and path in other.tensors]
        listed = sum((each.listed(path) for each in others), torch.zeros_like(idle))
        lose[i][path] = lose[i].get(path, torch.zeros_like(idle)) | (idle & listed)


def _by_rank(held: Mapping[int, Tensor], rule: OnOverlap) -> list[int]:
    """The operands that change a tensor, the one that wins first."""
    return sorted(held, reverse=rule == "last")


def _combined(
    base: Base,
    path: str,
    live: list[tuple[Operand, float]],
    held: Mapping[int, Tensor],
    rule: OnOverlap,
) -> Tensor:
    """New values (n,) of a parameter, where one operand alone with weight 1 changes it a copy."""
    original = base.original(path).flatten().float().cpu()
    total = torch.zeros(original.shape, dtype=torch.float64)
    count = torch.zeros(original.shape, dtype=torch.int32)
    # What the operands' values were rounded by, at most: less than that is no sum.
    slack = torch.zeros_like(total)
    copied = original.clone()
    plain = torch.ones(original.shape, dtype=torch.bool)
    for i in reversed(_by_rank(held, rule)):  # the winner is written last
        operand, weight = live[i]
        values, mask = operand.values(base, path), held[i]
        total += torch.where(mask, weight * (values.double() - original.double()), 0.0)
        slack += torch.where(mask, abs(weight) * _half_step(values, original), 0.0)
        count += mask.int()
        copied = torch.where(mask, values, copied)
        plain &= ~mask | (weight == 1)
    if rule == "mean":
        total /= count.clamp(min=1)
        slack /= count.clamp(min=1)
    if rule in ("mean", "sum"):
        plain &= count < 2
        total = torch.where((count > 1) & (total.abs() <= slack), 0.0, total)
        return torch.where(plain, copied, (original.double() + total).float())
    return copied


def _half_step(values: Tensor, original: Tensor) -> Tensor:
    """Half the distance between float32 numbers, of the larger of two magnitudes. As float64."""
    _, exponent = torch.frexp(torch.maximum(values.abs(), original.abs()))
    return torch.exp2((exponent - 25).double())


def _refusal(names: list[str], clashes: Mapping[str, int]) -> str:
    listed = [f"{count:,} of {path}" for path, count in list(clashes.items())[:_LISTED]]
    more = f" and {len(clashes) - _LISTED} more tensors" if len(clashes) > _LISTED else ""
    return (
        f"{', '.join(names)} overlap where disjoint changes were asked for: "
        f"{sum(clashes.values()):,} entries are changed by more than one, {', '.join(listed)}"
        f"{more}. Say what holds there: on_overlap first, last, mean or sum"
    )


def _smallest(base: Base, found: list[Stream], common: str) -> list[Stream]:
    """Streams of entries, joined into one where that loses no bit and is smaller.

    Or where there are so many that a reader would refuse them (docs/format.md).
    """
    if len(found) < 2:
        return found
    tensors = decode(tuple(found), base)["method"]
    one = _exactly(base, tensors, common)
    entries = sum(parameter.numel() for parameter in base.towers.parameters())
    if sum(stream.count for stream in found) > 4 * entries:
        return encode("method", tensors, "fp32", base) if one is None else one
    smaller = one is not None and sum(s.size for s in one) <= sum(s.size for s in found)
    return one if one is not None and smaller else found


def _exactly(base: Base, tensors: Tensors, precision: str) -> list[Stream] | None:
    """Streams in a precision that give back each bit; None where there are none."""
    try:
        made = encode("method", tensors, precision, base)
    except SettingError:  # beyond the precision's range
        return None
    found = decode(tuple(made), base)["method"]
    same = all(
        path in found and _alike(flat(found[path]), flat(tensor))
        for path, tensor in _without_own(base, tensors).items()
        if flat(tensor).numel()
    )
    return made if same else None


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and not differs(one, other).any()


def _without_own(base: Base, tensors: Tensors) -> Tensors:
    """Without entries that have the base's own value, for which a file may have no place."""
    return {
        path: changed(base.original(path).float().cpu(), *flat_entries(tensor))
        if tensor.is_sparse
        else tensor
        for path, tensor in tensors.items()
    }


def masks(given: Sequence[Operand], differ: bool) -> Tensors:
    """Masks of what is kept: what any operand drops is gone, or what the first alone does.

    Raises DeltaError where masks of one weight have other units.
    """
    found = dict(given[0].tensors)
    for operand in given[1:]:
        for path, kept in operand.tensors.items():
            if path not in found:
                if not differ:
                    found[path] = kept
                continue
            if found[path].shape != kept.shape:
                raise DeltaError(
                    f"{given[0].name} masks {path} in units of shape {tuple(found[path].shape)}, "
                    f"{operand.name} in units of {tuple(kept.shape)}; compose masks of one "
                    "granularity"
                )
            found[path] = found[path] | ~kept if differ else found[path] & kept
    return {path: kept for path, kept in found.items() if not kept.all()}


def reader_of(base: Base, given: Sequence[Operand], tensors: Tensors) -> Method:
    """The first operand's method whose settings allow these masks. Raises DeltaError for none."""
    for operand in given:
        try:
            with operand.delta.method.unpack(base, tensors):
                return operand.delta.method
        except DamagedDelta:  # it masks other tensors
            continue
    raise DeltaError(
        f"{', '.join(operand.name for operand in given)} mask different tensors, and none of their "
        "settings names all of them; compose masks of the same tensors"
    )
