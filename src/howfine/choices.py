"""Inputs of multiple choice: options side by side that do not see each other, then the texts.

Positions, types and the attention mask are those of UniMC's released code (Yang et al. 2022), but
for one thing: an input is put together of the parts' own tokens, so that no option's place can be
miscounted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from howfine.base import Base
from howfine.batch import Batch
from howfine.errors import SettingError, TaskError
from howfine.language import around, pieces
from howfine.task import Example

# Added to the attention scores of what is not to be seen.
UNSEEN = -1e9
# Tokens that options leave to everything else, as in the authors' code.
SPARED = 32


_HOLE = re.compile(r"\{text\}|\{pair\}")


def unseen_in(dtype: torch.dtype) -> float:
    """UNSEEN, or the lowest number that a format has."""
    return max(UNSEEN, torch.finfo(dtype).min)


class Asked(Protocol):
    """The settings that say what an input looks like."""

    @property
    def options(self) -> tuple[str, ...]: ...
    @property
    def question(self) -> str: ...
    @property
    def max_length(self) -> int: ...


@dataclass
class Row:
    """One input: its tokens, where its options' masks are, and the first place behind them."""

    ids: list[int]
    masks: list[int]
    behind: int


def check(options: Sequence[str]) -> None:
    """Raises SettingError for two options with one text."""
    told = [option.strip() for option in options]
    twice = sorted({option for option in told if told.count(option) > 1})
    if twice:
        raise SettingError(f"options: {twice[0]!r} is there twice; each must be told apart")
    if "" in told:
        raise SettingError("options: one is empty; write what it says")


def row(base: Base, asked: Asked, example: Example) -> Row:
    """The input of an example, texts cut from their ends to fit.

    Raises TaskError for an example without options, with two that are equal as texts, as tokens or
    after cutting, or with the mask token in a text, SettingError where options alone leave no room.
    """
    written = example.options or asked.options
    if len(written) < 2:
        raise TaskError(
            f"multiple choice needs two options at least, and {example.texts[0][:60]!r} has "
            f"{len(written)}; set the readout's options, one for each class, or give each Example "
            "its own"
        )
    texts = dict(zip(("{text}", "{pair}"), example.texts, strict=False))
    rest = [text for hole, text in texts.items() if not any(hole in each for each in written)]
    if "{pair}" not in texts and any("{pair}" in option for option in written):
        raise TaskError(
            f"an option has {{pair}}, for a second text, and {example.texts[0][:50]!r} is alone; "
            "give two texts (with a tab in between, at the command line)"
        )
    written = tuple(_HOLE.sub(lambda hole: texts.get(hole[0], ""), option) for option in written)
    if len({option.strip() for option in written}) < len(written):
        raise TaskError(
            f"two of the options {', '.join(option[:40] for option in written)} are the same; each "
            "must be told apart"
        )
    limit = min(asked.max_length, base.room)
    whole = [_tokens(base, option) for option in written]
    options = _shortened(base, whole, limit)
    _check_apart(base, written, whole, options, limit)
    # A task's own ones are asked of every text; an example's, or those with its text, may be cut.
    if options != whole and written == asked.options:
        raise SettingError(
            f"the options take {sum(map(len, whole)) + len(whole)} of {limit} tokens, and leave a "
            f"text fewer than {min(SPARED, limit // 2)}; write shorter ones, or raise max_length "
            f"({base.room_said})"
        )
    question = [_tokens(base, asked.question)] if asked.question else []
    return _fitted(base, options, question, [_tokens(base, text) for text in rest if text], limit)


def _fitted(
    base: Base,
    options: list[list[int]],
    question: list[list[int]],
    texts: list[list[int]],
    limit: int,
) -> Row:
    """All of them in one input, whose tail goes where it is too long; the last separator stays."""
    _, after = around(base.tokenizer)
    taken = len(_joined(base, options, question).ids)
    if taken + bool(texts) * (1 + len(after)) > limit:
        raise SettingError(
            f"options and question take {taken} of {limit} tokens and leave no room for a text; "
            f"shorten the question, or raise max_length ({base.room_said})"
        )
    made = _joined(base, options, [*question, *texts])
    if len(made.ids) > limit:
        made.ids = made.ids[: limit - len(after)] + list(after)
    return made


