"""Budgets: how much of a model stays, as a share of its units, parameters, operations, or in time.

A budget becomes a share of the heads and of the neurons, the largest within it. Heads and neurons
alone go: what else a model has counts in its parameters and in its time, not in its operations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from howfine import cuts, macs, processes, surgery, timing, units
from howfine.base import Base, TwoTowers
from howfine.errors import SettingError
from howfine.method import as_parameter

Of = Literal["units", "encoder", "parameters", "macs", "ms"]
# Of a share, this much apart is the same: far less than one unit is.
_APART = 1e-7
_SAID = re.compile(
    r"([0-9.]+(?:e[+-]?\d+)?)\s*(?:(units|encoder|parameters|macs|ms)(?:@(?:(\d+)x)?(\d+))?)?"
)
EXPECTED = (
    "a share above 0 and at most 1, of the units (0.5) or of what is named ('0.5 encoder', "
    "'0.5 parameters', '0.5 macs@128' for inputs of 128 tokens), or a time ('5 ms@1x64' for 1 "
    "input of 64 tokens)"
)


@dataclass(frozen=True)
class Budget:
    """How much stays: a share above 0, at most 1, or milliseconds.

    A share of the heads, and of the neurons (units); of the parameters of the blocks' matrices with
    their biases (encoder), or of all that the model has (parameters); of the multiply-adds of heads
    and neurons (macs). A time is that of the model without the others, on this machine.
    """

    amount: float
    of: Of = "units"
    # Inputs at a time, and tokens of an input, whose operations or time is meant.
    rows: int = timing.ROWS
    tokens: int = timing.TOKENS

    @classmethod
    def parse(cls, said: float | str) -> Budget:
        """A number, or one with what it is of: see `EXPECTED`. Raises SettingError."""
        match = _SAID.fullmatch(str(said).strip())
        if match is None:
            raise SettingError(f"keep {said!r}: expected {EXPECTED}")
        amount, of, rows, tokens = match.groups()
        try:
            shape = (int(rows or timing.ROWS), int(tokens or timing.TOKENS))
            made = cls(float(amount), cast(Of, of or "units"), *shape)
        except ValueError:  # two points
            raise SettingError(f"keep {said!r}: expected {EXPECTED}") from None
        fits = 0 < made.amount <= (math.inf if of == "ms" else 1) and made.amount < math.inf
        shaped = tokens is None or (of == "ms" or (of == "macs" and rows is None))
        if not fits or not shaped or made.rows < 1 or made.tokens < 1:
            raise SettingError(f"keep {said!r}: expected {EXPECTED}")
        return made

    def __str__(self) -> str:
        shape = {"macs": f"@{self.tokens}", "ms": f"@{self.rows}x{self.tokens}"}.get(self.of, "")
        return f"{self.amount!r}" + (f" {self.of}{shape}" if self.of != "units" else "")

    def share(
        self,
        base: Base,
        counted: Mapping[str, int],
        kept: Callable[[float], Mapping[str, Tensor]],
        *,
        cache: str | Path | None = None,
    ) -> float:
        """The largest share of the units, of `counted` ones by path, that is within this budget.

        `kept` (units,) tells which of them stay on at a share. Raises SettingError, with the
        nearest budget, where not even one unit of each layer is within it.
        """
        if self.of == "units":
            return self.amount
        least = self._least(base, counted)
        if self.of == "ms":
            return self._as_fast(base, counted, least, cache)
        whole, own = self._costs(base, counted)

        def spent(share: float) -> float:
            off = ((path, int((~on).sum())) for path, on in kept(share).items())
            return (whole - sum(own[path] * count for path, count in off)) / whole

        if spent(1.0) <= self.amount:
            return 1.0
        low, high = least, 1.0
        if spent(low) > self.amount:
            nearest = replace(self, amount=math.ceil(1e4 * spent(low)) / 1e4)
            raise SettingError(
                f"keep '{self}': the smallest share of heads and neurons alike that leaves each "
                f"layer one of both, {low:.3g}, leaves {spent(low):.4g} of the {_WORDS[self.of]}; "
                f"the nearest keep is '{nearest}'"
            )
        while high - low > _APART:
            middle = (low + high) / 2
            low, high = (middle, high) if spent(middle) <= self.amount else (low, middle)
        return low

    def prices(
        self, base: Base, counted: Mapping[str, int], *, cache: str | Path | None = None
    ) -> Prices:
        """What the units of `counted` take of this budget, by path, for a search among them.

        A time is that of the heads, and of the neurons, of every layer alike, between the sizes of
        a table for each (Kwon et al. 2022, arXiv 2204.09656, have one of each kind, too).
        """
        if self.of != "ms":
            whole, own = self._costs(base, counted)
            exact = torch.float64
            return Prices(
                whole, {p: torch.full((n,), own[p], dtype=exact) for p, n in counted.items()}
            )
        kinds: dict[str, dict[str, int]] = {}
        for path, count in counted.items():
            kinds.setdefault(units.kind(base, path), {})[path] = count
        tables = [
            (paths, _table(base, paths, self, self._least(base, paths), cache))
            for paths in kinds.values()
        ]
        milliseconds = sum(rows[0].milliseconds for _, rows in tables) / len(tables)
        times: dict[str, Tensor] = {}
        for paths, rows in tables:
            times |= _times(paths, rows, milliseconds)
        return Prices(milliseconds, {path: times[path] for path in counted})

    def room(self, prices: Prices, *, milder: bool = False) -> float:
        """What the units may take together; with `milder`, under the square root of this budget.

        Raises SettingError, with the nearest budget, where it is less than one unit of each layer
        takes.
        """
        share = self.amount / prices.whole if self.of == "ms" else self.amount
        if share >= 1:
            return math.inf
        own = sum(float(cost.sum()) for cost in prices.costs.values())
        other = prices.whole - own
        least = sum(float(cost[0]) for cost in prices.costs.values())
        found = (math.sqrt(share) if milder else share) * prices.whole - other
        if found < least - _APART * prices.whole:
            nearest = (other + least) / (1 if self.of == "ms" else prices.whole)
            nearest = math.ceil(1e4 * nearest - _APART) / 1e4
            said = "ms" if self.of == "ms" else f"of the {_WORDS[self.of]}"
            raise SettingError(
                f"keep '{self}': all but heads and neurons, and one of both of each layer, take "
                f"{nearest:.4g} {said}; the nearest keep is '{replace(self, amount=nearest)}'"
            )
        return found

    def _least(self, base: Base, counted: Mapping[str, int]) -> float:
        """The smallest share by which every layer has a unit of each kind."""
        kinds: dict[str, list[int]] = {}
        for path, count in counted.items():
            kinds.setdefault(units.kind(base, path), []).append(count)
        return max(len(own) / sum(own) for own in kinds.values())

    def _costs(self, base: Base, counted: Mapping[str, int]) -> tuple[int, dict[str, int]]:
        """What the whole model has, and one unit of each path."""
        if self.of == "macs":
            own = {path: macs.of_unit(base, path, self.tokens) for path in counted}
            every = units.counts(base)
            total = sum(macs.of_unit(base, p, self.tokens) * n for p, n in every.items())
            return total, own
        chosen = base.paths() if self.of == "parameters" else _with_biases(base)
        total = sum(base.parameter(path).numel() for path in chosen)
        return total, units.costs(base, counted)

    def _as_fast(
        self, base: Base, counted: Mapping[str, int], least: float, cache: str | Path | None
    ) -> float:
        """Between the sizes of a table, time is taken to go straight."""
        rows = _table(base, counted, self, least, cache)
        nearest = min(rows, key=lambda row: row.milliseconds)
        if nearest.milliseconds > self.amount:
            raise SettingError(
                f"keep '{self}': the fastest this base gets here, with {_keep(nearest):.3g} of the "
                f"units, takes {timing.askable(nearest.milliseconds):g} ms; ask for that, for "
                "fewer or shorter inputs, or prune a smaller base"
            )
        for above, row in zip([None, *rows], rows, strict=False):
            if row.milliseconds > self.amount:
                continue
            if above is None:
                return _keep(row)
            part = (self.amount - row.milliseconds) / (above.milliseconds - row.milliseconds)
            return _keep(row) + part * (_keep(above) - _keep(row))
        raise AssertionError("the fastest is in the table")


@dataclass(frozen=True)
class Prices:
    """What a model takes of a budget with all units on, and what each of them does.

    The first unit that a layer has takes `costs[path][0]`, the next `costs[path][1]`, and so on.
    """

    whole: float
    costs: Mapping[str, Tensor]


_WORDS = {"encoder": "blocks' parameters", "parameters": "parameters", "macs": "multiply-adds"}


def _keep(row: timing.Timed) -> float:
    assert row.keep is not None
    return row.keep


def _with_biases(base: Base) -> list[str]:
    """The blocks' matrices and what is added to what they give."""
    matrices, known = base.choose(("matrices",)), set(base.paths())
    biases = (f"{path.rpartition('.')[0]}.bias" for path in matrices)
    return [*matrices, *(path for path in biases if path in known)]


