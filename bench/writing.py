"""Texts written per second with a task's change on, against the bare base; five tasks in a batch.

    python bench/writing.py [--rounds 7] [--threads 2]

A model of GPT-2 small's shape with random weights (12 × 768, 50,257 words), sources of 64 tokens,
32 written after each, greedily and with a cache. Tasks are the paper's five: adapters of width 300,
300, 100, 100 and 10 after each block, with their own vectors. All in every round, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from howfine.base import Base
from howfine.batch import Batch, running
from howfine.combine import combine
from howfine.delta import Delta
from howfine.method import method
from howfine.readout import Asked, Wired, readout
from howfine.writing import written

SOURCE, NEW = 64, 32
# Width of the adapters, and kinds of segments, of the paper's five tasks.
TASKS = {"translation": (300, 2), "qa": (300, 3), "summary": (100, 2), "dialogue": (100, 3)}
TASKS |= {"table": (10, 9)}
# Least share of the reference's texts a second.
LEAST = {"batch of 16": 0.9, "batch of 1": 0.8, "five tasks in a batch": 0.85}


def gpt2_small() -> Base:
    """Random weights; a tokenizer that is asked for its special tokens alone."""
    torch.manual_seed(0)
    tower = GPT2LMHeadModel(GPT2Config()).eval()
    words = Tokenizer(models.WordLevel({"<end>": 50_256, "<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    return Base("gpt2-small-shape", tower, tokenizer, kind="causal_lm")


def made(base: Base, width: int, kinds: int, seed: int) -> Delta:
    """A task's change, drawn at random."""
    torch.manual_seed(seed)
    how = method("adapter", placement="block", width=width, activation="relu", std=0.02)
    names = tuple(f"kind{number}" for number in range(kinds))
    read = readout("typed_segments", kinds=names, max_length=256, max_new_tokens=NEW)
    with how.attach(base) as change:
        return Delta.pack(base, how, change, read, read.attach(base, ()), (), "fp32")


def batch(rows: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 50_000, (rows, SOURCE), generator=generator)
    types = (torch.arange(SOURCE) % 4).expand(rows, -1).clone()
    marks = torch.where(torch.arange(SOURCE) % 16 == 0, types, -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, marks=marks, types=types)


def timed(run: Callable[[], torch.Tensor], rows: int) -> float:
    start = time.perf_counter()
    found = run()
    spent = time.perf_counter() - start
    assert found.shape == (rows, NEW)
    assert (found >= 0).all(), "a text ended early: the times are not of the same work"
    return spent


@torch.inference_mode()
def bare(base: Base, rows: Batch) -> torch.Tensor:
    plain = Batch(rows.inputs)
    with running(plain):
        return written(base, plain, Asked(NEW))


@torch.inference_mode()
def alone(model: Wired, rows: Batch) -> torch.Tensor:
    return model(**rows.as_kwargs())["logits"].long()


def measure(base: Base, rounds: int) -> dict[str, list[float]]:
    """Shares of the reference's texts a second, by what was measured."""
    deltas = {name: made(base, *shape, seed=n) for n, (name, shape) in enumerate(TASKS.items())}
    found: dict[str, list[float]] = {name: [] for name in LEAST}
    each = 3
    together = batch(each * len(deltas))
    rows = {name: batch(each, seed) for seed, name in enumerate(deltas)}
    for number in range(rounds + 1):
        shares = {}
        for count in (16, 1):
            whole = batch(count)
            reference = timed(lambda whole=whole: bare(base, whole), count)
            with deltas["translation"].applied(base) as model:
                spent = timed(lambda model=model, whole=whole: alone(model, whole), count)
            shares[f"batch of {count}"] = reference / spent
        with deltas["translation"].applied(base) as model:
            one = timed(lambda model=model: alone(model, together), each * len(rows))
        with combine(deltas, base) as tasks:
            several = timed(
                lambda tasks=tasks: torch.cat(list(tasks.run(rows).values())), each * len(rows)
            )
        shares["five tasks in a batch"] = one / several
        for name, share in shares.items():
            if number:  # the first round warms up
                found[name].append(share)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for what, shares in measure(gpt2_small(), options.rounds).items():
        row = {
            "bench": "writing",
            "what": what,
            "share": round(statistics.median(shares), 3),
            "share_quartiles": [round(q, 3) for q in statistics.quantiles(shares, n=4)[::2]],
            "least": LEAST[what],
        }
        more = {"rounds": options.rounds, "threads": options.threads}
        print(json.dumps({**row, **more}), flush=True)


if __name__ == "__main__":
    main()