def _shortened(base: Base, options: list[list[int]], limit: int) -> list[list[int]]:
    """Tokens of the options, halved until they leave room for the rest."""
    while sum(map(len, options)) + len(options) > max(limit - SPARED, limit // 2):
        if max(map(len, options)) < 2:
            raise SettingError(
                f"{len(options)} options leave no room for a text in {limit} tokens; raise "
                f"max_length ({base.room_said}), or give fewer options"
            )
        options = [ids[: max(1, len(ids) // 2)] for ids in options]
    return options


def _check_apart(
    base: Base,
    written: Sequence[str],
    whole: list[list[int]],
    kept: list[list[int]],
    limit: int,
) -> None:
    """Two options of one score: nothing but their order would choose between them."""
    for number, ids in enumerate(kept):
        first = kept.index(ids)
        if first == number:
            continue
        both = f"the options {written[first][:40]!r} and {written[number][:40]!r}"
        if whole[first] == whole[number]:
            raise TaskError(
                f"the tokenizer of {base.name} gives {both} the same tokens and can't tell them "
                "apart; write them with other words"
            )
        raise TaskError(
            f"cut to fit, {both} are the same {len(ids)} tokens, as an input has {limit}; raise "
            f"max_length ({base.room_said}), or let what tells them apart come first"
        )


def _joined(base: Base, options: list[list[int]], parts: list[list[int]]) -> Row:
    before, after = around(base.tokenizer)
    made = Row(list(before), [], 0)
    for ids in options:
        made.masks.append(len(made.ids))
        made.ids += [base.tokenizer.mask_token_id, *ids]
    made.behind = len(made.ids)
    made.ids += after
    for ids in parts:
        made.ids += ids + after
    return made


def _tokens(base: Base, text: str) -> list[int]:
    ids = pieces(base, text)
    if base.tokenizer.mask_token_id in ids:
        raise TaskError(
            f"a text holds the mask token {base.tokenizer.mask_token}: {text[:80]!r}; only options "
            "have one in front: take it out of the text"
        )
    return ids


def padded(base: Base, rows: Sequence[Row], apart: bool) -> Batch:
    """A batch of inputs; `reads` (B, m + 1): the options' masks, -1 for none, and what is behind.

    With `apart` options see no other option and their positions start anew.
    """
    width, most = max(len(r.ids) for r in rows), max(len(r.masks) for r in rows)
    ids = torch.full((len(rows), width), base.tokenizer.pad_token_id or 0)
    types = torch.zeros_like(ids)
    places = torch.zeros_like(ids)
    unseen = unseen_in(base.dtype)
    mask = torch.full((len(rows), 1, width, width), unseen, dtype=base.dtype)
    reads = torch.full((len(rows), most + 1), -1)
    for number, one in enumerate(rows):
        length = len(one.ids)
        ids[number, :length] = torch.tensor(one.ids)
        first = one.masks[0]
        types[number, first : one.behind + 1] = 1
        places[number, :length] = _places(one) if apart else torch.arange(length)
        # A padded place sees what a real one does: a row of nothing has no softmax.
        mask[number, 0, :, :length] = 0
        if apart:
            mask[number, 0, first : one.behind, first : one.behind] = unseen
            for start, stop in zip(one.masks, [*one.masks[1:], one.behind], strict=True):
                mask[number, 0, start:stop, start:stop] = 0
        reads[number, : len(one.masks)] = torch.tensor(one.masks)
        reads[number, -1] = one.behind
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    inputs["position_ids"] += base.first_position
    if getattr(base.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = types
    return Batch(inputs=inputs, reads=reads)


def _places(one: Row) -> torch.Tensor:
    """Positions: from 1 in each option, and after the longest one from there on."""
    first, longest = one.masks[0], 0
    places = torch.zeros(len(one.ids), dtype=torch.long)
    places[:first] = torch.arange(first)
    for start, stop in zip(one.masks, [*one.masks[1:], one.behind], strict=True):
        places[start:stop] = torch.arange(first, first + stop - start)
        longest = max(longest, stop - start)
    rest = len(one.ids) - one.behind
    places[one.behind :] = torch.arange(first + longest, first + longest + rest)
    return places
