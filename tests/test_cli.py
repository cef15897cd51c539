"""The command line: every verb, what it prints, and that what it prints is so."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from console import Said, howfine_here, settle
from disk import base_folder, howfine, plan_file, task_folder
from howfine import container, regions, stated
from howfine.base import Base
from howfine.cli import app
from howfine.delta import Delta
from howfine.method import methods
from howfine.recipe import Recipe, recipes
from tiny import tiny_tower

VERBS = ["tune", "evaluate", "predict", "distance", "inspect", "merge", "study", "report"]
VERBS += ["methods", "demo", "extract", "slice", "export"]
QUICK = ("--max-steps", 2, "--batch-size", 8)


class Inputs:
    """A base and a task on disk, and a delta made of them by the command line."""

    def __init__(self, folder: Path) -> None:
        self.base, self.task = base_folder(folder), task_folder(folder)
        self.delta = folder / "mask.delta.safetensors"
        # At this rate no entry flips.
        flags = ("--initial-sparsity", 0.3, "--learning-rate", 1e-3)
        self.said = self.tune("--out", self.delta, *flags)
        settle()

    def tune(self, *flags: object, recipe: object = "mask") -> Said:
        made_on = ("--base", self.base, "--task", self.task)
        return howfine_here("tune", *made_on, "--recipe", recipe, *QUICK, *flags)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("cli"))


def header_of(path: Path) -> dict[str, Any]:
    return container.read(path)[0]


def examples(inputs: Inputs, split: str) -> list[tuple[str, str]]:
    with (inputs.task / f"{split}.csv").open(newline="") as stream:
        return [(row["text"], row["label"]) for row in csv.DictReader(stream)]


# tune, evaluate, predict.


def test_tune_says_what_it_made(inputs: Inputs) -> None:
    size, score = inputs.delta.stat().st_size, header_of(inputs.delta)["score"]
    pattern = rf"{inputs.delta}: {size:,} bytes, accuracy {score[1]:.4f} \[.*\] on 8 of dev, .*\n"
    assert re.fullmatch(pattern, inputs.said.out)
    base = Base.load(str(inputs.base))
    changed = regions.size(regions.support(Delta.load(inputs.delta), base))
    assert f", {changed:,} entries changed, " in inputs.said.out
    beside = inputs.tune("--out", inputs.delta.with_stem("beside.delta"), recipe="prefix")
    assert beside.code == 0
    assert "entries changed" not in beside.out


def test_tune_prints_json_and_nothing_else(inputs: Inputs, tmp_path: Path) -> None:
    said = inputs.tune("--json", "--out", tmp_path / "x.delta.safetensors")
    assert said.json["file"] == str(tmp_path / "x.delta.safetensors")
    assert said.json["bytes"] == (tmp_path / "x.delta.safetensors").stat().st_size
    assert said.json["score"]["value"] == header_of(tmp_path / "x.delta.safetensors")["score"][1]
    assert said.json["steps"] == 2
    assert "%" not in said.err, "a progress bar beside --json"


def test_the_default_name_is_under_runs(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = inputs.tune("--json", "--train-size", 8).json["file"]
    assert [str(path) for path in Path("runs").glob("*-mask.delta.safetensors")] == [made]


def test_evaluate_gives_the_score_in_the_header(inputs: Inputs) -> None:
    found = howfine_here("evaluate", inputs.delta, "--split", "dev", "--json").json
    metric, value, interval, on, count = header_of(inputs.delta)["score"]
    assert (found["metric"], round(found["score"], 6)) == (metric, value)
    assert [round(edge, 6) for edge in found["interval"]] == interval
    assert (f"{found['task']}/{found['split']}", found["n"]) == (on, count)
    assert found["bytes"] == inputs.delta.stat().st_size


def test_evaluate_and_predict_agree(inputs: Inputs) -> None:
    """Accuracy by hand, from the labels that predict prints."""
    rows = examples(inputs, "test")
    answers = howfine_here("predict", inputs.delta, *(text for text, _ in rows), "--json").json
    right = [answer["label"] == label for answer, (_, label) in zip(answers, rows, strict=True)]
    said = howfine_here("evaluate", inputs.delta, "--task", inputs.task)
    share = sum(right) / len(right)
    assert re.fullmatch(rf"accuracy {share:.4f} \[.*\] on 8 of test, ECE 0\.\d+\n", said.out)


def test_evaluate_says_how_far_its_probabilities_can_be_trusted(inputs: Inputs) -> None:
    rows = examples(inputs, "test")
    answers = howfine_here("predict", inputs.delta, *(text for text, _ in rows), "--json").json
    sure = [answer["probability"] for answer in answers]
    task = ("--task", inputs.task)
    found = howfine_here("evaluate", inputs.delta, *task, "--json").json["calibration"]
    assert found["confidence"] == pytest.approx(statistics.mean(sure), abs=1e-6)
    assert sum(found["reliability"]["count"]) == found["n"] == len(rows)
    assert "temperature" not in found
    asked = (*task, "--temperature-from", "dev")
    fitted = howfine_here("evaluate", inputs.delta, *asked, "--json").json["calibration"]
    assert {**found, "temperature": fitted["temperature"]} == fitted
    said = howfine_here("evaluate", inputs.delta, *asked).out
    before, after, value = re.search(
        r", ECE (\S+) \((\S+) at temperature (\S+), fitted on dev\)\n$", said
    ).groups()  # type: ignore[union-attr]
    assert (float(before), float(after)) == pytest.approx(
        (found["ece"], fitted["temperature"]["ece"]), abs=5e-5
    )
    assert float(value) == pytest.approx(fitted["temperature"]["value"], rel=5e-3)
    refused = howfine_here("evaluate", inputs.delta, *task, "--temperature-from", "test")
    assert "name another split" in refused.sentence


def test_predict_in_words(inputs: Inputs) -> None:
    (answer,) = howfine_here("predict", inputs.delta, "w1 w2 w3", "--json").json
    assert 0.5 <= answer["probability"] <= 1
    said = howfine_here("predict", inputs.delta, "w1 w2 w3")
    assert said.out == f"{answer['label']}\t{answer['probability']}\tw1 w2 w3\n"


def test_predict_takes_a_pair_with_a_tab(inputs: Inputs) -> None:
    """The same as transformers' own pair through the changed base."""
    (answer,) = howfine_here("predict", inputs.delta, "w1 w2\tw3", "--json").json
    base, delta = Base.load(str(inputs.base)), Delta.load(inputs.delta)
    with delta.applied(base) as model, torch.no_grad():
        pair = base.tokenizer("w1 w2", "w3", return_tensors="pt")
        shares = model(inputs=dict(pair))["logits"].softmax(-1)
    assert answer["probability"] == pytest.approx(shares.max().item(), abs=1e-6)
    (alone,) = howfine_here("predict", inputs.delta, "w1 w2 w3", "--json").json
    assert alone != answer


