"""Templates: texts, masks, free slots and words in one input, in the order that is written.

    {slot*5} {text} {slot*5} {mask} {slot*5} {pair} {slot*5}

`{text}` and `{pair}` are an example's texts, `{mask}` is the tokenizer's mask (`{mask*3}`: three),
`{bos}` its token for a beginning (or else for an end), `{slot}` a free position, `{slot=great}` one
that begins as that word; what stands between braces is words. Positions are known from how an input
was put together, never from token numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from howfine.base import Base
from howfine.batch import Batch
from howfine.errors import SettingError, TaskError
from howfine.language import around, pieces
from howfine.task import Example

_PART = re.compile(r"\{(?P<kind>text|pair|mask|bos|slot)(\*(?P<count>\d+))?(=(?P<word>[^{}]+))?\}")
_TEXTS = ("{text}", "{pair}")
# Parts at most: a number in a file is not to ask for any memory it likes.
MOST = 4096


@dataclass(frozen=True)
class Part:
    """A piece of a template: a text hole, a mask, a slot with its word, or words."""

    kind: str  # as it is written, without a number or a word; "" for words
    word: str = ""


@dataclass(frozen=True)
class Template:
    """The parts of an input, in order."""

    parts: tuple[Part, ...]
    written: str

    @property
    def slots(self) -> tuple[str, ...]:
        """The word that each free slot begins as, "" where none is named."""
        return tuple(part.word for part in self.parts if part.kind == "{slot}")

    @property
    def masks(self) -> int:
        """Number of mask positions."""
        return sum(part.kind == "{mask}" for part in self.parts)

    def fill(
        self, base: Base, examples: Sequence[Example], max_length: int, ended: bool = True
    ) -> Batch:
        """Inputs of all examples, padded on the right, with `slots` and `reads` (the masks).

        Of a base that has no masks `reads` is the last token. Unless `ended`, what the tokenizer
        puts behind a text is left out: more is to follow. Texts are cut from their ends, the
        longest first, until an input has `max_length` tokens. Raises TaskError for texts that hold
        the mask token or don't fit the holes, SettingError where the rest has no room.
        """
        limit = min(max_length, base.room)
        fixed = [_fixed(base, part, at == 0) for at, part in enumerate(self.parts)]
        before, after = around(base.tokenizer)
        edges = before, after if ended else []
        rows = [self._row(base, example, limit, fixed, edges) for example in examples]
        width = max(len(row.ids) for row in rows)
        pad = base.tokenizer.pad_token_id or 0
        inputs = {
            "input_ids": _padded([row.ids for row in rows], width, pad),
            "attention_mask": _padded([[1] * len(row.ids) for row in rows], width, 0),
        }
        # Some tokenizers list types whose model has none, or (GPT-2) takes them for words.
        if getattr(base.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        masks = [row.masks or [len(row.ids) - 1] for row in rows]
        slots = _padded([row.slots for row in rows], width, -1) if self.slots else None
        return Batch(inputs=inputs, slots=slots, reads=torch.tensor(masks))

    def _row(
        self,
        base: Base,
        example: Example,
        limit: int,
        fixed: Sequence[list[int]],
        edges: tuple[list[int], list[int]],
    ) -> _Row:
        before, after = edges
        texts = self._texts(base, example)
        taken = len(before) + len(after) + sum(map(len, fixed))
        if taken + any(texts.values()) > limit:
            raise SettingError(
                f"template {self.written!r} takes {taken} of {limit} tokens and leaves no room "
                f"for a text; shorten it, or raise max_length ({base.room_said})"
            )
        shorten(texts, limit - taken)
        row = _Row(list(before), [-1] * len(before), [])
        slot = 0
        for number, part in enumerate(self.parts):
            ids = texts[part.kind] if part.kind in _TEXTS else fixed[number]
            if part.kind == "{mask}":
                row.masks.append(len(row.ids))
            row.slots += [slot] if part.kind == "{slot}" else [-1] * len(ids)
            slot += part.kind == "{slot}"
            row.ids += ids
        row.ids += after
        row.slots += [-1] * len(after)
        if not row.ids:  # a blank text, and nothing around it
            row.ids, row.slots = [blank(base.tokenizer)], [-1]
        return row

    def _texts(self, base: Base, example: Example) -> dict[str, list[int]]:
        """Token numbers of an example's texts, by hole."""
        holes = [kind for kind in _TEXTS if any(part.kind == kind for part in self.parts)]
        if len(example.texts) > len(holes):
            raise TaskError(
                f"template {self.written!r} has {len(holes)} of the holes {{text}} and {{pair}}, "
                f"and an example has {len(example.texts)} texts; write a template with both"
            )
        found: dict[str, list[int]] = {hole: [] for hole in holes}
        for hole, text in zip(holes, example.texts, strict=False):
            found[hole] = pieces(base, text, after_space=self.parts[0].kind != hole)
            if self.masks and base.tokenizer.mask_token_id in found[hole]:
                raise TaskError(
                    f"a text holds the mask token {base.tokenizer.mask_token}: {text[:80]!r}; "
                    "only the template may: take it out of the text"
                )
        return found


