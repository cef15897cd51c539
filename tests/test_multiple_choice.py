"""UniMC's inputs and scores against the rules of its released code (spec 06)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from howfine.base import Base
from howfine.errors import SettingError, TaskError
from howfine.probe import GradientProbe
from howfine.readout import Readout, Wired, readout
from howfine.task import Example
from tiny import LABELS, SPECIAL, WORDS, logits_of, tiny_base, tiny_language_base, tiny_task

MASKED = ("bert", "roberta", "albert", "distilbert", "electra")
OPTIONS = ("w20 w21", "w22 w23 w24", "w25")
CLASSES = ("a", "b", "c")
TEXTS = [Example(("w1 w2 w3",), 0), Example(("w4",), 2), Example(("w5 w6 w7 w8 w9",), 1)]
ALL = (*SPECIAL, *WORDS)


def choice(**settings: Any) -> Readout:
    given: dict[str, Any] = {"options": OPTIONS, "question": "w4 w5", "answers": ("w50", "w51")}
    return readout("multiple_choice", **{**given, **settings})


def wired(base: Base, read: Readout, labels: tuple[str, ...] = CLASSES) -> Wired:
    return Wired(base, read, read.attach(base, labels)).eval()


def scores(base: Base, read: Readout, examples: list[Example] = TEXTS) -> Tensor:
    return logits_of(wired(base, read), base, examples)[:, :3]


def ids(words: str) -> list[int]:
    return [ALL.index(word) for word in words.split()]


def test_an_input_worked_by_hand() -> None:
    """Tokens, types, positions, places of masks, and who sees whom."""
    base = tiny_language_base("bert")
    batch = choice().collate(base, [TEXTS[0]])
    inputs = batch.inputs
    text = "[CLS] [MASK] w20 w21 [MASK] w22 w23 w24 [MASK] w25 [SEP] w4 w5 [SEP] w1 w2 w3 [SEP]"
    assert inputs["input_ids"][0].tolist() == ids(text)
    types = [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert inputs["token_type_ids"][0].tolist() == types
    places = [0, 1, 2, 3, 1, 2, 3, 4, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12]
    assert inputs["position_ids"][0].tolist() == places
    assert batch.reads is not None
    assert batch.reads.tolist() == [[1, 4, 8, 10]]
    block = [None, 0, 0, 0, 1, 1, 1, 1, 2, 2, *[None] * 8]
    for i, one in enumerate(block):
        for j, other in enumerate(block):
            seen = one is None or other is None or one == other
            assert (inputs["attention_mask"][0, 0, i, j] == 0) == seen, (i, j)


def test_positions_of_roberta_count_on_from_its_padding() -> None:
    base = tiny_language_base("roberta", type_vocab_size=1)
    batch = choice().collate(base, [TEXTS[0]])
    assert batch.inputs["position_ids"][0, :5].tolist() == [1, 2, 3, 4, 2]
    assert "token_type_ids" not in batch.inputs


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MASKED)
def test_permuting_options_permutes_scores(name: str, kernel: str) -> None:
    base = tiny_language_base(name)
    base.tower.set_attn_implementation(kernel)
    order = [2, 0, 1]
    straight = scores(base, choice())
    turned = scores(base, choice(options=tuple(OPTIONS[i] for i in order)))
    torch.testing.assert_close(turned, straight[:, order], atol=1e-5, rtol=0)
    # Without the block mask and the restart it does not hold.
    straight = scores(base, choice(apart=False))
    turned = scores(base, choice(options=tuple(OPTIONS[i] for i in order), apart=False))
    assert (turned - straight[:, order]).abs().max() > 1e-3


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MASKED)
def test_an_option_sees_no_other(name: str, kernel: str) -> None:
    """After one layer nothing of another option has reached it."""
    base = tiny_language_base(name, num_hidden_layers=1, n_layers=1)
    base.tower.set_attn_implementation(kernel)
    before = scores(base, choice())
    after = scores(base, choice(options=("w20 w21", "w30 w31 w32", "w25")))
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert (before[:, 1] - after[:, 1]).abs().max() > 1e-3
    deep = tiny_language_base(name)
    before, after = (
        scores(deep, choice(options=("w20 w21", other, "w25")))
        for other in ("w22 w23 w24", "w30 w31 w32")
    )
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-6


@pytest.mark.parametrize("name", MASKED)
def test_scores_are_the_models_own_logits_of_yes(name: str) -> None:
    base = tiny_language_base(name)
    batch = choice().collate(base, TEXTS)
    with torch.no_grad():
        logits = base.tower(**batch.inputs).logits
    found = scores(base, choice())
    assert batch.reads is not None
    for row in range(3):
        for option in range(3):
            expected = logits[row, batch.reads[row, option], ALL.index("w50")]
            assert found[row, option].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("name", MASKED)
def test_alone(name: str) -> None:
    base, read = tiny_language_base(name), choice()
    model = wired(base, read)
    together = logits_of(model, base, TEXTS)
    alone = torch.cat([logits_of(model, base, [text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_examples_may_have_options_of_their_own() -> None:
    """Fewer than there are classes: the others are never chosen, and have no share."""
    base = tiny_language_base("bert")
    own = [
        Example(("w4 w5", "w1 w2"), 0, ("w20", "w21")),
        Example(("w4 w5", ""), 1, ("w22", "w20", "w24")),
    ]
    read = choice(options=(), question="")
    model = wired(base, read)
    outputs = logits_of(model, base, own)
    assert torch.isfinite(outputs).all()
    shares = read.probabilities(outputs)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, dtype=torch.float64))
    assert shares[0, 2] < 1e-12
    assert int(read.predict(outputs)[0]) in (0, 1)
    with pytest.raises(TaskError, match="4 options and the task 3 classes"):
        logits_of(model, base, [Example(("w1",), 0, ("w1", "w2", "w3", "w4"))])


def test_class_names_are_the_options_where_none_are_given() -> None:
    base = tiny_language_base("bert")
    task = replace(tiny_task(), labels=("w20", "w21"))
    read: Any = choice(options=()).of_task(task)
    batch = read.collate(base, [TEXTS[0]])
    assert ids("[MASK] w20 [MASK] w21") == batch.inputs["input_ids"][0, 1:5].tolist()
    rows = [replace(row, options=("w1", "w2")) for row in task.splits["train"]]
    own = replace(task, splits={**task.splits, "train": rows})
    assert choice(options=()).of_task(own) == choice(options=())
    assert choice(options=("w3", "w4")).of_task(own) == choice(options=("w3", "w4"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_base_in_half_precision(kernel: str, dtype: torch.dtype) -> None:
    base = tiny_language_base("bert")
    exact = scores(base, choice())
    base.tower.set_attn_implementation(kernel)
    base.towers.to(dtype)
    torch.testing.assert_close(scores(base, choice()).float(), exact, atol=0.3, rtol=0)


def test_a_text_is_no_template() -> None:
    base = tiny_language_base("bert")
    read = choice(options=("w30 {pair}", "w31 {pair}"), question="")
    batch = read.collate(base, [Example(("w1", "w2 {text}"), 0)])
    assert ids("w30 w2 [UNK]") == batch.inputs["input_ids"][0, 2:5].tolist()


def test_options_may_hold_the_texts() -> None:
    """As entailment is asked: the hypothesis stands in the options, the premise behind them."""
    base = tiny_language_base("bert")
    read = choice(options=("w30 {pair}", "w31 {pair}"), question="")
    batch = read.collate(base, [Example(("w1 w2", "w3"), 0)])
    text = "[CLS] [MASK] w30 w3 [MASK] w31 w3 [SEP] w1 w2 [SEP]"
    assert batch.inputs["input_ids"][0].tolist() == ids(text)


def test_the_losses_are_the_papers() -> None:
    """Choice: cross-entropy over the options' "yes"; words: over all masks and guessed tokens."""
    base = tiny_language_base("bert")
    read = choice()
    model = Wired(base, read, read.attach(base, CLASSES))
    model.train()
    for module in base.towers.modules():
        module.training = False  # no dropout: the forward pass is to be repeated
    batch = read.collate(base, TEXTS)
    torch.manual_seed(3)
    outputs = model.head(base.towers, batch)
    assert batch.targets is not None
    # Again by hand, with the same draws.
    torch.manual_seed(3)
    inputs = dict(batch.inputs)
    assert batch.reads is not None
    guessed = model.head._hide(inputs, batch.reads[:, -1])
    assert guessed.any()
    with torch.no_grad():
        logits = base.tower(**inputs).logits
    losses = []
    for row in range(3):
        for place in range(logits.shape[1]):
            slots = batch.reads[row, :-1].tolist()
            if place in slots:
                gold = slots.index(place) == int(batch.targets[row])
                target = ALL.index("w50" if gold else "w51")
            elif guessed[row, place]:
                target = int(batch.inputs["input_ids"][row, place])
            else:
                continue
            losses.append(-logits[row, place].log_softmax(-1)[target].item())
    words = sum(losses) / len(losses)
    assert outputs[:, -1].mean().item() == pytest.approx(words, abs=1e-5)
    chosen = -outputs[:, :3].log_softmax(-1)[range(3), batch.targets].mean().item()
    assert read.loss(outputs, batch.targets).item() == pytest.approx(words + chosen, abs=1e-5)
    for objective, expected in (("choice", chosen), ("words", words)):
        alone = choice(objective=objective)
        assert alone.loss(outputs, batch.targets).item() == pytest.approx(expected, abs=1e-5)


