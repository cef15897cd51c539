"""Inputs made of typed segments: a beginning, then of each segment its marker and its text.

Lin, Madotto & Fung 2020, "Exploring versatile generative language model". Markers are vectors of a
readout's own (`howfine.vectors`), as are the types that every position of a segment may have added.
The last segment is the answer's: its text is to be written, and ends by a vector, too. No text can
hold a marker: they are known by where they stand and never by a token's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from howfine import language, layout, template, vectors
from howfine.base import Base
from howfine.batch import Batch
from howfine.errors import SettingError, TaskError, near
from howfine.task import Example
from howfine.tasks import segments

# What a text and its answer are, where a task does not say.
PLAIN = ("source", "target")


class Asked(layout.Room, Protocol):
    """The settings that say what an input looks like."""

    @property
    def kinds(self) -> tuple[str, ...]: ...
    @property
    def typed(self) -> bool: ...
    @property
    def answers(self) -> int: ...


@dataclass
class _Row:
    """One input: tokens, and the vectors that stand at them and are added."""

    ids: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], kind: int, mark: int = -1) -> None:
        self.ids += ids
        self.marks += [mark] * len(ids)
        self.types += [kind] * len(ids)


def batch(base: Base, asked: Asked, examples: Sequence[Example], labelled: bool) -> Batch:
    """Sources, with `labelled` their first targets too: `targets` (B, S), UNSEEN but on those.

    Padded as `howfine.layout` has it. Texts are cut from their ends, the longest first, never
    markers. Raises SettingError where settings leave a text no room, TaskError for examples of
    other segments or without targets.
    """
    limit = layout.room(base, asked)
    rows = [_row(base, asked, example, limit) for example in examples]
    sources = [len(row.ids) for row in rows]
    if labelled:
        for row, example in zip(rows, examples, strict=True):
            _learn(base, asked, row, example)
    made = Batch(
        inputs={
            "input_ids": layout.padded([row.ids for row in rows], base.tokenizer.pad_token_id or 0),
            "attention_mask": layout.padded([[1] * len(row.ids) for row in rows], 0),
        },
        marks=layout.padded([row.marks for row in rows], -1),
        types=layout.padded([row.types for row in rows], -1),
    )
    if not labelled:
        return layout.on_the_left(made)
    end = vectors.ending(base)
    made.targets = layout.padded(
        [_targets(row, source, end) for row, source in zip(rows, sources, strict=True)],
        layout.UNSEEN,
    )
    return made


def _row(base: Base, asked: Asked, example: Example, limit: int) -> _Row:
    """What is read before writing begins."""
    read = example.segments or _parsed(asked, example)
    texts = {
        at: _known(base, text, language.pieces(base, text)) for at, (_, text) in enumerate(read)
    }
    before, _ = language.around(base.tokenizer)
    taken = len(before) + 1 + len(read)
    if taken + 1 > limit:
        raise SettingError(
            f"the markers of {len(read)} segments take {taken} of {limit} tokens and leave no room "
            f"for their texts; raise max_length ({base.room_said}), or let less be "
            "written"
        )
    template.shorten(texts, limit - taken)
    row, blank = _Row(), template.blank(base.tokenizer)
    row.add(before, _type(asked, vectors.BEGINNING))
    row.add([blank], _type(asked, vectors.BEGINNING), vectors.BEGINNING)
    for at, (name, _) in enumerate(read):
        kind = _kind(asked, name)
        row.add([blank], _type(asked, kind), kind)
        row.add(texts[at], _type(asked, kind))
    return row


def _parsed(asked: Asked, example: Example) -> Sequence[tuple[str, str]]:
    """The segments of a text as it is written by hand."""
    if len(example.texts) > 1:
        raise TaskError(
            f"an example has {len(example.texts)} texts, beginning {example.texts[0][:40]!r}; "
            "expected one, or segments"
        )
    if asked.answers > 1:
        raise TaskError(
            f"{example.texts[0][:60]!r} does not say what is to be written, of "
            f"{', '.join(asked.kinds[-asked.answers :])}; give an Example with segments"
        )
    return segments.parsed(example.texts[0], asked.kinds)


def _kind(asked: Asked, name: str) -> int:
    if name not in asked.kinds:
        raise TaskError(
            f"a segment is of kind {name!r}, for which there is no vector. "
            f"{near(name, asked.kinds)}"
        )
    return vectors.KINDS + asked.kinds.index(name)


def _type(asked: Asked, kind: int) -> int:
    return kind if asked.typed else -1


def _learn(base: Base, asked: Asked, row: _Row, example: Example) -> None:
    """Let a row go on with its target, and the end where there is room for it."""
    end, kind = vectors.ending(base), row.types[-1]
    ids = layout.target(base, example, asked.max_new_tokens, end)
    ended = ids[-1] == end
    row.add(_known(base, example.targets[0], ids[: len(ids) - ended]), kind)
    if ended:
        row.add([template.blank(base.tokenizer)], kind, vectors.END)


def _known(base: Base, text: str, ids: list[int]) -> list[int]:
    """Tokens of a text, all of which the model has a vector for; its next number is an end's."""
    if ids and max(ids) >= vectors.ending(base):
        token = base.tokenizer.convert_ids_to_tokens(max(ids))
        raise TaskError(
            f"{text[:60]!r} holds {token!r}, which the tokenizer knows and {base.name} has no "
            "vector for; take it out, or resize the model's table of words"
        )
    return ids


def _targets(row: _Row, source: int, end: int) -> list[int]:
    """What a row's tokens are to be learned as."""
    own = zip(row.ids[source:], row.marks[source:], strict=True)
    learned = [end if mark == vectors.END else token for token, mark in own]
    return [layout.UNSEEN] * source + learned
