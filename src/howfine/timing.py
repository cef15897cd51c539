"""Timing: how long a model takes for a batch, here; and tables of that, measured once.

It is that of the tower alone, without tokenizer and head, in this process and with its number of
threads. Tables are kept in the user's cache.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from howfine import fingerprint
from howfine.base import IMAGE, Base
from howfine.container import write_atomically
from howfine.cuts import trial
from howfine.errors import SettingError, StorageError

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


def check_shape(base: Base, rows: int, tokens: int) -> None:
    """Refuse a batch that the base can't take."""
    if rows < 1 or tokens < 1:
        raise SettingError(f"latency of {rows} x {tokens} tokens: expected 1 or more of both")
    if base.tower_name != IMAGE and tokens > base.room:
        raise SettingError(
            f"latency of {tokens} tokens: {base.name} takes {base.room} at most; ask for fewer"
        )


def askable(milliseconds: float) -> float:
    """A time in hundredths, as it is said to be asked for: never below what was measured."""
    return math.ceil(100 * milliseconds) / 100


def of_model(base: Base, model: Any, rows: int, tokens: int) -> Timed:
    """A model of the base's tower, and the base, in turn."""
    check_shape(base, rows, tokens)
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


def table(
    base: Base, told: Any, measure: Callable[[], list[Timed]], cache: str | Path | None = None
) -> list[Timed]:
    """What `measure` gives, kept under `cache` (by default the user's) for the same again.

    That is whatever JSON `told` says, on this base, machine and number of threads.
    """
    own = [base.fingerprint, str(base.dtype), told, machine(base)]
    path = Path(cache or fingerprint.cache_folder() / "latency")
    path /= f"{fingerprint.of_text(json.dumps(own))[:32]}.json"
    if known := _known(path):
        return known
    found = measure()
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
