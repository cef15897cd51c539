"""A block for the first position alone: it looks at all the others, and computes nothing for them.

Where a readout reads one position, the block on top of everything needs only that one's query and
feed-forward part, and of the others their keys and values: the same numbers, but for rounding, at
about a quarter of the operations. It works where a block computes attention through transformers'
attention interface and is told nothing else that has a place for each position; any other block
computes all of them.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from howfine.attention import KERNELS, own_function

_PREFIX = "howfine_first_"


@dataclass
class _Asked:
    """What an attention is to do: give keys and values away, or take those that are here."""

    keys: Tensor | None = None
    values: Tensor | None = None


class _Given(Exception):
    """Keys and values are computed; nothing after them is wanted."""


_ASKED: ContextVar[_Asked | None] = ContextVar("asked", default=None)


def prepare(block: nn.Module) -> None:
    """Let a block, which shares its config with no other, be computed by `at_first`."""
    for module in block.modules():
        config: Any = getattr(module, "config", None)
        kernel = getattr(config, "_attn_implementation", None)
        if kernel in KERNELS:
            config._attn_implementation = _registered(kernel)


def at_first(block: nn.Module, states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What a prepared block gives: (B, 1, H) at the first position, or (B, S, H) at all of them."""
    told = [value for value in (*args, *kwargs.values()) if value is not None]
    again = block.training and getattr(block, "gradient_checkpointing", False)
    traced = torch.compiler.is_compiling() or torch.compiler.is_exporting()  # has no half calls
    if again or traced or not all(_has_no_places(value, states.shape[1]) for value in told):
        return block(states, *args, **kwargs)
    asked = _Asked()
    token = _ASKED.set(asked)
    try:
        return block(states, *args, **kwargs)
    except _Given:
        # As a tensor of its own: torch may add up a part of another in another order.
        return block(states[:, :1].contiguous(), *args, **kwargs)
    finally:
        _ASKED.reset(token)


def _has_no_places(value: Any, positions: int) -> bool:
    """Whether it is right for one position as for all: a switch, or a mask (B, 1, ·, S)."""
    if isinstance(value, Tensor):
        return value.ndim == 4 and value.shape[1] == 1 and value.shape[3] == positions
    return isinstance(value, bool | int | float | str)


def _registered(kernel: str) -> str:
    """The name of a kernel that does what is asked, known to transformers."""
    name = _PREFIX + kernel
    if name not in ALL_ATTENTION_FUNCTIONS:

        def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _attend(kernel, module, *args, **kwargs)

        AttentionInterface.register(name, attend)
    return name


def _attend(
    kernel: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """(B, heads, S, width) queries, keys and values; of all positions, or a query of the first."""
    asked, own = _ASKED.get(), own_function(kernel, module)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    biased = any(isinstance(each, Tensor) for each in kwargs.values())
    if asked is not None and not causal and not biased:
        if asked.keys is None or asked.values is None:
            asked.keys, asked.values = key, value
            raise _Given
        key, value = asked.keys, asked.values
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, :1]
    return own(module, query, key, value, attention_mask, **kwargs)
