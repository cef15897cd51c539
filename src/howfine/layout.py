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


class Room(Protocol):
    """The settings that say how much may be read and written."""

    @property
    def max_length(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...


class Asked(Room, Protocol):
    """The settings that say what an input looks like."""

    @property
    def template(self) -> str: ...


def batch(base: Base, asked: Asked, examples: Sequence[Example], labelled: bool) -> Batch:
    """Sources, with `labelled` their first targets too: `targets` (B, S), UNSEEN but on those.

    Rows are padded on the right to learn from, and on the left to write after. Of an
    encoder-decoder `decoder_input_ids` are what its decoder reads: the beginning, and of what is to
    be learned all but the last. Raises SettingError where settings leave a source no room,
    TaskError for examples without targets.
    """
    whole = base.kind == language.SEQ2SEQ
    limit = room(base, asked)
    made = template.parse(asked.template).fill(base, examples, limit, ended=whole)
    made.reads = None
    if not labelled:
        return _apart(base, made, [[]] * len(examples)) if whole else on_the_left(made)
    written = [target(base, example, asked.max_new_tokens) for example in examples]
    return _apart(base, made, written) if whole else _behind(base, made, written)


def room(base: Base, asked: Room) -> int:
    """Tokens of a source, with all that a template puts around it.

    Raises SettingError where what may be written leaves none, or has none itself.
    """
    limit, most = min(asked.max_length, base.room), asked.max_new_tokens
    if base.kind == language.SEQ2SEQ:  # the decoder's tokens have positions of their own
        positions = getattr(base.config, "max_position_embeddings", None)
        if positions and most + len(beginning(base)) - 1 > positions:
            raise SettingError(
                f"max_new_tokens {most}: the decoder of {base.name} holds {positions} tokens; let "
                "less be written"
            )
        return limit
    if limit <= most:
        raise SettingError(
            f"max_new_tokens {most} leaves no room for a text in {limit} tokens; raise max_length "
            f"({base.room_said}), or let less be written"
        )
    return limit - most


def beginning(base: Base) -> list[int]:
    """What an encoder-decoder's decoder has read before it writes: its start, and a forced token.

    The second is BART's <s>, or a language. Raises SettingError where the model names no start.
    """
    start = _stated(base, "decoder_start_token_id")
    if start is None:
        raise SettingError(
            f"{base.name} does not say with which token its decoder starts; set "
            "decoder_start_token_id in its config, of a multilingual model the language's"
        )
    forced = _stated(base, "forced_bos_token_id")
    return [start] if forced is None else [start, forced]


def _stated(base: Base, name: str) -> int | None:
    """A token that the generation config names, as generate() has it, or else the config."""
    for config in (base.tower.generation_config, base.config):
        if (found := getattr(config, name, None)) is not None:
            return int(found)
    return None


def target(base: Base, example: Example, most: int, end: int | None = None) -> list[int]:
    """Token numbers of what is to be written, the end's last; cut where it is longer than `most`.

    The end is the tokenizer's, unless another one is given. Raises TaskError for an example without
    one, or with the end's token inside.
    """
    if not example.targets:
        raise TaskError(
            f"{example.texts[0][:60]!r} has no text to be written, expected one to learn from; "
            "name the column of them with target"
        )
    if base.kind == language.SEQ2SEQ:  # some have a vocabulary, or pieces, of their own for it
        words = base.tokenizer
        own = words(text_target=example.targets[0], add_special_tokens=False, verbose=False)
        ids = list(own["input_ids"])
    else:
        ids = language.pieces(base, example.targets[0])
    own = base.tokenizer.eos_token_id if end is not None else ending(base)
    if own in ids:
        raise TaskError(
            f"a text to be written holds {base.tokenizer.eos_token}, which ends it: "
            f"{example.targets[0][:80]!r}; take it out of the text"
        )
    return [*ids, own if end is None else end][:most]


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
        "input_ids": padded(rows, base.tokenizer.pad_token_id or 0),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
    }
    both = zip(sources, written, strict=True)
    targets = padded([[UNSEEN] * len(source) + [*own] for source, own in both], UNSEEN)
    slots = made.slots
    if slots is not None:
        longer = targets.shape[1] - slots.shape[1]
        slots = torch.nn.functional.pad(slots, (0, longer), value=-1)
    return Batch(inputs=inputs, targets=targets, slots=slots)


def _apart(base: Base, made: Batch, written: Sequence[Sequence[int]]) -> Batch:
    """An encoder-decoder's input: the decoder reads the beginning, and what is learned so far."""
    start = beginning(base)
    read = [[*start, *own[:-1]] for own in written]
    inputs = dict(made.inputs)
    inputs["decoder_input_ids"] = padded(read, base.tokenizer.pad_token_id or 0)
    targets = padded(written, UNSEEN) if any(written) else None
    return Batch(inputs=inputs, targets=targets, slots=made.slots)


def on_the_left(made: Batch) -> Batch:
    """The same rows with their padding in front, so that all end where writing begins."""
    lengths = made.inputs["attention_mask"].sum(1)
    width = made.inputs["input_ids"].shape[1]
    # Column c of a row of length n comes from c + n, counted round the row.
    columns = (torch.arange(width) + lengths[:, None]) % width
    inputs = {name: value.gather(1, columns) for name, value in made.inputs.items()}
    fields = {name: getattr(made, name) for name in ("slots", "marks", "types")}
    turned = {n: value.gather(1, columns) for n, value in fields.items() if value is not None}
    return Batch(inputs=inputs, **turned)


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(B, S) of rows of numbers, with a value behind the shorter ones."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
