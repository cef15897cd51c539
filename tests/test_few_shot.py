"""PERFECT's parts against its equations (spec 05): adapters, label vectors, hinge, prototypes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from howfine.base import Base
from howfine.delta import SUFFIX, Delta
from howfine.errors import DamagedDelta, SettingError
from howfine.evaluate import evaluate
from howfine.method import method
from howfine.readout import Readout, Wired, readout
from howfine.recipe import Recipe
from howfine.task import Example
from howfine.training import Training
from howfine.tune import tune
from tiny import (
    HIDDEN,
    INNER,
    LABELS,
    LAYERS,
    Fitted,
    logits_of,
    tiny_base,
    tiny_language_base,
    tiny_task,
    wire,
)

ENCODERS = ("bert", "roberta", "albert", "distilbert", "electra", "mpnet", "deberta-v2", "t5")
EVERY = (*ENCODERS, "gpt2", "llama", "qwen3", "gemma2", "bart")
PERFECT = {"template": "{text} {mask*2} {pair}", "max_length": 32}


def few_shot(base: Base, **settings: Any) -> Fitted:
    read = readout("label_embedding", **{**PERFECT, **settings})
    return wire(base, method("adapter", reduction=4, beside=("norm",)), read)


# --- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_zero_adapters_are_the_base(name: str) -> None:
    base = tiny_base(name)
    ids = torch.arange(5, 15).unsqueeze(0)
    with torch.no_grad():
        before = base.tower(input_ids=ids).last_hidden_state
        with method("adapter", std=0).attach(base):
            attached = base.tower(input_ids=ids).last_hidden_state
        with method("adapter", std=0.5).attach(base):
            moved = base.tower(input_ids=ids).last_hidden_state
    assert torch.equal(attached, before)
    assert (moved - before).abs().max() > 1e-2
    assert base.is_untouched()


def test_an_adapter_stands_before_the_residual() -> None:
    """LN(A(W2·f + b2) + residual), written out for BERT's first layer."""
    base = tiny_base("bert")
    block = base.tower.encoder.layer[0]
    with method("adapter", reduction=4, std=0.3).attach(base) as change:
        seen: dict[str, Tensor] = {}
        hooks = [
            block.intermediate.register_forward_hook(lambda m, i, o: seen.update(inner=o)),
            block.attention.register_forward_hook(lambda m, i, o: seen.update(residual=o[0])),
            block.register_forward_hook(lambda m, i, o: seen.update(out=o)),
        ]
        with torch.no_grad():
            base.tower(input_ids=torch.arange(5, 15).unsqueeze(0))
            module = change.parts["made"]["adapter.0."]
            x = block.output.dense(seen["inner"])
            inner = nn.functional.gelu(
                x @ module.down.weight.T + module.down.bias, approximate="tanh"
            )
            adapted = x + inner @ module.up.weight.T + module.up.bias
            expected = block.output.LayerNorm(adapted + seen["residual"])
        for hook in hooks:
            hook.remove()
    out = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def test_numbers_are_the_formula() -> None:
    """n·(2HB + H + B) for adapters, 2H for each LayerNorm, K·M·H for label vectors (spec 05, d)."""
    base = tiny_base("bert")
    fitted = few_shot(base)
    narrow = HIDDEN // 4
    adapters = LAYERS * (2 * HIDDEN * narrow + HIDDEN + narrow)
    norms = 2 * HIDDEN * (2 * LAYERS + 1)
    trained = sum(p.numel() for p in fitted.wired.parameters() if p.requires_grad)
    assert trained == adapters + norms + 2 * 2 * HIDDEN
    assert INNER != HIDDEN  # the formula would not notice


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    fitted = few_shot(tiny_base("bert"))
    tensors = fitted.method.pack(fitted.base, fitted.change)
    fitted.change.remove()
    lost = {name: value for name, value in tensors.items() if name != "adapter.1.up.bias"}
    places = torch.ones(HIDDEN, dtype=torch.bool)
    wrongs = [{**tensors, "adapter.0.up.bias": value} for value in (torch.zeros(3), places)]
    for wrong in (lost, *wrongs):
        with pytest.raises(DamagedDelta, match="adapter tensors don't fit"):
            fitted.method.unpack(fitted.base, wrong)
    assert fitted.base.is_untouched()
    with pytest.raises(SettingError, match="unknown"):
        method("adapter", activation="gelo")
    with pytest.raises(SettingError, match="reduction 0"):
        method("adapter", reduction=0)


