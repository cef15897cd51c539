"""Keys and values in front of every attention, through transformers' attention interface.

They come after the projections (and after rotation, where positions rotate keys) and never enter a
cache: the interface is called with what a cache holds, so generation, beams and batches of any
padding see the same keys and values in front, at every step.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from howfine.base import Base
from howfine.batch import Batch, current, running, worn_rows
from howfine.change import Undo, all_or_nothing
from howfine.errors import DeltaError, SettingError

_HELD = "howfine_front"
# Whose masks are understood here.
KERNELS = ("sdpa", "eager")
_PREFIX = "howfine_"


@dataclass
class Front:
    """What stands in front at one attention, (heads, p, width) each; or what passes, recorded.

    With `visible` (R, p) there are R of them, (R, heads, p, width), of which each row of the
    running batch wears one, and sees of it what is visible. With `slots` (B, S), -1 for a word,
    they stand nowhere in front, and are added to the keys and values of that many first positions.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    visible: Tensor | None = None
    slots: Tensor | None = None
    seen: list[tuple[Tensor, Tensor]] | None = field(default=None)


def modules(base: Base) -> list[nn.Module]:
    """Each layer's self-attention; one where all layers share a block.

    Of a whole encoder-decoder the encoder's, the decoder's, and then its cross-attentions.
    """
    kinds = base.anatomy.attentions(base.depth)
    return [base.body.get_submodule(path) for _, paths in kinds for path in paths]


def put_on(base: Base) -> tuple[list[Front], Undo]:
    """A Front for each attention, empty so far, which the base's attention then looks at.

    Raises SettingError for an architecture that computes attention in its own way.
    """
    config: Any = base.tower.config
    before = config._attn_implementation
    if before.startswith(_PREFIX):
        raise SettingError(
            "keys and values are in front of this base's attention already: another change of this "
            "kind is on; take it off first"
        )
    if before not in KERNELS:
        raise SettingError(
            f"attention is computed by {before!r}, in front of whose keys nothing can be put; load "
            f"the model with attn_implementation {' or '.join(KERNELS)}"
        )
    name = _registered(before)
    fronts = []
    with all_or_nothing() as undo:
        for module in modules(base):
            fronts.append(Front())
            setattr(module, _HELD, fronts[-1])
            undo.append(functools.partial(delattr, module, _HELD))
        base.tower.set_attn_implementation(name)
        undo.append(lambda: base.tower.set_attn_implementation(before))
        if config._attn_implementation != name:
            raise SettingError(
                f"{base.config.model_type} does not compute attention through transformers' "
                "attention interface, so nothing can stand in front of its keys; give another base"
            )
        every = list(undo)

    def remove() -> None:
        while every:
            every.pop()()

    return fronts, remove


@torch.no_grad()
def recorded(base: Base, ids: Tensor, once: bool = False) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of each attention for one input (S,), (heads, S, width) each.

    Of a block that several layers share the first layer's, or with `once` a SettingError. A whole
    encoder-decoder reads the input twice, as its decoder's, too.
    """
    fronts, undo = put_on(base)
    was_training = base.tower.training
    base.tower.eval()
    try:
        for front in fronts:
            front.seen = []
        # Where rows wear changes, this one wears none: tables end with a row for that.
        with running(Batch({}, rows=torch.tensor([-1], device=base.device))):
            inputs = {"input_ids": ids.unsqueeze(0).to(base.device)}
            if base.anatomy.decoder is not None:
                inputs["decoder_input_ids"] = inputs["input_ids"]
            base.body(**inputs)
        found = [front.seen[0] for front in fronts if front.seen]
        if once and any(len(front.seen or ()) > 1 for front in fronts):
            raise SettingError(
                f"the layers of {base.name} share one block, and the keys of words differ from "
                "layer to layer: they can't begin as words. Leave init_text out"
            )
    finally:
        base.tower.train(was_training)
        undo()
    if len(found) != len(fronts):
        raise SettingError(
            f"{base.config.model_type} does not compute attention through transformers' attention "
            "interface, so nothing can stand in front of its keys; give another base"
        )
    return [(keys[0].clone(), values[0].clone()) for keys, values in found]


def _registered(implementation: str) -> str:
    """The name of an attention implementation that looks for a Front, known to transformers."""
    name = _PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:

        def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _attend(own_function(implementation, module), module, *args, **kwargs)

        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def own_function(implementation: str, module: nn.Module) -> Callable[..., Any]:
    """The function that the module would have called."""
    if implementation in ALL_ATTENTION_FUNCTIONS:
        found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[implementation]
        return found
    # Every modelling file has its own one for "eager".
    eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return eager


def _attend(
    own: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """(B, heads, S, width) queries, keys and values, with what stands in front, in each row."""
    front: Front | None = getattr(module, _HELD, None)
    if front is not None and front.seen is not None:
        front.seen.append((key.detach(), value.detach()))
    if front is None or front.keys is None or front.values is None:
        return own(module, query, key, value, attention_mask, **kwargs)
    if front.slots is not None:
        key = _added(key, front.keys, front.slots)
        value = _added(value, front.values, front.slots)
        return own(module, query, key, value, attention_mask, **kwargs)
    count = front.keys.shape[-2]
    attention_mask = _wider(module, query, key, attention_mask, count, kwargs)
    keys, values = front.keys, front.values
    if front.visible is not None:
        rows = worn_rows(len(query)).to(keys.device)
        keys, values, visible = keys[rows], values[rows], front.visible[rows]
        attention_mask = _seeing(query, key, attention_mask, visible)
    if kwargs.get("position_bias") is not None:  # T5's: none for what has no place in the text
        kwargs["position_bias"] = functional.pad(kwargs["position_bias"], (count, 0))
    key, value = _before(keys, key), _before(values, value)
    if _in_steps(module, query, key, attention_mask, kwargs):
        return _seen_by_all(query, key, value, attention_mask, **kwargs), None
    return own(module, query, key, value, attention_mask, **kwargs)


def _in_steps(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Whether torch would compute this attention step by step: on a CPU, with dropout."""
    config: Any = getattr(module, "config", None)
    return (
        getattr(config, "_attn_implementation", None) == _PREFIX + "sdpa"
        and bool(kwargs.get("dropout"))
        and query.device.type == "cpu"
        and query.shape[1] == key.shape[1]
        and (mask is None or mask.dtype == torch.bool)
        and kwargs.get("position_bias") is None
    )


