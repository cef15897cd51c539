"""Cost: parameters, bytes and memory of a change."""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from howfine import container
from howfine.codec import VALUES, combinatorial_bits
from howfine.delta import Delta
from howfine.errors import DamagedDelta
from howfine.streams import MOST_PLACES


class PeakMemory:
    """Highest memory of this process since construction, as growth over what it held then.

    On an accelerator, the allocator's own count. On Linux the kernel's high-water mark, reset at
    construction; elsewhere the lifetime peak, which an earlier and larger run may hide.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        _give_back_memory()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_high_water()
        self.start = self._now()

    def _now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _status("VmRSS:") or _lifetime_peak()

    def growth(self) -> int:
        """Bytes above the start, at the highest."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _status("VmHWM:") or _lifetime_peak()
        return max(0, peak - self.start)


def _give_back_memory() -> None:
    """Free what earlier runs left, so that the start does not hide this run's growth."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim is not None:
            trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reset_high_water() -> None:
    path = Path("/proc/self/clear_refs")
    try:
        path.write_text("5")
    except OSError:  # not Linux, or a sandbox: the lifetime peak then stands in, as documented
        return


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status; 0 where there is none."""
    path = Path("/proc/self/status")
    if not path.exists():
        return 0
    for line in path.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def _lifetime_peak() -> int:
    try:
        import resource
    except ImportError:  # Windows, whose own count of it psutil reads
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Part:
    """Some bytes of a delta file and what they are."""

    name: str
    coding: str
    entries: int
    kept: int | None  # places set, for a set of places
    bytes: int
    bound_bytes: float | None  # log2 C(n, k) / 8, for a set of places


def parts(path: str | Path) -> list[Part]:
    """Every byte of a delta file, accounted for: the parts' bytes add up to the file's.

    Raises DamagedDelta for a file that declares more places than any model has parameters.
    """
    path = Path(path)
    delta = Delta.load(path)
    declared = sum(stream.count for stream in delta.streams if stream.coded.coding not in VALUES)
    if declared > MOST_PLACES:
        raise DamagedDelta(
            f"{path} declares {declared:,} places in {len(delta.streams):,} streams, more than any "
            f"model has parameters ({MOST_PLACES:,}); it is damaged: get a fresh copy"
        )
    codings = {"header": "json", "index": "deflate"}
    found = [
        Part(name, codings.get(name, "raw"), 0, None, size, None)
        for name, size in container.overhead(path).items()
    ]
    for stream in delta.streams:
        kept = stream.kept()
        bound = None if kept is None else combinatorial_bits(stream.count, kept) / 8
        size = len(stream.coded.payload)
        found.append(Part(stream.name, stream.coded.coding, stream.count, kept, size, bound))
        if stream.values is not None:
            size = len(stream.values.payload)
            name = f"{stream.name}, values"
            found.append(Part(name, stream.values.coding, kept or 0, None, size, None))
    return found