# --- label vectors and the hinge -----------------------------------------------------------------


def hinge_by_loops(scores: Tensor, gold: list[int]) -> float:
    """Equation 3: the mean over masks, then over examples."""
    total = 0.0
    for row, y in zip(scores.tolist(), gold, strict=True):
        for mask in row:
            total += sum(max(0.0, 1 - mask[y] + t) for k, t in enumerate(mask) if k != y) / (
                len(mask) * len(row)
            )
    return total / len(gold)


def test_the_hinge_is_the_papers() -> None:
    read = readout("label_embedding", **PERFECT)
    torch.manual_seed(0)
    scores = torch.randn(5, 2, 3)
    gold = [0, 2, 1, 1, 0]
    outputs = torch.stack([scores, torch.zeros_like(scores)], dim=1)
    found = read.loss(outputs, torch.tensor(gold))
    assert found.item() == pytest.approx(hinge_by_loops(scores, gold), abs=1e-6)


def test_the_hinge_vanishes_beyond_the_margin() -> None:
    read = readout("label_embedding", **PERFECT)
    scores = torch.tensor([[[2.0, 0.5], [1.5, 0.5]]]).requires_grad_()
    loss = read.loss(torch.stack([scores, scores], dim=1), torch.tensor([0]))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad is not None
    assert not scores.grad.any()


def states_by_hand(base: Base, read: Readout, examples: list[Example]) -> Tensor:
    """(B, M, H) of the base as it is, one input at a time."""
    found = []
    for example in examples:
        batch = read.collate(base, [example])
        with torch.no_grad():
            state = base.body(**batch.inputs).last_hidden_state[0]
        where = batch.inputs["input_ids"][0] == base.tokenizer.mask_token_id
        found.append(state[where])
    return torch.stack(found)


@pytest.mark.parametrize("name", ["bert", "roberta", "albert", "electra"])
@pytest.mark.parametrize("inference", ["prototypes", "raw_prototypes", "scores"])
def test_answers_are_the_papers(name: str, inference: str) -> None:
    """Equations 4 and 5 as loops, with unit vectors as the authors' code has them, and without."""
    base, task = tiny_base(name), tiny_task()
    read = readout("label_embedding", **PERFECT, inference=inference)
    head = read.attach(base, LABELS)
    model = Wired(base, read, head).eval()
    train, test = list(task.splits["train"]), list(task.splits["test"])
    read.remember(model, base, train)
    outputs = logits_of(model, base, test)
    learned, asked = states_by_hand(base, read, train), states_by_hand(base, read, test)
    for row, states in enumerate(asked):
        best = []
        for k in range(2):
            members = [h for h, e in zip(learned, train, strict=True) if e.label == k]
            center = torch.stack(members).mean(0)
            tried = []
            for i in range(2):
                h, c = states[i], center[i]
                if inference == "prototypes":
                    h, c = h / h.norm(), c / c.norm()
                score = -((h - c) ** 2).sum()
                tried.append(
                    head.vectors[k, i].detach() @ states[i] if inference == "scores" else score
                )
            best.append(max(float(t) for t in tried))
        found = read.predict(outputs[row : row + 1])[0]
        assert int(found) == best.index(max(best))
        shares = read.probabilities(outputs[row : row + 1])[0]
        torch.testing.assert_close(
            shares, torch.tensor(best).double().softmax(-1), atol=1e-5, rtol=0
        )