def test_predict_reads_standard_input(inputs: Inputs) -> None:
    texts = [text for text, _ in examples(inputs, "dev")]
    as_arguments = howfine_here("predict", inputs.delta, *texts)
    piped = howfine_here("predict", inputs.delta, "-", stdin="".join(f"{t}\n" for t in texts))
    assert as_arguments.out == piped.out
    assert piped.out.count("\n") == 8
    assert howfine_here("predict", inputs.delta, "-", "--json").json == []


# distance, inspect, merge, methods.


def test_distance_between_checkpoints(inputs: Inputs, tmp_path: Path) -> None:
    changed = tiny_tower("bert")
    path = "encoder.layer.1.output.dense.weight"
    with torch.no_grad():
        changed.get_parameter(path)[0] += 0.5
    changed.save_pretrained(tmp_path)
    rows = {
        row["path"]: row for row in howfine_here("distance", inputs.base, tmp_path, "--json").json
    }
    before, after = (load_file(f / "model.safetensors") for f in (inputs.base, tmp_path))
    assert rows.keys() == before.keys()
    moved = np.abs(after[path].double().numpy() - before[path].double().numpy())
    assert rows[path]["l1"] == pytest.approx(moved.sum(), rel=1e-6)
    assert rows[path]["mean_abs"] == pytest.approx(moved.mean(), rel=1e-6)
    assert rows[path]["changed"] == pytest.approx(1 / 32)
    assert (rows[path]["layer"], rows[path]["part"]) == (1, "O")
    assert all(row["l1"] == 0 for name, row in rows.items() if name != path)
    words = howfine_here("distance", inputs.base, tmp_path).out.splitlines()
    assert len(words) == 1 + len(rows)
    assert any(line.startswith(path) and "3.12%" in line for line in words)


