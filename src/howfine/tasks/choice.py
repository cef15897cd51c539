"""Multiple-choice sets, each example with options of its own, from a folder of Parquet files.

`mc/NAME/{train,dev,test}.parquet` with columns `question`, `choices` (a list), `label` (an index)
and, where there is one, `context`. What a set lacks of dev and test is carved out of train; a set
without train is learned from its dev.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from howfine.errors import TaskError, TaskNotFound
from howfine.tasks import SPLITS, Found, Row, completed, files, tables

COLLECTION = "mc"
# Of COPA's questions.
_ASKED = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
SETS = (
    "arc_challenge",
    "arc_easy",
    "commonsenseqa",
    "copa",
    "dream",
    "mctest160",
    "mctest500",
    "openbookqa",
)


def names() -> list[str]:
    """Every name."""
    return [f"{COLLECTION}/{name}" for name in SETS]


def known(name: str) -> bool:
    """Whether a name is one of these, or several with a plus in between."""
    return all(part in names() for part in name.split("+"))


def read(name: str, data: Path | None) -> Found:
    """A set by name, or several as one: their examples one after the other.

    Raises TaskNotFound where the folder lacks it, TaskError for a row that can't be answered.
    """
    data = files.named(name, data)
    parts = [_one(data / part) for part in name.split("+")]
    lacking = sorted({split for _, made in parts for split in made})
    splits = {split: [row for part, _ in parts for row in part[split]] for split in SPLITS}
    most = max(len(row.options) for rows in splits.values() for row in rows)
    labels = tuple(str(number) for number in range(1, most + 1))
    told = f"{name}, multiple choice with options of its own"
    told += f"; {', '.join(lacking)} carved out of train" if lacking else ""
    return Found(splits, labels, "accuracy", told)


def _one(folder: Path) -> tuple[dict[str, list[Row]], list[str]]:
    """A set's splits, and which of them it lacked."""
    found = {path.stem: _rows(path) for path in sorted(folder.glob("*.parquet"))}
    splits: dict[str, list[Row]] = {name: found[name] for name in SPLITS if name in found}
    if not splits:
        raise TaskNotFound(
            f"{folder} holds no train.parquet, dev.parquet or test.parquet; name another folder "
            "with --data"
        )
    if "train" not in splits:
        splits["train"] = splits.pop("dev", [])
    return _completed(splits), [name for name in SPLITS if name not in splits]


def _completed(found: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """As `completed`, with all questions on one context, such as a story, on one side."""
    together: dict[tuple[str, Any], list[Row]] = {}
    for row in (row for rows in found.values() for row in rows):
        together.setdefault(_context(row), []).append(row)
    firsts = {
        split: [row for row in rows if row is together[_context(row)][0]]
        for split, rows in found.items()
    }
    return {
        split: [each for row in rows for each in together[_context(row)]]
        for split, rows in completed(firsts).items()
    }


def _context(row: Row) -> tuple[str, Any]:
    return row.source, row.texts[1] or row.number


def _rows(path: Path) -> list[Row]:
    columns: dict[str, list[Any]] = tables.columns(path)
    rows = []
    for number, values in enumerate(zip(*columns.values(), strict=True), 1):
        row = dict(zip(columns, values, strict=True))
        options, label = tuple(row["choices"]), int(row["label"])
        if not 0 <= label < len(options):
            raise TaskError(
                f"{path}, row {number}: label {label} of {len(options)} options; expected an index"
            )
        if len({option.strip().casefold() for option in options}) < len(options):
            continue  # two options are the same: no answer is right alone
        question = _ASKED.get(row["question"], row["question"])
        texts = (question, row.get("context") or "")
        rows.append(Row(texts, label, str(path), number, options))
    return rows
