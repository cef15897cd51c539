"""Switching a change on and off: a sparse delta in place, beside PEFT's merge and unmerge.

    python bench/switch.py [--rounds 30]

1 % of the entries of MiniLM's matrices, one thread, CPU milliseconds of on and off together,
medians of interleaved rounds of five; and whether the base came back bit for bit. Then the bytes of
files of random places at several densities against log2 C(n, k) / 8 plus the empirical entropy of
the values.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from howfine import streams
from howfine.base import Base
from howfine.codec import combinatorial_bits, decode_values, entropy_bits
from howfine.delta import Delta
from howfine.entries import sparse, unpack
from howfine.method import Tensors, method
from howfine.readout import readout

LIMIT_MS, SLACK, OVERHEAD = 1.0, 1.02, 700
REPEATS = 5  # a round times so many, after one that is not timed
PEERS = {"PEFT SHiRA r=8 on all linear": "shira", "PEFT LoRA r=8 on all linear": "lora"}


def drawn(base: Base, density: float, seed: int = 0) -> Tensors:
    """New values at a share of the entries of the matrices, all together drawn at random."""
    torch.manual_seed(seed)
    paths = base.choose(("matrices",))
    sizes = [base.parameter(path).numel() for path in paths]
    count = round(density * sum(sizes))
    chosen = torch.zeros(sum(sizes), dtype=torch.bool)
    chosen[torch.randperm(sum(sizes))[:count]] = True
    found = {}
    for path, places in zip(paths, chosen.split(sizes), strict=True):
        weight, index = base.parameter(path).detach(), places.nonzero().flatten()
        values = weight.flatten()[index] + 0.01 * torch.randn(len(index))
        found[path] = sparse(index, values, tuple(weight.shape))
    return found


def peer(kind: str) -> tuple[Callable[[], None], Callable[[], bool]]:
    """PEFT's merge and unmerge as one function, and whether the base came back."""
    import peft

    tower = copy.deepcopy(Base.load().tower)
    before = {name: value.detach().clone() for name, value in tower.named_parameters()}
    targets = ["query", "key", "value", "dense"]
    make = {"shira": peft.ShiraConfig, "lora": peft.LoraConfig}[kind]
    model = peft.get_peft_model(tower, make(r=8, target_modules=targets))
    for value in model.parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value, std=0.01)

    def both() -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    def came_back() -> bool:
        now = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): value
            for name, value in model.named_parameters()
        }
        return all(torch.equal(now[name], value) for name, value in before.items())

    return both, came_back


def switching(rounds: int) -> list[dict[str, Any]]:
    base = Base.load()
    change = unpack(base, drawn(base, 0.01))
    switch = change.parts["switch"]
    switch.off()

    def ours() -> None:
        switch.on()
        switch.off()

    runs: dict[str, tuple[Callable[[], None], Callable[[], bool]]] = {
        "howfine, 1 % of the matrices": (ours, base.is_untouched)
    }
    runs |= {name: peer(kind) for name, kind in PEERS.items()}
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, (run, _) in runs.items():
            run()  # its memory is in the cache then, as in use
            start = time.process_time()
            for _ in range(REPEATS):
                run()
            if number:  # the first one warms up
                spent[name].append(1000 * (time.process_time() - start) / REPEATS)
    rows = []
    for name, (_, came_back) in runs.items():
        limit = LIMIT_MS if name.startswith("howfine") else None
        row = {"bench": "switch", "what": name, "cpu_ms": round(statistics.median(spent[name]), 3)}
        rows.append({**row, "limit": limit, "restored": came_back(), "rounds": rounds})
    return rows


def sizes() -> list[dict[str, Any]]:
    base, made, read = Base.load(), method("sparse"), readout("classifier", reference=True)
    labels, rows = ("negative", "positive"), []
    entries = sum(base.parameter(path).numel() for path in base.choose(("matrices",)))
    for density in (1e-5, 1e-4, 1e-3, 1e-2, 5e-2):
        for store in ("int8", "int4", "sign"):
            tensors = drawn(base, density)
            delta = _packed(base, made, tensors, read, labels, store)
            with tempfile.TemporaryDirectory() as folder:
                size = delta.save(Path(folder) / "one.delta.safetensors")
            (joined,) = [stream for stream in delta.streams if stream.values is not None]
            count = joined.kept()
            values = decode_values(joined.values, count)
            bits = combinatorial_bits(entries, count) + float(entropy_bits(values))
            bits += sum(8 * stream.size for stream in delta.streams if "readout/" in stream.name)
            limit = round(SLACK * bits / 8 + OVERHEAD)
            row = {"bench": "sparse-size", "density": density, "store": store}
            row |= {"entries": count, "bytes": size, "bound": round(bits / 8)}
            rows.append({**row, "limit": limit, "ratio": round(8 * size / bits, 4)})
    return rows


def _packed(base: Base, made: Any, packed: Tensors, read: Any, labels: Any, store: str) -> Delta:
    """A delta of given entries, with a head of zeros, which takes next to nothing."""
    head = read.attach(base, labels)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    found = [
        *streams.encode("method", packed, store, base),
        *streams.encode("readout", read.pack(head), store, base),
    ]
    return Delta(base.name, base.fingerprint, made, read.settled(base), labels, tuple(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for row in [*switching(options.rounds), *sizes()]:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
