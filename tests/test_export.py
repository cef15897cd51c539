"""ONNX files answer as the model does; what can't be exported is one sentence, and no file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from console import howfine_here
from howfine import export as exporting
from howfine.base import Base
from howfine.compose import stored
from howfine.delta import SUFFIX, Delta
from howfine.errors import SettingError, StorageError
from howfine.evaluate import predict
from howfine.export import export
from howfine.method import Method, method
from howfine.readout import Readout, readout
from howfine.recipe import Recipe
from howfine.slicing import sliced
from howfine.start import weight_at
from howfine.task import Example
from howfine.training import Training
from howfine.tune import tune
from tiny import (
    LABELS,
    READOUT,
    TinyProbe,
    fit_a_little,
    tiny_base,
    tiny_language_base,
    tiny_task,
    tiny_towers,
)

TEXTS = ["w1 w2 w3", "w7", "w9 w8 w7 w6 w5 w4 w3 w2 w1"]


def delta_of(base: Base, chosen: Method, read: Readout = READOUT) -> Delta:
    fitted = fit_a_little(base, chosen)
    with fitted.change:
        head = fitted.head if read is READOUT else read.attach(base, LABELS)
        return Delta.pack(base, chosen, fitted.change, read, head, LABELS)


def shares(path: Path, delta: Delta, base: Base, texts: list[str]) -> np.ndarray:
    """(B, classes) probabilities that the file gives."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    batch = delta.readout.collate(base, [Example((text,)) for text in texts], labelled=False)
    wanted = {each.name for each in session.get_inputs()}
    given = {name: v.numpy() for name, v in exporting._fields(batch).items() if name in wanted}
    (logits,) = session.run(None, given)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def agrees(path: Path, delta: Delta, base: Base, texts: list[str]) -> None:
    answers = predict(delta, texts, base)
    found = shares(path, delta, base, texts)
    for answer, row in zip(answers, found, strict=True):
        assert delta.labels[int(row.argmax())] == answer["label"]
        assert float(row.max()) == pytest.approx(answer["probability"], abs=1e-5)


def test_the_file_answers_as_the_model_does(tmp_path: Path) -> None:
    """One row or several, of any lengths; the classes' names are in it."""
    base = tiny_base("bert")
    delta = delta_of(base, method("select", train=("bias",)))
    path = export(delta, tmp_path / "x.onnx", base)
    assert base.is_untouched()
    agrees(path, delta, base, TEXTS)
    for text in TEXTS:
        agrees(path, delta, base, [text])
    held = {each.key: each.value for each in onnx.load(path).metadata_props}
    assert held["labels"].splitlines() == list(LABELS)
    assert [each.name for each in tmp_path.iterdir()] == ["x.onnx"]


@pytest.mark.slow
def test_half_precision_halves_the_file(tmp_path: Path) -> None:
    base, half = tiny_base("bert"), tiny_base("bert")
    # A file of differences: whole values would overwrite a base that was rounded before.
    delta = stored(delta_of(base, method("select", train=("matrices",))), base, "int8")[0]
    assert half.fingerprint == base.fingerprint  # of the weights as they were loaded
    half.towers.to(torch.float16)
    files = [export(delta, tmp_path / f"{n}.onnx", each) for n, each in enumerate((base, half))]
    once = export(delta, tmp_path / "once.onnx", base, dtype="float16")
    assert base.is_untouched()
    place = f"{base.tower_name}.encoder.layer.0.output.dense.weight"
    with delta.changed(base):
        wanted = weight_at(base, place).half().numpy()
    with delta.changed(half):
        assert (weight_at(half, place).numpy() != wanted).any()
    held = [onnx.numpy_helper.to_array(v) for v in onnx.load(once).graph.initializer]
    alike = (v if v.shape == wanted.shape else v.T for v in held)
    assert any(v.shape == wanted.shape and (v == wanted).all() for v in alike)
    assert once.stat().st_size == pytest.approx(files[1].stat().st_size, rel=0.05)
    held = [sum(each.ByteSize() for each in onnx.load(p).graph.initializer) for p in files]
    assert held[1] < 0.55 * held[0]
    found, exact = (shares(path, delta, base, TEXTS) for path in files[::-1])
    assert abs(found - exact).max() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        *((name, "full") for name in ("gpt2", "llama", "albert", "mpnet")),
        *((name, "adapter") for name in ("distilbert", "gpt2", "mpnet")),
        *((name, "prefix") for name in ("distilbert", "llama")),
        ("distilbert", "deep"),
    ],
)
def test_every_kind_of_change(name: str, chosen: str, tmp_path: Path) -> None:
    base = tiny_base(name)
    delta = delta_of(base, method(chosen))
    path = export(delta, tmp_path / "x.onnx", base)
    agrees(path, delta, base, TEXTS)


