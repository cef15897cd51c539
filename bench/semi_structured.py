"""A 2:4 MiniLM in torch's semi-structured tensors against the same one dense, on a CUDA device.

    python bench/semi_structured.py [--rounds 25] [--layers 6] [--width 384]

Both in float16, in every round in turn, at several batches of 64 tokens. Without a CUDA device that
has such kernels it says so and measures nothing: a CPU has none. `--width 768 --layers 12` makes a
BERT-base of random weights instead.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from typing import Any

import torch

from howfine.base import Base
from howfine.gates import settle_n_of_m
from howfine.semi_structured import semi_structured

BATCHES, TOKENS = (1, 16, 128, 512), 64


def pruned(options: argparse.Namespace) -> Any:
    """The blocks' matrices with the two largest of every four, in float16 on the device."""
    model = Base.load().tower
    if (options.layers, options.width) != (6, 384):
        config = copy.deepcopy(model.config)
        config.update({"num_hidden_layers": options.layers, "hidden_size": options.width})
        config.update({"intermediate_size": 4 * options.width})
        model = type(model)(config)
    with torch.no_grad():
        for module in model.encoder.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(settle_n_of_m(module.weight.abs(), 2, 4))
    return model.half().cuda().eval()


def taken(model: Any, given: dict[str, torch.Tensor]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(**given)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: torch has semi-structured kernels for CUDA alone")
    dense = pruned(options)
    sparse = copy.deepcopy(dense)
    count = len(semi_structured(sparse))
    for rows in BATCHES:
        tokens = torch.randint(1000, 30_000, (rows, TOKENS), device="cuda")
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with torch.inference_mode():
            apart = (dense(**given)[0] - sparse(**given)[0]).abs().max().item()
            spent = [(taken(dense, given), taken(sparse, given)) for _ in range(options.rounds + 3)]
        ratios = [one / other for one, other in spent[3:]]
        row = {
            "bench": "semi-structured",
            "device": torch.cuda.get_device_name(),
            "matrices": count,
            "rows": rows,
            "tokens": TOKENS,
            "dense_ms": round(1000 * statistics.median(one for one, _ in spent[3:]), 3),
            "sparse_ms": round(1000 * statistics.median(other for _, other in spent[3:]), 3),
            "times_as_fast": round(statistics.median(ratios), 3),
            "quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
            "largest_difference": round(apart, 4),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
