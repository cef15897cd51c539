"""Distillation: what a teacher writes, or answers, is what a student learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import howfine
from howfine import distill
from howfine.base import Base
from howfine.cli import app
from howfine.delta import SUFFIX
from howfine.distill import distilled
from howfine.errors import SettingError, TaskError
from howfine.evaluate import predict
from howfine.method import method
from howfine.readout import readout
from howfine.recipe import Recipe
from howfine.task import Task
from howfine.tune import tune
from tiny import tiny_task, tiny_writer, written_task

READ = readout("language_model", max_length=32, max_new_tokens=4)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Task, Path]:
    """A base, a task some of whose sources stand there twice, and a teacher of it."""
    base, task = tiny_writer("gpt2"), written_task()
    rows = [*task.splits["train"], replace(task.splits["train"][0], targets=("w1 w2",))]
    task = replace(task, splits={**task.splits, "train": rows})
    path = tmp_path_factory.mktemp("teacher") / f"teacher{SUFFIX}"
    recipe = Recipe("full", method("full"), READ).override(epochs=20, learning_rate=3e-3)
    tune(base, task, recipe, out=path)
    return base, task, path


def test_train_is_what_the_teacher_writes(taught: Any, tmp_path: Path) -> None:
    base, task, path = taught
    made = distilled(task, path, base, cache=tmp_path)
    sources = [row.texts[0] for row in task.splits["train"]][:-1]  # the last is there twice
    rows = made.splits["train"]
    assert [row.texts[0] for row in rows] == sources
    written = [answer["text"] for answer in predict(path, sources, base)]
    kept = [row.targets[0] for row in task.splits["train"]]
    assert [row.targets for row in rows] == [
        (own or gold,) for own, gold in zip(written, kept, strict=False)
    ]
    assert any(own != gold for own, gold in zip(written, kept, strict=False))
    assert made.splits["dev"] is task.splits["dev"]
    assert made.splits["test"] is task.splits["test"]
    assert made.fingerprint != task.fingerprint
    assert "16 train targets written by teacher" in made.provenance
    assert base.is_untouched()


def test_texts_are_kept_for_the_same_task_and_teacher(
    taught: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, task, path = taught
    first = distilled(task, path, base, cache=tmp_path)
    (kept,) = tmp_path.iterdir()

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("written again")

    with monkeypatch.context() as patch:
        patch.setattr(distill, "logits", refused)
        assert distilled(task, path, base, cache=tmp_path) == first
        with pytest.raises(AssertionError, match="written again"):
            distilled(task.subset(train=8), path, base, cache=tmp_path)
        kept.write_text(kept.read_text()[:20])  # torn
        with pytest.raises(AssertionError, match="written again"):
            distilled(task, path, base, cache=tmp_path)
    assert distilled(task, path, base, cache=tmp_path) == first
    kept.write_text(json.dumps([""] * 16))  # a teacher that wrote nothing
    silent = distilled(task, path, base, cache=tmp_path)
    assert [row.targets for row in silent.splits["train"]] == [
        row.targets for row in task.splits["train"][:-1]
    ]
    assert "16 kept where it wrote nothing" in silent.provenance


def test_a_whole_model_teaches(taught: Any, tmp_path: Path) -> None:
    base, task, path = taught
    folder = tmp_path / "merged"
    base.tower.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    howfine.merge(path, folder, base)
    made = distilled(task, folder, readout=READ, cache=tmp_path / "kept")
    assert made.splits["train"] == distilled(task, path, base, cache=tmp_path).splits["train"]


def test_what_is_wrong_is_said(taught: Any, tmp_path: Path) -> None:
    base, task, path = taught
    with pytest.raises(TaskError, match="has classes or scores, and the teacher"):
        distilled(tiny_task(), path, base, cache=tmp_path)
    with pytest.raises(SettingError, match="there is no teacher"):
        distilled(task, tmp_path / f"lost{SUFFIX}", base, readout=READ, cache=tmp_path)
    with pytest.raises(SettingError, match="is no delta file"):
        distilled(task, tmp_path, base, cache=tmp_path)
    other = tmp_path / f"classes{SUFFIX}"
    body = readout("classifier", max_length=32)
    recipe = Recipe("x", method("select", train=("none",)), body).override(max_steps=1)
    tune(tiny_writer("gpt2"), tiny_task(), recipe, out=other)
    with pytest.raises(TaskError, match="has texts to be written, and the teacher"):
        distilled(task, other, tiny_writer("gpt2"), cache=tmp_path)
    base.tower.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    segments = readout("typed_segments", max_length=40, max_new_tokens=4)
    with pytest.raises(SettingError, match="vectors of its own"):
        distilled(task, tmp_path / "base", readout=segments, cache=tmp_path)
    assert not [each for each in tmp_path.iterdir() if each.suffix == ".json"]


def test_from_the_command_line(
    taught: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, task, path = taught
    monkeypatch.chdir(tmp_path)
    base.tower.save_pretrained("base")
    base.tokenizer.save_pretrained("base")
    lines = [
        {"source": row.texts[0], "target": row.targets[0]} for row in task.splits["train"][:-1]
    ]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = CliRunner().invoke(
        app,
        [
            *("tune", "--recipe", "vlm", "--base", "base", "--task", "rows.jsonl"),
            *("--form", "translation", "--teacher", str(path), "--max-steps", "2"),
            *("--width", "4", "--max-length", "40", "--max-new-tokens", "4", "--json"),
        ],
    )
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["trainable"] > 0
