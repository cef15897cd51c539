"""Inputs of a language model that writes: sources on the left, what is to be written after them.

A causal model reads source and target as one row of tokens, an encoder-decoder has them apart.
Sources are cut from their ends, never what a template puts around them; a target is cut to the
tokens that may be written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from howfine import language, template
from howfine.base import Base
from howfine.batch import Batch
from howfine.errors import SettingError, TaskError
from howfine.task import Example

# What torch's cross-entropy leaves out.
UNSEEN = -100


class Asked(Protocol):
    """The settings that say what an input looks like."""

    @property
    def template(self) -> str: ...
    @property
    def max_length(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...


def batch(base: Base, asked: Asked, examples: Sequence[Example], labelled: bool) -> Batch:
    """Sources, with `labelled` their first targets too: `targets` (B, S), UNSEEN but on those.

    Rows are padded on the right to learn from, and on the left to write after. Raises SettingError
    where settings leave a source no room, TaskError for examples without targets.
    """
    whole = base.kind == language.SEQ2SEQ
    limit = room(base, asked)
    made = template.parse(asked.template).fill(base, examples, limit)
    made.reads = None
    if not labelled:
        return made if whole else on_the_left(made)
    written = [target(base, example, asked.max_new_tokens) for example in examples]
    return _apart(made, written) if whole else _behind(base, made, written)


def room(base: Base, asked: Asked) -> int:
    """Tokens of a source, with all that a template puts around it.

    Raises SettingError where what may be written leaves none.
    """
    limit = min(asked.max_length, base.room)
    if base.kind == language.SEQ2SEQ:  # the decoder's tokens have positions of their own
        return limit
    if limit <= asked.max_new_tokens:
        raise SettingError(
            f"max_new_tokens {asked.max_new_tokens} leaves no room for a text in {limit} tokens; "
            f"raise max_length (the base holds {base.room}), or let less be written"
        )
    return limit - asked.max_new_tokens


def target(base: Base, example: Example, most: int) -> list[int]:
    """Token numbers of what is to be written, the end's last; cut where it is longer than `most`.

    Raises TaskError for an example without one, or with the end's token inside.
    """
    if not example.targets:
        raise TaskError(
            f"{example.texts[0][:60]!r} has no text to be written, expected one to learn from; "
            "name the column of them with target"
        )
    ids = language.pieces(base, example.targets[0])
    end = ending(base)
    if end in ids:
        raise TaskError(
            f"a text to be written holds {base.tokenizer.eos_token}, which ends it: "
            f"{example.targets[0][:80]!r}; take it out of the text"
        )
    return [*ids, end][:most]


def ending(base: Base) -> int:
    """The token that ends a text. Raises SettingError where the tokenizer has none."""
    if base.tokenizer.eos_token_id is None:
        raise SettingError(
            f"the tokenizer of {base.name} has no token for an end, so nothing says when a text is "
            "written; set its eos_token"
        )
    return int(base.tokenizer.eos_token_id)


def _behind(base: Base, made: Batch, written: Sequence[Sequence[int]]) -> Batch:
    """A causal model's input: the target follows the source."""
    ids, mask = made.inputs["input_ids"], made.inputs["attention_mask"]
    sources = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
    rows = [[*source, *own] for source, own in zip(sources, written, strict=True)]
    inputs = {
        "input_ids": _padded(rows, base.tokenizer.pad_token_id or 0),
        "attention_mask": _padded([[1] * len(row) for row in rows], 0),
    }
    if "token_type_ids" in made.inputs:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    both = zip(sources, written, strict=True)
    targets = _padded([[UNSEEN] * len(source) + [*own] for source, own in both], UNSEEN)
    slots = made.slots
    if slots is not None:
        longer = targets.shape[1] - slots.shape[1]
        slots = torch.nn.functional.pad(slots, (0, longer), value=-1)
    return Batch(inputs=inputs, targets=targets, slots=slots)


def _apart(made: Batch, written: Sequence[Sequence[int]]) -> Batch:
    """An encoder-decoder's input: the decoder learns the target by itself."""
    return Batch(inputs=made.inputs, targets=_padded(written, UNSEEN), slots=made.slots)


def on_the_left(made: Batch) -> Batch:
    """The same rows with their padding in front, so that all end where writing begins."""
    lengths = made.inputs["attention_mask"].sum(1)
    width = made.inputs["input_ids"].shape[1]
    # Column c of a row of length n comes from c + n, counted round the row.
    columns = (torch.arange(width) + lengths[:, None]) % width
    inputs = {name: value.gather(1, columns) for name, value in made.inputs.items()}
    slots = None if made.slots is None else made.slots.gather(1, columns)
    return Batch(inputs=inputs, slots=slots)


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
