"""Answers without training, changes that are no weights, and tasks with options of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from typer.testing import CliRunner

from howfine.base import Base
from howfine.cli import app
from howfine.compare import delta_distance
from howfine.delta import SUFFIX
from howfine.errors import (
    BaseError,
    BaseNotFound,
    SettingError,
    StorageError,
    TaskError,
    TaskNotFound,
)
from howfine.evaluate import evaluate, predict
from howfine.extract import extract
from howfine.merge import merge
from howfine.method import method
from howfine.plan import Plan
from howfine.readout import readout
from howfine.recipe import Recipe
from howfine.task import Example, Task
from howfine.tune import tune
from howfine.zero_shot import meta_train, zero_shot
from tiny import fit_a_little, tiny_base, tiny_language_base, tiny_task, wire

WORDS = {"answers": ("w50", "w51")}


def saved_base(folder: Path) -> str:
    """A tiny masked language model as a folder, as users have one."""
    base = tiny_language_base("bert")
    base.tower.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return str(folder)


def test_zero_shot_gives_every_option_its_share() -> None:
    base = tiny_language_base("bert")
    answers = zero_shot(base, ["w1 w2", "w3"], ["w20", "w21 w22"], question="w4", **WORDS)
    for answer in answers:
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["probability"] == max(answer["probabilities"].values())
        assert answer["probabilities"][answer["option"]] == answer["probability"]
    turned = zero_shot(base, ["w1 w2", "w3"], ["w21 w22", "w20"], question="w4", **WORDS)
    for one, other in zip(answers, turned, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    assert zero_shot(base, [], ["w20", "w21"], **WORDS) == []
    assert base.is_untouched()
    with pytest.raises(SettingError, match="is there twice"):
        zero_shot(base, ["w1"], ["w20", "w20"], **WORDS)
    with pytest.raises(SettingError, match="several texts"):
        zero_shot(base, "w1 w2", ["w20", "w21"], **WORDS)
    with pytest.raises(SettingError, match="several options"):
        zero_shot(base, ["w1 w2"], "ab", **WORDS)
    with pytest.raises(TaskError, match="input 2 is an Example with options of its own"):
        zero_shot(base, ["w1", Example(("w2",), options=("w7", "w8"))], ["w20", "w21"], **WORDS)
    with pytest.raises(SettingError, match="no setting epochs"):
        zero_shot(base, ["w1"], ["w20", "w21"], epochs=3)
    with pytest.raises(SettingError, match="needs a base of kind masked_lm"):
        zero_shot(tiny_language_base("gpt2"), ["w1"], ["w20", "w21"], **WORDS)


def test_zero_shot_refuses_what_has_no_sensible_answer() -> None:
    base = tiny_language_base("bert")
    with pytest.raises(SettingError, match="found 1 options, expected what may be answered"):
        zero_shot(base, ["w1"], ["w20"], **WORDS)
    long = ["w20 " * 30, "w21 " * 30]
    with pytest.raises(SettingError, match="the options take 62 of 64 tokens, and leave a text"):
        zero_shot(base, ["w1"], long, **WORDS)
    with pytest.raises(SettingError, match="shorten the question, or raise max_length"):
        zero_shot(base, ["w1"], ["w20", "w21"], question="w9 " * 60, **WORDS)
    with pytest.raises(SettingError, match=r"is a gpt2, of which there is none; give another"):
        zero_shot(tiny_language_base("gpt2"), ["w1"], ["w20", "w21"], **WORDS)
    with pytest.raises(TaskError, match=r"an option has \{pair\}, for a second text, and 'w1 w2'"):
        zero_shot(base, ["w1 w2"], ["w30 {pair}", "w31 {pair}"], **WORDS)


def test_zero_shot_asks_as_the_base_was_trained(tmp_path: Path) -> None:
    """The folder that meta_train writes says which words answer."""
    rows = tuple(
        Example((f"w{n} w{n + 1}",), label=n % 2, options=(f"w{n + 20}", f"w{n + 40}"))
        for n in range(8)
    )
    splits = {"train": rows, "dev": rows[:4], "test": rows[:4]}
    task = Task("choices", splits, ("1", "2"), "accuracy", "made up")
    settings = {**WORDS, "max_length": 40}
    meta_train(
        saved_base(tmp_path / "base"), task, tmp_path / "made", epochs=1, batch_size=4, **settings
    )
    asked = (str(tmp_path / "made"), ["w1 w2", "w7"], ["w20", "w21 w22"])
    assert zero_shot(*asked) == zero_shot(*asked, **settings)
    assert zero_shot(*asked) != zero_shot(*asked, answers=("w51", "w50"))
    command = ["zero-shot", "w1 w2", "--options", "w20;w21 w22", "--base", asked[0], "--json"]
    own, other = (
        json.loads(CliRunner().invoke(app, [*command, *more]).stdout)
        for more in ([], ["--answers", "w51,w50"])
    )
    assert own[0]["probabilities"] == pytest.approx(zero_shot(*asked)[0]["probabilities"], abs=1e-5)
    assert other[0]["probabilities"] != pytest.approx(own[0]["probabilities"], abs=1e-5)
    (tmp_path / "made" / "readout.json").write_text("[]")
    with pytest.raises(BaseError, match="is not what merge wrote"):
        zero_shot(*asked)


def test_zero_shot_of_a_pair() -> None:
    base = tiny_language_base("bert")
    options = ["w30 {pair}", "w31 {pair}"]
    (same,) = zero_shot(base, [("w1 w2", "w3")], options, **WORDS)
    (other,) = zero_shot(base, [("w1 w2", "w4")], options, **WORDS)
    assert same["option"] in options
    assert same["probability"] != other["probability"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base by its folder, loaded with its language model's head."""
    name = saved_base(tmp_path / "base")
    # The tiny vocabulary has no yes and no.
    read = readout("multiple_choice", **WORDS)
    recipe = Recipe("unimc", method("full"), read)
    monkeypatch.setattr(Recipe, "load", classmethod(lambda cls, name: recipe))
    command = ["zero-shot", "w1 w2", "w3", "--options", "w20; w21 w22", "--base", name]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    answers = json.loads(done.stdout)
    assert [set(answer["probabilities"]) for answer in answers] == [{"w20", "w21 w22"}] * 2
    said = CliRunner().invoke(app, command)
    assert said.stdout.splitlines()[0].startswith(answers[0]["option"])


