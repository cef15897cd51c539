"""Coders of values: floats in one of PRECISIONS."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from howfine.codec.coded import (
    PRECISIONS,
    VALUES,
    Array,
    Coded,
    bits_packed,
    bits_unpacked,
    check,
    check_length,
    damaged,
    packed,
    unpacked,
)
from howfine.codec.scales import LARGEST, TOPS, largest_scale, scale_of
from howfine.codec.steps import decode_halves, decode_steps, encode_halves, encode_steps
from howfine.errors import SettingError, near

# Numbers as they lie in a file: torch dtype, integer of that width, the same in little-endian.
_RAW = {
    "fp32": (torch.float32, torch.int32, "<i4"),
    "fp16": (torch.float16, torch.int16, "<i2"),
    "bf16": (torch.bfloat16, torch.int16, "<i2"),
}
# Entropy coding of halves must save this share: it takes longer to read.
_WORTH = 0.02


def encode_values(
    values: torch.Tensor,
    precision: str,
    parts: Sequence[int] | None = None,
    scales: Sequence[float] | None = None,
) -> Coded:
    """Float values of any shape in one of PRECISIONS, raw or entropy coded, whichever is smaller.

    intB holds the steps -(2^(B-1) - 1)..2^(B-1) - 1 times a scale: max|x| over the last step from
    6 bits on, below that the one of least squared error. sign stores x > 0 and the scale mean|x|,
    which is the best one in the least-squares sense (BitDelta, Liu et al. 2024). With `parts`, the
    lengths of the pieces that the values are made of, each piece has a scale of its own. `scales`,
    one a piece, are taken as they are: values that were rounded before keep their steps.

    Raises SettingError for an unknown precision, a dtype that is not float, values beyond the
    precision's range, NaN or infinity where a scale is taken, and parts that do not add up.
    """
    flat = _checked(values, precision)
    if precision in _RAW:
        dtype, view, stored = _RAW[precision]
        raw = flat.to(dtype).view(view).numpy()
        plain = raw.astype(stored).tobytes()
        if precision == "fp16" and raw.size:
            halves = encode_halves(raw.view(np.uint16), int(len(plain) * (1 - _WORTH)))
            return Coded("fp16", (), plain) if halves is None else Coded("fp16h", (), halves)
        return Coded(precision, (), plain)
    x = flat.to(torch.float32).numpy()
    used, steps = _quantised(x, precision, parts, scales)
    params = tuple(map(float, used))
    if precision == "sign":
        return Coded("sign", params, packed(steps > 0))
    top = TOPS[precision]
    plain = steps.tobytes() if top > 31 else bits_packed(steps + top, top.bit_length() + 1)
    written = encode_steps(steps, len(plain)) if x.size else None
    return Coded(precision, params, plain) if written is None else Coded("steps", params, written)


def encode_steps_of(steps: Array, scales: Sequence[float]) -> Coded:
    """Steps taken already, int8 (count,), of one scale, or of one for each part as they come.

    For a quantiser of one's own: `encode_values` would look for another scale.
    """
    params = tuple(float(np.float32(scale)) for scale in scales)
    if steps.size and steps.all() and np.abs(steps).max() == 1:
        return Coded("sign", params, packed(steps > 0))
    most = int(np.abs(steps).max(initial=0))
    precision = min((name for name in TOPS if TOPS[name] >= most), key=TOPS.__getitem__)
    top = TOPS[precision]
    plain = steps.tobytes() if top > 31 else bits_packed(steps + top, top.bit_length() + 1)
    written = encode_steps(steps, len(plain)) if steps.size else None
    return Coded(precision, params, plain) if written is None else Coded("steps", params, written)


def decode_values(coded: Coded, count: int, parts: Sequence[int] | None = None) -> torch.Tensor:
    """The float32 values (count,), as rounded by `encode_values` with the same `parts`.

    Raises DamagedDelta if `coded` is not exactly `count` values.
    """
    check(coded, count, VALUES)
    try:
        return _decoded(coded, count, parts)
    except MemoryError as error:
        raise damaged(coded, f"{count} entries", "what this machine's memory holds") from error


def encode_nonzero(values: torch.Tensor, precision: str) -> tuple[Coded, torch.Tensor]:
    """(k,) differences without those that are rounded to 0, and a mask (k,) of the others.

    All are coded where the others would be rounded otherwise without them.
    """
    given = rounded(values, precision)
    kept = given != 0
    if kept.any() and not torch.equal(rounded(values[kept], precision), given[kept]):
        kept = torch.ones_like(kept)
    return encode_values(values[kept] if kept.any() else values, precision), kept


def rounded(
    values: torch.Tensor, precision: str, parts: Sequence[int] | None = None
) -> torch.Tensor:
    """What `decode_values` makes of `encode_values`, bit for bit, without coding: float32.

    Same shape and device as `values`. Raises SettingError where `encode_values` does.
    """
    flat = _checked(values, precision)
    if precision in _RAW:
        found = flat.to(_RAW[precision][0]).to(torch.float32, copy=True)
    else:
        x = flat.to(torch.float32).numpy()
        scales, steps = _quantised(x, precision, parts)
        found = torch.from_numpy(steps * _spread(scales, parts))
    return found.view(values.shape).to(values.device)


def _checked(values: torch.Tensor, precision: str) -> torch.Tensor:
    """`values` flat on the CPU; SettingError where `precision` cannot hold them."""
    if precision not in PRECISIONS:
        raise SettingError(f"unknown precision {precision!r}. {near(str(precision), PRECISIONS)}")
    if not values.is_floating_point():
        raise SettingError(f"values must be float, found {values.dtype}; convert them first")
    flat = values.detach().cpu().reshape(-1)
    if precision in _RAW:
        _check_range(flat, precision, _RAW[precision][0])
    elif not flat.to(torch.float32).isfinite().all():
        raise SettingError(
            f"{precision} needs finite values, found NaN or infinity among {flat.numel()}; "
            "use fp32, or look for the step at which training diverged"
        )
    return flat


def _quantised(
    x: Array,
    precision: str,
    parts: Sequence[int] | None,
    given: Sequence[float] | None = None,
) -> tuple[Array, Array]:
    """(float32 scales, one a part; int8 steps (count,)). Raises SettingError for other parts."""
    sizes = [x.size] if parts is None else list(parts)
    if min(sizes, default=0) < 0 or sum(sizes) != x.size:
        raise SettingError(
            f"parts of {sum(sizes)} values in all, found {x.size}; give the length of each part"
        )
    pieces = np.split(x, np.cumsum(sizes)[:-1]) if sizes else []
    found = [scale_of(piece, precision) for piece in pieces] if given is None else given
    scales = np.array(found, np.float32)
    if len(scales) != len(sizes):
        raise SettingError(f"{len(scales)} scales, expected {len(sizes)}: one for each part")
    if precision == "sign":
        return scales, np.where(x > 0, np.int8(1), np.int8(-1))
    spread, top = _spread(scales, parts), TOPS[precision]
    # A scale that underflows to 0 stands for magnitudes below 1e-43.
    steps = np.zeros_like(x)
    np.divide(x, spread, out=steps, where=spread > 0)
    return scales, np.rint(steps, out=steps).clip(-top, top).astype(np.int8)


def _spread(scales: Array, parts: Sequence[int] | None) -> Array:
    """The scale of every value (count,), or of all of them (1,)."""
    return scales if parts is None else np.repeat(scales, np.asarray(parts, np.int64))


def _decoded(coded: Coded, count: int, parts: Sequence[int] | None) -> torch.Tensor:
    if coded.coding in ("fp16h", *_RAW) and coded.params:
        raise damaged(coded, f"{len(coded.params)} params", "none")
    if coded.coding == "fp16h":
        halves = decode_halves(coded, count).view(np.int16)
        return torch.from_numpy(halves).view(torch.float16).to(torch.float32)
    if coded.coding in _RAW:
        dtype, _, stored = _RAW[coded.coding]
        check_length(coded, count * np.dtype(stored).itemsize)
        raw = np.frombuffer(coded.payload, stored)
        return torch.from_numpy(raw.astype(stored.lstrip("<"))).view(dtype).to(torch.float32)
    if parts is not None and (min(parts, default=0) < 0 or sum(parts) != count):
        raise damaged(coded, f"parts of {sum(parts)} values in all", f"{count}")
    scales = _scales(coded, 1 if parts is None else len(parts))
    if coded.coding == "sign":
        bits = unpacked(coded, coded.payload, count)
        spread = _spread(scales, parts)
        return torch.from_numpy(np.where(bits, spread, -spread))
    steps = _steps(coded, count)
    with np.errstate(over="ignore"):
        found = steps * _spread(scales, parts)
    if not np.isfinite(found).all():
        raise damaged(coded, "values beyond a float32", "smaller steps, or a smaller scale")
    return torch.from_numpy(found)


def _steps(coded: Coded, count: int) -> Array:
    """The int8 steps (count,), raw or by their law."""
    if coded.coding == "steps":
        if count:
            return decode_steps(coded, coded.payload, count)
        check_length(coded, 0)
        return np.zeros(0, np.int8)
    top = TOPS[coded.coding]
    if top > 31:
        check_length(coded, count)
        steps = np.frombuffer(coded.payload, np.int8)
    else:
        width = top.bit_length() + 1
        plain = bits_unpacked(coded, coded.payload, count, width)
        steps = (plain.view(np.int16) - top).astype(np.int8)
    if count and (steps.min() < -top or steps.max() > top):
        raise damaged(coded, "a step without its opposite", f"steps in -{top}..{top}")
    return steps


def _check_range(flat: torch.Tensor, precision: str, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    beyond = flat.abs() > limit
    if precision != "fp16":
        beyond &= flat.isfinite()
    if beyond.any():
        wider = {"fp16": "bf16 or fp32", "bf16": "fp32", "fp32": "smaller values"}[precision]
        raise SettingError(
            f"{precision} holds magnitudes up to {limit:g}, found {int(beyond.sum())} larger of "
            f"{flat.numel()}; use {wider}"
        )


def _scales(coded: Coded, number: int) -> Array:
    """The float32 scales (number,) in the params."""
    top = float(largest_scale(TOPS[coded.coding]) if coded.coding in TOPS else LARGEST)
    if len(coded.params) != number:
        raise damaged(coded, f"{len(coded.params)} params", f"{number} scales")
    for scale in coded.params:
        known = type(scale) in (int, float) and 0 <= scale <= top
        if not known or float(np.float32(scale)) != scale:
            raise damaged(coded, "a scale that is none", f"a float32 in 0..{top:g}")
    return np.array(coded.params, np.float32)