@dataclass
class _Row:
    ids: list[int]
    slots: list[int]
    masks: list[int]


@lru_cache(maxsize=64)
def parse(written: str) -> Template:
    """A template from how it is written. Raises SettingError with what is wrong."""
    parts: list[Part] = []
    at = 0
    for match in _PART.finditer(written):
        parts += _words(written, written[at : match.start()])
        at = match.end()
        kind = f"{{{match['kind']}}}"
        count = int(match["count"] or 1)
        if kind in _TEXTS and (match["count"] or any(part.kind == kind for part in parts)):
            raise SettingError(f"template {written!r}: {kind} may stand there once")
        if match["word"] and kind != "{slot}":
            raise SettingError(f"template {written!r}: only a slot can begin as a word")
        if count > MOST - len(parts):
            raise SettingError(f"template {written[:80]!r} has more than {MOST} parts; shorten it")
        parts += [Part(kind, match["word"] or "")] * count
    parts += _words(written, written[at:])
    if not any(part.kind == "{text}" for part in parts):
        raise SettingError(f"template {written!r} has no {{text}}; write where the text goes")
    return Template(tuple(parts), written)


def _words(written: str, between: str) -> list[Part]:
    if "{" in between or "}" in between:
        raise SettingError(
            f"template {written!r}: {between.strip()!r} is not understood; expected {{text}}, "
            "{pair}, {mask}, {bos}, {slot}, {slot*5} or {slot=word}, and words"
        )
    return [Part("", between.strip())] if between.strip() else []


def _fixed(base: Base, part: Part, first: bool) -> list[int]:
    """Token numbers of a part that is no text; the first one stands after no space."""
    if not part.kind:
        words = pieces(base, part.word, after_space=not first)
        if base.tokenizer.mask_token_id in words:  # None is no token's number
            raise SettingError(
                f"the template's words {part.word.strip()!r} hold the mask token; write {{mask}} "
                "where it is to be read"
            )
        return words
    if part.kind == "{mask}":
        if base.tokenizer.mask_token_id is None:
            raise SettingError(
                f"the template has a {{mask}}, and {base.name} has no mask token; a causal "
                "language model reads its last position: leave the mask out"
            )
        return [base.tokenizer.mask_token_id]
    if part.kind == "{bos}":
        return [_beginning(base)]
    return [blank(base.tokenizer)] if part.kind == "{slot}" else []


def _beginning(base: Base) -> int:
    """The token for a beginning, or else for an end, as GPT-2's one token is both."""
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(base.tokenizer, name) is not None:
            return int(getattr(base.tokenizer, name))
    raise SettingError(
        f"the template has a {{bos}}, and {base.name} has no token for a beginning or an end; "
        "write words instead"
    )


def blank(tokenizer: Any) -> int:
    """What stands at a slot that nothing fills, and where there is no token at all."""
    for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is not None:
            return int(getattr(tokenizer, name))
    return 0


def shorten(texts: Mapping[Any, list[int]], room: int) -> None:
    """Cut ends until the texts have `room` tokens together, the longest first."""
    while sum(map(len, texts.values())) > max(0, room):
        max(texts.values(), key=len).pop()


def _padded(rows: list[list[int]], width: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
