"""Few-shot splits that others published: LM-BFF's (Gao et al. 2021) and FewGLUE (Schick 2021).

From a folder of Parquet files: `lmbff_16shot/NAME/kshot.parquet` has 16 rows of each class for
train and for dev, five times over (the seeds after the @ of a name); `superglue_few/NAME/` has 32
rows each. Tests are the official validation sets, or LM-BFF's own of MR and SST-5; of LM-BFF's,
rows whose texts are in train or dev are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from howfine.errors import TaskNotFound, UnknownLabel
from howfine.tasks import Found, Row, files, glue, key, tables

LMBFF, FEWGLUE = "lmbff", "fewglue"
SEEDS = (13, 21, 42, 87, 100)
STARS = ("very negative", "negative", "neutral", "positive", "very positive")


@dataclass(frozen=True)
class Spec:
    """One task: its classes, how the files write them, and where its test is."""

    labels: tuple[str, ...]
    written: tuple[str, ...]  # as the files have them, in that order
    glue: str = ""  # the GLUE task whose test split is the test; "": its own
    metric: str = "accuracy"


def _numbered(labels: tuple[str, ...], glue_name: str = "", metric: str = "accuracy") -> Spec:
    return Spec(labels, tuple(map(str, range(len(labels)))), glue_name, metric)


_SENTIMENT = ("negative", "positive")
_NLI = ("entailment", "neutral", "contradiction")
LMBFF_TASKS = {
    "cola": _numbered(glue.TASKS["cola"].labels, "cola", "matthews"),
    "mnli": Spec(_NLI, _NLI, "mnli"),
    "mr": _numbered(_SENTIMENT),
    "mrpc": _numbered(glue.TASKS["mrpc"].labels, "mrpc"),
    "qnli": Spec(glue.ENTAILED, glue.ENTAILED, "qnli"),
    "qqp": _numbered(glue.TASKS["qqp"].labels, "qqp"),
    "rte": Spec(glue.ENTAILED, glue.ENTAILED, "rte"),
    "sst-2": _numbered(_SENTIMENT, "sst2"),
    "sst-5": _numbered(STARS),
}
# By columns: a function of a row's values gives its texts.
Texts = Callable[[Mapping[str, Any]], tuple[str, ...]]
FEWGLUE_TASKS: dict[str, tuple[tuple[str, ...], Texts]] = {
    "boolq": (("false", "true"), lambda row: (row["passage"], row["question"])),
    "cb": (
        ("entailment", "contradiction", "neutral"),
        lambda row: (row["premise"], row["hypothesis"]),
    ),
    "rte": (glue.ENTAILED, lambda row: (row["premise"], row["hypothesis"])),
    "wic": (
        ("different", "same"),
        lambda row: (f"{row['word']}: {row['sentence1']}", row["sentence2"]),
    ),
}


def names() -> list[str]:
    """Every name, of LM-BFF's with each seed."""
    own = [f"{LMBFF}/{name}@{seed}" for name in LMBFF_TASKS for seed in SEEDS]
    return own + [f"{FEWGLUE}/{name}" for name in FEWGLUE_TASKS]


def known(name: str) -> bool:
    """Whether a name is one of these."""
    return name in names()


def read(name: str, data: Path | None) -> Found:
    """A few-shot task by name. Raises TaskNotFound where the folder lacks it."""
    collection, _, short = name.partition("/")
    data = files.named(name, data)
    if collection == FEWGLUE:
        return _fewglue(short, data / "superglue_few" / short)
    task, _, seed = short.partition("@")
    return _lmbff(task, int(seed), data)


def _lmbff(name: str, seed: int, data: Path) -> Found:
    spec, folder = LMBFF_TASKS[name], data / "lmbff_16shot" / name
    path = _there(folder / "kshot.parquet", name)
    splits: dict[str, list[Row]] = {"train": [], "dev": []}
    columns = tables.columns(path)
    for number, values in enumerate(zip(*columns.values(), strict=True), 1):
        row = dict(zip(columns, values, strict=True))
        if int(row["seed"]) == seed:
            splits[row["split"]].append(_row(spec, row, str(path), number))
    if spec.glue:
        test = glue.read(spec.glue, data).splits["test"]
        # Not every folder has the validation set: GLUE's reader takes another one of QQP.
        origin = f"{', '.join(sorted({Path(row.source).name for row in test}))} of GLUE {spec.glue}"
    else:
        test, origin = _own_test(spec, _there(folder / "test.parquet", name)), "its own"
    seen = {key(row.texts) for rows in splits.values() for row in rows}
    splits["test"] = [row for row in test if key(row.texts) not in seen]
    source = f"LM-BFF's 16-shot split of {name}, seed {seed}; test: {origin}"
    if left := len(test) - len(splits["test"]):
        source += f", {left} rows whose texts are in train or dev left out"
    return Found(splits, spec.labels, spec.metric, source)


def _own_test(spec: Spec, path: Path) -> list[Row]:
    test = tables.columns(path)
    return [
        _row(spec, dict(zip(test, values, strict=True)), path.name, number)
        for number, values in enumerate(zip(*test.values(), strict=True), 1)
    ]


def _row(spec: Spec, row: Mapping[str, Any], source: str, number: int) -> Row:
    texts = tuple(filter(None, (row["text_a"], row["text_b"])))
    label = str(row["label"])
    if label not in spec.written:
        raise UnknownLabel(
            f"{source}, row {number}: label {label!r} is none of {', '.join(spec.written)}; get a "
            "fresh copy of the file"
        )
    return Row(texts, spec.written.index(label), source, number)


def _fewglue(name: str, folder: Path) -> Found:
    labels, texts = FEWGLUE_TASKS[name]
    splits = {}
    for split, stem in (("train", "train32"), ("dev", "dev32"), ("test", "val")):
        path = _there(folder / f"{stem}.parquet", name)
        columns = tables.columns(path)
        rows = [dict(zip(columns, v, strict=True)) for v in zip(*columns.values(), strict=True)]
        splits[split] = [
            Row(texts(row), int(row["label"]), str(path), number)
            for number, row in enumerate(rows, 1)
        ]
    source = f"FewGLUE {name}, 32 rows for train and for dev; test: the official validation set"
    return Found(splits, labels, "accuracy", source)


def _there(path: Path, name: str) -> Path:
    if not path.is_file():
        raise TaskNotFound(f"few-shot task {name!r} needs {path}, which is not there; name another "
                           "folder with --data")  # fmt: skip
    return path
