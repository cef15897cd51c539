"""Latency: how long a changed model takes for a batch, without the units that are off.

See `howfine.timing` for what is measured. A table of the sizes of a delta of all sizes is measured
once and kept in the user's cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from howfine import plugins, timing, units
from howfine.base import Base
from howfine.cuts import smaller
from howfine.delta import Delta
from howfine.errors import SettingError
from howfine.timing import ROWS, SIZES, TOKENS, Timed


def of_delta(delta: Delta, base: Base, rows: int = ROWS, tokens: int = TOKENS) -> Timed:
    """The latency of a base with a delta on, cut where that can be."""
    timing.check_shape(base, rows, tokens)
    with delta.changed(base):
        return timing.of_model(base, smaller(base, or_same=True), rows, tokens)


def of_base(base: Base, rows: int = ROWS, tokens: int = TOKENS) -> Timed:
    """The latency of a base as it is."""
    return timing.of_model(base, base.tower, rows, tokens)


def of_sizes(
    delta: Delta,
    base: Base,
    rows: int = ROWS,
    tokens: int = TOKENS,
    sizes: Sequence[float] = SIZES,
    *,
    cache: str | Path | None = None,
) -> list[Timed]:
    """The latency at each of the sizes that a delta of all sizes has, the largest first.

    Kept under `cache` (by default the user's) for this machine and number of threads. Raises
    SettingError for a delta of one size, and for inputs that the base can't take.
    """
    timing.check_shape(base, rows, tokens)

    def measured() -> list[Timed]:
        found: list[Timed] = []
        for keep in sorted(sizes, reverse=True):
            try:
                timed = of_delta(delta.resized(keep), base, rows, tokens)
            except SettingError:
                if not found:  # no size at all, not one that is too small
                    raise
                break
            found.append(replace(timed, keep=keep))
        return found

    return timing.table(base, _told(delta, rows, tokens, sizes), measured, cache)


def largest(
    delta: Delta,
    base: Base,
    milliseconds: float,
    rows: int = ROWS,
    tokens: int = TOKENS,
    *,
    cache: str | Path | None = None,
) -> Timed:
    """The largest of the sizes that is as fast. Raises SettingError, with the nearest, for none."""
    if not 0 < milliseconds < math.inf:
        raise SettingError(f"a latency of {milliseconds:g} ms: expected a number above 0")
    table = of_sizes(delta, base, rows, tokens, cache=cache)
    fits = [row for row in table if row.milliseconds <= milliseconds]
    if not fits:
        nearest = min(table, key=lambda row: row.milliseconds)
        raise SettingError(
            f"no size of this delta takes {milliseconds:g} ms for {rows} x {tokens} tokens here: "
            f"the fastest, with {nearest.keep:g} of the units, takes "
            f"{timing.askable(nearest.milliseconds):g} ms; ask for that, for shorter inputs, or "
            "prune a smaller base"
        )
    return fits[0]


def _told(delta: Delta, rows: int, tokens: int, sizes: Sequence[float]) -> list[object]:
    """What a table hangs on, beside base and machine: the sizes there are, and each one's units."""
    ranked = [
        [stream.name, stream.coded.payload.hex()]
        for stream in delta.streams
        if stream.name.startswith(f"method/{units.KEPT}")
    ]
    fields = plugins.settings_of(delta.method)
    own = {name: value for name, value in fields.items() if name != "keep"}
    return [ranked, own, rows, tokens, list(sizes)]
