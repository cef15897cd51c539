"""A model that writes: what is learned, what is written, and how that is scored."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

import howfine
from howfine.base import Base
from howfine.batch import Batch
from howfine.change import Change
from howfine.cli import app
from howfine.delta import SUFFIX
from howfine.errors import SettingError, TaskError
from howfine.evaluate import evaluate, logits, predict
from howfine.layout import UNSEEN, on_the_left
from howfine.ledger import pack_predictions, unpack_predictions
from howfine.method import Method, method
from howfine.plan import Plan
from howfine.readout import Readout, Wired, readout
from howfine.recipe import Recipe
from howfine.report import report
from howfine.study import study
from howfine.task import Example, Task
from howfine.tune import tune
from tiny import SPECIAL, WORDS, probe_for, tiny_base, tiny_task, tiny_writer, written_task

CAUSAL = ("gpt2", "llama", "qwen3", "gemma2")
ALL = (*SPECIAL, *WORDS)
EXAMPLES = [
    Example(("w1 w2 w3",), targets=("w4 w5", "w9")),
    Example(("w6",), targets=("w7 w8 w9 w10",)),
    Example(("w11 w12 w13 w14 w15",), targets=("w16",)),
]


def writer(**settings: Any) -> Readout:
    return readout("language_model", **{"max_length": 32, "max_new_tokens": 8, **settings})


def wired(base: Base, read: Readout) -> Wired:
    return Wired(base, read, read.attach(base, ())).eval()


def ids(words: str) -> list[int]:
    return [ALL.index(word) for word in words.split()]


def outputs(model: Wired, base: Base, labelled: bool, examples: list[Example] = EXAMPLES) -> Tensor:
    return logits(model, base, examples, labelled=labelled)


def test_inputs_worked_by_hand() -> None:
    base = tiny_writer("gpt2")
    read = writer(max_new_tokens=4)
    batch = read.collate(base, EXAMPLES[:2])
    rows = ["w1 w2 w3 [CLS] w4 w5 [SEP]", "w6 [CLS] w7 w8 w9 w10 [PAD]"]  # no room for an end
    assert batch.inputs["input_ids"].tolist() == [ids(row) for row in rows]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 7, [1] * 6 + [0]]
    assert batch.targets is not None
    assert batch.targets.tolist() == [
        [UNSEEN] * 4 + ids("w4 w5 [SEP]"),
        [UNSEEN] * 2 + ids("w7 w8 w9 w10") + [UNSEEN],
    ]
    asked = read.collate(base, EXAMPLES[:2], labelled=False)
    rows = ["w1 w2 w3 [CLS]", "[PAD] [PAD] w6 [CLS]"]
    assert asked.inputs["input_ids"].tolist() == [ids(row) for row in rows]
    assert asked.inputs["attention_mask"].tolist() == [[1] * 4, [0, 0, 1, 1]]
    assert asked.targets is None


def test_sources_are_cut_and_never_what_stands_around_them() -> None:
    base = tiny_writer("gpt2")
    read = writer(template="w50 {text} {slot*2} {bos}", max_length=12, max_new_tokens=4)
    long = Example((" ".join(f"w{i}" for i in range(20)),), targets=("w1 w2 w3 w4 w5",))
    batch = read.collate(base, [long])
    assert batch.targets is not None
    assert batch.slots is not None
    row = batch.inputs["input_ids"][0].tolist()
    assert row[:5] == ids("w50 w0 w1 w2 w3")
    assert row[7:] == ids("[CLS] w1 w2 w3 w4")
    assert batch.slots.tolist() == [[-1] * 5 + [0, 1] + [-1] * 5]
    asked = read.collate(base, [long, EXAMPLES[1]], labelled=False)
    assert asked.slots is not None
    assert asked.slots.tolist() == [[-1] * 5 + [0, 1, -1], [-1] * 5 + [0, 1, -1]]
    with pytest.raises(SettingError, match="max_new_tokens 12 leaves no room"):
        writer(max_length=12, max_new_tokens=12).attach(base, ())


def test_nobody_is_warned_of_what_is_cut() -> None:
    """transformers would, once a tokenizer: it does not know that the text is not used whole."""
    base = tiny_writer("gpt2")
    base.tokenizer.model_max_length = 8
    long = Example((" ".join(f"w{i}" for i in range(20)),), targets=("w1 w2 w3 w4 w5",))
    writer(max_length=12, max_new_tokens=4).collate(base, [long])
    assert not base.tokenizer.deprecation_warnings
    base.tokenizer(long.texts[0])
    assert base.tokenizer.deprecation_warnings


def test_turning_padding_to_the_left_keeps_rows_whole() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    tokens = torch.tensor([[7, 8, 9], [7, 0, 0], [7, 8, 0]])
    turned = on_the_left(Batch({"input_ids": tokens, "attention_mask": mask}))
    assert turned.inputs["input_ids"].tolist() == [[7, 8, 9], [0, 0, 7], [0, 7, 8]]
    assert turned.inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize("name", CAUSAL)
def test_likelihoods_are_the_models_own(name: str) -> None:
    """Each row by itself, through the whole model: no padding, no chosen positions."""
    base = tiny_writer(name)
    found = outputs(wired(base, writer()), base, labelled=True)
    for row, example in zip(found, EXAMPLES, strict=True):
        source = ids(f"{example.texts[0]} [CLS]")
        target = ids(f"{example.targets[0]} [SEP]")
        scores = base.tower(input_ids=torch.tensor([source + target])).logits[0]
        told = scores[len(source) - 1 : -1].log_softmax(-1)
        expected = -told[torch.arange(len(target)), target].sum()
        assert row[0] == pytest.approx(float(expected), abs=1e-4)
        assert row[1] == len(target)


def test_the_loss_is_a_mean_of_tokens_or_of_examples() -> None:
    base = tiny_writer("gpt2")
    read = writer()
    model = wired(base, read)
    batch = read.collate(base, EXAMPLES)
    made = model(**batch.as_kwargs())
    by_example = writer(reduction="examples").loss(made["logits"], batch.targets)
    assert made["loss"] == pytest.approx(float(made["logits"][:, 0].sum()) / (3 + 5 + 2))
    assert by_example == pytest.approx(float(made["logits"][:, 0].sum()) / 3)
    labels = batch.targets
    whole = base.tower(**batch.inputs).logits[:, :-1].flatten(0, 1)
    theirs = functional.cross_entropy(whole, labels[:, 1:].flatten(), ignore_index=UNSEEN)
    assert made["loss"] == pytest.approx(float(theirs), abs=1e-5)


def greedy(base: Base, source: list[int], most: int) -> list[int]:
    """Token after token through the whole model, with no cache and no padding."""
    row = list(source)
    for _ in range(most):
        row.append(int(base.tower(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
        if row[-1] == base.tokenizer.eos_token_id:
            break
    return row[len(source) :]


def texts_of(base: Base, rows: list[list[int]]) -> list[str]:
    return [" ".join(ALL[i] for i in row if ALL[i] not in SPECIAL) for row in rows]


@pytest.mark.parametrize("name", CAUSAL)
def test_rows_are_written_as_each_is_alone(name: str) -> None:
    # With tied vectors Gemma says what it read last.
    base = tiny_writer(name, tie_word_embeddings=False)
    read = writer()
    found = read.predictions(base, outputs(wired(base, read), base, labelled=False))
    with torch.inference_mode():
        rows = [greedy(base, ids(f"{e.texts[0]} [CLS]"), 8) for e in EXAMPLES]
    assert found.tolist() == texts_of(base, rows)
    assert len(set(found)) > 1
    assert base.is_untouched()


def test_an_end_ends_a_text() -> None:
    """The likeliest first token is made the end: nothing is written, and nothing behind it."""
    base = tiny_writer("gpt2")
    read = writer()
    first = greedy(base, ids("w1 w2 w3 [CLS]"), 3)
    base.tokenizer.eos_token = ALL[first[2]]
    model = wired(base, read)
    (told,) = read.predictions(base, outputs(model, base, False, EXAMPLES[:1]))
    assert told == " ".join(ALL[i] for i in first[: first.index(first[2])])


def beams_by_hand(base: Base, source: list[int], most: int, beams: int) -> list[int]:
    """Beam search by the book, each hypothesis through the whole model; ends count."""
    live, done = [(0.0, list(source))], []
    end = base.tokenizer.eos_token_id
    for _ in range(most):
        wide = []
        for score, row in live:
            told = base.tower(input_ids=torch.tensor([row])).logits[0, -1].float().log_softmax(-1)
            wide += [(score + float(told[i]), [*row, i]) for i in told.topk(2 * beams)[1].tolist()]
        wide = sorted(wide, key=lambda each: -each[0])[: 2 * beams]
        ranked = wide[:beams]
        done += [(s / (len(r) - len(source)), r) for s, r in ranked if r[-1] == end]
        live = [(s, r) for s, r in wide if r[-1] != end][:beams]
        if len(done) >= beams:
            break
    else:
        done += [(score / most, row) for score, row in live]
    return max(done, key=lambda each: each[0])[1][len(source) :]


def test_beams_are_those_of_the_book() -> None:
    base = tiny_writer("gpt2", seed=3)
    read = writer(beams=3, max_new_tokens=5)
    found = read.predictions(base, outputs(wired(base, read), base, labelled=False))
    with torch.inference_mode():
        rows = [beams_by_hand(base, ids(f"{e.texts[0]} [CLS]"), 5, 3) for e in EXAMPLES]
        plain = [greedy(base, ids(f"{e.texts[0]} [CLS]"), 5) for e in EXAMPLES]
    assert found.tolist() == texts_of(base, rows)
    assert found.tolist() != texts_of(base, plain)


CHANGES: dict[str, tuple[Method, str]] = {
    "slots": (method("prompt", init="normal"), "{slot} {text} {slot*2} {bos}"),
    "front": (method("prompt", init="normal", length=3), "{text} {bos}"),
    "prefix": (method("prefix", length=3, hidden=0), "{text} {bos}"),
    "infix": (method("prefix", hidden=0, place="slots"), "w3 {text} {slot*2} {bos}"),
    "adapter": (method("adapter", std=0.5, reduction=4), "{text} {bos}"),
}


def put_on(base: Base, how: Method, read: Readout) -> Change:
    torch.manual_seed(0)
    return how.attach(base, probe_for(how, read, base))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("beams", [1, 3])
def test_changes_are_on_in_every_step(name: str, kind: str, beams: int) -> None:
    """A batch with its padding and cache writes what each row does alone and without a cache."""
    base = tiny_writer(name)
    how, form = CHANGES[kind]
    read = writer(template=form, beams=beams, max_new_tokens=6)
    bare = read.predictions(base, outputs(wired(base, read), base, labelled=False))
    with put_on(base, how, read):
        model = wired(base, read)
        together = read.predictions(base, outputs(model, base, labelled=False))
        alone = [outputs(model, base, False, [each]) for each in EXAMPLES]
        assert together.tolist() == [read.predictions(base, each)[0] for each in alone]
        if beams == 1:
            assert together.tolist() == [step_by_step(model, base, read, e) for e in EXAMPLES]
    assert together.tolist() != bare.tolist()
    assert base.is_untouched()


def test_a_block_on_top_needs_a_cache_that_grows() -> None:
    base = tiny_writer("llama")
    fixed = {"cache_implementation": "static", "disable_compile": True, "max_new_tokens": 2}
    with (
        method("deep").attach(base),
        pytest.raises(SettingError, match=r"a cache of a fixed size \(StaticLayer\), expected one"),
    ):
        base.tower.generate(torch.tensor([ids("w1 w2")]), **fixed)
    assert base.is_untouched()


def step_by_step(model: Wired, base: Base, read: Readout, example: Example) -> str:
    """What is likeliest next, by the likelihoods that a loss is made of: no generate()."""
    written: list[int] = []
    longer: Readout = replace(read, max_new_tokens=8)  # type: ignore[type-var]
    for _ in range(6):
        # As many rows as there are tokens, each with another one at the end.
        words = replace(example, targets=(" ".join(["w1"] * (len(written) + 1)),))
        batch = longer.collate(base, [words] * len(ALL))
        assert batch.targets is not None
        tried = torch.tensor([[*written, i] for i in range(len(ALL))])
        batch.inputs["input_ids"][:, -1 - tried.shape[1] : -1] = tried
        batch.targets[:, -1 - tried.shape[1] : -1] = tried
        batch.targets[:, -1] = UNSEEN  # the end
        with torch.inference_mode():
            found = model(**batch.as_kwargs())["logits"][:, 0]
        written.append(int(found.argmin()))
        if written[-1] == base.tokenizer.eos_token_id:
            break
    return texts_of(base, [written])[0]


def test_a_task_is_learned_written_and_scored(tmp_path: Path) -> None:
    base, task = tiny_writer("gpt2"), written_task()
    read = writer(max_new_tokens=4)
    recipe = Recipe("copy", method("full"), read).override(
        epochs=40, batch_size=8, learning_rate=3e-3, evaluations=2
    )
    before = evaluate_bare(base, read, task)
    tuned = tune(base, task, recipe, out=tmp_path / f"copy{SUFFIX}")
    score = evaluate(tuned.path, base, task, split="train")
    assert score.metric == "rouge_l"
    assert score.scores["perplexity"] < 3 < before
    assert score.value > 80
    assert set(score.scores) == {"rouge_l", "bleu", "perplexity"}
    answers = predict(tuned.path, [task.splits["train"][0].texts[0]], base)
    assert answers == [{"text": score.predictions[0]}]
    assert (unpack_predictions(pack_predictions(score.predictions)) == score.predictions).all()
    with howfine.combine({"one": tuned.path}, base) as tasks:
        (told,) = tasks.predict([("one", task.splits["train"][0].texts[0])])
    assert told == {"task": "one", "text": score.predictions[0]}
    assert base.is_untouched()


def evaluate_bare(base: Base, read: Readout, task: Task) -> float:
    total, tokens = outputs(wired(base, read), base, True, list(task.splits["train"])).sum(0)
    return math.exp(total / tokens)


def test_perplexity_is_of_all_tokens_together() -> None:
    base, task = tiny_writer("llama"), written_task()
    read = writer()
    with method("full").attach(base) as change:
        delta = howfine.Delta.pack(
            base, method("full"), change, read.settled(base), read.attach(base, ()), (), "fp32"
        )
    score = evaluate(delta, base, task)
    model = wired(base, read)
    total, tokens = outputs(model, base, True, list(task.splits["test"])).sum(0)
    assert score.scores["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert score.calibration is None


def test_the_command_writes(tmp_path: Path) -> None:
    base = tiny_writer("gpt2")
    base.tower.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    examples = [each for split in written_task().splits.values() for each in split]
    rows = [{"say": e.texts[0], "so": list(e.targets)} for e in examples]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    columns = ["--text", "say", "--target", "so"]
    out = tmp_path / f"a{SUFFIX}"
    told = CliRunner().invoke(
        app,
        ["tune", "--recipe", "bitfit", "--readout", "language_model", "--base",
         str(tmp_path / "base"), "--task", str(path), *columns, "--out", str(out), "--max-steps",
         "1", "--max-length", "32", "--max-new-tokens", "6", "--json"],
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["score"]["metric"] == "bleu"
    told = CliRunner().invoke(app, ["predict", str(out), "w1 w2"])
    assert told.exit_code == 0, told.output
    text, asked = told.stdout.rstrip("\n").split("\t")
    assert asked == "w1 w2"
    assert text == predict(out, ["w1 w2"])[0]["text"]


def test_what_can_not_be() -> None:
    base = tiny_writer("gpt2")
    with pytest.raises(SettingError, match="needs a base of kind causal_lm or seq2seq_lm"):
        writer().attach(tiny_base("bert"), ())
    with pytest.raises(SettingError, match="has a {mask}"):
        writer(template="{text} {mask}")
    with pytest.raises(SettingError, match="expected 1 at least"):
        writer(beams=0)
    with pytest.raises(TaskError, match="no text to be written"):
        writer().collate(base, [Example(("w1",))])
    with pytest.raises(TaskError, match="which ends it"):
        writer().collate(base, [Example(("w1",), targets=("w2 [SEP] w3",))])
    recipe = Recipe("x", method("full"), writer())
    with pytest.raises(TaskError, match="has classes or scores, and the readout of recipe x"):
        tune(base, tiny_task(), recipe)
    reads = Recipe("y", method("full"), readout("classifier"))
    with pytest.raises(TaskError, match="has texts to be written, and the readout of recipe y"):
        tune(tiny_base("gpt2"), written_task(), reads)
    still = Recipe("z", method("select", train=("none",)), writer())
    with pytest.raises(SettingError, match="recipe z: its method changes nothing"):
        tune(base, written_task(), still)
    base.tokenizer.eos_token = None
    with pytest.raises(SettingError, match="no token for an end"):
        writer().attach(base, ())


def test_a_recipe_takes_another_readout() -> None:
    """In all its phases, and then the settings of that one."""
    chosen = Recipe.load("diff-pruning").override(readout="language_model", max_new_tokens=9)
    phase: Any = chosen
    while isinstance(phase, Recipe):
        assert phase.readout == readout("language_model", max_new_tokens=9)
        phase = phase.start
    with pytest.raises(SettingError, match="language_model"):
        Recipe.load("bitfit").override(readout="language_modle")


def test_a_study_of_texts(tmp_path: Path) -> None:
    """Every run with the readout that the plan names; the report reads texts back."""
    base, task = tiny_writer("gpt2"), written_task()
    read = {"language_model": {"max_length": 32, "max_new_tokens": 4}}
    plan = Plan("full", "bitfit", (), settings={"readout": read, "max_steps": 2}, seeds=(0,))
    assert plan.kind == "causal_or_seq2seq_lm"
    study(base, task, plan, out=tmp_path)
    assert "ROUGE-L" in report(tmp_path, base=base, task=task)["sentence"]


def test_numbers_of_texts_are_kept_as_they_are() -> None:
    told = np.array(["ä", "", "two\nlines"], dtype=object)
    assert unpack_predictions(pack_predictions(told)).tolist() == told.tolist()
