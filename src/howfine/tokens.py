"""Free vectors in front of every input, and positions that start later."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from howfine import surgery
from howfine.base import Base
from howfine.change import Undo, all_or_nothing
from howfine.errors import SettingError
from howfine.unread import Top


def prepend(base: Base, vectors: nn.Parameter, first: int) -> Undo:
    """Put the rows of `vectors` from `first` on before every input, and take them off the output.

    Positions count them, so texts have as much less room. Of a whole encoder-decoder the input is
    the encoder's, on whose output they stay: the decoder sees them. Raises SettingError where no
    room is left.
    """
    count = len(vectors) - first
    _check_room(base, count)
    body, embedding, scale = reader(base), base.embedding, scaling(base)
    run, top = body.forward, Top(base)

    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs = named(run, args, kwargs)
        _check_sight(base, kwargs, count)
        if cached(kwargs) > count:  # a later step of a generation: the cache has the front
            return run(**_after_front(kwargs, count))
        ids, given = kwargs.pop("input_ids", None), kwargs.pop("inputs_embeds", None)
        own = embedding(ids) * scale if given is None else given
        front = scale * vectors[first:].to(own.dtype).expand(len(own), -1, -1)
        kwargs = _longer(base, kwargs, own, count)
        whole = kwargs.pop("return_dict", None) is not False
        with top.unread(count):
            state = run(inputs_embeds=torch.cat([front, own], dim=1), return_dict=True, **kwargs)
        if base.anatomy.decoder is None:
            state = without_front(body, state, count)
        return state if whole else state.to_tuple()

    def longer(mask: Tensor | None, _: Tensor) -> Tensor | None:
        return None if mask is None else functional.pad(_plain(mask), (count, 0), value=1)

    with all_or_nothing() as undo:
        undo.append(surgery.rewire(body, forward))
        undo.append(across(base, longer))
        return _reserving(base, count, together(undo))


def reader(base: Base) -> Any:
    """The module that reads the input: a whole encoder-decoder's encoder, the body otherwise."""
    return base.body.get_submodule(base.anatomy.stack)


def scaling(base: Base) -> float:
    """What the reader multiplies vectors by that it looked up: Pegasus' and Marian's encoders."""
    return float(getattr(reader(base), "embed_scale", 1.0))


def together(undos: list[Undo]) -> Undo:
    """One undo for all of them, last first."""
    left = list(undos)

    def undo() -> None:
        while left:
            left.pop()()

    return undo


def across(base: Base, longer: Callable[[Tensor | None, Tensor], Tensor | None]) -> Undo:
    """Let a decoder's mask over its encoder's output be `longer(mask, output)`.

    The mask is (B, S) or None, the output (B, S', H). Nothing where there is no decoder.
    """
    if base.anatomy.decoder is None:
        return lambda: None
    decoder = base.body.get_submodule(base.anatomy.decoder.stack)
    run = decoder.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs = named(run, args, kwargs)
        mask, states = kwargs.get("encoder_attention_mask"), kwargs["encoder_hidden_states"]
        kwargs["encoder_attention_mask"] = longer(mask, states)
        return run(**kwargs)

    return surgery.rewire(decoder, forward)


def _reserving(base: Base, count: int, restored: Undo) -> Undo:
    """Take so many positions from texts until the undo, which is then of both."""
    base.reserved += count

    def undo() -> None:
        restored()
        base.reserved -= count

    return undo


def cached(kwargs: dict[str, Any]) -> int:
    """Positions that a cache holds already."""
    cache = kwargs.get("past_key_values")
    return int(cache.get_seq_length()) if cache is not None else 0