def test_scaling_hidden_states_changes_no_answer() -> None:
    base, task = tiny_base("bert"), tiny_task()
    read = readout("label_embedding", **PERFECT)
    model = Wired(base, read, read.attach(base, LABELS)).eval()
    answers = []
    norm = base.tower.encoder.layer[-1].output.LayerNorm
    for factor in (1.0, 3.0):
        with torch.no_grad():
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
        read.remember(model, base, task.splits["train"])
        answers.append(logits_of(model, base, task.splits["test"])[:, 1])
    torch.testing.assert_close(answers[0], answers[1], atol=1e-5, rtol=0)


def test_a_class_without_examples_is_never_answered() -> None:
    base, read = tiny_base("bert"), readout("label_embedding", **PERFECT)
    for inference in ("prototypes", "raw_prototypes"):
        read = readout("label_embedding", **PERFECT, inference=inference)
        model = Wired(base, read, read.attach(base, ("a", "b", "c"))).eval()
        read.remember(model, base, tiny_task().splits["train"])
        outputs = logits_of(model, base, tiny_task().splits["train"])
        assert torch.isfinite(outputs).all()
        assert 2 not in read.predict(outputs)


def test_words_begin_label_vectors() -> None:
    base = tiny_base("bert")
    head = readout("label_embedding", **PERFECT, words=("w1 w2 w3", "w4")).attach(base, LABELS)
    table = base.embedding.weight
    assert torch.equal(head.vectors[0], table[[6, 7]])
    assert torch.equal(head.vectors[1, 0], table[9])
    assert head.vectors[1, 1].abs().max() < 1e-3


# --- whole ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", ["prototypes", "scores"])
def test_a_file_answers_as_the_training_did(inference: str, tmp_path: Path) -> None:
    """Evaluations in training use prototypes of their moment, the file those of its best state."""
    base, task = tiny_base("bert"), tiny_task()
    recipe = Recipe(
        "few-shot",
        method("adapter", reduction=4, beside=("norm",)),
        readout("label_embedding", **PERFECT, inference=inference),
        Training(epochs=4, batch_size=8, evaluations=4, learning_rate=1e-2),
    )
    path = tmp_path / f"x{SUFFIX}"
    done = tune(base, task, recipe, out=path)
    assert evaluate(path, base, task, split="dev").value == done.score.value
    names = {stream.name for stream in Delta.load(path).streams}
    stored = "prototypes" if inference == "prototypes" else "vectors"
    assert {name for name in names if name.startswith("readout/")} == {f"readout/{stored}"}
    assert base.is_untouched()


def test_a_masked_language_model_does_as_well_as_its_body() -> None:
    base = tiny_language_base("bert")
    fitted = few_shot(base)
    fitted.wired.eval()
    assert torch.isfinite(logits_of(fitted.wired, base)).all()
    fitted.change.remove()
    assert base.is_untouched()


def test_bad_settings_are_named() -> None:
    with pytest.raises(SettingError, match=r"has no \{mask\}"):
        readout("label_embedding", template="{text}")
    with pytest.raises(SettingError, match="is a regression"):
        readout("label_embedding", **PERFECT).attach(tiny_base("bert"), ())
    with pytest.raises(SettingError, match="expected 2"):
        readout("label_embedding", **PERFECT, words=("w1",)).attach(tiny_base("bert"), LABELS)
    with pytest.raises(SettingError, match="vectors of 16 numbers"):
        few_shot(tiny_base("albert"), words=("w1", "w2"))


