"""Size and speed of the coding of places, on uniformly random masks.

    python bench/codec.py [--out FILE.jsonl]

Prints one line of JSON a row, then the same as Markdown. `bits` are those of the payload and of
8 bytes a param; `bound` is log2 C(n, k); `ratio` is the worst of the seeds and their bits over
bound. Times are medians of interleaved repeats on one thread. The exit status is 1 when a size is
over 1.01 of its bound, or encoding plus decoding 10 M entries at 5 % takes half a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from howfine.codec import combinatorial_bits, decode_places, encode_places

COUNTS = (4_000_000, 10_000_000)
DENSITIES = (0.5, 0.2, 0.05, 0.01, 0.001, 0.0001)
SEEDS = range(3)
REPEATS = 5
MOST_RATIO, MOST_SECONDS = 1.01, 0.5

Row = dict[str, Any]


def random_mask(count: int, density: float, seed: int) -> torch.Tensor:
    """A uniformly random set of count · density places."""
    mask = torch.zeros(count, dtype=torch.bool)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    mask[order[: round(count * density)]] = True
    return mask


def size(count: int, density: float) -> Row:
    rows = []
    for seed in SEEDS:
        coded = encode_places(random_mask(count, density, seed))
        bits = 8 * len(coded.payload) + 64 * len(coded.params)
        bound = combinatorial_bits(count, round(count * density))
        figures = {"bits": bits, "bound": round(bound, 1), "ratio": round(bits / bound, 5)}
        rows.append({"bench": "codec", "n": count, "density": density, "coding": coded.coding})
        rows[-1] |= figures
    return max(rows, key=lambda row: row["ratio"])


def times() -> list[Row]:
    """One row a count and density; every repeat goes through all of them."""
    masks = {(n, d): random_mask(n, d, 0) for n in COUNTS for d in DENSITIES}
    spent: dict[tuple[int, float], list[tuple[float, float]]] = {key: [] for key in masks}
    for _ in range(REPEATS):
        for key, mask in masks.items():
            start = time.perf_counter()
            coded = encode_places(mask)
            middle = time.perf_counter()
            found = decode_places(coded, mask.numel())
            spent[key].append((middle - start, time.perf_counter() - middle))
            if not torch.equal(found, mask):
                raise AssertionError(f"{key} came back changed")
    rows = []
    for (count, density), pairs in spent.items():
        encode, decode = (round(statistics.median(side), 4) for side in zip(*pairs, strict=True))
        row = {"bench": "codec-time", "n": count, "density": density}
        rows.append(row | {"encode_s": encode, "decode_s": decode})
    return rows


def table(rows: list[Row]) -> str:
    names = [name for name in rows[0] if name != "bench"]
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the lines of JSON there too")
    out: Path | None = parser.parse_args().out
    torch.set_num_threads(1)
    sizes = [size(count, density) for count in COUNTS for density in DENSITIES]
    seconds = times()
    text = "".join(json.dumps(row) + "\n" for row in sizes + seconds)
    print(text)
    print(table(sizes), table(seconds), sep="\n\n")
    if out:
        out.write_text(text)
    slow = [
        row
        for row in seconds
        if (row["n"], row["density"]) == (10_000_000, 0.05)
        and row["encode_s"] + row["decode_s"] >= MOST_SECONDS
    ]
    return int(bool(slow) or any(row["ratio"] > MOST_RATIO for row in sizes))


if __name__ == "__main__":
    sys.exit(main())