# --- changes beside the weights ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter", "prompt", "prefix"])
def test_what_changes_no_weight_is_not_merged_nor_measured(name: str, tmp_path: Path) -> None:
    """Silently leaving it out would make a checkpoint that is the base."""
    base = tiny_base("gpt2")
    settings: dict[str, Any] = {} if name == "adapter" else {"length": 2}
    fitted = fit_a_little(base, method(name, **settings))
    delta = fitted.delta()
    fitted.change.remove()
    with pytest.raises(SettingError, match="parameters of its own beside"):
        merge(delta, tmp_path / "out", base)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SettingError, match="parameters of its own beside"):
        delta_distance(delta, base)
    delta.save(tmp_path / f"x{SUFFIX}")
    with pytest.raises(SettingError, match="parameters of its own beside"):
        extract(base, tmp_path / f"x{SUFFIX}", out=tmp_path / f"y{SUFFIX}", density=0.1)
    assert base.is_untouched()


def test_a_plan_asks_for_the_base_that_its_recipes_read() -> None:
    assert Plan("full", "head-only", ("warp",)).kind == "masked_or_causal_lm"
    assert Plan("full", "head-only", ("mask",)).kind == "body"


def test_classifiers_read_a_language_models_body(tmp_path: Path) -> None:
    base, body = tiny_language_base("bert"), tiny_base("bert")
    read = readout("classifier", max_length=32)
    assert (
        wire(base, method("full"), read).logits().shape
        == wire(body, method("full"), read).logits().shape
    )


@pytest.mark.parametrize(
    ("name", "kind"), [("bert", "masked_lm"), ("gpt2", "causal_lm"), ("roberta", "masked_lm")]
)
def test_a_base_loads_as_the_language_model_it_is(name: str, kind: str, tmp_path: Path) -> None:
    tiny = tiny_language_base(name)
    tiny.tower.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    base = Base.load(str(tmp_path), kind="masked_or_causal_lm")
    assert base.kind == kind
    assert base.fingerprint == tiny.fingerprint


def test_a_base_saved_without_its_head_is_told(tmp_path: Path) -> None:
    body = tiny_base("bert")
    body.tower.save_pretrained(tmp_path)
    body.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BaseNotFound, match="saved without a language model's head: it lacks cls"):
        Base.load(str(tmp_path), kind="masked_or_causal_lm")