@pytest.mark.slow
def test_answers_at_a_mask(tmp_path: Path) -> None:
    """A readout that reads a position of its own: where it is, is an input of the graph."""
    base = tiny_language_base("bert")
    read, chosen = readout("verbalizer", template="{text} {mask}"), method("select")
    with chosen.attach(base) as change:
        delta = Delta.pack(base, chosen, change, read, read.attach(base, LABELS), LABELS)
    path = export(delta, tmp_path / "x.onnx", base)
    agrees(path, delta, base, TEXTS)


@pytest.mark.slow
def test_prompts_at_slots_are_refused(tmp_path: Path) -> None:
    """Where they stand is looked at as numbers, which no graph can."""
    base = tiny_language_base("bert")
    read, chosen = readout("verbalizer", template="{text} {slot} {mask}"), method("prompt")
    with chosen.attach(base, TinyProbe(read)) as change:
        delta = Delta.pack(base, chosen, change, read, read.attach(base, LABELS), LABELS)
    with pytest.raises(SettingError, match="torch can't export a bert with this change"):
        export(delta, tmp_path / "x.onnx", base)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_from_tuning_to_onnx(tmp_path: Path) -> None:
    """tune, prune, slice, export: the same answers at the end of the chain."""
    base, task = tiny_base("bert"), tiny_task()
    settings = {"max_steps": 20, "batch_size": 8, "learning_rate": 0.01}
    full = Recipe("full", method("full"), READOUT, Training(**settings))
    tuned = tune(base, task, full, out=tmp_path / f"tuned{SUFFIX}")
    pruned_by = method("prune", keep=0.5, beside=("all",))
    half = Recipe("half", pruned_by, READOUT, Training(**settings), start=str(tuned.path))
    pruned = tune(base, task, half, out=tmp_path / f"half{SUFFIX}")
    small = sliced(pruned.path, tmp_path / "small", base)
    texts = [row.texts[0] for row in task.splits["dev"]]
    before = predict(pruned.path, texts, base)
    told = howfine_here("export", small.readout, tmp_path / "x.onnx", "--json")
    assert told.code == 0, told.err
    assert told.json["labels"] == list(LABELS)
    delta = Delta.load(str(small.readout))
    found = shares(tmp_path / "x.onnx", delta, Base.load(str(small.folder)), texts)
    assert [LABELS[int(row.argmax())] for row in found] == [each["label"] for each in before]
    assert found.max(1).tolist() == pytest.approx([a["probability"] for a in before], abs=1e-4)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-5, 0.0])
def test_small_logits_are_compared_as_large_ones(size: float) -> None:
    """Wrong answers are told from rounding, whatever the head's scale; the right ones pass."""
    base, chosen = tiny_base("bert"), method("select", train=("none",))
    with chosen.attach(base) as change:
        head = READOUT.attach(base, LABELS)
        for value in head.parameters():
            value.data = size * torch.randn_like(value)
        delta = Delta.pack(base, chosen, change, READOUT, head, LABELS, "fp32")
    with delta.applied(base) as wired, exporting._quiet():
        graph = exporting._graph(wired, base, delta, False)
        exporting._check_same(graph, wired, base, delta, False)
        wired.head.linear.weight.data -= 1e-5
        with pytest.raises(SettingError, match="other outputs than torch"):
            exporting._check_same(graph, wired, base, delta, False)


@pytest.mark.slow
def test_a_graph_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("bert")
    delta = delta_of(base, method("select", train=("bias",)))
    graph = exporting._graph

    def another(wired: Any, *rest: Any) -> bytes:
        bias = wired.head.linear.bias
        bias.data += 5
        made = graph(wired, *rest)
        bias.data -= 5
        return made

    monkeypatch.setattr(exporting, "_graph", another)
    with pytest.raises(SettingError, match="other outputs than torch"):
        export(delta, tmp_path / "x.onnx", base)
    monkeypatch.setattr(exporting, "_graph", lambda *rest: b"no graph")
    with pytest.raises(SettingError, match="can't run the graph"):
        export(delta, tmp_path / "x.onnx", base)
    assert not list(tmp_path.iterdir())


def test_what_has_no_graph_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("bert")
    delta = delta_of(base, method("select", train=("bias",)))
    (tmp_path / "x.onnx").write_text("mine")
    with pytest.raises(StorageError, match="exists already"):
        export(delta, tmp_path / "x.onnx", base)
    assert (tmp_path / "x.onnx").read_text() == "mine"
    two, read = tiny_towers(), readout("contrastive", width=8, size=8)
    locked = method("towers")
    with locked.attach(two) as change:
        aligned = Delta.pack(two, locked, change, read, read.attach(two, ()), ())
    with pytest.raises(SettingError, match="takes pictures"):
        export(aligned, tmp_path / "y.onnx", two)
    coarse = tiny_base("bert")
    coarse.towers.to(torch.bfloat16)
    with pytest.raises(SettingError, match="no bfloat16 on CPUs.*float16"):
        export(delta, tmp_path / "y.onnx", coarse)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SettingError, match=r"pip install 'howfine\[onnx\]'"):
        export(delta, tmp_path / "y.onnx", base)
