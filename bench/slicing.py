"""A sliced MiniLM, half of the heads and neurons of every layer, against the whole one.

    python bench/slicing.py [--rounds 25] [--threads 2]

Batches of 16 × 64 tokens, fp32, through torch and through ONNX Runtime; both models in every round,
in turn. Half of the units are half of the blocks' multiplications (heads 3·n·d·w + 2·n²·w + n·w·d
each, neurons 2·n·d): the speed-up is held against that ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from howfine.base import Base
from howfine.delta import Delta
from howfine.export import export
from howfine.method import method
from howfine.readout import readout
from howfine.slicing import sliced

ROWS, TOKENS, KEEP = 16, 64, 0.5
LABELS = ("no", "yes")
# ONNX Runtime's fused kernel of sum and LayerNorm takes longer on a CPU than both one by one.
FUSED, NORMS_APART = "ONNX Runtime", "ONNX Runtime, sums and LayerNorms apart"
# Least share of the ratio of multiplications that the speed-up has to be.
LEAST = 0.85


def multiplications(base: Base) -> int:
    """Of the blocks, for one row."""
    total, wide = 0, base.hidden_size
    for path in base.choose(("D", "O")):
        inputs = base.parameter(path).shape[1]
        if base.place(path)[1] == "D":
            total += 4 * TOKENS * wide * inputs + 2 * TOKENS**2 * inputs
        else:
            total += 2 * TOKENS * wide * inputs
    return total


def whole_delta(base: Base) -> tuple[Delta, Delta]:
    """Nothing changed, and half of the units off; a head that nothing trained."""
    read, found = readout("classifier"), []
    head = read.attach(base, LABELS)
    for keep in (1.0, KEEP):
        chosen = method("prune", keep=keep, by="magnitude", scope="layer")
        with chosen.attach(base) as change:
            found.append(Delta.pack(base, chosen, change, read, head, LABELS))
    return found[0], found[1]


def inputs(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 30_000, (rows, TOKENS), generator=generator)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": torch.zeros_like(tokens),
    }


def session(path: Path, threads: int, without: Sequence[str] = ()) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Or this session's threads would go on spinning for work while the other session runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    made = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without)
    )
    given = {name: value.numpy() for name, value in inputs(ROWS).items()}
    return lambda: made.run(None, given)


def compared(whole: Callable[[], Any], small: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Medians of both, in ms, and of their ratio."""
    spent = []
    for _ in range(rounds + 3):
        start = time.perf_counter()
        whole()
        between = time.perf_counter()
        small()
        spent.append((between - start, time.perf_counter() - between))
    spent = spent[3:]
    ratios = [one / two for one, two in spent]
    return {
        "whole_ms": round(1000 * statistics.median(one for one, _ in spent), 1),
        "ms": round(1000 * statistics.median(two for _, two in spent), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_quartiles": [round(q, 2) for q in statistics.quantiles(ratios, n=4)[::2]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = Base.load()
    base.tower.eval()
    whole, half = whole_delta(base)
    with tempfile.TemporaryDirectory() as folder:
        made = sliced(half, Path(folder) / "small", base)
        small = Base.load(str(made.folder))
        small.tower.eval()
        ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "torch": (lambda: base.tower(**inputs(ROWS)), lambda: small.tower(**inputs(ROWS)))
        }
        assert made.readout is not None
        paths = [Path(folder) / name for name in ("whole.onnx", "small.onnx")]
        export(whole, paths[0], base)
        export(Delta.load(made.readout), paths[1], small)
        for what, without in ((NORMS_APART, ["SkipLayerNormFusion"]), (FUSED, [])):
            one, two = (session(path, options.threads, without) for path in paths)
            ways[what] = (one, two)
        fewer = multiplications(base) / multiplications(small)
        for what, (one, two) in ways.items():
            with torch.inference_mode():
                found = compared(one, two, options.rounds)
            row = {"bench": "slicing", "what": what, **found, "multiplications": round(fewer, 3)}
            row |= {"share": round(found["ratio"] / fewer, 3), "least": LEAST}
            print(json.dumps(row | {"rounds": options.rounds, "threads": options.threads}))


if __name__ == "__main__":
    main()