# --- tasks with options of their own -------------------------------------------------------------


def choice_folder(folder: Path) -> Path:
    """One set with all splits and a context, one with train and test alone, one without train."""

    def write(name: str, split: str, count: int, options: int, context: bool) -> None:
        table = {
            "question": [f"w{n}" for n in range(count)],
            "choices": [[f"w{n + o} w{20 + o}" for o in range(options)] for n in range(count)],
            "label": [str(n % options) for n in range(count)],
        }
        if context:
            table["context"] = [f"w{n} w9" for n in range(count)]
        path = folder / "mc" / name / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table(table), path)

    for split in ("train", "dev", "test"):
        write("dream", split, 12, 3, context=True)
    for split in ("train", "test"):
        write("openbookqa", split, 20, 4, context=False)
    for split in ("dev", "test"):
        write("copa", split, 20, 2, context=False)
    return folder


def test_multiple_choice_sets(tmp_path: Path) -> None:
    data = choice_folder(tmp_path)
    task = Task.load("mc/dream", data=data)
    assert {split: len(rows) for split, rows in task.splits.items()} == {
        "train": 12,
        "dev": 12,
        "test": 12,
    }
    assert task.splits["train"][1].texts == ("w1", "w1 w9")
    assert task.splits["train"][1].options == ("w1 w20", "w2 w21", "w3 w22")
    assert task.labels == ("1", "2", "3")
    both = Task.load("mc/dream+mc/openbookqa", data=data)
    assert both.labels == ("1", "2", "3", "4")
    assert len(both.splits["train"]) == 12 + 18
    assert both.splits["dev"][-1].texts[1] == ""
    assert len(Task.load("mc/copa", data=data).splits["test"]) == 20
    assert "carved" not in task.provenance
    assert both.provenance.endswith("; dev carved out of train")
    with pytest.raises(TaskNotFound, match="name it with --data"):
        Task.load("mc/dream")
    with pytest.raises(TaskNotFound, match="holds no train"):
        Task.load("mc/arc_easy", data=data)
    stories = [f"w{story} w40" for story in range(30) for _ in range(4)]
    asked = {"question": [f"w{n % 9}" for n in range(120)], "context": stories}
    asked["label"] = [0, 1] * 60
    asked["choices"] = [["w1", f"w{2 + n % 7}"] for n in range(120)]
    (data / "mc" / "mctest500").mkdir()
    parquet.write_table(pyarrow.table(asked), data / "mc" / "mctest500" / "train.parquet")
    told = Task.load("mc/mctest500", data=data)
    assert told.provenance.endswith("; dev, test carved out of train")
    read = {split: {row.texts[1] for row in rows} for split, rows in told.splits.items()}
    assert sum(map(len, read.values())) == len(set.union(*read.values())) == 30  # none on two sides
    assert sum(map(len, told.splits.values())) == 120
    assert len(told.splits["dev"]) % 4 == len(told.splits["test"]) % 4 == 0
    odd = {"question": ["w1"], "choices": [["w1", "w2"]], "label": ["2"]}
    parquet.write_table(pyarrow.table(odd), data / "mc" / "dream" / "dev.parquet")
    with pytest.raises(TaskError, match="label 2 of 2 options"):
        Task.load("mc/dream", data=data)


def test_options_count_in_a_fingerprint(tmp_path: Path) -> None:
    data = choice_folder(tmp_path)
    task = Task.load("mc/dream", data=data)
    other = {
        split: [type(row)(row.texts, row.label, row.options[::-1]) for row in rows]
        for split, rows in task.splits.items()
    }
    turned = Task(task.name, other, task.labels, task.metric, "turned")
    assert turned.fingerprint != task.fingerprint


def test_meta_training_and_then_zero_shot(tmp_path: Path) -> None:
    """Train on sets with options, merge, load the folder, answer something else."""
    data, name = choice_folder(tmp_path), saved_base(tmp_path / "base")
    base = Base.load(name, kind="masked_or_causal_lm")
    task = Task.load("mc/dream+mc/openbookqa", data=data)
    recipe = Recipe.load("unimc").override(
        answers=("w50", "w51"), epochs=1, learning_rate=1e-3, max_length=64
    )
    path = tmp_path / f"choice{SUFFIX}"
    done = tune(base, task, recipe, out=path)
    assert 0 <= done.score.value <= 1
    assert base.is_untouched()
    merged = merge(path, tmp_path / "merged", base)
    trained = Base.load(str(merged), kind="masked_or_causal_lm")
    asked = (["w1 w2", "w3"], ["w20", "w21"])
    answers, before = (zero_shot(each, *asked, **WORDS) for each in (trained, base))
    assert answers != before
    assert torch.isfinite(torch.tensor([answer["probability"] for answer in answers])).all()


