"""Texts to be written: data as sentences, translation, dialogue; from a folder of Parquet files.

`gen/e2e` and `gen/dart` turn data into a sentence, `gen/multi30k-en-de` (any two of en, de, fr and
cs) a caption into another language, `gen/dream` goes on with a dialogue; those of `hub` come from
there. Train has a row for each reference; in dev and test the references of one source stand
together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from howfine.errors import TaskError, TaskNotFound
from howfine.tasks import SPLITS, Found, Row, completed, dialogue, files, forms, hub, key, tables
from howfine.tasks.segments import AFTER, BETWEEN, RESPONSE, TRIPLE, Segments, rendered
from howfine.tasks.written import referenced

COLLECTION = "gen"
_LANGUAGES = ("en", "de", "fr", "cs")
# The captions' test set of 2016; those of 2017 lack Czech.
_TESTS = ("test", "test2016")
# Of E2E: "name[The Vaults], area[city centre]".
_SLOT = re.compile(r"\s*([^\[,]+)\[([^\]]*)\]")
# "customer rating" in some of its files is "customerrating" in others.
_SLOT_KINDS = {"customer rating": "customerRating", "customerrating": "customerRating"}
# A row's examples: the text, its segments, and what may be written.
Read = Callable[[dict[str, Any]], list[tuple[str, Segments, tuple[str, ...]]]]


@dataclass(frozen=True)
class Source:
    """Where a set is read from, and how."""

    folder: str
    reads: Read
    # A column of which copies are read once, "" for none.
    once: str = ""


def _e2e(row: dict[str, Any]) -> list[tuple[str, Segments, tuple[str, ...]]]:
    """The slots as in prefix-tuning's data: "name : The Vaults | area : city centre"."""
    slots = [(name.strip(), value) for name, value in _SLOT.findall(row["mr"])]
    read = ((_SLOT_KINDS.get(name, name), value) for name, value in slots if value.strip())
    text = BETWEEN.join(name + AFTER + value for name, value in slots)
    return [(text, (*read, (RESPONSE, "")), (row["ref"],))]


def _dart(row: dict[str, Any]) -> list[tuple[str, Segments, tuple[str, ...]]]:
    """The triples, with colons inside and bars between."""
    parts = [part.strip() for each in row["triples"] for part in each.split(" | ", 2)]
    read = zip(TRIPLE * (len(parts) // 3), parts, strict=True)
    return [_plain((*read, (RESPONSE, "")), tuple(row["refs"]))]


def _dream(row: dict[str, Any]) -> list[tuple[str, Segments, tuple[str, ...]]]:
    """Each turn of a dialogue but the first."""
    turns = dialogue.turns_of(row["context"])
    return [_plain(segments, (said,)) for segments, said in dialogue.replies(turns)]


def _translated(source: str, target: str) -> Read:
    return lambda row: [_plain(forms.translated(row[source]), (row[target],))]


def _plain(segments: Segments, targets: tuple[str, ...]) -> tuple[str, Segments, tuple[str, ...]]:
    return rendered(segments), segments, targets


SETS = {
    "e2e": Source("gen/e2e", _e2e),
    "dart": Source("gen/dart", _dart),
    "dream": Source("mc/dream", _dream, once="context"),
    **{
        f"multi30k-{a}-{b}": Source("gen/multi30k", _translated(a, b))
        for a, b in permutations(_LANGUAGES, 2)
    },
}


def names() -> list[str]:
    """Every name."""
    return [f"{COLLECTION}/{name}" for name in (*SETS, *hub.SETS)]


def known(name: str) -> bool:
    """Whether a name is one of these, or several with a plus in between."""
    return all(part in names() for part in name.split("+"))


def read(name: str, data: Path | None) -> Found:
    """A set by name, or several as one: their examples one after the other.

    Raises TaskNotFound where the folder lacks it, TaskError for a row that can't be read.
    """
    parts = [_one(part, data) for part in name.split("+")]
    splits = {split: [row for part in parts for row in part.splits[split]] for split in SPLITS}
    metrics = {part.metric for part in parts}
    metric = metrics.pop() if len(metrics) == 1 else None
    return Found(splits, (), metric, " + ".join(part.provenance for part in parts))


def _one(name: str, data: Path | None) -> Found:
    short = name.removeprefix(f"{COLLECTION}/")
    if short in hub.SETS:
        return hub.read(short)
    source = SETS[short]
    found = _splits(files.named(name, data) / source.folder, source)
    how = ""
    if "train" not in found:
        found["train"] = found.pop("dev", [])
        how = "; train is its dev file"
    made = [split for split in SPLITS if split not in found]
    if made:
        how += f"; {' and '.join(made)} carved out of train by a hash of the source"
    whole = _completed(found)
    # Copies of a source within a split stay: each has a text of its own to learn.
    for split, others in (("dev", ("test",)), ("train", ("dev", "test"))):
        held = {key(row.texts) for other in others for row in whole[other]}
        kept = [row for row in whole[split] if key(row.texts) not in held]
        if left := len(whole[split]) - len(kept):
            how += f"; {left} {split} rows whose source is in {' or '.join(others)} left out"
        whole[split] = kept
    return Found(referenced(whole), (), None, f"{name} from a folder of data{how}")


def _completed(found: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """As `completed`, with all examples of one row of a file, such as a dialogue, on one side."""
    together: dict[tuple[str, int], list[Row]] = {}
    for row in (row for rows in found.values() for row in rows):
        together.setdefault((row.source, row.number), []).append(row)
    firsts = {
        split: [row for row in rows if row is together[row.source, row.number][0]]
        for split, rows in found.items()
    }
    return {
        split: [each for row in rows for each in together[row.source, row.number]]
        for split, rows in completed(firsts).items()
    }


def _splits(folder: Path, source: Source) -> dict[str, list[Row]]:
    """The splits that a folder has."""
    paths = {split: folder / f"{split}.parquet" for split in SPLITS}
    for test in _TESTS:
        if (folder / f"{test}.parquet").is_file():
            paths["test"] = folder / f"{test}.parquet"
            break
    found = {split: _rows(path, source) for split, path in paths.items() if path.is_file()}
    if not found:
        raise TaskNotFound(
            f"{folder} holds no train.parquet, dev.parquet or test.parquet; name another folder "
            "with --data"
        )
    return found


def _rows(path: Path, source: Source) -> list[Row]:
    columns = tables.columns(path)
    rows: list[Row] = []
    seen = set()
    for number, values in enumerate(zip(*columns.values(), strict=True), 1):
        row = dict(zip(columns, values, strict=True))
        if source.once:
            if row.get(source.once) in seen:
                continue
            seen.add(row.get(source.once))
        try:
            found = source.reads(row)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TaskError(
                f"{path}, row {number}: {error!r}; found the columns {', '.join(columns)}"
            ) from error
        rows += [Row((text,), 0, str(path), number, (), goals, made) for text, made, goals in found]
    return rows
