"""Golden files: deltas of every kind as each format version wrote them, to be read for ever.

    cd tests && python -m golden.make

writes those of version 2 anew, in the folder v2, which is right only until that version is
released: whoever has a file from before must be able to read it. With names of cases behind it,
those alone are written: for a new method or coding. Those of version 1 are no longer made. Beside
the deltas lie the base they were made on, tokens to run through it, and in each folder
`expected.json`: logits, and SHA-256 of every decoded tensor.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from howfine import container, streams
from howfine.base import Base, TwoTowers
from howfine.codec import PRECISIONS
from howfine.delta import SUFFIX, Delta
from howfine.method import Method, method
from howfine.readout import readout
from tiny import LABELS, probe_for, tiny_task, tiny_tokenizer

HERE = Path(__file__).parent
FOLDERS = (HERE, HERE / "v2")
FLAT = "-flat"  # ends the stem of a small file that is laid out as only a large one would be
# The codings of places; the mask's matrices are given patterns that call for each of them.
PATTERNS = ("none", "all", "rank", "bits", "grid", "histogram", "gaps", "zlib")


def golden_base() -> Base:
    """The base on disk, whatever torch draws at random today."""
    tower = AutoModel.from_pretrained(HERE / "base", dtype=torch.float32)
    return Base("golden", tower, tiny_tokenizer())


def golden_towers() -> TwoTowers:
    """That base beside an image tower on disk."""
    tower = AutoModel.from_pretrained(HERE / "image", dtype=torch.float32)
    text = golden_base()
    return TwoTowers(Base("golden-image", tower), text)


def base_of(delta: Delta) -> Base:
    """The base that a golden delta was made on."""
    return golden_towers() if delta.base_kind == "two_towers" else golden_base()


def decoded(delta: Delta, base: Base) -> dict[str, str]:
    """SHA-256 of every stored tensor, by its stream's name."""
    changed, head = delta.tensors(base)
    named = {f"method/{path}": value for path, value in changed.items()}
    named |= {f"readout/{name}": value for name, value in head.items()}
    return {name: _sha256(value) for name, value in sorted(named.items())}


def _sha256(value: Tensor) -> str:
    value = value.to_dense() if value.is_sparse else value
    assert value.dtype in (torch.bool, torch.float32)
    array = value.contiguous().numpy()
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


@torch.no_grad()
def logits(delta: Delta, base: Base, tokens: dict[str, Any]) -> Tensor:
    """Outputs of the base with a delta on, for the golden tokens."""
    with delta.applied(base) as model:
        inputs = {name: torch.tensor(value) for name, value in tokens.items()}
        if isinstance(base, TwoTowers):
            rows = len(inputs["input_ids"])
            inputs["pixel_values"] = torch.linspace(-1, 1, rows * 192).sin().view(rows, 3, 8, 8)
            inputs["pictures"] = torch.arange(rows)
        return model(inputs=inputs)["logits"]


def pattern(kind: str, shape: torch.Size) -> Tensor:
    """A mask on which the coding `kind` is the smallest."""
    count = shape.numel()
    random, every = torch.rand(shape), torch.arange(count).view(shape)
    steps = torch.tensor([1, 1, 1, 9, 13])[torch.randint(0, 5, (count,))].cumsum(0)
    columns = torch.where(torch.rand(1, shape[1]) < 0.5, 0.03, 0.6)
    return {
        "none": torch.zeros(shape, dtype=torch.bool),
        "all": torch.ones(shape, dtype=torch.bool),
        "bits": random < 0.5,
        "rank": random > 0.02,
        "gaps": random > 0.2,
        "histogram": torch.isin(every, steps),
        "grid": random < columns,
        "zlib": (every % 5 == 0) | (every % 7 == 3),
    }[kind]