def test_guessed_tokens_are_drawn_as_in_the_code() -> None:
    """A rate of 0, .1, .2 or .3 a row; of the chosen four fifths masked, a tenth kept."""
    base, read = tiny_language_base("bert"), choice(max_length=60)
    head: Any = read.attach(base, CLASSES)
    rows = [Example((" ".join(["w1"] * 60),), 0)] * 64
    torch.manual_seed(0)
    chosen, kinds = [], {"masked": 0, "kept": 0, "other": 0}
    for _ in range(40):
        batch = read.collate(base, rows)
        inputs = dict(batch.inputs)
        assert batch.reads is not None
        hidden = head._hide(inputs, batch.reads[:, -1])
        assert not hidden[:, : int(batch.reads[0, -1])].any()
        chosen.append(hidden[:, int(batch.reads[0, -1]) :].float().mean(1))
        before, after = batch.inputs["input_ids"][hidden], inputs["input_ids"][hidden]
        kinds["masked"] += int((after == 4).sum())
        kinds["kept"] += int((after == before).sum())
        kinds["other"] += int(((after != before) & (after != 4)).sum())
        assert torch.equal(batch.inputs["input_ids"][~hidden], inputs["input_ids"][~hidden])
    shares = torch.cat(chosen)
    assert shares.mean().item() == pytest.approx(0.125, abs=0.01)
    assert (shares == 0).float().mean().item() == pytest.approx(0.30, abs=0.03)
    total = sum(kinds.values())
    assert kinds["masked"] / total == pytest.approx(0.80, abs=0.02)
    assert kinds["kept"] / total == pytest.approx(0.10, abs=0.02)