def test_a_phase_begins_with_label_vectors_of_its_own(tmp_path: Path) -> None:
    """Prototypes are stored and label vectors are not; the same seed still gives the same file."""
    base, task = tiny_base("bert"), tiny_task()
    read = readout("label_embedding", **PERFECT)
    first = Recipe("first", method("full"), read, Training(max_steps=2))
    second = Recipe("second", method("sparse", by="movement", density=0.1), read,
                    Training(max_steps=2), start=first)  # fmt: skip
    files = []
    for name in ("a", "b"):
        torch.rand(3)  # where the caller's random numbers are does not matter
        path = tmp_path / f"{name}{SUFFIX}"
        tune(base, task, second, out=path, starts=tmp_path / "starts")
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_prototypes_are_of_what_is_stored(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), tiny_task()
    recipe = Recipe(
        "coarse",
        method("adapter", reduction=2, std=0.3),
        readout("label_embedding", **PERFECT),
        Training(max_steps=4, learning_rate=1e-2, rounding=0.0),
        store="int4",
    )
    path = tmp_path / f"x{SUFFIX}"
    tune(base, task, recipe, out=path)
    delta = Delta.load(path)
    with delta.applied(base) as wired:
        stored = wired.head.prototypes.clone()
        wired.readout.remember(wired, base, task.splits["train"])
        exact = wired.head.prototypes
    # What is left is the rounding of the prototypes themselves.
    assert (stored - exact).norm() / exact.norm() < 0.14


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("adapter", {"beside": ("norm",)}), ("prompt", {"length": 3}), ("prefix", {"hidden": 0})],
)
def test_a_fit_goes_on_from_a_delta_of_its_method(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """With rate 0 what is stored is what was begun with; of another task the head is its own."""
    base, task = tiny_base("bert"), tiny_task()
    read = readout("classifier", max_length=32)
    first = Recipe(
        "first", method(kind, **settings), read, Training(max_steps=3, learning_rate=0.1)
    )
    path, again = tmp_path / f"first{SUFFIX}", tmp_path / f"again{SUFFIX}"
    tune(base, task, first, out=path)
    still = Training(max_steps=1, learning_rate=0.0, readout_learning_rate=0.0)
    second = Recipe("second", method(kind, **settings), read, still, start=str(path))
    tune(base, task, second, out=again)
    (before, head), (after, kept) = (Delta.load(file).tensors(base) for file in (path, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(head[name], kept[name]) for name in head)
    other = replace(task, labels=("yes", "no"))
    tune(base, other, second, out=again)
    after, kept = Delta.load(again).tensors(base)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(head["linear.weight"], kept["linear.weight"])


def test_what_can_not_go_on_is_told(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), tiny_task()
    read, brief = readout("classifier", max_length=32), Training(max_steps=1)
    path, out = tmp_path / f"first{SUFFIX}", tmp_path / f"x{SUFFIX}"

    def fit(kind: str, **settings: Any) -> None:
        tune(
            base, task, Recipe("x", method(kind, **settings), read, brief, start=str(path)), out=out
        )

    tune(base, task, Recipe("x", method("prompt", length=3), read, brief), out=path)
    with pytest.raises(SettingError, match="has length 3, and this fit 5"):
        fit("prompt", length=5)
    with pytest.raises(SettingError, match="of its own beside"):
        fit("adapter")
    tune(base, task, Recipe("x", method("prefix", length=3, hidden=0), read, brief), out=path)
    with pytest.raises(SettingError, match="not the net that made them"):
        fit("prefix", hidden=8, length=3)
    with pytest.raises(SettingError, match="has shift True, and this fit False"):
        fit("prefix", hidden=0, length=3, shift=False)
    tune(base, task, Recipe("x", method("adapter", reduction=4), read, brief), out=path)
    with pytest.raises(SettingError, match="has narrowness 'reduction 4', and .* 'reduction 8'"):
        fit("adapter", reduction=8)
    with pytest.raises(SettingError, match="has beside"):
        fit("adapter", reduction=4, beside=("norm",))
    moved = Recipe("x", method("full"), read, Training(max_steps=3))
    tune(base, task, moved, out=path)
    with pytest.raises(SettingError, match="begins at the base's weights"):
        fit("adapter")
    assert base.is_untouched()
