"""How the magnitudes of a difference are spread, and which of them to keep, how finely.

An entry-wise quantiser with a dead zone: magnitudes below a threshold T are left out, the others
become round(x / Δ) steps. With one T and one Δ for all tensors, every bit buys the same error
wherever it is spent: that is reverse water-filling over tensors (Cover & Thomas 2006, section
10.3.3) with uniform thresholds, near-optimal for any smooth law (Sullivan 1996).

The squared error and the bits of any such quantiser follow from counts of magnitudes on a log grid.
Bits: log2 C(n, k) for the places, the empirical entropy of the steps and a sign for each value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from howfine.codec import combinatorial_bits

Array = npt.NDArray[Any]

_DROPPED = 16  # of a float32's bits: what is left says its octave and 128 places in it
_BINS = 1 << 15
_FINITE = 255 << 7  # from this bin on: infinity and NaN
LAST_STEP = 127
# T / Δ. Rounding alone has 1/2; the more bits a place takes, the more a value must be worth.
_RATIOS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0)
# Bits a value of precisions that are no steps. Halves have entropy-coded exponents.
_VALUE_BITS = {"fp32": 32.0, "fp16": 13.5, "sign": 1.0}
_RAW = ((2, 1), (3, 3), (4, 7), (6, 31), (8, 127))  # bits of a raw step, and the last one


class Spread:
    """Counts of magnitudes (after weighting) of all entries, 128 bins an octave."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, np.int64)

    def add(self, magnitudes: Array) -> bool:
        """Count float32 magnitudes (n,); False where one is NaN or infinite."""
        bins = magnitudes.view(np.uint32) >> _DROPPED
        found = np.bincount(bins, minlength=_BINS)
        self.counts += found
        return not found[_FINITE:].any()

    @property
    def total(self) -> int:
        """Entries counted, zeros too."""
        return int(self.counts.sum())

    @property
    def changed(self) -> int:
        """Entries that are not zero (magnitudes below 1e-40 count as zero)."""
        return int(self.counts[1:].sum())


@dataclass(frozen=True)
class Quantiser:
    """What is kept and how it is rounded, and the figures that this is estimated to have."""

    precision: str  # "steps", "sign", "fp16" or "fp32"
    threshold: float  # smallest magnitude kept
    whole: float  # from this magnitude on all are kept, below it `share` of them: see `part_of`
    share: float
    step: float  # Δ; 0 unless the precision is "steps"
    scale: float  # what a step, or a sign, stands for: of least squared error
    kept: int
    bits: float
    error: float  # squared, weighted


