"""Sets of texts to be written that the hub has; a new one is a row of SETS.

Where the hub lacks a test set, its validation set is `test` here and dev is carved out of train,
each dialogue on one side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from howfine.errors import BadSplit, TaskError
from howfine.tasks import Found, Row, carve, files
from howfine.tasks.dialogue import asked, talk
from howfine.tasks.forms import translated
from howfine.tasks.segments import Segments, rendered
from howfine.tasks.written import referenced

# At most so many dialogues, and a tenth, are carved out for dev.
DEV_DIALOGUES = 500
# The branch that has a set's files as Parquet where the main one has a program in their place.
_PARQUET = "refs/convert/parquet"
# One's own examples: segments, and what is written.
Read = Callable[[dict[str, Any]], list[tuple[Segments, str]]]


@dataclass(frozen=True)
class HubSet:
    """Where a set is on the hub, and how a row of it is read."""

    name: str
    # A configuration; of the branch `revision`, a folder.
    config: str | None
    reads: Read
    # What of a row stays on one side of a split.
    whole: Callable[[dict[str, Any]], str]
    revision: str | None = None
    metric: str | None = None

    def __str__(self) -> str:
        return f"{self.name}:{self.config}" if self.config else self.name


def _said(turns: list[str]) -> list[str]:
    """Turns without the silence that stands for the other where one's own turn is the first."""
    return [turn for turn in turns if turn.strip("_ ").casefold() != "silence"]


def _personachat(row: dict[str, Any]) -> list[tuple[Segments, str]]:
    """Replies after sentences about who replies, whose last comes to the front after each turn.

    Of the candidates the last one was said.
    """
    persona, found = list(row["personality"]), []
    for turn in row["utterances"]:
        found.append((talk(persona, _said(turn["history"])), turn["candidates"][-1]))
        persona = [*persona[-1:], *persona[:-1]]
    return found


def _opening(row: dict[str, Any]) -> str:
    """The first two turns: of one dialogue the set has a row for each of the two who speak."""
    last = row["utterances"][-1]
    return "\n".join(_said([*last["history"], last["candidates"][-1]])[:2])


def _coqa(row: dict[str, Any]) -> list[tuple[Segments, str]]:
    """An answer to each question, after the round before it."""
    rounds = list(zip(row["questions"], row["answers"]["input_text"], strict=True))
    return [
        (asked(row["story"], [text for each in rounds[:at] for text in each], question), answer)
        for at, (question, answer) in enumerate(rounds)
    ]


def _iwslt(source: str, target: str) -> HubSet:
    def reads(row: dict[str, Any]) -> list[tuple[Segments, str]]:
        return [(translated(row["translation"][source]), row["translation"][target])]

    config = f"iwslt2017-{source}-{target}"
    return HubSet("IWSLT/iwslt2017", config, reads, lambda row: reads(row)[0][1], _PARQUET)


SETS = {
    "personachat": HubSet("AlekseyKorshuk/persona-chat", None, _personachat, _opening),
    "cnn-dailymail": HubSet(
        *("abisee/cnn_dailymail", "3.0.0"),
        lambda row: [(translated(row["article"]), row["highlights"])],
        lambda row: str(row["article"]),
        metric="rouge_l",
    ),
    "coqa": HubSet(
        "stanfordnlp/coqa", None, _coqa, lambda row: str(row["story"]), metric="token_f1"
    ),
    "iwslt-de-en": _iwslt("de", "en"),
    "iwslt-en-de": _iwslt("en", "de"),
}


def read(name: str) -> Found:
    """A set by its short name.

    Raises TaskNotFound without a network, BadSplit and TaskError for what can't be read.
    """
    source = SETS[name]
    splits = files.hub_splits(source.name, source.config, source.revision)
    if missing := {"train", "validation"} - set(splits):
        raise BadSplit(
            f"{source} has no {' and no '.join(sorted(missing))} split; found "
            f"{', '.join(splits) or 'none'}. Name another data set of the hub, with a form"
        )
    how = f"{source} from the hub"
    whole = {theirs: _whole(source, theirs, splits[theirs]) for theirs in splits}
    if "test" in whole:
        parts = {"train": whole["train"], "dev": whole["validation"], "test": whole["test"]}
    else:
        count = min(DEV_DIALOGUES, max(1, len(whole["train"]) // 10))
        train, dev = carve(whole["train"], count, "dev 0")
        parts = {"train": train, "dev": dev, "test": whole["validation"]}
        how += " (test: validation); dev carved out of train by a hash"
    rows = {split: _rows(source, part) for split, part in parts.items()}
    found = {split: [r for r in part if _is_whole(r)] for split, part in rows.items()}
    if left := sum(map(len, rows.values())) - sum(map(len, found.values())):
        how += f"; {left} with an empty text left out"
    return Found(referenced(found), (), source.metric, how)


def _whole(source: HubSet, split: str, table: Iterable[dict[str, Any]]) -> list[Row]:
    """The hub's own rows, each as the label of one whose text is what stays on one side."""
    place = f"{source} {split}"
    return [
        Row((_tried(source, source.whole, row, f"{place}, row {number}"),), row, place, number)
        for number, row in enumerate(table, 1)
    ]


def _rows(source: HubSet, wholes: list[Row]) -> list[Row]:
    rows = []
    for each in wholes:
        for segments, written in _tried(source, source.reads, each.label, each.where):
            texts = (rendered(segments),)
            rows.append(each._replace(texts=texts, label=0, targets=(written,), segments=segments))
    return rows


def _tried(source: HubSet, reads: Callable[..., Any], row: dict[str, Any], where: str) -> Any:
    try:
        return reads(row)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise TaskError(
            f"{where}: {error!r}; found the columns {', '.join(row)}. The data set has changed on "
            "the hub: write its rows to a file and name their form"
        ) from error


def _is_whole(row: Row) -> bool:
    """Whether no text is empty."""
    return all(text.strip() for text in (*row.targets, *(text for _, text in row.segments[:-1])))
