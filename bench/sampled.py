"""Which way to k entries of a matrix product is the quickest, by shape and share of entries.

    python bench/sampled.py [--threads 2] [--tokens 1024]

Prints a JSON line a case with the medians of each way in ms; `howfine.sampled` has its limits from
it. Run it on another machine to see whether they hold there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from howfine import sampled

SHAPES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768))
SHARES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2)
ROUNDS = 15
# The limits that make `Sampling.product` go each way.
WAYS = {
    "pairs": {"FEW": float("inf")},
    "sampled": {"FEW": 0.0, "WHOLE": 1.0},
    "whole": {"FEW": 0.0, "WHOLE": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for rows, columns in SHAPES:
        for share in SHARES:
            print(json.dumps(measured(rows, columns, share, options.tokens)), flush=True)


def measured(rows: int, columns: int, share: float, tokens: int) -> dict[str, object]:
    """One case: medians over rounds in which the ways stand in an order of their own."""
    index = torch.randperm(rows * columns)[: max(1, round(share * rows * columns))].sort().values
    sampling = sampled.Sampling((rows, columns), index // columns, index % columns)
    left, right = torch.randn(tokens, rows), torch.randn(tokens, columns)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    order = list(WAYS)
    for _ in range(ROUNDS):
        random.shuffle(order)
        for way in order:
            with mock.patch.multiple(sampled, **WAYS[way]):
                found[way].append(seconds(lambda: sampling.product(left, right)))
    few = sampling.few
    chosen = "pairs" if few else "whole" if share > sampled.WHOLE else "sampled"
    medians = {way: round(1000 * statistics.median(values), 3) for way, values in found.items()}
    return {"shape": (rows, columns), "share": share, "k": len(index), **medians, "chosen": chosen}


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