def test_nothing_is_hidden_when_nothing_trains() -> None:
    """Options' masks are guessed wherever there are targets; in training without dropout, too."""
    base, read = tiny_language_base("bert"), choice()
    model = wired(base, read)
    batch = read.collate(base, TEXTS)
    first, again = (model(**batch.as_kwargs())["logits"] for _ in range(2))
    assert torch.equal(first, again)
    assert (first[:, -1] > 0).all()
    asked = read.collate(base, TEXTS, labelled=False)
    assert not model(**asked.as_kwargs())["logits"][:, -1].any()
    words = choice(objective="words")
    for mode in ("train without dropout", "eval"):
        made = Wired(base, words, words.attach(base, CLASSES), dropout=False)
        made.train(mode != "eval")
        assert made.head.training == (mode != "eval")
        assert made(**batch.as_kwargs())["loss"] > 0
    probe = GradientProbe(wired(base, words), base, TEXTS, 3)
    (found,) = probe.gradients(base, [base.choose(("Q@0",))[0]]).values()
    assert found.any()


def test_long_options_and_texts_are_cut() -> None:
    base = tiny_language_base("bert")
    long = " ".join(["w1"] * 80)
    batch = choice(max_length=64).collate(base, [Example((long,), 0)])
    row = batch.inputs["input_ids"][0].tolist()
    assert len(row) == 64
    assert row[-1] == ALL.index("[SEP]")
    both = ("w2 " + long, "w3 " + long)
    batch = choice(options=(), max_length=64).collate(base, [Example(("w9",), 0, both)])
    assert batch.inputs["input_ids"].shape[1] <= 64
    assert ALL.index("w9") in batch.inputs["input_ids"][0].tolist()
    # Those of a whole task are never cut.
    with pytest.raises(SettingError, match="the options take 164 of 64 tokens, and leave a text"):
        choice(options=both, max_length=64).collate(base, [Example(("w9",), 0)])