def test_what_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    """A bias of zeros that moved has moved infinitely far, relative to itself."""
    model, path = tiny_tower("bert"), "encoder.layer.1.output.dense.bias"
    for number, name in enumerate(("before", "after")):
        with torch.no_grad():
            model.get_parameter(path).fill_(number)
        model.save_pretrained(tmp_path / name)
    said = howfine_here("distance", tmp_path / "before", tmp_path / "after", "--json")
    assert {row["path"]: row["relative"] for row in said.json}[path] is None
    assert " inf " in howfine_here("distance", tmp_path / "before", tmp_path / "after").out


def test_distance_from_a_base_to_a_delta(inputs: Inputs) -> None:
    """A mask drops entries: L1 is the sum of the magnitudes that are gone."""
    rows = howfine_here("distance", inputs.base, inputs.delta, "--json").json
    base, delta = Base.load(str(inputs.base)), Delta.load(inputs.delta)
    kept, _ = delta.tensors(base)
    for row in rows:
        mask = kept.get(f"text.{row['path']}")
        weight = base.tower.get_parameter(row["path"]).double()
        gone = 0.0 if mask is None else weight[~mask].abs().sum().item()
        assert row["l1"] == pytest.approx(gone, rel=1e-6), row["path"]
    assert sum(row["l1"] > 0 for row in rows) == 12


def test_inspect_accounts_for_every_byte(inputs: Inputs) -> None:
    found = howfine_here("inspect", inputs.delta, "--json").json
    data = inputs.delta.read_bytes()
    assert sum(part["bytes"] for part in found["parts"]) == found["bytes"] == len(data)
    by_name = {part["name"]: part for part in found["parts"]}
    assert by_name["header"]["bytes"] == 8 + int.from_bytes(data[:8], "little")
    masks = [part for name, part in by_name.items() if name.startswith("method/")]
    assert len(masks) == 12
    for part in masks:
        assert 0 < part["kept"] < part["entries"]
        assert part["bytes"] >= part["bound_bytes"] - 1
    stored = {k: v for k, v in header_of(inputs.delta).items() if k != "howfine"}
    assert found["header"] == stored
    words = howfine_here("inspect", inputs.delta).out
    assert f"{len(data):,}  in all (the file has {len(data):,})" in words


def test_inspect_counts_where_a_base_changes(inputs: Inputs) -> None:
    """Of a mask, the entries it drops; a word embedding or a bias is none of its matters."""
    found = howfine_here("inspect", inputs.delta, "--base", inputs.base, "--json").json
    assert "where" not in howfine_here("inspect", inputs.delta, "--json").json
    parts = [part for part in found["parts"] if part["name"].startswith("method/")]
    assert [(row["layer"], row["part"]) for row in found["where"]] == [
        (layer, part) for layer in (0, 1) for part in "QKVDIO"
    ]
    assert sum(row["entries"] for row in found["where"]) == sum(p["entries"] for p in parts)
    dropped = sum(part["entries"] - part["kept"] for part in parts)
    assert sum(row["changed"] for row in found["where"]) == dropped
    words = howfine_here("inspect", inputs.delta, "--base", inputs.base).out.splitlines()
    assert words[-1].split() == [f"{dropped:,}", "changed", "in", "all"]
    last = found["where"][-1]
    assert words[-2].split() == [
        f"{last['changed']:,}", f"{last['entries']:,}", f"{100 * last['share']:.0f}", "%", "1", "O"
    ]  # fmt: skip


