"""Texts to be written: data as sentences, and translation, from a folder of Parquet files.

`gen/e2e` and `gen/dart` turn data into a sentence, `gen/multi30k-en-de` (any two of en, de, fr and
cs) a caption into another language. Train has a row for each reference; in dev and test the
references of one source stand together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

from howfine.errors import TaskError, TaskNotFound
from howfine.tasks import SPLITS, Found, Row, completed, files, key
from howfine.tasks.written import referenced

COLLECTION = "gen"
_LANGUAGES = ("en", "de", "fr", "cs")
_PAIRS = tuple(f"multi30k-{a}-{b}" for a, b in permutations(_LANGUAGES, 2))
# The captions' test set of 2016; those of 2017 lack Czech.
_TESTS = ("test", "test2016")
# Of E2E: "name[The Vaults], area[city centre]".
_SLOT = re.compile(r"\s*([^\[,]+)\[([^\]]*)\]")
Read = Callable[[dict[str, Any]], tuple[str, tuple[str, ...]]]


def names() -> list[str]:
    """Every name."""
    return [f"{COLLECTION}/{name}" for name in ("e2e", "dart", *_PAIRS)]


def known(name: str) -> bool:
    """Whether a name is one of these."""
    return name in names()


def read(name: str, data: Path | None) -> Found:
    """A set by name.

    Raises TaskNotFound where the folder lacks it, TaskError for a row that can't be read.
    """
    data = files.named(name, data)
    short, _, languages = name.removeprefix(f"{COLLECTION}/").partition("-")
    source, _, target = languages.partition("-")
    readers: dict[str, Read] = {
        "e2e": _e2e,
        "dart": _dart,
        "multi30k": lambda row: (row[source], (row[target],)),
    }
    found = _splits(data / COLLECTION / short, readers[short])
    how = ""
    if "train" not in found:
        found["train"] = found.pop("dev", [])
        how = "; train is its dev file"
    made = [split for split in SPLITS if split not in found]
    if made:
        how += f"; {' and '.join(made)} carved out of train by a hash of the source"
    whole = completed(found)
    # Copies of a source within train stay: each has a text of its own to learn.
    held = {key(row.texts) for split in ("dev", "test") for row in whole[split]}
    train = [row for row in whole["train"] if key(row.texts) not in held]
    if left := len(whole["train"]) - len(train):
        how += f"; {left} train rows whose source is in dev or test left out"
    splits = referenced({**whole, "train": train})
    return Found(splits, (), None, f"{name} from a folder of data{how}")


def _splits(folder: Path, reads: Read) -> dict[str, list[Row]]:
    """The splits that a folder has."""
    paths = {split: folder / f"{split}.parquet" for split in SPLITS}
    for test in _TESTS:
        if (folder / f"{test}.parquet").is_file():
            paths["test"] = folder / f"{test}.parquet"
            break
    found = {split: _rows(path, reads) for split, path in paths.items() if path.is_file()}
    if not found:
        raise TaskNotFound(
            f"{folder} holds no train.parquet, dev.parquet or test.parquet; name another folder "
            "with --data"
        )
    return found


def _rows(path: Path, reads: Read) -> list[Row]:
    columns = files.columns(path)
    rows = []
    for number, values in enumerate(zip(*columns.values(), strict=True), 1):
        try:
            source, targets = reads(dict(zip(columns, values, strict=True)))
        except (KeyError, TypeError) as error:
            raise TaskError(
                f"{path}, row {number}: {error!r}; found the columns {', '.join(columns)}"
            ) from error
        rows.append(Row((source,), 0, str(path), number, targets=targets))
    return rows


def _e2e(row: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The slots as in prefix-tuning's data: "name : The Vaults | area : city centre"."""
    slots = _SLOT.findall(row["mr"])
    return " | ".join(f"{name.strip()} : {value}" for name, value in slots), (row["ref"],)


def _dart(row: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The triples, with colons inside and bars between."""
    triples = (" : ".join(part.strip() for part in each.split(" | ")) for each in row["triples"])
    return " | ".join(triples), tuple(row["refs"])
