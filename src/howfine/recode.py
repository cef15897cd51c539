"""Streams made again: without some of their entries, or scaled, and still in as few bits.

Steps of a quantised stream stay as they are. Fitting a scale again, to fewer values or to others,
would round them a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from howfine.base import Base
from howfine.codec import (
    Coded,
    decode_places,
    decode_values,
    encode_values,
)
from howfine.errors import SettingError
from howfine.streams import Stream, coded_places, joined_name, members_of

# The precision whose values a coding by entropy holds. Steps of fewer bits are steps of int8 too.
_PRECISION = {"steps": "int8", "fp16h": "fp16"}
# Values whose steps are the same differ by less, those of other steps by 1/127 or more.
_SAME_STEPS = 1e-4


def precision_of(stream: Stream) -> str:
    """In what its values are stored, as one of codec's PRECISIONS; int8 for steps of any intB."""
    coding = (stream.values or stream.coded).coding
    return _PRECISION.get(coding, coding)


def recode(
    stream: Stream, base: Base, lose: Mapping[str, Tensor], times: float = 1.0
) -> Stream | None:
    """A method's stream of new values, with the change of some entries undone and others scaled.

    `lose` has row-major bool masks (n,) by path; a path that is not in it loses nothing. What is
    left is θ + times (θ' - θ). Steps times a scale stay those steps, times the scale times `times`.
    Other values stay in their precision if it holds the products exactly, and become fp32 if not.
    None where nothing is left. Raises DamagedDelta.
    """
    if stream.values is not None:
        return _joined(stream, stream.values, base, lose, times)
    path = stream.name.partition("/")[2]
    lost = lose.get(path)
    if times == 1 and (lost is None or not lost.any()):
        return stream
    original = base.original(path).flatten().float().cpu()
    values = decode_values(stream.coded, stream.count)
    if lost is not None:
        values = torch.where(lost, torch.zeros(()) if stream.difference else original, values)
    coded, difference = _again(values, original, stream.coded, stream.difference, times)
    found = decode_values(coded, stream.count)
    if torch.equal(original + found if difference else found, original):
        return None
    return replace(stream, coded=coded, difference=difference)


def _joined(
    stream: Stream, coded: Coded, base: Base, lose: Mapping[str, Tensor], times: float
) -> Stream | None:
    members = members_of(stream, base.paths())
    sizes = [base.parameter(path).numel() for path in members]
    places = decode_places(stream.coded, stream.count)
    none = torch.zeros((), dtype=torch.bool)
    lost = torch.cat([lose.get(p, none.expand(n)) for p, n in zip(members, sizes, strict=True)])
    kept = places & ~lost
    if times == 1 and torch.equal(kept, places):
        return stream
    left = {p: part for p, part in zip(members, kept.split(sizes), strict=True) if part.any()}
    if not left:
        return None
    counts = [int(part.count_nonzero()) for part in places.split(sizes)]
    parts = counts if len(coded.params) > 1 else None  # each tensor with a scale of its own
    values = decode_values(coded, sum(counts), parts)[kept[places]]
    original = torch.cat([base.original(path).flatten().float().cpu() for path in members])[kept]
    if parts is not None:
        parts = [int(part.count_nonzero()) for part in kept.split(sizes)]
        scales = [scale for scale, part in zip(coded.params, parts, strict=True) if part]
        coded, parts = replace(coded, params=tuple(scales)), [part for part in parts if part]
    again, difference = _again(values, original, coded, stream.difference, times, parts)
    together = torch.cat(list(left.values()))
    name = joined_name(stream.name.partition("/")[0], list(left), base)
    return Stream(
        name, (len(together),), coded_places(together, list(left), base), difference, again
    )


def _again(
    values: Tensor,
    original: Tensor,
    coded: Coded,
    difference: bool,
    times: float,
    parts: list[int] | None = None,
) -> tuple[Coded, bool]:
    """(values times `times` coded anew, whether they are differences from `original`)."""
    if not difference:
        new = values if times == 1 else (original.double() + times * _apart(values, original))
        return encode_values(new.float(), "fp32"), False
    new = values * times
    made = _as_before(new, coded, times, parts)
    if made is not None:
        return made, True
    return encode_values((original.double() + times * values.double()).float(), "fp32"), False


def _apart(values: Tensor, original: Tensor) -> Tensor:
    return values.double() - original.double()


def _as_before(new: Tensor, coded: Coded, times: float, parts: list[int] | None) -> Coded | None:
    """`new` in the precision and the steps of `coded`; None where they don't fit it."""
    scales = [float(torch.tensor(abs(times) * scale)) for scale in coded.params]
    if any(not 0 < scale < 1e30 for scale in scales):
        return None
    precision = _PRECISION.get(coded.coding, coded.coding)
    try:
        made = encode_values(new, precision, parts, scales or None)
    except SettingError:  # beyond what half a number holds
        return None
    found = decode_values(made, new.numel(), parts)
    same = torch.allclose(found, new, rtol=_SAME_STEPS if scales else 0, atol=0)
    return made if same else None
