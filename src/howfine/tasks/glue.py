"""The GLUE tasks (Wang et al. 2019), from a folder of Parquet files or from the hub.

The labels of the official test sets are hidden, so the official validation set is the test split
here, and dev is carved out of train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from howfine.errors import TaskNotFound
from howfine.tasks import Found, Row, carve, files, rows_of, tables, without

HUB = "nyu-mll/glue"
DEV_ROWS = 1000

PAIR = ("sentence1", "sentence2")
ENTAILED = ("entailment", "not_entailment")


@dataclass(frozen=True)
class Spec:
    """One task of the nine."""

    # The text columns as the hub names them; a folder may say sentence1, sentence2.
    text: tuple[str, ...]
    # Class names in the order of the hub's indices.
    labels: tuple[str, ...]
    metric: str
    validation: str = "validation"


TASKS = {
    "cola": Spec(("sentence",), ("unacceptable", "acceptable"), "matthews"),
    "mnli": Spec(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        validation="validation_matched",
    ),
    "mrpc": Spec(PAIR, ("not_equivalent", "equivalent"), "f1"),
    "qnli": Spec(("question", "sentence"), ENTAILED, "accuracy"),
    "qqp": Spec(("question1", "question2"), ("not_duplicate", "duplicate"), "f1"),
    "rte": Spec(PAIR, ENTAILED, "accuracy"),
    "sst2": Spec(("sentence",), ("negative", "positive"), "accuracy"),
    "stsb": Spec(PAIR, (), "pearson_spearman"),
    "wnli": Spec(PAIR, ("not_entailment", "entailment"), "accuracy"),
}
# The file that is the test split, the first one there; the last is Wang et al.'s (2017) split of
# the Quora pairs, for a folder that lacks the official one.
TEST_FILES = ("dev", "validation", "dev_matched", "validation_matched", "bimpm_test")
HELDOUT_FILE = "heldout_subset"


def read(name: str, data: Path | None) -> Found:
    """A GLUE task by its short name, from `data`/glue/`name` where a folder is given.

    Raises TaskNotFound where the folder or the network lacks it.
    """
    return _from_hub(name) if data is None else _from_folder(name, data / "glue" / name)


def _from_hub(name: str) -> Found:
    spec = TASKS[name]
    splits = files.hub_splits(HUB, name)
    train, test = (
        _rows(spec, splits[split].to_dict(), f"{HUB}:{name} {split}")
        for split in ("train", spec.validation)
    )
    return _found(name, train, test, f"GLUE {name} from {HUB} (test: {spec.validation})")


def _from_folder(name: str, folder: Path) -> Found:
    spec = TASKS[name]
    stems = {path.stem: path for path in sorted(folder.glob("*.parquet"))}
    train_stems = ["train"] if "train" in stems else [s for s in stems if s.startswith("train_")]
    test_stem = next((stem for stem in TEST_FILES if stem in stems), None)
    if not train_stems or test_stem is None:
        raise TaskNotFound(
            f"{folder} holds no GLUE {name}: found {', '.join(stems) or 'no Parquet files'}, "
            f"expected train.parquet and dev.parquet; name another folder with --data, or none "
            f"to ask the hub"
        )

    def rows(stem: str) -> list[Row]:
        return _rows(spec, tables.columns(stems[stem]), str(stems[stem]))

    train = [row for stem in train_stems for row in rows(stem)]
    test = rows(test_stem)
    source = f"GLUE {name} from a folder (train: {' + '.join(train_stems)}; test: {test_stem})"
    if "train" in stems:
        return _found(name, train, test, source)
    # Subsets gathered from several places share rows; official files are left as they are.
    heldout = without(rows(HELDOUT_FILE), test) if HELDOUT_FILE in stems else []
    return _found(name, without(train, test, heldout), test, source, heldout)


def _rows(spec: Spec, columns: dict[str, list[Any]], source: str) -> list[Row]:
    text = PAIR if set(PAIR) <= set(columns) else spec.text
    # The official QQP has a few pairs with an empty question.
    return rows_of(columns, text, "label", source, skip_empty=True)


def _found(
    name: str, train: list[Row], test: list[Row], source: str, dev: Sequence[Row] = ()
) -> Found:
    """Train, dev and test; without a dev, a tenth of train, at most DEV_ROWS, by the hash."""
    made = f"dev: {HELDOUT_FILE}"
    if not dev:
        train, dev = carve(train, min(DEV_ROWS, round(len(train) / 10)), "dev 0")
        made = "dev: carved out of train by a hash of the text"
    return Found(
        splits={"train": train, "dev": list(dev), "test": test},
        labels=TASKS[name].labels,
        metric=TASKS[name].metric,
        provenance=f"{source}; {made}",
    )
