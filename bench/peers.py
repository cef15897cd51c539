"""PEFT's methods trained as howfine's are, and stored as PEFT stores them.

Head, collation, loss, data order, optimiser, schedule and clipping are howfine's own: a peer is put
into the same training loop. What counts is the file: PEFT's `adapter_model.safetensors` with the
head in it, as `modules_to_save` would put it. The score is of that file, loaded again.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from howfine import evaluate
from howfine.base import Base
from howfine.evaluate import Score
from howfine.loop import Fit
from howfine.method import Tensors
from howfine.readout import Wired
from howfine.recipe import Recipe
from howfine.task import Task

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD = "base_model.model.classifier."
PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Peer:
    """A trained peer: the scores of its file and what the file weighs."""

    heldout: Score
    test: Score
    store: str  # fp16, or fp32 where fp16 costs score on the held-out rows
    bytes: int
    sizes: dict[str, int]  # bytes by precision
    parts: dict[str, int]  # bytes of header, head and change, which add up to `bytes`
    config_bytes: int  # of adapter_config.json, which is not counted
    seconds: float  # training alone
    steps: int
    trainable: int


def tune(base: Base, task: Task, recipe: Recipe, folder: Path, seed: int) -> Peer:
    """Train a peer, store it in `folder` as PEFT would, and score the file on dev and test."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        Fit(base, task, recipe, seed, Path(scratch), progress=False) as fit,
    ):
        fit.train(None)
        made = fit.parts
        made.model.eval()
        made.change.parts["peft"].save_pretrained(folder, save_embedding_layers=False)
        head = recipe.readout.pack(made.head)
        steps = fit.trainer.state.global_step
    whole = load_file(folder / FILE) | head_as_saved(head)
    heldout, sizes = {}, {}
    for store, dtype in PRECISIONS.items():
        path = folder / store / FILE
        path.parent.mkdir(exist_ok=True)
        save_file({k: cast(v, dtype) for k, v in whole.items()}, path, metadata={"format": "pt"})
        sizes[store] = path.stat().st_size
        heldout[store] = score_file(path, base, task, recipe, "dev")
    store = "fp16" if heldout["fp16"].value >= heldout["fp32"].value else "fp32"
    return Peer(
        heldout=heldout[store],
        test=score_file(folder / store / FILE, base, task, recipe, "test"),
        store=store,
        bytes=sizes[store],
        sizes=sizes,
        parts=account(folder / store / FILE),
        config_bytes=(folder / CONFIG).stat().st_size,
        seconds=fit.seconds,
        steps=steps,
        trainable=fit.trainable,
    )


def account(path: Path) -> dict[str, int]:
    """Bytes of a file's header, of the head in it, and of what the peer changes."""
    tensors = {
        name: value.numel() * value.element_size() for name, value in load_file(path).items()
    }
    head = sum(size for name, size in tensors.items() if name.startswith(HEAD))
    change = sum(tensors.values()) - head
    return {"header": path.stat().st_size - head - change, "head": head, "change": change}


def score_file(path: Path, base: Base, task: Task, recipe: Recipe, split: str) -> Score:
    """The score of an adapter file with a head in it, put on the base anew."""
    method, head = split_file(load_file(path))
    readout = recipe.readout
    with recipe.method.unpack(base, method):
        model = Wired(base, readout, readout.unpack(base, task.labels, head)).eval()
        found = readout.predict(evaluate.logits(model, base, task.splits[split])).numpy()
    return evaluate.score(task, split, found)


def head_as_saved(head: Tensors) -> Tensors:
    """The head's tensors under the names that `modules_to_save=["classifier"]` gives them."""
    return {HEAD + name.removeprefix("linear."): value for name, value in head.items()}


def split_file(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """(PEFT's tensors, the head's by its own names); fp16 comes back as fp32, as PEFT has it."""
    method, head = {}, {}
    for name, value in tensors.items():
        value = cast(value, torch.float32)
        if name.startswith(HEAD):
            head["linear." + name.removeprefix(HEAD)] = value
        else:
            method[name] = value
    return method, head


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """Numbers in another precision; positions stay as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