def _table(
    base: Base,
    counted: Mapping[str, int],
    budget: Budget,
    least: float,
    cache: str | Path | None,
) -> list[timing.Timed]:
    """The latency of ten sizes, the largest first: of every layer the same share of its units."""
    if isinstance(base, TwoTowers):
        raise SettingError(
            f"keep '{budget}': {base.name} is two towers, whose time hangs on both inputs; give a "
            "share of parameters or of operations"
        )
    timing.check_shape(base, budget.rows, budget.tokens)
    sizes = [size for size in timing.SIZES if size > least] + [least]

    def measured() -> list[timing.Timed]:
        return [replace(_timed(base, counted, budget, size), keep=size) for size in sizes]

    told = ["even", dict(counted), budget.rows, budget.tokens, sizes]
    # Processes that train together have to prune the same units.
    return processes.agreed(lambda: timing.table(base, told, measured, cache), base.device)


def _times(counted: Mapping[str, int], rows: list[timing.Timed], whole: float) -> dict[str, Tensor]:
    """(units,) milliseconds that each unit of a layer adds, of units of one kind, by path.

    Each layer takes what its part of them does; the first unit, which every layer has, nothing. A
    smaller size that took longer, by chance, takes what the next larger one does.
    """
    shares = np.array([_keep(row) for row in rows])
    parts = np.array([row.milliseconds for row in rows]) / rows[0].milliseconds
    parts = np.minimum.accumulate(parts)
    found = {}
    for path, count in counted.items():
        sizes = np.arange(1, count + 1) / count
        taken = whole * count / sum(counted.values()) * np.interp(sizes, shares[::-1], parts[::-1])
        found[path] = torch.from_numpy(np.diff(taken, prepend=taken[0]))
    return found


def _timed(base: Base, counted: Mapping[str, int], budget: Budget, share: float) -> timing.Timed:
    """The latency with that share of each layer's units; which ones these are changes no time."""
    scores = {path: torch.arange(count, 0, -1) for path, count in counted.items()}
    kept = units.strongest(base, scores, share, "layer")
    with ExitStack() as undo:
        for path, value in units.cleared(base, units.named(kept)).items():
            parameter = as_parameter(value, base.parameter(path))
            undo.callback(surgery.replace(base.towers, path, parameter))
        return timing.of_model(base, cuts.smaller(base, or_same=True), budget.rows, budget.tokens)
