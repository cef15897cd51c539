"""Tasks whose answers are texts: files, named sets, several references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from howfine.errors import BadSplit, MissingColumn, SettingError, TaskError, TaskNotFound
from howfine.task import Example, Task
from howfine.tasks import SPLITS, Row, generation
from howfine.tasks.written import together
from tiny import tiny_task, written_task


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def folder(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    for split in SPLITS:
        jsonl(tmp_path / f"{split}.jsonl", rows)
    return tmp_path


ROWS = [
    {"text": "a", "so": "one"},
    {"text": "b", "so": ["two", "zwei"]},
    {"text": "a", "so": "eins"},
]


def test_references_of_a_source_stand_together_but_in_train(tmp_path: Path) -> None:
    task = Task.load(folder(tmp_path, ROWS), target="so")
    assert (task.kind, task.metric, task.labels) == ("generation", "bleu", ())
    pairs = [("a", "one"), ("b", "two"), ("b", "zwei"), ("a", "eins")]
    assert task.splits["train"] == [Example((text,), targets=(so,)) for text, so in pairs]
    whole = [Example(("a",), targets=("one", "eins")), Example(("b",), targets=("two", "zwei"))]
    assert task.splits["dev"] == task.splits["test"] == whole
    assert task.targets("test").tolist() == [("one", "eins"), ("two", "zwei")]
    assert task.targets("train").shape == (4,)


def test_every_format_can_hold_them(tmp_path: Path) -> None:
    table = {"say": [f"w{i} x" for i in range(40)], "so": [str(i) for i in range(40)]}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    lines = [f"{say},{so}" for say, so in zip(*table.values(), strict=True)]
    (tmp_path / "a.csv").write_text("\n".join(["say,so", *lines]) + "\n")
    jsonl(tmp_path / "a.jsonl", [dict(zip(table, row, strict=True)) for row in
                                 zip(*table.values(), strict=True)])  # fmt: skip
    found = [
        Task.load(tmp_path / f"a.{kind}", text="say", target="so")
        for kind in ("parquet", "csv", "jsonl")
    ]
    assert len({task.fingerprint for task in found}) == 1
    # Texts that read as numbers stay texts.
    assert all(row.targets[0].isdigit() for row in found[0].splits["train"])


def test_the_fingerprint_sees_what_is_to_be_written() -> None:
    task = written_task()
    first, *rest = task.splits["test"]
    other = {**task.splits, "test": [Example(first.texts, targets=first.targets[:1]), *rest]}
    assert Task("x", other, (), "bleu", "").fingerprint != task.fingerprint


@pytest.mark.parametrize("bad", [["", "x"], [], [3], 3, ["x", None]])
def test_bad_targets_are_named_by_row(tmp_path: Path, bad: Any) -> None:
    rows = [*ROWS, {"text": "c", "so": bad}]
    with pytest.raises(TaskError, match=r"row 4: column 'so' holds"):
        Task.load(folder(tmp_path, rows), target="so")


def test_columns_that_dont_fit(tmp_path: Path) -> None:
    path = folder(tmp_path, ROWS)
    with pytest.raises(MissingColumn, match="'said'"):
        Task.load(path, target="said")
    with pytest.raises(SettingError, match="name one column"):
        Task.load(path, target="so", label="text")
    with pytest.raises(SettingError, match="'accuracy' is for classification"):
        Task.load(path, target="so", metric="accuracy")
    with pytest.raises(SettingError, match="'bleu' is for generation"):
        Task("x", tiny_task().splits, tiny_task().labels, "bleu", "")
    with pytest.raises(SettingError, match="no classes to take examples of"):
        written_task().shots(3)


def test_a_mixture_is_refused() -> None:
    splits = dict(written_task().splits)
    splits["dev"] = [*splits["dev"], Example(("w1",))]
    with pytest.raises(TaskError, match="and examples without"):
        Task("x", splits, (), "bleu", "")


def test_subsets_are_drawn_evenly() -> None:
    small = written_task().subset(train=5, dev=2, test=3)
    assert [len(small.splits[split]) for split in SPLITS] == [5, 2, 3]
    assert small.kind == "generation"


def test_together_keeps_the_order() -> None:
    rows = [Row((t,), 0, "f", n, targets=(s,)) for n, (t, s) in enumerate(["bx", "ay", "bz"])]
    assert [(row.texts, row.targets) for row in together(rows)] == [
        (("b",), ("x", "z")),
        (("a",), ("y",)),
    ]


def saved(path: Path, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def test_named_sets(tmp_path: Path) -> None:
    """Slots, triples and sentences as they are written; splits that lack are made."""
    home = tmp_path / "gen"
    for split in SPLITS:
        saved(
            home / "e2e" / f"{split}.parquet",
            mr=[f"name[The {split}], priceRange[more than £ 30]", "name[A, B], area[city centre]"],
            ref=["It is dear.", "Go there."],
        )
    task = Task.load("gen/e2e", data=tmp_path)
    assert [row.texts[0] for row in task.splits["test"]] == [
        "name : The test | priceRange : more than £ 30",
        "name : A, B | area : city centre",
    ]
    # What train shares with dev and test is left out of train, what dev shares with test of dev.
    assert [row.texts[0] for row in task.splits["dev"]] == [
        "name : The dev | priceRange : more than £ 30"
    ]
    assert "1 dev rows whose source is in test left out" in task.provenance
    assert [row.texts[0] for row in task.splits["train"]] == [
        "name : The train | priceRange : more than £ 30"
    ]
    assert "1 train rows whose source is in dev or test left out" in task.provenance
    triples = [[f"M{n} | JOINED | 1973", f"M{n} | LOCATION | M, N"] for n in range(30)]
    saved(home / "dart" / "dev.parquet", triples=triples, refs=[["It", "that"]] * 30)
    saved(home / "dart" / "test.parquet", triples=triples[:1], refs=[["It", "that"]])
    task = Task.load("gen/dart", data=tmp_path)
    assert [(row.texts, row.targets) for row in task.splits["test"]] == [
        (("M0 : JOINED : 1973 | M0 : LOCATION : M, N",), ("It", "that"))
    ]
    assert "train is its dev file; dev carved out of train" in task.provenance
    assert len(task.splits["train"]) == 2 * (29 - len(task.splits["dev"]))
    words = {"en": [f"a{n}" for n in range(40)], "de": [f"b{n}" for n in range(40)]}
    saved(home / "multi30k" / "train.parquet", **words)
    saved(home / "multi30k" / "dev.parquet", en=["yes"], de=["ja"])
    saved(home / "multi30k" / "test2016.parquet", en=["no"], de=["nein"])
    task = Task.load("gen/multi30k-de-en", data=tmp_path)
    assert [(row.texts, row.targets) for row in task.splits["test"]] == [(("nein",), ("no",))]
    assert set(generation.names()) >= {"gen/e2e", "gen/dart", "gen/multi30k-cs-fr"}
    with pytest.raises(TaskError, match="found the columns en, de"):
        Task.load("gen/multi30k-de-fr", data=tmp_path)


def test_sets_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOWFINE_DATA", raising=False)
    with pytest.raises(TaskNotFound, match="--data"):
        Task.load("gen/e2e")
    with pytest.raises(TaskNotFound, match=r"holds no train\.parquet"):
        Task.load("gen/e2e", data=tmp_path)
    with pytest.raises(SettingError, match="fixed columns"):
        Task.load("gen/e2e", data=tmp_path, target="ref")
    saved(tmp_path / "gen" / "e2e" / "test.parquet", mr=["a[b]"], ref=["c"])
    with pytest.raises(BadSplit):
        Task.load("gen/e2e", data=tmp_path)
