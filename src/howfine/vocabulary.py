"""A vocabulary of the tokens that given texts use: a smaller embedding table and tokenizer.

Of a multilingual base the table is most of what is stored (of XLM-R base 192 of 278 M parameters)
and none of the time. Texts that the tokens were chosen by are cut as before, and their outputs are
the same: rows go, and no number in a row changes. Another text may meet words of more pieces than
before, or unknown ones.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from howfine import cuts, plugins, subwords
from howfine.base import IMAGE, Base, TwoTowers
from howfine.delta import Delta
from howfine.errors import SettingError
from howfine.task import Task

# Texts that are cut into tokens at once.
_AT_ONCE = 1000
# Fields of a config for generation that list tokens, of which some may be gone.
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
# Fields of configs and modules that say how many tokens there are.
_COUNTS = ("vocab_size", "decoder_vocab_size")
_NAMED = ("_token_id", "_token_ids")
# What a template puts in, and the words that stand inside: "{slot=so}".
_FIELD, _INSIDE = re.compile(r"\{[^{}]*\}"), re.compile(r"\{[^{}=]*=([^{}]*)\}")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens that stay."""

    # The numbers that they had; a number is now its place here.
    kept: tuple[int, ...]
    # Gives no others.
    tokenizer: Any


def used(base: Base, texts: Iterable[str], least: int = 1, words: Iterable[str] = ()) -> Vocabulary:
    """The tokens that are in the texts at least so many times.

    Those of `words` stay however rare they are, and so do special and other added tokens, the
    unknown one, bytes, what tokens are merged from, those that the config names, and where
    positions count on from the padding's number, all below it. Raises SettingError for a base
    without a fast tokenizer, for no texts, and where every token stays.
    """
    spec, rows = _spec(base), base.embedding.num_embeddings
    if least < 1 or isinstance(texts, str):
        raise SettingError(
            f"least {least} and texts of type {type(texts).__name__}: expected how often a token "
            "has to be there, 1 or more, and several texts, such as a list"
        )
    numbers = set(subwords.numbers(spec).values())
    if (last := max(numbers)) >= rows:
        raise SettingError(
            f"the tokenizer of {base.name} gives numbers up to {last}, and its embedding table has "
            f"{rows} rows; give a base whose tokenizer and weights belong together"
        )
    counts = _counted(spec, texts)
    chosen = {token for token, count in counts.items() if count >= least}
    if not chosen:
        raise SettingError(
            f"no token is {least} times in the texts, which have {counts.total()} tokens; give "
            "texts of the kind that the model will read, or a lower least"
        )
    first, named = base.first_position, _named(base.tower) & set(range(rows))
    if gone := sorted(set(range(first)) - numbers):
        raise SettingError(
            f"the tokenizer of {base.name} has no token number {gone[0]}, and positions count on "
            f"from number {first - 1}, so that numbers can't be kept; give a tokenizer with all"
        )
    chosen |= set(_counted(spec, words)) | set(range(first)) | (named & numbers)
    chosen = subwords.needed(spec, chosen)
    # Rows that no token leads to come last, so that tokens are numbered without a gap.
    kept = sorted(chosen | named, key=lambda row: (row not in numbers and row >= first, row))
    if len(kept) >= rows:
        raise SettingError(
            f"the texts use all {rows:,} tokens of {base.name}, so its vocabulary can't be cut; "
            "give fewer texts, or let rare tokens go with a higher least"
        )
    made = copy.deepcopy(base.tokenizer)
    smaller = subwords.of_some(spec, [row for row in kept if row in numbers])
    made._tokenizer = Tokenizer.from_str(json.dumps(smaller))
    return Vocabulary(tuple(kept), made)


def texts_of(task: Task) -> Iterator[str]:
    """All that a task's examples say: texts, answers to choose from, texts to write, labels."""
    yield from task.labels
    for examples in task.splits.values():
        for example in examples:
            yield from (*example.texts, *example.options, *example.targets)
            yield from (text for _, text in example.segments)


def words_of(delta: Delta) -> set[str]:
    """Words that a delta's readout may look for: its labels and settings, templates in parts."""
    found = {*delta.labels, *_strings(plugins.settings_of(delta.readout))}
    inside = {word for text in found for word in _INSIDE.findall(text)}
    return found | inside | {part for text in found for part in _FIELD.split(text)}


@torch.no_grad()
def cut(base: Base, model: Any, vocabulary: Vocabulary) -> None:
    """Let a copy of the base's tower have the rows of these tokens alone, in place.

    Raises SettingError where it then computes something else.
    """
    kept, rows = torch.tensor(vocabulary.kept, device=base.device), base.embedding.num_embeddings
    trial = torch.randint(
        len(kept), (2, min(8, base.room)), generator=torch.Generator().manual_seed(0)
    )
    trial = trial.to(base.device)
    whole = _outputs(base, model, kept[trial])
    if model.get_output_embeddings() is not None:
        whole = whole[..., kept]
    for held in _by_token(model, rows):
        # In its place, so that what is tied stays tied, and nothing else is.
        tokens = [size == rows for size in held.shape].index(True)
        held.data = held.data.index_select(tokens, kept)
    _shrink(model, rows, vocabulary.kept)
    small = _outputs(base, model, trial)
    cuts.check_same(base, whole, small, "these tokens")