def test_bad_input_is_named() -> None:
    base = tiny_language_base("bert")
    with pytest.raises(SettingError, match="'w1' is there twice"):
        choice(options=("w1", "w1", "w2"))
    with pytest.raises(TaskError, match="w2, w2 are the same"):
        choice(options=()).collate(base, [Example(("w1",), 0, ("w2", "w2"))])
    long = " ".join(["w1"] * 80)
    both = choice(options=(f"{long} w2", f"{long} w3"), max_length=64)
    with pytest.raises(
        TaskError, match=r"cut to fit.*the same 10 tokens, .* has 64; raise max_len"
    ):
        both.collate(base, [Example(("w9",), 0)])
    with pytest.raises(TaskError, match="'Good' and 'good' the same tokens and can't tell"):
        choice(options=("Good", "good")).collate(base, [Example(("w9",), 0)])
    with pytest.raises(TaskError, match=r"holds the mask token \[MASK\]"):
        choice().collate(base, [Example(("w1 [MASK]",), 0)])
    with pytest.raises(TaskError, match="has 0"):
        choice(options=()).collate(base, [Example(("w1",), 0)])
    with pytest.raises(SettingError, match="one is empty"):
        choice(options=("w1", " "))
    for name in ("mpnet", "deberta-v2"):
        with pytest.raises(SettingError, match="takes no account of"):
            choice().attach(tiny_language_base(name), CLASSES)
    with pytest.raises(SettingError, match="expected 2: one for each"):
        choice().attach(base, LABELS)
    with pytest.raises(SettingError, match="needs a base of kind masked_lm"):
        choice().attach(tiny_language_base("gpt2"), CLASSES)
    with pytest.raises(SettingError, match="no language model's head"):
        choice().attach(tiny_base("bert"), CLASSES)
    with pytest.raises(SettingError, match="two different words"):
        choice(answers=("w1", "w1"))
    with pytest.raises(SettingError, match="expected one that it knows"):
        choice(answers=("hello", "w1")).attach(base, CLASSES)
    many = tuple(f"w{n}" for n in range(40))
    crowded = choice(options=many, max_length=40)
    with pytest.raises(SettingError, match="40 options leave no room"):
        crowded.collate(base, [Example(("w9",), 0)])


def test_it_trains() -> None:
    """A few steps on the tiny task, every loss: finite gradients for the whole model."""
    base, task = tiny_language_base("bert"), tiny_task()
    for objective in ("both", "choice", "words"):
        read = choice(options=("w20", "w21"), objective=objective)
        model = Wired(base, read, read.attach(base, LABELS))
        model.train()
        for parameter in base.towers.parameters():
            parameter.requires_grad_(True)
        batch = read.collate(base, task.splits["train"])
        model(**batch.as_kwargs())["loss"].backward()
        reached = [p.grad for p in base.towers.parameters() if p.grad is not None]
        assert len(reached) > 20
        assert all(torch.isfinite(gradient).all() for gradient in reached)
        for parameter in base.towers.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None


def test_only_the_choices_loss_is_a_mean_over_rows() -> None:
    """A row with more options has more words to guess, and more of a say in their mean."""
    base = tiny_language_base("bert")
    two, four = (f"w20 w{n} w22" for n in (21, 31))
    rows = [
        Example((two,), 0, options=("w40", "w41")),
        Example((four,), 1, options=("w40", "w41", "w42", "w43")),
    ]
    for objective in ("both", "words", "choice"):
        read = choice(options=(), objective=objective)
        wired = Wired(base, read, read.attach(base, ("a", "b", "c", "d"))).eval()
        losses = [
            float(wired(**read.collate(base, part).as_kwargs())["loss"])
            for part in (rows, rows[:1], rows[1:])
        ]
        same = losses[0] == pytest.approx(sum(losses[1:]) / 2, abs=1e-5)
        assert read.adds_up == same == (objective == "choice")
