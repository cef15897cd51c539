"""A language model's head, step by step: what its decoder reads, and the decoder itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from howfine.base import Base
from howfine.errors import SettingError

MASKED, CAUSAL, SEQ2SEQ = "masked_lm", "causal_lm", "seq2seq_lm"


def require(base: Base, what: str, kinds: tuple[str, ...] = (MASKED, CAUSAL)) -> None:
    """Raises SettingError unless the base is a language model of one of the kinds."""
    if base.kind in kinds and (base.anatomy.language is not None or base.kind == SEQ2SEQ):
        return
    named = " or ".join(kinds)
    if not any(_can_be(base, kind) for kind in kinds):
        raise SettingError(
            f"{what} needs a base of kind {named}, and {base.name} is a {base.config.model_type}, "
            "of which there is none; give another base"
        )
    found = "no language model's head" if base.kind == "body" else f"kind {base.kind}"
    raise SettingError(
        f"{what} needs a base of kind {named}, and {base.name} was loaded with {found}; load it "
        f"with Base.load({base.name!r}, kind={kinds[0]!r}), or give another base"
    )


def _can_be(base: Base, kind: str) -> bool:
    """Whether transformers has a model of the base's architecture with that head."""
    heads = {
        MASKED: transformers.MODEL_FOR_MASKED_LM_MAPPING,
        CAUSAL: transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        SEQ2SEQ: transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    }
    found: bool = type(base.tower.config) in heads[kind]
    return found


def before_decoder(base: Base) -> Callable[[nn.Module, Tensor], Tensor]:
    """A function of (tower, hidden states (…, H)): what the decoder would read, (…, H').

    H' is the width of the output embedding: that of the embedding table where it is factorised.
    """
    steps = base.anatomy.language or ()

    def run(tower: nn.Module, hidden: Tensor) -> Tensor:
        for step in steps:
            module: Callable[[Tensor], Tensor] = functional.gelu
            if step != "gelu":
                module = tower.get_submodule(step)
            hidden = module(hidden)
        return hidden

    return run


def decoder(base: Base) -> nn.Linear:
    """The layer from there to the vocabulary: rows are output vectors of tokens."""
    found: Any = base.tower.get_output_embeddings()
    return found


def scores(base: Base) -> Callable[[nn.Module, Tensor], Tensor]:
    """A function of (tower, hidden states (…, H)): the model's own scores of tokens, (…, V)."""
    reading, cap = before_decoder(base), capped(base)

    def run(tower: nn.Module, hidden: Tensor) -> Tensor:
        found: Tensor = tower.get_output_embeddings()(reading(tower, hidden))  # type: ignore
        return cap(found)

    return run


def capped(base: Base) -> Callable[[Tensor], Tensor]:
    """What the model does to a decoder's outputs: Gemma 2 and 3 keep them in bounds."""
    most = getattr(base.config, "final_logit_softcapping", None)
    return lambda found: most * torch.tanh(found / most) if most else found


def single_token(base: Base, word: str, what: str) -> int:
    """The number of a word that is one token of the vocabulary, as it stands after a space.

    Raises SettingError for a word of several pieces, or one that is not known.
    """
    ids = pieces(base, word)
    if len(ids) != 1 or ids[0] == base.tokenizer.unk_token_id:
        shown = base.tokenizer.convert_ids_to_tokens(ids)
        raise SettingError(
            f"{what} {word!r} is {len(ids)} tokens of {base.name} ({' '.join(shown)}), expected "
            "one that it knows; give another word"
        )
    return ids[0]


def pieces(base: Base, text: str, after_space: bool = True) -> list[int]:
    """Token numbers of a text, as after a space or a start, without special tokens around it."""
    tokenizer = base.tokenizer
    if tokenizer is None:
        raise SettingError(
            f"{text!r} can't be read: {base.name} came without a tokenizer; give attach() one"
        )
    if not text.strip():
        return []
    before = _spaced(tokenizer) if after_space else ""
    # Not verbose: it would warn of texts longer than the model takes, which are cut later.
    found = tokenizer(before + text, add_special_tokens=False, verbose=False)
    return list(found["input_ids"])


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token numbers that the tokenizer puts before and after a text.

    They are asked for each time: mBART's are those of the language that it is set to.
    """
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    return [], []


@functools.lru_cache(maxsize=16)
def _spaced(tokenizer: Any) -> str:
    """A space where the tokenizer tells words by the space before them and adds none itself."""
    alone, after = tokenizer.tokenize("a"), tokenizer.tokenize(" a")
    marks_itself = bool(alone) and alone[0].startswith("\u2581")
    return " " if alone != after and not marks_itself else ""
