"""Step time and peak memory of each method against full fine-tuning, side by side in one run.

    python bench/steps.py [--rounds 13] [--threads 2]

MiniLM, 16 sentences of 64 tokens, AdamW. Time: all methods in every round, in an order shuffled
anew, a method next to its peer and both of them twice, there and back; medians over rounds; ratios,
to full fine-tuning and to the peer, are medians of per-round ratios. Memory: a fresh process for
each method; the growth of its high-water mark over the loaded base, and the most bytes of tensors
that a step made and held at once, which repeat to the byte and are what a method and its peer are
compared by (the former varies by 20 MB from process to process).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from howfine.adamw import AdamW
from howfine.base import Base
from howfine.cost import PeakMemory
from howfine.method import Method, method

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "mask": ("mask", {}),
    "mask, bf16 scores": ("mask", {"scores": "bfloat16"}),
    "mask, threshold": ("mask", {"variant": "threshold"}),
    "select top-2 layers": ("select", {"train": ("all@-2,-1",)}),
    "select biases (BitFit)": ("select", {"train": ("bias",)}),
    "head only": ("select", {"train": ("none",)}),
    "sparse, 0.1 % of the matrices": ("sparse", {"density": 0.001, "by": "random"}),
    # A thousandth of the encoder's matrices, in the twelve of 36 that LoRA is put on below.
    "sparse, 0.1 % of the matrices, in q, v": (
        "sparse",
        {"density": 0.006, "by": "random", "where": ("Q", "V")},
    ),
    "sparse, 1 % of the matrices": ("sparse", {"density": 0.01, "by": "random"}),
    "diff, stage 1 on the matrices": ("diff", {"where": ("matrices",)}),
    "prefix, 20 positions": ("prefix", {"length": 20, "hidden": 0}),
    "prompt, 20 vectors": ("prompt", {"length": 20}),
}
_LINEAR = ["query", "key", "value", "dense"]
_VIRTUAL = {"task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": 20}
LORA, PREFIX = "PEFT LoRA r=8 on q, v", "PEFT prefix tuning, 20 positions"
PROMPT = "PEFT prompt tuning, 20 vectors"
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    LORA: ("LoraConfig", {"r": 8, "target_modules": ["query", "value"]}),
    "PEFT SHiRA r=8 on all linear": ("ShiraConfig", {"r": 8, "target_modules": _LINEAR}),
    PREFIX: ("PrefixTuningConfig", _VIRTUAL),
    PROMPT: ("PromptTuningConfig", _VIRTUAL),
}
# Whose time and memory are a method's limits, besides those below: at most as much.
PEERS = {
    "sparse, 0.1 % of the matrices": LORA,
    "sparse, 0.1 % of the matrices, in q, v": LORA,
    "prefix, 20 positions": PREFIX,
    "prompt, 20 vectors": PROMPT,
}
LIMITS = {
    "mask": 1.00,
    "select top-2 layers": 0.55,
    "head only": 0.40,
    "sparse, 0.1 % of the matrices": 0.65,
    "sparse, 0.1 % of the matrices, in q, v": 0.65,
    "sparse, 1 % of the matrices": 0.85,
    "diff, stage 1 on the matrices": 1.05,
}
STEPS = 4  # a round times so many, after one to warm up


class Work:
    """One batch and its step."""

    def __init__(self, base: Base) -> None:
        generator = torch.Generator().manual_seed(0)
        self.base = base
        self.ids = torch.randint(1000, 30_000, (16, 64), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.targets = torch.randint(0, 2, (16,), generator=generator)

    def step(
        self,
        model: nn.Module,
        head: nn.Module,
        optimizer: torch.optim.Optimizer,
        penalty: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        hidden = model(input_ids=self.ids, attention_mask=self.mask).last_hidden_state
        loss = nn.functional.cross_entropy(head(hidden.mean(1)), self.targets)
        (loss if penalty is None else loss + penalty()).backward()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, 1.0)  # as in `tune`
        optimizer.step()
        optimizer.zero_grad()

    @contextmanager
    def ready(self, name: str) -> Iterator[Callable[[], None]]:
        """A method put on the base, as a function that makes one step."""
        head = nn.Linear(self.base.hidden_size, 2)
        if name in PEFT:
            import peft

            kind, settings = PEFT[name]
            model = peft.get_peft_model(self.base.tower, getattr(peft, kind)(**settings))
            optimizer = _adamw([p for p in model.parameters() if p.requires_grad], head)
            model.train()
            try:
                yield lambda: self.step(model, head, optimizer)
            finally:
                if hasattr(model, "unload"):
                    model.unload()
                self.base.towers.requires_grad_(False)
            return
        kind, settings = METHODS[name]
        made: Method = method(kind, **settings)
        with made.attach(self.base) as change:
            optimizer = _adamw(list(change.trainable.values()), head)
            self.base.train()
            own = type(made).penalty is not Method.penalty
            penalty = (lambda: made.penalty(change, 0.5)) if own else None
            yield lambda: self.step(self.base.tower, head, optimizer, penalty)


def _adamw(parameters: list[nn.Parameter], head: nn.Module) -> torch.optim.Optimizer:
    return AdamW([*parameters, *head.parameters()], lr=1e-4, fused=True)


def times(rounds: int) -> dict[str, list[float]]:
    work = Work(Base.load())
    found: dict[str, list[float]] = {name: [] for name in [*METHODS, *PEFT]}
    for number in range(rounds):
        took: dict[str, list[float]] = {name: [] for name in found}
        for name in _order(random.Random(number)):
            with work.ready(name) as step:
                step()
                start = time.perf_counter()
                for _ in range(STEPS):
                    step()
                took[name].append((time.perf_counter() - start) / STEPS)
        for name, seconds in took.items():
            found[name].append(statistics.mean(seconds))
    return found


def _order(drawn: random.Random) -> list[str]:
    """All methods; peers and those that are held against them next to each other, there and back.

    What slows a machine down for a while slows both.
    """
    groups: dict[str, list[str]] = {}
    for name in [*METHODS, *PEFT]:
        groups.setdefault(PEERS.get(name, name), []).append(name)
    made = []
    for group in drawn.sample([*groups.values()], len(groups)):
        drawn.shuffle(group)
        made += [*group, *group[::-1]] if len(group) > 1 else group
    return made


def peak(name: str) -> dict[str, int]:
    """Growth over the loaded base, of this process; and what a step held at once."""
    work = Work(Base.load())
    memory = PeakMemory(torch.device("cpu"))
    with work.ready(name) as step:
        for _ in range(STEPS):
            step()
        grown = memory.growth()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = itertools.accumulate(event.nbytes() for event in events)
    return {"peak_bytes": grown, "allocated_bytes": max(held)}


def _against(seconds: list[float], of_peer: list[float]) -> dict[str, Any]:
    """How long a step takes to one of its peer in the same round."""
    ratios = [a / b for a, b in zip(seconds, of_peer, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)[::2]
    return {
        "to_peer": round(statistics.median(ratios), 3),
        "to_peer_quartiles": [round(q, 3) for q in quartiles],
    }


def peak_of(name: str, threads: int) -> dict[str, int]:
    command = [sys.executable, __file__, "--peak", name, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=13)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", help="measure one method's memory in this process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(peak(options.peak)))
        return
    found = times(options.rounds)
    ratios_of = {
        name: [a / b for a, b in zip(seconds, found["full"], strict=True)]
        for name, seconds in found.items()
    }
    grown = {name: peak_of(name, options.threads) for name in found}
    for name, seconds in found.items():
        ratios, peer = ratios_of[name], PEERS.get(name)
        row = {
            "bench": "step",
            "method": name,
            "ms": round(1000 * statistics.median(seconds), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
            "limit": LIMITS.get(name),
            **(_against(seconds, found[peer]) if peer else {}),
            **grown[name],
            "allocated_limit": grown[peer]["allocated_bytes"] if peer else None,
            "rounds": options.rounds,
            "threads": options.threads,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
