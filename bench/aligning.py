"""Steps of aligning two towers with frozen blocks reused, against computing them each time.

    python bench/aligning.py [--rounds 7] [--threads 2]

A ViT of DeiT-S's shape with random weights (12 × 384, 224 pixels, 197 tokens) beside MiniLM, 16
pairs with captions of 16 tokens, fp32, AdamW; both ways take the same step in every round, in turn.
Then, each in a process of its own whose malloc keeps nothing, the memory that a batch of 512 in
chunks of 32 takes (112 pixels, all parameters training), against a batch of 32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from transformers import ViTConfig, ViTModel

from howfine.base import Base, TwoTowers
from howfine.batch import Batch
from howfine.cost import PeakMemory
from howfine.features import Reuse
from howfine.method import Method, method
from howfine.readout import Wired, readout

ROWS, TOKENS, SIZE = 16, 16, 224
BLOCK = {"deep": {}}
KINDS: dict[str, Method] = {
    "projections": method("towers"),
    "deep adapters": method("towers", image=BLOCK, text=BLOCK),
}
# Least ratio of a step that computes all to one that reuses what is frozen.
LEAST = 5.0
LARGE, SMALL = 512, 32
# At most so many times the memory of a small batch.
MEMORY = 1.5


def towers(size: int) -> TwoTowers:
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    tower = ViTModel(ViTConfig(**shape, image_size=size), add_pooling_layer=False)
    return TwoTowers(Base("vit-small-shape", tower), Base.load())


def batch(rows: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 30_000, (rows, TOKENS), generator=generator)
    inputs = {
        "pixel_values": torch.randn(rows, 3, size, size, generator=generator),
        "pictures": torch.arange(rows),
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": torch.zeros_like(tokens),
    }
    return Batch(inputs, targets=torch.arange(rows))


class Step:
    """A kind of change on towers of its own, ready for steps."""

    def __init__(self, chosen: Method, reuse: bool, size: int = SIZE, chunk: int = 0) -> None:
        base = towers(size)
        read = readout("contrastive", size=size, chunk=chunk)
        self.model = Wired(base, read, read.attach(base, ()))
        kept = Reuse(base, on=reuse)
        change = chosen.attach(base)
        kept.start()
        parameters = [*change.trainable.values(), *self.model.head.parameters()]
        self.optimiser = torch.optim.AdamW(parameters, lr=1e-4)
        self.model.train()

    def run(self, rows: Batch) -> tuple[float, float]:
        """(loss, seconds) of a step."""
        start = time.perf_counter()
        loss = self.model(**rows.as_kwargs())["loss"]
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return float(loss.detach()), time.perf_counter() - start


def steps(rounds: int, threads: int) -> None:
    rows = batch(ROWS, SIZE)
    for kind, chosen in KINDS.items():
        whole, reused = Step(chosen, reuse=False), Step(chosen, reuse=True)
        spent: list[tuple[float, float]] = []
        apart = 0.0
        for number in range(rounds + 2):  # the first ones see and keep what is frozen
            torch.manual_seed(number)
            one = whole.run(rows)
            torch.manual_seed(number)
            two = reused.run(rows)
            apart = max(apart, abs(one[0] - two[0])) if kind == "projections" else apart
            if number > 1:
                spent.append((one[1], two[1]))
        ratios = [one / two for one, two in spent]
        row = {
            "bench": "aligning",
            "what": f"{kind}: times as fast",
            "ms": round(1000 * statistics.median(two for _, two in spent), 1),
            "whole_ms": round(1000 * statistics.median(one for one, _ in spent), 1),
            "ratio": round(statistics.median(ratios), 2),
            "ratio_quartiles": [round(q, 2) for q in statistics.quantiles(ratios, n=4)[::2]],
            "least": LEAST,
        }
        if kind == "projections":  # deep ones draw dropout at other places
            row["loss_apart"] = apart
        print(json.dumps({**row, "rounds": rounds, "threads": threads}), flush=True)


def peak(rows: int, chunk: int) -> int:
    """Bytes that a step takes above the loaded towers, in a fresh process."""
    command = [sys.executable, __file__, "--peak", f"{rows},{chunk}"]
    # glibc gives freed memory back, so that it is what the step holds and not what malloc keeps.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "100000"}
    malloc["MALLOC_MMAP_THRESHOLD_"] = "100000"
    environment = {**os.environ, **malloc}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        rows, chunk = map(int, options.peak.split(","))
        whole = method("towers", image={"full": {}}, text={"full": {}})
        step, given = Step(whole, False, 112, chunk), batch(rows, 112)
        memory = PeakMemory(torch.device("cpu"))
        step.run(given)
        print(memory.growth())
        return
    steps(options.rounds, options.threads)
    small, large = peak(SMALL, 0), peak(LARGE, SMALL)
    row = {
        "bench": "chunks",
        "what": f"a batch of {LARGE} in chunks of {SMALL}: memory to a batch of {SMALL}",
        "mb": round(large / 1e6),
        "small_mb": round(small / 1e6),
        "ratio": round(large / small, 2),
        "limit": MEMORY,
    }
    print(json.dumps({**row, "threads": options.threads}), flush=True)


if __name__ == "__main__":
    main()
