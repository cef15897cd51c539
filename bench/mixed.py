"""A batch whose rows wear different changes, against one whose rows all wear the same.

    python bench/mixed.py [--rounds 13] [--threads 2]

MiniLM, 16 rows of 64 tokens, inference, each change with a head of its own. "One" is the delta put
on alone, as `howfine.evaluate` does; "16" is `howfine.combine`. Both in every round, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from howfine.base import Base
from howfine.batch import Batch
from howfine.combine import Combined, combine
from howfine.delta import Delta
from howfine.method import Method, method
from howfine.readout import Wired, readout

ROWS, TOKENS, STEPS = 16, 64, 5
LIMIT = 1.15
LABELS = ("no", "yes")
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "adapter, reduction 16": ("adapter", {}),
    "adapter and LayerNorms": ("adapter", {"beside": ("norm",)}),
    "prefix, 10 positions": ("prefix", {"length": 10, "hidden": 0}),
    "prompt, 10 vectors": ("prompt", {"length": 10}),
    "head alone": ("select", {"train": ("none",)}),
}


def made(base: Base, chosen: Method, seed: int) -> Delta:
    """A change drawn at random, away from where it would begin."""
    torch.manual_seed(seed)
    read = readout("classifier")
    with chosen.attach(base) as change:
        for value in change.trainable.values():
            value.data += 0.02 * torch.randn_like(value)
        head = read.attach(base, LABELS)
        return Delta.pack(base, chosen, change, read, head, LABELS)


def batch(rows: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 30_000, (rows, TOKENS), generator=generator)
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        run()
    return (time.perf_counter() - start) / STEPS


def measure(base: Base, chosen: Method, rounds: int) -> dict[str, object]:
    """Seconds with no change, with one and with as many as rows, alternating."""
    deltas = [made(base, chosen, seed) for seed in range(ROWS)]
    whole, single = batch(ROWS, 0), [batch(1, seed) for seed in range(ROWS)]
    bare: list[float] = []
    one: list[float] = []
    many: list[float] = []
    plain = made(base, method("select", train=("none",)), 0)
    for number in range(rounds + 1):
        with plain.applied(base) as wired:
            nothing = timed(lambda wired=wired: forward(wired, whole))
        with deltas[0].applied(base) as wired:
            first = timed(lambda wired=wired: forward(wired, whole))
        with combine({str(n): delta for n, delta in enumerate(deltas)}, base) as tasks:
            asked = {str(n): row for n, row in enumerate(single)}
            second = timed(lambda tasks=tasks, asked=asked: mixed(tasks, asked))
        if number:  # the first round warms up
            bare.append(nothing)
            one.append(first)
            many.append(second)
    ratios = [b / a for a, b in zip(one, many, strict=True)]
    to_base = [b / a for a, b in zip(bare, many, strict=True)]
    return {
        "base_ms": round(1000 * statistics.median(bare), 1),
        "to_base": round(statistics.median(to_base), 3),
        "one_ms": round(1000 * statistics.median(one), 1),
        "many_ms": round(1000 * statistics.median(many), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
    }


@torch.inference_mode()
def forward(wired: Wired, rows: Batch) -> torch.Tensor:
    return wired(**rows.as_kwargs())["logits"]


@torch.inference_mode()
def mixed(tasks: Combined, asked: dict[str, Batch]) -> dict[str, torch.Tensor]:
    return tasks.run(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=13)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = Base.load()
    for kind, (name, settings) in KINDS.items():
        found = measure(base, method(name, **settings), options.rounds)
        more = {"limit": LIMIT, "rounds": options.rounds, "threads": options.threads}
        print(json.dumps({"bench": "mixed", "kind": kind, **found, **more}), flush=True)


if __name__ == "__main__":
    main()
