"""The scale of quantised values: what one step is worth."""

from __future__ import annotations

import numpy as np

from howfine.codec.coded import Array

# The last step of each precision that has steps.
TOPS = {f"int{bits}": 2 ** (bits - 1) - 1 for bits in (8, 6, 4, 3, 2)}
LARGEST = np.finfo(np.float32).max
# From this last step on, the whole range is kept: what clipping saves is then below the rounding.
_WIDE = 31
# Fractions of the scale that clips nothing: 32 an octave, over 12 octaves. The error is flat about
# its minimum: half a step of 2.2 % beside it hardly costs anything. And a scale that would be 4096
# times too small for the largest value is the best one only for an outlier among millions.
_FRACTIONS = 2.0 ** (-np.arange(384) / 32)
# Of the best scale and its three leading digits, those where they cost less error than this.
_SLACK = 1.001


def scale_of(x: Array, precision: str) -> np.float32:
    """The scale of finite float32 values (count,); 0 for none."""
    if not x.size:
        return np.float32(0)
    if precision == "sign":
        return np.float32(np.abs(x).mean(dtype=np.float64))
    top = TOPS[precision]
    whole = np.minimum(np.abs(x).max() / np.float32(top), largest_scale(top))
    return whole if top >= _WIDE or not whole else _least_squares(x, whole, top)


def largest_scale(top: int) -> np.float32:
    """The largest scale whose multiple `top` is a float32 and not infinity."""
    scale = LARGEST / np.float32(top)
    with np.errstate(over="ignore"):
        fits = np.isfinite(scale * np.float32(top))
    return scale if fits else np.nextafter(scale, np.float32(0))


def _least_squares(x: Array, whole: np.float32, top: int) -> np.float32:
    """Of the fractions of the scale `whole`, the one of least squared error.

    The error is a sum over the values beyond each threshold (j - 1/2) scale between two steps. So
    one sort and its running sums give it for every scale, not a pass over the values each.
    """
    with np.errstate(under="ignore"):
        exact = np.unique((whole * _FRACTIONS).astype(np.float32))
        short = np.array([np.float32(f"{scale:.2e}") for scale in exact], np.float32)
    scales = np.concatenate([exact, np.minimum(short, largest_scale(top))])
    ordered = np.sort(np.abs(x)).astype(np.float64)
    # In units of the largest value: its square may be no float64... nor that of the smallest.
    ordered /= ordered[-1]
    units = scales.astype(np.float64) / float(np.abs(x).max())
    sums = np.append(0, np.cumsum(ordered))
    levels = np.arange(1, top + 1)
    below = np.searchsorted(ordered, units[:, None] * (levels - 0.5))
    # With q(x) the step of x: Σ q x, and Σ q², from what lies beyond the thresholds.
    products = (sums[-1] - sums[below]).sum(1)
    squares = ((len(ordered) - below) * (2 * levels - 1)).sum(1)
    errors = float(ordered @ ordered) - 2 * units * products + units**2 * squares
    best = int(errors[: len(exact)].argmin())
    near = len(exact) + best
    return scales[near if errors[near] <= _SLACK * errors[best] else best]