class Search:
    """Quantisers of one Spread."""

    def __init__(self, spread: Spread) -> None:
        used = np.flatnonzero(spread.counts[:_FINITE])
        self._bins = used[used > 0]
        self.total = spread.total
        self._counts = spread.counts[self._bins].astype(np.float64)
        low, high = _edge(self._bins), _edge(self._bins + 1)
        self._low, self._high, self._x = low, high, (low + high) / 2
        # Running from the top: what is kept by a threshold at each bin's lower edge.
        self._kept = np.cumsum(spread.counts[self._bins][::-1])[::-1]
        power = self._counts * self._x**2
        self.energy = float(power.sum())
        self._left = np.cumsum(power) - power  # squared error of what is below each bin

    def _at(
        self, place: int, precision: str, ratio: float = 1.0, part: int | None = None
    ) -> Quantiser:
        """The quantiser whose threshold is the lower edge of the bin at `place`.

        It keeps `part` of that bin's entries, all by default.
        """
        x, counts = self._x[place:], self._counts[place:]
        kept = int(self._kept[place]) if place < len(self._x) else 0
        threshold = float(self._low[place]) if place < len(self._x) else float("inf")
        error = float(self._left[place]) if place < len(self._x) else self.energy
        edge = (threshold, 1.0)
        if part is not None:
            without = int(counts[0]) - part
            edge = (float(self._high[place]), part / counts[0])
            counts = np.concatenate([[part], counts[1:]])
            kept, error = kept - without, error + without * float(x[0]) ** 2
        bits = combinatorial_bits(self.total, kept)
        if precision in ("fp16", "fp32"):
            bits += _VALUE_BITS[precision] * kept
            if precision == "fp16":
                error += float(counts @ np.maximum(x * 2.0**-11, 2.0**-24) ** 2) / 12
            return Quantiser(precision, threshold, *edge, 0, 1, kept, bits, error)
        step = threshold / ratio
        levels = np.ones(len(x))
        if precision == "steps":
            np.clip(np.rint(x / step), 1, LAST_STEP, out=levels)
        squares = float(counts @ levels**2)
        scale = float(counts @ (levels * x)) / squares if squares else 0.0
        error += float(counts @ (x - scale * levels) ** 2)
        bits += _step_bits(np.bincount(levels.astype(np.int64), counts)) if kept else 0
        step = step if precision == "steps" else 0
        return Quantiser(precision, threshold, *edge, step, scale, kept, bits, error)

    def within(self, bits: float, precision: str) -> Quantiser:
        """Of least error among those of at most so many bits.

        "steps" goes over to halves and to float32 where so many bits are there that more steps
        would gain nothing.
        """
        if precision == "sign":
            return self._signs(bits)
        if precision != "steps":
            return self._lowest(bits, precision)
        found = [self._best(bits, ratio) for ratio in _RATIOS]
        found += [self._lowest(bits, other) for other in ("fp16", "fp32")]
        return min(found, key=lambda one: (one.error, one.bits))

    def of_density(self, density: float, precision: str) -> Quantiser:
        """The one that keeps the largest magnitudes, at most this share of all entries."""
        most = int(density * self.total)
        place = int(np.searchsorted(-self._kept, -most))
        if precision != "steps":
            return self._at(place, precision)
        # A value is kept where the squared error it saves, about T² - (T - Δ)², is worth its bits
        # at the slope of a uniform quantiser, Δ² ln 2 / 6 a bit.
        share = max(density, 1 / max(self.total, 1))
        value_bits = np.log2(max((1 - share) / share, 1e-3)) + 2.5
        ratio = float(np.clip(0.5 + np.log(2) / 12 * value_bits, 0.5, 2))
        return self._at(place, precision, ratio)

    @property
    def alike(self) -> int:
        """Entries that moved most, alike as far as the counts tell: the fewest by density."""
        return int(self._kept[-1])

    def one(self, precision: str) -> Quantiser:
        """The one that keeps least: an entry or two of those that moved most."""
        return self._at(len(self._x) - 1, precision, part=1)

    def near(self, share: float) -> float:
        """Bits at which steps leave at most this share of the squared magnitudes as error."""
        bits = 1024.0
        while bits < 16 * self.total + 1e6:
            if self.within(bits, "steps").error <= share * self.energy:
                break
            bits *= 1.5
        return bits

    def _first(self, bits: float, precision: str, ratio: float) -> int:
        """The lowest bin from which on everything fits into `bits`: bits fall with the threshold.

        Above half of all entries places get cheaper again, values don't.
        """
        low, high = 0, len(self._x)
        while low < high:
            middle = (low + high) // 2
            if self._at(middle, precision, ratio).bits <= bits:
                high = middle
            else:
                low = middle + 1
        return low

    def _lowest(self, bits: float, precision: str) -> Quantiser:
        first = self._first(bits, precision, 1.0)
        return self._or_part(self._at(first, precision), first, bits)

    def _or_part(self, whole: Quantiser, first: int, bits: float, ratio: float = 1.0) -> Quantiser:
        """`whole`, or less error with as much of the bin below `first` as fits.

        Entries that moved alike are all in one bin, and it may be most of them.
        """
        if not first:
            return whole
        low, high = 0, int(self._counts[first - 1])
        while high - low > 1:
            part = (low + high) // 2
            if self._at(first - 1, whole.precision, ratio, part).bits <= bits:
                low = part
            else:
                high = part
        if not low:
            return whole
        more = self._at(first - 1, whole.precision, ratio, low)
        return min(whole, more, key=lambda one: one.error)

    def _signs(self, bits: float) -> Quantiser:
        """With one magnitude for all, more entries err more once they are much smaller than it.

        The error of the best scale is the energy less (Σ |x|)² / k, of the k entries kept.
        """
        first = self._first(bits, "sign", 1.0)
        saved = np.cumsum((self._counts * self._x)[::-1])[::-1] ** 2 / self._kept
        best = first + int(np.argmax(saved[first:])) if first < len(saved) else first
        return self._or_part(self._at(best, "sign"), first, bits)

    def _best(self, bits: float, ratio: float) -> Quantiser:
        """Where 127 steps can't reach the largest magnitudes, a larger step may err less."""
        first = self._first(bits, "steps", ratio)
        places = {min(first + more, len(self._x)) for more in _octaves(len(self._x) - first)}
        best = min((self._at(p, "steps", ratio) for p in places), key=lambda q: q.error)
        return self._or_part(best, first, bits, ratio)


def _step_bits(counts: Array) -> float:
    """Bits of steps with their signs, by how many there are of each magnitude 0, 1, 2, …

    Entropy coded, with a law, or each in as many bits as the largest takes.
    """
    seen, kept = counts[counts > 0], float(counts.sum())
    raw = kept if len(counts) == 2 else kept * next(b for b, top in _RAW if top >= len(counts) - 1)
    law = 8 * (4 + min(len(seen), 20))
    return min(raw, kept + float(seen @ np.log2(kept / seen)) + law)


def part_of(first: int, count: int, share: float) -> Array:
    """Which of the entries number `first` and on, in order of position, are that share: (count,).

    By the golden ratio: as even as can be over any stretch, and in step with no rows or columns.
    """
    turns = np.arange(first, first + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return turns < np.uint64(share * 2.0**64)


def _octaves(room: int) -> Iterable[int]:
    return (0, *range(64, min(room, 2048), 64))


def _edge(bins: Array) -> Array:
    """Lower edges of bins as float64."""
    return (bins.astype(np.uint32) << _DROPPED).view(np.float32).astype(np.float64)
