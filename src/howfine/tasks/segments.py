"""What an example is made of: texts, each of a kind, in reading order; the last is to be written.

As one plain text the others stand as `name : The Vaults | area : riverside`. Triples stand as
`subject : relation : object`, without the names of the three, and a lone `source` as its text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from howfine.errors import TaskError
from howfine.tasks import Row

Segments = tuple[tuple[str, str], ...]
# The kind of what is translated or summed up; alone, it needs no name in front.
SOURCE = "source"
# Of what is written: about data, and for a source.
RESPONSE, TARGET = "response", "target"
TRIPLE = ("subject", "relation", "object")
BETWEEN, AFTER = " | ", " : "


def kinds_of(segments: Iterable[Segments]) -> tuple[str, ...]:
    """Kinds in order of first appearance; those that are written come last."""
    seen = [each for each in segments if each]
    written = dict.fromkeys(each[-1][0] for each in seen)
    read = dict.fromkeys(kind for each in seen for kind, _ in each[:-1])
    return (*(kind for kind in read if kind not in written), *written)


def unlearned(splits: Mapping[str, Sequence[Row]]) -> str:
    """Words for a provenance on kinds that no train row has, "" where there are none."""
    known = {kind for row in splits["train"] for kind, _ in row.segments}
    others = kinds_of(row.segments for rows in splits.values() for row in rows)
    lost = [repr(kind) for kind in others if kind not in known]
    return f"; no train row has a segment of {', '.join(lost)}" if lost else ""


def rendered(segments: Segments) -> str:
    """The plain text of all segments but the last."""
    kinds = tuple(kind for kind, _ in segments[:-1])
    texts = [text for _, text in segments[:-1]]
    if kinds == (SOURCE,):
        return texts[0]
    if kinds and kinds == TRIPLE * (len(kinds) // 3):
        return BETWEEN.join(AFTER.join(texts[at : at + 3]) for at in range(0, len(texts), 3))
    return BETWEEN.join(kind + AFTER + text for kind, text in zip(kinds, texts, strict=True))


def parsed(text: str, kinds: Sequence[str]) -> Segments:
    """The segments of a plain text; of the kinds that a task knows the last is to be written.

    ` | kind : text` begins a segment where the kind is known, whatever its capitals and spaces,
    so "customer rating" is `customerRating`. A text that begins with none is one of triples where
    these are known, or else the text of the only kind of source, or of `source`. Raises TaskError
    for a text that is none of these, or has an empty segment.
    """
    *read, answer = kinds
    alone = SOURCE if SOURCE in read else read[0] if len(read) == 1 else None
    found = _marked(text, kinds)
    if not found and set(TRIPLE) <= set(read):
        found = _triples(text)
    if not found and alone is not None:
        found = [(alone, text)]
    if not found:
        raise TaskError(
            f"the text {text[:60]!r} begins with none of the kinds {', '.join(kinds)}; expected "
            f"such as {_example(read, answer)!r}"
        )
    for kind, content in found:
        if not content.strip():
            raise TaskError(
                f"the text {text[:60]!r} has nothing for {kind!r}; expected such as "
                f"{_example(read, answer)!r}"
            )
    return (*found, (answer, ""))


def _marked(text: str, kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Segments with their kinds in front; none where the text begins otherwise."""
    marks = list(_mark(tuple(kinds)).finditer(text))
    if not marks or marks[0].start() > 0:
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return [
        (_named(mark, kinds), text[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)
    ]


@lru_cache
def _mark(kinds: tuple[str, ...]) -> re.Pattern[str]:
    """Where a segment begins: a group for each kind."""
    spaced = (r"\s?".join(map(re.escape, "".join(kind.split()))) for kind in kinds)
    known = "|".join(f"({each})" for each in spaced)
    return re.compile(rf"(?:\A\s*|{re.escape(BETWEEN)})(?:{known}){re.escape(AFTER)}", re.I)


def _named(mark: re.Match[str], kinds: Sequence[str]) -> str:
    """The kind that a mark names: as it is written, else the one that differs least."""
    number = mark.lastindex or 1
    return mark[number] if mark[number] in kinds else kinds[number - 1]


def _triples(text: str) -> list[tuple[str, str]]:
    """Triples; what has no two colons belongs to the object before. None: no triple leads."""
    found: list[tuple[str, str]] = []
    for piece in text.split(BETWEEN):
        parts = piece.split(AFTER, 2)
        if len(parts) == 3:
            found += zip(TRIPLE, parts, strict=True)
        elif found:
            kind, before = found.pop()
            found.append((kind, before + BETWEEN + piece))
        else:
            return []
    return found


def _example(read: Sequence[str], answer: str) -> str:
    shown = TRIPLE if set(TRIPLE) <= set(read) else read[:2]
    return rendered((*((kind, "…") for kind in shown), (answer, "")))