def test_inspect_counts_in_a_stream_of_many_tensors_and_behind_a_map(
    inputs: Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "x.delta.safetensors"
    inputs.tune("--out", out, recipe="sparse")
    found = howfine_here("inspect", out, "--base", inputs.base, "--json").json
    (joined,) = (p for p in found["parts"] if p["name"].startswith("method/*") and p["kept"])
    changed = sum(row["changed"] for row in found["where"])
    assert 0 < changed <= joined["kept"]  # a difference that the store rounds to 0 changes nothing
    assert len({row["layer"] for row in found["where"]}) == 2
    inputs.tune("--out", out, recipe="lora-xs")
    found = howfine_here("inspect", out, "--base", inputs.base, "--json").json
    assert [row["part"] for row in found["where"]] == list("QKVDIO" * 2)
    assert min(row["share"] for row in found["where"]) > 0.9


def test_merge_is_a_plain_checkpoint(inputs: Inputs, tmp_path: Path) -> None:
    """The body through AutoModel, the head by hand: the answers of predict."""
    out = tmp_path / "merged"
    told = howfine_here("merge", inputs.delta, out, "--json").json
    size = (out / "model.safetensors").stat().st_size
    assert told == {"folder": str(out), "bytes": size, "dtype": "float32"}
    texts = [text for text, _ in examples(inputs, "test")]
    model, tokenizer = AutoModel.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    base, delta = Base.load(str(inputs.base)), Delta.load(inputs.delta)
    head, about = (
        load_file(out / "readout.safetensors"),
        json.loads((out / "readout.json").read_text()),
    )
    with torch.no_grad():
        state = model.eval()(**batch)
        with delta.applied(base) as wired:
            assert torch.equal(wired.towers["text"](**batch).last_hidden_state, state[0])
            logits = wired(inputs=dict(batch))["logits"]
        assert about["readout"]["classifier"]["pooling"] == "pooler"
        by_hand = state.pooler_output @ head["linear.weight"].T + head["linear.bias"]
    assert torch.allclose(by_hand, logits, atol=1e-6)
    answers = howfine_here("predict", inputs.delta, *texts, "--json").json
    assert [about["labels"][i] for i in by_hand.argmax(-1)] == [a["label"] for a in answers]


def test_merge_keeps_what_the_base_states_and_nothing_of_the_last_batch(
    inputs: Inputs, tmp_path: Path
) -> None:
    """No pooler where there was none, the stated pooling, a tokenizer that cuts nothing off."""
    from transformers import BertConfig, BertForMaskedLM

    from tiny import TINY, tiny_tokenizer

    BertForMaskedLM(BertConfig(**TINY["bert"][1])).save_pretrained(tmp_path / "mlm")
    tiny_tokenizer().save_pretrained(tmp_path / "mlm")
    stated.state_pooling(tmp_path / "mlm", "mean", 32)
    made = (
        "--base",
        tmp_path / "mlm",
        "--task",
        inputs.task,
        "--out",
        tmp_path / "x.delta.safetensors",
    )
    assert howfine_here("tune", "--recipe", "head-only", *made, *QUICK).code == 0
    assert howfine_here("merge", tmp_path / "x.delta.safetensors", tmp_path / "merged").code == 0
    base, merged = Base.load(str(tmp_path / "mlm")), Base.load(str(tmp_path / "merged"))
    assert not any("pooler" in name for name in load_file(tmp_path / "merged/model.safetensors"))
    assert (merged.pooling, merged.fingerprint) == ("mean", base.fingerprint)
    stored = json.loads((tmp_path / "merged/tokenizer.json").read_text())
    assert stored["truncation"] is stored["padding"] is None


def test_merge_of_an_encoder_keeps_its_decoder(inputs: Inputs, tmp_path: Path) -> None:
    """Of an encoder-decoder the base is the encoder; the merged folder is the whole again."""
    from transformers import T5Config, T5Model

    from tiny import TINY, tiny_tokenizer

    torch.manual_seed(0)
    T5Model(T5Config(**TINY["t5"][1])).save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    made = (
        "--base",
        tmp_path / "t5",
        "--task",
        inputs.task,
        "--out",
        tmp_path / "x.delta.safetensors",
    )
    assert howfine_here("tune", "--recipe", "full", *made, *QUICK).code == 0
    assert howfine_here("merge", tmp_path / "x.delta.safetensors", tmp_path / "merged").code == 0
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    before = AutoModel.from_pretrained(tmp_path / "t5")
    base, delta = Base.load(str(tmp_path / "t5")), Delta.load(tmp_path / "x.delta.safetensors")
    with delta.applied(base):
        changed = base.tower.state_dict()
        own = merged.get_encoder().state_dict()
        assert all(torch.equal(own[name], value) for name, value in changed.items())
    path = "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    assert torch.equal(merged.get_parameter(path), before.get_parameter(path))
    path = path.replace("decoder", "encoder").replace("layer.2", "layer.1")
    assert not torch.equal(merged.get_parameter(path), before.get_parameter(path))


def test_methods_lists_them_with_their_settings() -> None:
    listed = howfine_here("methods", "--json").json
    assert [entry["name"] for entry in listed] == sorted(methods())
    (mask,) = howfine_here("methods", "mask", "--json").json
    assert "initial_sparsity" in [setting["name"] for setting in mask["settings"]]
    words = howfine_here("methods", "mask").out
    assert "--initial-sparsity" in words
    assert "(default 0.05)" in words
    assert {*recipes(), *methods()} == set(
        re.findall(r"^ *([\w-]+)", howfine_here("methods").out, re.M)
    )


@pytest.mark.parametrize("name", sorted(methods().keys() - recipes()))
def test_a_method_without_a_recipe_runs_at_its_defaults(name: str) -> None:
    """Not as its example, which is made for tiny models."""
    assert Recipe.load(name).method == methods()[name]()


def test_a_recipe_is_listed_by_its_name() -> None:
    words = howfine_here("methods", "bitfit").out
    assert "(default 'fp16')" in words
    (entry,) = howfine_here("methods", "bitfit", "--json").json
    assert entry["name"] == "bitfit"
    wrong = howfine_here("methods", "bitfitt").sentence
    assert wrong == "method or recipe 'bitfitt' is unknown. Did you mean 'bitfit'?"


# prune: a recipe that is called like its method, and sets it otherwise.
@pytest.mark.parametrize(("name", "start"), [("bitfit", None), ("prune", "full")])
def test_every_flag_of_a_recipe_is_listed_at_its_value(name: str, start: str | None) -> None:
    words = howfine_here("methods", name).out
    recipe = Recipe.load(name)
    (line,) = [line for line in words.splitlines() if line.split()[:1] == ["--start"]]
    assert line.endswith(f"(default {start!r})")
    for part in (recipe.method, recipe.readout, recipe.training):
        for field in dataclasses.fields(part):
            flag = f"--{field.name.replace('_', '-')}"
            (line,) = [line for line in words.splitlines() if line.split()[:1] == [flag]]
            assert line.endswith(f"(default {getattr(part, field.name)!r})")


def test_version() -> None:
    assert howfine_here("--version").out.strip() == version("howfine")


@pytest.mark.skipif(find_spec("howfine.report") is None, reason="the report is not written yet")
def test_study_and_report(inputs: Inputs, tmp_path: Path) -> None:
    small = {"recipes": [], "knobs": {}, "seeds": [0]}
    plan = plan_file(tmp_path, **small, settings={"max_steps": 2, "batch_size": 8})
    made = ("--base", inputs.base, "--task", inputs.task, "--plan", plan, "--out", tmp_path / "out")
    result = howfine_here("study", *made, "--json").json
    assert (tmp_path / "out" / result["recommended"]["file"]).is_file()
    again = howfine_here("report", tmp_path / "out", "--json").json
    assert again["sentence"] == result["sentence"]
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000
    words = howfine_here("report", tmp_path / "out").out
    assert words.startswith(result["sentence"])


# Flags.


def test_flags_override_the_recipe(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "x.delta.safetensors"
    assert header_of(inputs.delta)["method"] == {"mask": {"initial_sparsity": 0.3}}
    kept = {p["kept"] / p["entries"] for p in parts_of(inputs.delta) if p["kept"] is not None}
    assert max(kept) == pytest.approx(0.7, abs=0.01)
    inputs.tune("--train", "all@-1", "--learning-rate=1e-2", "--out", out, recipe="top-layers")
    assert header_of(out)["method"] == {"select": {"train": ["all@-1"]}}
    assert names_of(out) == {n for n in names_of(out) if n.startswith("text.encoder.layer.1.")}
    # At a rate of 0 nothing moves, and what has not moved is not stored.
    inputs.tune("--learning-rate", 0, "--out", out, "--train", "bias,norm", recipe="bitfit")
    assert header_of(out)["method"] == {"select": {"train": ["bias", "norm"]}}
    assert names_of(out) == set()
    inputs.tune("--store", "bf16", "--max-length", 7, "--out", out, recipe="bitfit")
    assert header_of(out)["readout"]["classifier"]["max_length"] == 7
    assert {part["coding"] for part in parts_of(out)} == {"json", "raw", "deflate", "bf16"}
    inputs.tune("--seed", 5, "--out", out, recipe="bitfit")
    one = out.read_bytes()
    inputs.tune("--seed", 6, "--out", out, recipe="bitfit")
    assert out.read_bytes() != one


def parts_of(path: Path) -> list[dict[str, Any]]:
    return howfine_here("inspect", path, "--json").json["parts"]


def names_of(path: Path) -> set[str]:
    """Paths of the base that a delta changes."""
    names = [part["name"] for part in parts_of(path)]
    return {name.removeprefix("method/") for name in names if name.startswith("method/")}


def test_a_recipe_of_ones_own(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("method: {select: {train: [V]}}\nstore: sign\n")
    inputs.tune(
        "--out", tmp_path / "x.delta.safetensors", "--warmup", 0, recipe=tmp_path / "mine.yaml"
    )
    assert {name.rpartition("self.")[2] for name in names_of(tmp_path / "x.delta.safetensors")} == {
        "value.weight"
    }


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--learning-rat", 1], "has no setting 'learning_rat'. Did you mean 'learning_rate'?"),
        (["--initial_sparsty", 1], "Did you mean 'initial_sparsity'?"),
        (["--varient", "zhou"], "Did you mean 'variant'?"),
        (["--qqq", 1], "has no setting 'qqq'. Known: batch_size, dropout, epochs"),
        (["--self", 1], "has no setting 'self'."),
        (["--learning-rate"], "flag --learning-rate needs a value, such as --learning-rate 1"),
        (["--learning-rate", "--epochs", 1], "flag --learning-rate needs a value"),
        (["stray"], "argument 'stray': expected a flag"),
        (["--learning-rate", "fast"], "setting 'learning_rate': found 'fast'"),
    ],
    ids=str,
)
def test_a_wrong_flag_of_a_recipe(inputs: Inputs, flags: list[object], sentence: str) -> None:
    said = inputs.tune(*flags)
    assert said.code == 2
    assert sentence in said.sentence
    assert said.out == ""


@pytest.mark.parametrize("verb", ["evaluate", "predict", "inspect", "merge", "methods", "study"])
def test_a_wrong_flag_of_a_verb(inputs: Inputs, verb: str) -> None:
    said = howfine_here(verb, inputs.delta, "x", "--jsn")
    assert said.code == 2
    assert "--jsn" in said.err
    assert "--json" in said.err
    assert "Traceback" not in said.err


def test_a_wrong_verb() -> None:
    said = howfine_here("tuen")
    assert said.code == 2
    assert "tune" in said.err


# A process of its own.


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    said = howfine_here(verb, "--help")
    assert said.code == 0
    assert "--json" in said.out


@pytest.mark.parametrize("code", ["import howfine", "import howfine.cli as c; c.main()"])
def test_help_is_at_once(code: str) -> None:
    """Half a second as the clock on the wall goes, the median of five; no torch behind it."""
    probe = (
        "import sys; sys.argv = ['howfine', '--help']\n"
        f"try:\n    {code}\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 0.5, times


def test_a_process_prints_json_alone_and_exits_as_it_should(inputs: Inputs, tmp_path: Path) -> None:
    made_on = ("--base", inputs.base, "--task", inputs.task, "--recipe", "bitfit", *QUICK)
    done = howfine(
        "tune", *made_on, "--evaluations", 2, "--out", tmp_path / "x.delta.safetensors", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == (tmp_path / "x.delta.safetensors").stat().st_size
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == [tmp_path / "x.delta.safetensors"]


def test_only_the_first_of_several_processes_speaks(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "RANK", "1")
    assert howfine_here("inspect", inputs.delta) == Said(0, "", "")


def test_a_system_without_resource_has_its_peak_from_psutil(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on Windows, where the module has to be had all the same."""
    found = find_spec("howfine.cost")
    assert found is not None
    assert found.loader is not None
    again = module_from_spec(found)
    monkeypatch.setitem(sys.modules, "howfine.cost", again)  # dataclasses look it up
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=memory_info))
    monkeypatch.setattr("pathlib.Path.exists", lambda self: False)
    found.loader.exec_module(again)
    peaks = iter((5_000, 7_000))

    def memory_info() -> SimpleNamespace:
        return SimpleNamespace(peak_wset=next(peaks))

    assert again.PeakMemory(torch.device("cpu")).growth() == 2_000


def test_no_help_is_taken_for_markup() -> None:
    """Rich takes a word in brackets out: `[default: 1]` would not be seen."""

    def every(command: Any) -> Iterator[Any]:
        yield command
        for inner in getattr(command, "commands", {}).values():
            yield from every(inner)

    found = [
        (command.name, option.name, option.help)
        for command in every(typer.main.get_command(app))
        for option in command.params
        if "[" in (getattr(option, "help", "") or "")
    ]
    assert not found