def test_a_plain_text_has_no_options_where_examples_had_their_own(tmp_path: Path) -> None:
    base = tiny_language_base("bert")
    task = Task.load("mc/dream", data=choice_folder(tmp_path))
    recipe = Recipe.load("unimc").override(answers=("w50", "w51"), max_steps=1, max_length=64)
    delta = tune(base, task, recipe, out=tmp_path / f"own{SUFFIX}").delta
    with pytest.raises(TaskError, match="'w1 w2' has 0; set the readout's options"):
        predict(delta, ["w1 w2"], base)
    (found,) = predict(delta, [Example(("w1 w2",), options=("w3", "w4"))], base)
    assert found["label"] in ("1", "2")
    given = recipe.override(options=("w3", "w4", "w5"))
    delta = tune(base, task, given, out=tmp_path / f"given{SUFFIX}").delta
    assert predict(delta, ["w1 w2"], base)


def test_meta_train_is_both_in_one(tmp_path: Path) -> None:
    """The folder is what tune and merge give; it answers, and nothing else is left."""
    data, name = choice_folder(tmp_path), saved_base(tmp_path / "base")
    told = {"answers": "w50,w51", "max_steps": "2", "learning_rate": "1e-3", "max_length": "64"}
    flags = [part for key, value in told.items() for part in (f"--{key.replace('_', '-')}", value)]
    out = tmp_path / "made"
    done = CliRunner().invoke(
        app,
        ["meta-train", "--base", name, "--task", "mc/dream", "--data", str(data), "--out",
         str(out), "--json", *flags],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["folder"] == str(out)
    base = Base.load(name, kind="masked_or_causal_lm")
    task = Task.load("mc/dream", data=data)
    recipe = Recipe.load("unimc").override(**told)
    tuned = tune(base, task, recipe, out=tmp_path / f"by-hand{SUFFIX}")
    other = merge(tuned.delta, tmp_path / "by-hand", base)
    made, by_hand = (Base.load(str(f), kind="masked_or_causal_lm") for f in (out, other))
    assert made.fingerprint == by_hand.fingerprint != base.fingerprint
    with pytest.raises(StorageError, match="exists already"):
        meta_train(base, task, out)
    with pytest.raises(TaskError, match="examples without options of their own"):
        meta_train(base, tiny_task(), tmp_path / "other")


def test_options_of_their_own_need_a_readout_that_reads_them(tmp_path: Path) -> None:
    task = Task.load("mc/dream", data=choice_folder(tmp_path))
    with pytest.raises(TaskError, match="does not read"):
        tune(tiny_base("bert"), task, "head-only", out=tmp_path / f"x{SUFFIX}")


def test_training_goes_on_with_other_options(tmp_path: Path) -> None:
    """A change without a head means the same under another readout of no parameters."""
    base = Base.load(saved_base(tmp_path / "base"), kind="masked_or_causal_lm")
    task = replace(tiny_task(), labels=("w5", "w6"))
    first = Recipe.load("unimc").override(
        answers=("w50", "w51"), options=("w1", "w2"), max_steps=2, learning_rate=1e-3
    )
    path = tmp_path / f"first{SUFFIX}"
    tune(base, task, first, out=path)
    second = replace(
        first.override(options=("w3", "w4")),
        method=method("sparse", by="movement", density=0.1),
        start=str(path),
    )
    done = tune(base, task, second, out=tmp_path / f"second{SUFFIX}")
    assert 0 <= done.score.value <= 1
    answers = extract(base, path, tmp_path / f"some{SUFFIX}", density=0.1, task=task)
    assert answers.head  # without parameters
    assert answers.score is not None
    assert answers.score.value == evaluate(answers.path, base, task, split="dev").value
    named = first.override(options=())
    done = tune(base, task, named, out=tmp_path / f"named{SUFFIX}")
    assert done.delta.readout.options == ("w5", "w6")  # type: ignore[attr-defined]
