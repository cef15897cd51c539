"""Subwords: what a fast tokenizer's tokens need of each other, and a tokenizer of some of them.

Read and written as the JSON of the `tokenizers` library. A smaller tokenizer cuts a text as the
larger one did where every token of it stayed:

- WordPiece takes the longest token that fits, and of fewer tokens the same one is the longest.
- BPE merges the pair of the lowest rank. Merges on the way to a token that stays do so as well;
  others played no part.
- Unigram takes the likeliest cut. An unknown character counts 10 less than the least likely token,
  which therefore stays: no cut gets likelier than it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from tokenizers import pre_tokenizers

from howfine.errors import SettingError

Spec = dict[str, Any]
_KINDS = ("WordPiece", "WordLevel", "BPE", "Unigram")
_BYTE_LEVEL = "ByteLevel"
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def numbers(spec: Spec) -> dict[str, int]:
    """Every token's number. Raises SettingError for a kind of tokenizer that is not known."""
    model = spec["model"]
    if model.get("type") not in _KINDS:
        raise SettingError(
            f"the tokenizer is of kind {model.get('type')!r}, expected one of {', '.join(_KINDS)}; "
            "its vocabulary can't be cut"
        )
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{each["content"]: each["id"] for each in spec["added_tokens"]}}


def needed(spec: Spec, used: Iterable[int]) -> set[int]:
    """The numbers of tokens that some tokens need beside them, and these.

    Special and other added tokens, the unknown one, bytes, and what the tokens are merged from.
    """
    model, known = spec["model"], numbers(spec)
    stay = {*used, *_added(spec)}
    words = [model.get("unk_token")]
    if model.get("byte_fallback"):
        words += _BYTES
    if _holds(spec["pre_tokenizer"], _BYTE_LEVEL) or _holds(spec["normalizer"], _BYTE_LEVEL):
        before, after = _affixes(model)
        for byte in pre_tokenizers.ByteLevel.alphabet():
            words += [byte, before + byte, byte + after]
    stay |= {known[word] for word in words if word in known}
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        stay |= {model["unk_id"]} - {None}
        stay.add(scores.index(min(scores)))
    if model["type"] == "BPE":
        pieces, _ = _merged(spec, stay)
        stay |= {known[piece] for piece in pieces}
    return stay


def of_some(spec: Spec, kept: Iterable[int]) -> Spec:
    """The tokenizer of the tokens kept, which are numbered from 0 on in the order given.

    They are what `needed` gives, ascending.
    """
    kept = list(kept)
    number = {old: new for new, old in enumerate(kept)}
    model = dict(spec["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in number]
        unknown = model["unk_id"]
        model["unk_id"] = None if unknown is None else number[unknown]
    else:
        own = sorted(model["vocab"].items(), key=lambda item: item[1])
        model["vocab"] = {token: number[old] for token, old in own if old in number}
    if model["type"] == "BPE":
        _, ranks = _merged(spec, number)
        model["merges"] = [merge for rank, merge in enumerate(model["merges"]) if rank in ranks]
    return {
        **spec,
        "model": model,
        "added_tokens": [{**each, "id": number[each["id"]]} for each in spec["added_tokens"]],
        "post_processor": _renumbered(spec["post_processor"], number),
        "padding": None,
        "truncation": None,
    }


def _added(spec: Spec) -> set[int]:
    """Numbers that are put in from outside: added tokens, and what stands around a text."""
    found = {each["id"] for each in spec["added_tokens"]}
    for part in _parts(spec["post_processor"], "processors"):
        for special in part.get("special_tokens", {}).values():
            found |= set(special["ids"])
        found |= {part[name][1] for name in ("sep", "cls") if name in part}
    return found


def _renumbered(part: Any, number: Mapping[int, int]) -> Any:
    """What stands around a text, with other numbers."""
    if part is None:
        return None
    made = dict(part)
    if "processors" in made:
        made["processors"] = [_renumbered(each, number) for each in made["processors"]]
    if "special_tokens" in made:
        made["special_tokens"] = {
            name: {**special, "ids": [number[each] for each in special["ids"]]}
            for name, special in made["special_tokens"].items()
        }
    for name in {"sep", "cls"} & made.keys():
        made[name] = [made[name][0], number[made[name][1]]]
    return made


def _parts(part: Any, several: str) -> list[Any]:
    """A step of a tokenizer, or those of a sequence of them."""
    if part is None:
        return []
    if several not in part:
        return [part]
    return [one for each in part[several] for one in _parts(each, several)]


def _holds(part: Any, kind: str) -> bool:
    """Whether a step of a tokenizer, or one inside it, is of a kind."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_holds(each, kind) for each in part.values())
    return isinstance(part, list) and any(_holds(each, kind) for each in part)


def _affixes(model: Spec) -> tuple[str, str]:
    """What BPE writes before a piece that goes on with a word, and after one that ends it."""
    return model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""


def _merged(spec: Spec, stay: Iterable[int]) -> tuple[set[str], set[int]]:
    """The pieces that tokens are merged from, and the ranks of those merges."""
    model, ranks = spec["model"], dict[tuple[str, str], int]()
    for rank, merge in enumerate(model["merges"]):
        one, two = merge.split(" ") if isinstance(merge, str) else merge
        ranks[one, two] = rank
    own = {number: token for token, number in model["vocab"].items()}
    before, after = _affixes(model)
    pieces, applied = set[str](), set[int]()
    for number in {*stay} - _added(spec):
        if (token := own.get(number)) is None:
            continue
        symbols, used = _symbols(token, before, after), set[int]()
        seen = {*symbols}
        while pairs := [
            (ranks[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in ranks
        ]:
            rank, at = min(pairs)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1].removeprefix(before)]
            seen.add(symbols[at])
            used.add(rank)
        if symbols == [token]:  # another one is never merged: it is a word of its own
            pieces |= seen
            applied |= used
    return pieces, applied


def _symbols(token: str, before: str, after: str) -> list[str]:
    """The single characters that a token is merged from."""
    ends, goes_on = bool(after) and token.endswith(after), bool(before) and token.startswith(before)
    inner = token.removeprefix(before) if goes_on else token
    found = [before + char for char in (inner.removesuffix(after) if ends else inner)]
    if found and not goes_on:
        found[0] = found[0].removeprefix(before)
    if found and ends:
        found[-1] += after
    return found
