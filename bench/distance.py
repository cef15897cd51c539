"""Peak memory of `howfine.distance` on two checkpoints far larger than it may hold (Linux).

    python bench/distance.py [--gigabytes 2]

Writes a pair of float32 checkpoints into a temporary folder, measures them in a fresh process and
prints one line of JSON. The exit status is 1 when the peak is over the limit, three times the
largest tensor plus 300 MB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HIDDEN = 1024
VOCABULARY = 62_500  # a word embedding of 256 MB
LINEARS = {
    "attention.self.query": (HIDDEN, HIDDEN),
    "attention.self.key": (HIDDEN, HIDDEN),
    "attention.self.value": (HIDDEN, HIDDEN),
    "attention.output.dense": (HIDDEN, HIDDEN),
    "intermediate.dense": (4 * HIDDEN, HIDDEN),
    "output.dense": (HIDDEN, 4 * HIDDEN),
}
CHUNK = 4_000_000  # entries written at a time
SLACK = 300_000_000  # bytes the limit allows on top of three times the largest tensor


def shapes(size: int) -> dict[str, tuple[int, int]]:
    """The matrices of a BERT with as many layers as bring the file to `size` bytes."""
    found = {"embeddings.word_embeddings.weight": (VOCABULARY, HIDDEN)}
    layer = 0
    while 4 * sum(a * b for a, b in found.values()) < size:
        found |= {f"encoder.layer.{layer}.{path}.weight": s for path, s in LINEARS.items()}
        layer += 1
    return found


def write(path: Path, matrices: dict[str, tuple[int, int]], step: float) -> None:
    """A safetensors file of N(0, 0.02) plus `step` times another N(0, 1), chunk by chunk."""
    header, end = {}, 0
    for name, (rows, columns) in matrices.items():
        begin, end = end, end + 4 * rows * columns
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    base, noise = np.random.default_rng(0), np.random.default_rng(1)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in range(end // 4, 0, -CHUNK):
            entries = min(CHUNK, left)
            chunk = base.standard_normal(entries, dtype=np.float32) * np.float32(0.02)
            if step:
                chunk += noise.standard_normal(entries, dtype=np.float32) * np.float32(step)
            file.write(chunk.data)


def measured(before: str, after: str) -> None:
    """The fresh process: measures, then prints its own peak, time and a few of its figures."""
    from howfine.architectures import anatomy_of
    from howfine.checkpoint import Checkpoint
    from howfine.distance import distance, summary

    start = time.perf_counter()
    place = anatomy_of(SimpleNamespace(model_type="bert")).place
    found = summary(distance(Checkpoint.open(before), Checkpoint.open(after), place=place))
    seconds = time.perf_counter() - start
    # VmHWM is this program's own peak; getrusage would count what its parent held before exec.
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    figures = {"peak_rss_bytes": 1024 * int(peak.split()[1]), "seconds": round(seconds, 1)}
    figures |= {"matrices": found.matrices, "relative": round(found.largest.relative, 5)}
    print(json.dumps(figures))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of each checkpoint")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measured(*options.measure)
        return 0
    matrices = shapes(int(options.gigabytes * 1e9))
    size = 4 * sum(a * b for a, b in matrices.values())
    largest = 4 * max(a * b for a, b in matrices.values())
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if free < 2.2 * size:
            sys.exit(f"{folder} has {free / 1e9:.1f} GB free, expected {2.2 * size / 1e9:.1f} GB")
        pair = [str(Path(folder) / f"{side}.safetensors") for side in ("before", "after")]
        for path, step in zip(pair, (0.0, 1e-4), strict=True):
            write(Path(path), matrices, step)
        command = [sys.executable, __file__, "--measure", *pair]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    limit, figures = 3 * largest + SLACK, json.loads(done.stdout)
    sizes = {"bytes_per_checkpoint": size, "largest_tensor_bytes": largest, "limit_bytes": limit}
    print(json.dumps({"bench": "distance-memory", **sizes, **figures}))
    return int(figures["peak_rss_bytes"] > limit)


if __name__ == "__main__":
    sys.exit(main())
