"""Texts as a tokenizer encodes them: cut to fit, padded on the right, none without a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from howfine.base import Base
from howfine.errors import SettingError


def encoded(base: Base, columns: Sequence[Sequence[str]], max_length: int) -> dict[str, Tensor]:
    """(B, S) inputs of a column of B texts, or of two columns, whose texts are read in pairs.

    Special tokens count. Raises SettingError where they leave no room for a text: a tokenizer then
    cuts nothing at all.
    """
    taken = base.tokenizer.num_special_tokens_to_add(pair=len(columns) > 1)
    limit = min(max_length, base.room)
    if taken >= limit:
        how = f"raise max_length, found {max_length}, to {taken + 1} or more"
        if base.room == limit:  # the base itself, or what changes leave of it
            how = f"{base.name} holds {limit} beside what is put in front: put fewer vectors there"
        raise SettingError(
            f"special tokens take {taken} of {limit} tokens and leave no room for a text; {how}"
        )
    found = base.tokenizer(
        *map(list, columns),
        padding=True,
        truncation=True,
        max_length=limit,
        padding_side="right",  # positions then start at 0 in every row, padded or not
        return_tensors="pt",
    )
    _fill_empty(found, base.tokenizer)
    return dict(found)


def _fill_empty(found: Any, tokenizer: Any) -> None:
    """Give a text without any token (blank, and no special tokens) one to read."""
    empty = found["attention_mask"].sum(1) == 0
    if not empty.any():
        return
    if not found["attention_mask"].shape[1]:
        for name, value in found.items():
            found[name] = torch.zeros(len(value), 1, dtype=torch.long)
    token = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
    found["input_ids"][empty, 0] = token
    found["attention_mask"][empty, 0] = 1