def cases() -> Iterator[tuple[str, Method, str]]:
    """(file's stem, method, store): one of each method, one of each precision."""
    yield "full", method("full"), "fp32"
    yield "mask", method("mask", initial_sparsity=0.2), "fp16"
    yield "mask-row", method("mask", granularity="row", where=["I", "O"]), "fp32"
    yield "sparse", method("sparse", density=0.03, by="random"), "int4"
    yield "graft", method("graft", density=0.0, bias=1.1), "fp16"
    yield "diff", method("diff", density=0.05, structure="none"), "int3"
    for store in PRECISIONS:
        yield f"select-{store}", method("select", train=["bias", "K@-1"]), store
    yield f"select{FLAT}", method("select", train=["bias", "K@-1"]), "int3"
    random = method("subspace", map="random", size=20, where=["all"], map_seed=3)
    yield "subspace-random", random, "fp16"
    yield "subspace-lora-xs", method("subspace", rank=2), "fp16"
    tiny = method("subspace", map="tiny-lora", rank=3, size=4, sharing="letter")
    yield "subspace-tiny-lora", tiny, "bf16"
    yield "adapter", method("adapter", reduction=8, beside=["norm"]), "fp16"
    block = method("adapter", placement="block", width=3, activation="relu")
    yield "adapter-block", block, "int8"
    two = {"adapter": {"placement": "layerwise", "width": 3}}
    yield "towers", method("towers", image=two, text={"select": {"train": ["norm"]}}), "fp16"
    yield "deep", method("deep"), "int8"
    yield "prune", method("prune", keep=0.6, by="magnitude", beside=["all@-1"]), "int8"
    yield (
        "dynamic",
        method("dynamic", keep=0.6, smallest=0.3, by="magnitude", beside=["all@-1"]),
        "fp16",
    )
    yield "l0", method("l0", keep=0.6, layers=True, beside=["all@-1"]), "fp16"
    yield "post-training", method("post_training", keep=0.6, length=8, rows=16), "int8"
    yield "prefix", method("prefix", length=3, hidden=0), "fp16"
    yield "prompt", method("prompt", length=4, init="table"), "int8"


def made(stem: str, chosen: Method, store: str, base: Base) -> Delta:
    """A change as training might leave it, drawn from a seed."""
    torch.manual_seed(sum(stem.encode()))
    two = chosen.for_towers
    read = readout("contrastive", width=8) if two else readout("classifier", max_length=32)
    labels = () if two else LABELS
    probe = probe_for(chosen, read, base) if chosen.start == "needed" else None
    with chosen.attach(base, probe) as change:
        for number, (path, value) in enumerate(change.trainable.items()):
            if stem == "mask":
                kept = pattern(PATTERNS[number % len(PATTERNS)], value.shape)
                value.data = torch.where(kept, 5.0, -5.0)
            elif chosen.starts_at_base and not value.any():  # not the base's own: numbers from 0
                value.data = 0.5 * torch.randn_like(value)
            elif stem != "full" or "layer.1.attention" in path or path.endswith("bias"):
                value.data += 0.1 * torch.randn_like(value) * value.abs().max()
        head = read.attach(base, labels)
        delta = Delta.pack(base, chosen, change, read, head, labels, store)
    on = {"metric": "accuracy", "value": 0.625, "interval": [0.25, 0.875], "on": "tiny/dev", "n": 8}
    return delta.with_score(on)


def save(stem: str, delta: Delta, path: Path) -> None:
    """As `Delta.save`, or flat although it is small."""
    delta.save(path)
    if stem.endswith(FLAT):
        header = {"howfine": container.FORMAT, **delta.header()}
        groups = streams.groups(delta.streams)
        header["check"] = container.checksum(header, groups)
        path.write_bytes(container.assemble(header, groups))


def main(stems: list[str]) -> None:
    """Write deltas of version 2 and what is expected of them; named cases, or all."""
    base, folder = golden_base(), FOLDERS[-1]
    folder.mkdir(exist_ok=True)
    expected: dict[str, Any] = {"files": {}}
    if stems:
        expected = json.loads((folder / "expected.json").read_text())
    texts = [example.texts[0] for example in tiny_task().splits["dev"]]
    encoded = tiny_tokenizer()(texts, padding=True)
    tokens = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    files = expected["files"]
    for stem, chosen, store in cases():
        if stems and stem not in stems:
            continue
        path = folder / f"{stem}{SUFFIX}"
        own = golden_towers() if chosen.for_towers else base
        save(stem, made(stem, chosen, store, own), path)
        delta = Delta.load(path)
        files[stem] = {
            "header": delta.header(),
            "tensors": decoded(delta, own),
            "logits": logits(delta, own, tokens).tolist(),
        }
    expected = {"fingerprint": base.fingerprint, "tokens": tokens, "files": files}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