def _spec(base: Base) -> subwords.Spec:
    """The base's tokenizer as JSON."""
    if isinstance(base, TwoTowers) or base.tower_name == IMAGE:
        kind = "two towers" if isinstance(base, TwoTowers) else "a tower of images"
        raise SettingError(f"{base.name} is {kind}; a vocabulary is cut of one model of texts")
    fast = getattr(base.tokenizer, "backend_tokenizer", None)
    if fast is None:
        found = "none" if base.tokenizer is None else f"a {type(base.tokenizer).__name__}"
        raise SettingError(
            f"a vocabulary is cut of fast tokenizers, and the base {base.name} has {found}; give a "
            "folder with a tokenizer.json"
        )
    # What the last batch was padded and truncated to is none of the tokenizer's own.
    spec: subwords.Spec = json.loads(fast.to_str())
    return {**spec, "padding": None, "truncation": None}


def _counted(spec: subwords.Spec, texts: Iterable[str]) -> Counter[int]:
    """How often each token is in texts, as they stand or as behind other words: what is more.

    Templates, second texts and what a model writes come behind others.
    """
    fast, found = Tokenizer.from_str(json.dumps(spec)), Counter[int]()
    left = iter(texts)
    while some := list(islice(left, _AT_ONCE)):
        both = []
        for part in (some, [f" {text.strip()}" for text in some]):
            pieces = fast.encode_batch(part, add_special_tokens=False)
            both.append(Counter(token for each in pieces for token in each.ids))
        found.update(both[0] | both[1])
    return found


def _named(tower: Any) -> set[int]:
    """Numbers of tokens that a model's configs name."""
    found = set[int]()
    for stated in filter(None, (tower.config, getattr(tower, "generation_config", None))):
        for name, value in vars(stated).items():
            if name.endswith(_NAMED):
                found |= {each for each in _flat(value) if type(each) is int}
    return found


def _renumber(stated: Any, number: Mapping[int, int]) -> None:
    """Let a config name tokens by their new numbers; those that are gone leave lists of them."""
    for name, value in list(vars(stated).items()) if stated else ():
        if name.endswith(_NAMED) and type(value) is int:
            setattr(stated, name, number.get(value, value))
        elif isinstance(value, list) and (name.endswith(_NAMED) or name in _LISTS):
            there = [each for each in value if number.keys() >= set(_flat(each))]
            setattr(stated, name, [_as(each, number) for each in there] or None)


def _as(value: Any, number: Mapping[int, int]) -> Any:
    return [number[each] for each in value] if isinstance(value, list) else number[value]


def _flat(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _by_token(model: Any, rows: int) -> list[Tensor]:
    """Tensors of a model that hold something of each of so many tokens, each once."""
    head, held = model.get_output_embeddings(), dict[str, Tensor](model.named_buffers())
    found = [model.get_input_embeddings().weight]
    if head is not None:
        owner = next(name for name, module in model.named_modules() if module is head)
        # A head around the decoder may have a bias of its own, tied to the decoder's or unused.
        around = model.get_submodule(owner.rpartition(".")[0])
        found += [head.weight, getattr(head, "bias", None), getattr(around, "bias", None)]
        found += [value for name, value in held.items() if name == "final_logits_bias"]  # BART's
    own = {id(value): value for value in found if isinstance(value, Tensor) and rows in value.shape}
    return list(own.values())


def _shrink(model: Any, before: int, kept: tuple[int, ...]) -> None:
    """Let modules and configs of a model say how many tokens there are, and which."""
    number = {old: new for new, old in enumerate(kept)}
    configs = [model.config, getattr(model, "generation_config", None)]
    for said in [*model.modules(), *configs]:
        for name in _COUNTS:
            if getattr(said, name, None) == before:
                setattr(said, name, len(kept))
        if isinstance(said, nn.Embedding) and len(said.weight) != said.num_embeddings:
            said.num_embeddings = len(kept)
            padding = said.padding_idx
            said.padding_idx = None if padding is None else number.get(padding)
        if isinstance(said, nn.Linear) and len(said.weight) != said.out_features:
            said.out_features = len(kept)
    for said in configs:
        _renumber(said, number)


def _outputs(base: Base, model: Any, ids: Tensor) -> Tensor:
    """(2, 8, …) what a model gives for tokens."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.anatomy.decoder is not None:
        inputs["decoder_input_ids"] = ids
    found: Tensor = model.eval()(**inputs)[0]
    return found


def _strings(value: Any) -> Iterator[str]:
    """All texts inside settings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)
