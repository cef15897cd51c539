"""Latency: how long a changed model takes for a batch, without the units that are off.

It is that of the tower alone, without tokenizer and head, in this process and with its number of
threads. A table of the sizes of a delta of all sizes is measured once and kept in the user's cache.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from howfine import fingerprint, plugins, units
from howfine.base import IMAGE, Base
from howfine.container import write_atomically
from howfine.delta import Delta
from howfine.errors import SettingError, StorageError
from howfine.slicing import smaller, trial

ROWS, TOKENS = 1, 64
SIZES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
# Runs that a median is taken of, after a few that warm up.
_RUNS, _WARM = 25, 3


@dataclass(frozen=True)
class Timed:
    """A model's latency in milliseconds, a median, and its parameters; at a size where asked.

    `whole` is that of the base, in the same rounds, in which both ran in turn.
    """

    milliseconds: float
    whole: float
    parameters: int
    keep: float | None = None


def of_delta(delta: Delta, base: Base, rows: int = ROWS, tokens: int = TOKENS) -> Timed:
    """The latency of a base with a delta on, cut where that can be."""
    _check_shape(base, rows, tokens)
    with delta.changed(base):
        return _timed(base, smaller(base, or_same=True), rows, tokens)


def of_base(base: Base, rows: int = ROWS, tokens: int = TOKENS) -> Timed:
    """The latency of a base as it is."""
    _check_shape(base, rows, tokens)
    return _timed(base, base.tower, rows, tokens)


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
    _check_shape(base, rows, tokens)
    path = Path(cache or fingerprint.cache_folder() / "latency")
    path /= f"{_key(delta, base, rows, tokens, sizes)}.json"
    if known := _known(path):
        return known
    found: list[Timed] = []
    for keep in sorted(sizes, reverse=True):
        try:
            timed = of_delta(delta.resized(keep), base, rows, tokens)
        except SettingError:
            if not found:  # no size at all, not one that is too small
                raise
            break
        found.append(replace(timed, keep=keep))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps([asdict(row) for row in found]).encode())
    except (OSError, StorageError):  # a folder that can't be written: measured anew each time
        return found
    return found


def _known(path: Path) -> list[Timed]:
    """A table that was measured before; empty for none, or a torn file."""
    try:
        return [Timed(**row) for row in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return []


def _check_shape(base: Base, rows: int, tokens: int) -> None:
    """Refuse a batch that the base can't take."""
    if rows < 1 or tokens < 1:
        raise SettingError(f"latency of {rows} x {tokens} tokens: expected 1 or more of both")
    if base.tower_name != IMAGE and tokens > base.room:
        raise SettingError(
            f"latency of {tokens} tokens: {base.name} takes {base.room} at most; ask for fewer"
        )


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
    table = of_sizes(delta, base, rows, tokens, cache=cache)
    fits = [row for row in table if row.milliseconds <= milliseconds]
    if not fits:
        nearest = min(table, key=lambda row: row.milliseconds)
        raise SettingError(
            f"no size of this delta takes {milliseconds:g} ms for {rows} x {tokens} tokens here: "
            f"the fastest, with {nearest.keep:g} of the units, takes {nearest.milliseconds:.2f} "
            "ms; ask for that, for shorter inputs, or prune a smaller base"
        )
    return fits[0]


def _timed(base: Base, model: Any, rows: int, tokens: int) -> Timed:
    was_training = base.tower.training
    try:
        with torch.inference_mode():
            return _in_turn(base, model, rows, tokens)
    finally:
        base.tower.train(was_training)


def _in_turn(base: Base, model: Any, rows: int, tokens: int) -> Timed:
    inputs, both = trial(base, rows, tokens), dict.fromkeys((base.tower, model.eval()))
    spent: dict[Any, list[float]] = {each.eval(): [] for each in both}
    for number in range(_WARM + _RUNS):
        for each in both:
            start = time.perf_counter()
            each(**inputs)
            if base.device.type == "cuda":
                torch.cuda.synchronize(base.device)
            if number >= _WARM:
                spent[each].append(time.perf_counter() - start)
    own, whole = (1e3 * statistics.median(spent[each]) for each in (model, base.tower))
    return Timed(own, whole, sum(p.numel() for p in model.parameters()))


def _key(delta: Delta, base: Base, rows: int, tokens: int, sizes: Sequence[float]) -> str:
    """What a table hangs on: the sizes there are, which units each has, and the machine."""
    ranked = [
        [stream.name, stream.coded.payload.hex()]
        for stream in delta.streams
        if stream.name.startswith(f"method/{units.KEPT}")
    ]
    fields = plugins.settings_of(delta.method)
    own = {name: value for name, value in fields.items() if name != "keep"}
    told = [base.fingerprint, str(base.dtype), ranked, own, rows, tokens, list(sizes)]
    told.append(machine(base))
    return fingerprint.of_text(json.dumps(told))[:32]


def machine(base: Base) -> str:
    """What a latency was measured on, in words."""
    gpu = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else ""
    kernel = getattr(base.config, "_attn_implementation", None)
    threads = torch.get_num_threads()
    device = f"{base.device} {gpu}".strip()
    return f"{cpu()}, {device}, {threads} threads, torch {torch.__version__}, {kernel}"


def cpu() -> str:
    """The processor's name as Linux tells it, or the architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