def _seen_by_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None = None,
    **_: Any,
) -> Tensor:
    """(B, S, heads, width): as torch does it, but for a look for queries that see nothing.

    There is none: all of them see what stands in front.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    shares = functional.dropout(scores.softmax(dim=-1), dropout)
    return (shares @ value).transpose(1, 2).contiguous()


def _added(own: Tensor, at_slots: Tensor, slots: Tensor) -> Tensor:
    """Keys (B, heads, S, width) with those of slots, (heads, p, width), added where slots are.

    A cache holds them as they were, so that in later steps of a generation they are added again;
    beams have each row several times, one after the other.
    """
    here = slots.to(own.device).repeat_interleave(len(own) // len(slots), dim=0)
    here = functional.pad(here, (0, own.shape[2] - here.shape[1]), value=-1)
    chosen = at_slots.to(own.dtype)[:, here.clamp(min=0)].transpose(0, 1)
    return own + chosen * (here >= 0)[:, None, :, None]


def slots_for(count: int) -> Tensor:
    """Where the running batch has slots. Raises DeltaError where it has not `count` of them."""
    batch = current()
    if batch is None or batch.slots is None:
        raise RuntimeError(
            "a change of keys and values at a template's slots is on, and this forward pass does "
            "not say where they are; run it through howfine's readout"
        )
    most = int(batch.slots.max()) + 1
    if most != count:
        raise DeltaError(
            f"the readout's inputs have {most} slots and the change holds keys and values for "
            f"{count}; the file is damaged, or its template was altered"
        )
    return batch.slots


def _seeing(query: Tensor, key: Tensor, mask: Tensor | None, visible: Tensor) -> Tensor | None:
    """A widened mask in which each row sees of what is in front only what it wears."""
    if visible.all():
        return mask
    rows, count = visible.shape
    if mask is None:
        mask = torch.ones(1, 1, 1, count + key.shape[2], dtype=torch.bool, device=query.device)
    if mask.ndim == 2:
        return torch.cat([visible.to(mask.dtype), mask[:, count:]], dim=1)
    mask = mask.expand(rows, -1, query.shape[2], -1).clone()
    hidden = ~visible[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    never = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    mask[..., :count] = mask[..., :count].masked_fill(hidden, never)
    return mask


def _before(front: Tensor, own: Tensor) -> Tensor:
    return torch.cat([front.to(own.dtype).expand(own.shape[0], -1, -1, -1), own], dim=2)


def _wider(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    count: int,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The mask with `count` columns that everything sees, where there is or must be a mask."""
    if mask is not None:
        seen = True if mask.dtype == torch.bool else (1 if mask.ndim == 2 else 0)
        return functional.pad(mask, (count, 0), value=seen)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if not causal or query.shape[2] == 1:
        return None
    # No mask stands for torch's triangle, from the first key on: a query has as many keys before
    # it as queries, and what a static cache has behind them is still empty.
    rows, columns = query.shape[2], key.shape[2]
    made = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
    return functional.pad(made, (count, 0), value=True)[None, None]
