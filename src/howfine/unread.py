"""The top block's feed-forward net, left out at positions that are cut off the output.

What stands in front of a text is read in the block on top as keys and values alone, and those are
computed ahead of its feed-forward net. The text's numbers stay the same, but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from howfine.base import ON_TOP, Base


class Top:
    """The block on top of a base, and the matrices of its feed-forward net."""

    def __init__(self, base: Base) -> None:
        self.body: Any = base.body
        self.block = self.body.get_submodule(base.anatomy.block_path(base.depth - 1))
        chunks = getattr(base.config, "chunk_size_feed_forward", 0)
        self.plain = in_one_row(base) and not chunks
        modules = dict(self.block.named_modules())
        self.nets = [
            (modules[path], letter == "O")
            for letter in ("I", "G", "O")
            for path in base.anatomy.letters.get(letter, "").split("|")
            if path and path in modules
        ]

    @contextmanager
    def unread(self, count: int) -> Iterator[None]:
        """A pass of the body whose output at the first `count` positions nobody reads.

        It changes nothing where that can't be told of one module: encoder-decoders, whose output in
        front is read, blocks that share weights or have another on top, feed-forward nets computed
        in chunks of positions, and blocks that are computed again after the pass, or traced.
        """
        again = self.body.training and getattr(self.body, "is_activation_checkpointing", False)
        traced = torch.compiler.is_compiling() or torch.compiler.is_exporting()
        with ExitStack() as hooks:
            if self.plain and not (again or traced or hasattr(self.block, ON_TOP)):
                for module, last in self.nets:
                    # Hooks, since another change may compute a module its own way.
                    if last:
                        handle = module.register_forward_hook(_put_back(count))
                    else:
                        handle = module.register_forward_pre_hook(_leave_out(count))
                    hooks.callback(handle.remove)
            yield


def in_one_row(base: Base) -> bool:
    """Whether each block runs once, one after the other."""
    layers = getattr(base.config, "num_hidden_layers", None) or base.depth
    return len(base.anatomy.stacks) == 1 and int(layers) == base.depth


def _leave_out(count: int) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][:, count:].contiguous(), *args[1:])  # GPT-2 views it

    return hook


def _put_back(count: int) -> Any:
    def hook(_: nn.Module, args: Any, given: Tensor) -> Tensor:
        return functional.pad(given, (0, 0, count, 0))

    return hook