def _plain(mask: Any) -> Tensor:
    """A mask that can be made longer."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise SettingError(
            "vectors in front need an attention mask of two axes, (rows, tokens): use slots of the "
            "readout's template instead, and a dynamic cache in generation"
        )
    return mask


def _after_front(kwargs: dict[str, Any], count: int) -> dict[str, Any]:
    """Inputs of a step whose cache begins with what stands in front."""
    made = dict(kwargs)
    mask = made.get("attention_mask")
    if mask is not None:
        made["attention_mask"] = functional.pad(_plain(mask), (count, 0), value=1)
    if made.get("position_ids") is not None:
        made["position_ids"] = made["position_ids"] + count
    return made


def _longer(base: Base, kwargs: dict[str, Any], own: Tensor, count: int) -> dict[str, Any]:
    """The other inputs of a model, for as many more positions."""
    rows, length = own.shape[:2]
    made = dict(kwargs)
    mask = made.get("attention_mask")
    if mask is None:
        mask = torch.ones(rows, length, dtype=torch.long, device=own.device)
    mask = _plain(mask)
    made["attention_mask"] = torch.cat([mask.new_ones(rows, count), mask], dim=1)
    types = made.get("token_type_ids")
    if types is not None:
        made["token_type_ids"] = torch.cat([types.new_zeros(rows, count), types], dim=1)
    places = made.get("position_ids")
    if places is not None:
        front = torch.arange(count, device=own.device).expand(rows, -1) + base.first_position
        made["position_ids"] = torch.cat([front, places + count], dim=1)
    return made


def without_front(body: Any, state: Any, count: int) -> Any:
    """A model's output as if the vectors in front had none; a pooler reads the text's first."""
    hidden = state["last_hidden_state"] = state["last_hidden_state"][:, count:]
    if state.get("pooler_output") is not None:
        if hasattr(body, "pooler_activation"):  # ALBERT's takes the position itself
            state["pooler_output"] = body.pooler_activation(body.pooler(hidden[:, 0]))
        else:
            state["pooler_output"] = body.pooler(hidden)
    if state.get("hidden_states") is not None:
        state["hidden_states"] = tuple(layer[:, count:] for layer in state["hidden_states"])
    return state


def ahead(module: Any, before: Callable[[], None]) -> Undo:
    """Call `before` ahead of each forward pass of a module."""
    run = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        before()
        return run(*args, **kwargs)

    return surgery.rewire(module, forward)


def later(base: Base, count: int) -> Undo:
    """Let positions of the text start at `count`.

    Models without numbered positions (T5) have none to move, and those of a whole encoder-decoder
    stay: its stacks number their own. Raises SettingError where no room is left.
    """
    body = base.body
    run = body.forward
    if count and not numbered(base):
        if numbers_itself(base) and base.anatomy.decoder is None:
            raise SettingError(
                f"{base.config.model_type} numbers its positions itself and takes no others, so "
                "those of the text can't start later; set shift=False"
            )
        count = 0
    _check_room(base, count)
    if not count:
        return lambda: None

    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs = named(run, args, kwargs)
        kwargs["position_ids"] = positions(base, kwargs) + count
        return run(**kwargs)

    return _reserving(base, count, surgery.rewire(body, forward))


def numbered(base: Base) -> bool:
    """Whether the body takes numbered positions."""
    return "position_ids" in inspect.signature(base.body.forward).parameters


def numbers_itself(base: Base) -> bool:
    """Whether positions are numbered, but from the input's first on, whatever is padding (BART)."""
    return not numbered(base) and bool(getattr(base.config, "max_position_embeddings", None))


def positions(base: Base, kwargs: dict[str, Any]) -> Tensor:
    """(B, S) positions as the model would number them; those of padding play no part."""
    given = kwargs.get("position_ids")
    if isinstance(given, Tensor):
        return given
    inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    rows, length = inputs.shape[:2]
    cache = kwargs.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    mask = kwargs.get("attention_mask")
    if mask is None or mask.ndim != 2:
        mask = torch.ones(rows, past + length, dtype=torch.long, device=inputs.device)
    places = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
    return places + base.first_position


def named(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    names = list(inspect.signature(run).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def window(base: Base) -> int:
    """Tokens that the narrowest layer looks back on; 0 where all see everything."""
    kinds = getattr(base.config, "layer_types", None)
    slides = any("sliding" in kind for kind in kinds) if kinds else True
    return int(getattr(base.config, "sliding_window", None) or 0) if slides else 0


def _check_sight(base: Base, kwargs: dict[str, Any], count: int) -> None:
    """Past a window's width there must be no padding between what stands in front and a text."""
    mask, sight = kwargs.get("attention_mask"), window(base)
    if not sight or mask is None:
        return
    mask = _plain(mask)
    if count + mask.shape[1] <= sight or bool(mask[:, 0].all()):
        return
    raise SettingError(
        f"layers of {base.name} look back on {window(base)} tokens, and with padding on the left "
        "vectors in front would be out of sight for the shorter texts; give texts of one length, "
        "one at a time say (batch_size=1)"
    )


def _check_room(base: Base, count: int) -> None:
    if base.room - count < 1:
        raise SettingError(
            f"{count} vectors in front leave no room for a text: {base.name} holds {base.room} "
            "tokens; use fewer"
        )
