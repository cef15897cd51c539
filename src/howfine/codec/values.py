"""Coders of values: floats in one of PRECISIONS."""

from __future__ import annotations

import numpy as np
import torch

from howfine.codec.coded import PRECISIONS, Coded, check, check_length, damaged, packed, unpacked
from howfine.errors import SettingError, near

# Numbers as they lie in a file: torch dtype, integer of that width, the same in little-endian.
_RAW = {
    "fp32": (torch.float32, torch.int32, "<i4"),
    "fp16": (torch.float16, torch.int16, "<i2"),
    "bf16": (torch.bfloat16, torch.int16, "<i2"),
}

# Just below max / 127, whose multiple 127 would round to infinity.
_LARGEST = np.finfo(np.float32).max
_LARGEST_SCALE = {
    "int8": np.nextafter(_LARGEST / np.float32(127), np.float32(0)),
    "sign": _LARGEST,
}


def encode_values(values: torch.Tensor, precision: str) -> Coded:
    """Float values of any shape in one of PRECISIONS.

    int8 is symmetric with scale max|x| / 127; sign stores x > 0 and the scale mean|x|, which is the
    best one in the least-squares sense (BitDelta, Liu et al. 2024).

    Raises SettingError for an unknown precision, a dtype that is not float, values beyond the
    precision's range, and NaN or infinity where a scale is taken.
    """
    if precision not in PRECISIONS:
        raise SettingError(f"unknown precision {precision!r}. {near(str(precision), PRECISIONS)}")
    if not values.is_floating_point():
        raise SettingError(f"values must be float, found {values.dtype}; convert them first")
    flat = values.detach().cpu().reshape(-1)
    if precision in _RAW:
        dtype, view, stored = _RAW[precision]
        _check_range(flat, precision, dtype)
        raw = flat.to(dtype).view(view).numpy().astype(stored)
        return Coded(precision, (), raw.tobytes())
    x = flat.to(torch.float32).numpy()
    if not np.isfinite(x).all():
        raise SettingError(
            f"{precision} needs finite values, found NaN or infinity among {x.size}; "
            "use fp32, or look for the step at which training diverged"
        )
    if precision == "sign":
        scale = np.float32(np.abs(x).mean(dtype=np.float64)) if x.size else np.float32(0)
        return Coded("sign", (float(scale),), packed(x > 0))
    scale = np.minimum(np.abs(x).max(initial=0) / np.float32(127), _LARGEST_SCALE["int8"])
    # A scale that underflows to 0 stands for magnitudes below 1e-43.
    steps = np.rint(x / scale).clip(-127, 127) if scale else np.zeros_like(x)
    return Coded("int8", (float(scale),), steps.astype(np.int8).tobytes())


def decode_values(coded: Coded, count: int) -> torch.Tensor:
    """The float32 values (count,), as rounded by `encode_values`.

    Raises DamagedDelta if `coded` is not exactly `count` values.
    """
    check(coded, count, PRECISIONS)
    if coded.coding in _RAW:
        dtype, _, stored = _RAW[coded.coding]
        check_length(coded, count * np.dtype(stored).itemsize)
        if coded.params:
            raise damaged(coded, f"{len(coded.params)} params", "none")
        raw = np.frombuffer(coded.payload, stored)
        return torch.from_numpy(raw.astype(stored.lstrip("<"))).view(dtype).to(torch.float32)
    scale = _scale(coded)
    if coded.coding == "sign":
        return torch.from_numpy(np.where(unpacked(coded, coded.payload, count), scale, -scale))
    check_length(coded, count)
    steps = np.frombuffer(coded.payload, np.int8)
    if count and steps.min() == -128:
        raise damaged(coded, "the step -128", "steps in -127..127")
    return torch.from_numpy(steps * scale)


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


def _scale(coded: Coded) -> np.float32:
    top = float(_LARGEST_SCALE[coded.coding])
    if len(coded.params) != 1:
        raise damaged(coded, f"{len(coded.params)} params", "one scale")
    scale = coded.params[0]
    if type(scale) not in (int, float) or not 0 <= scale <= top or np.float32(scale) != scale:
        raise damaged(coded, "a scale that is none", f"a float32 in 0..{top:g}")
    return np.float32(scale)
