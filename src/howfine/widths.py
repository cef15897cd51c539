"""Models whose layers have widths of their own, which no config of their architecture can say.

The config says them by module, as `howfine_widths`: {path: [inputs, outputs]}. transformers' own
classes take the number of heads from the widths they meet, so that nothing else has to change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

KEY = "howfine_widths"


def of_width(like: nn.Module, inputs: int, outputs: int) -> nn.Module:
    """A linear module like another one, of so many inputs and outputs; its values are any."""
    weight: torch.Tensor = like.weight  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]), torch.device(weight.device):
        if isinstance(like, nn.Linear):
            made: nn.Module = nn.Linear(inputs, outputs, bias=like.bias is not None)
        else:  # GPT-2's Conv1D, the only other kind that there is
            made = type(like)(outputs, inputs)
    return made.to(weight.dtype).requires_grad_(weight.requires_grad)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Let a model have another module at a path."""
    owner, _, name = path.rpartition(".")
    parent: Any = model.get_submodule(owner)
    before, after = (each.get_parameter("weight").shape for each in (getattr(parent, name), module))
    # GPT-2's attention keeps the width of each third of a fused projection.
    if getattr(parent, "split_size", 0) * 3 == before[-1]:
        parent.split_size = after[-1] // 3
    setattr(parent, name, module)


def class_for(auto: Any, config: Any) -> Any:
    """What makes and loads models of a config: an Auto class, or a class of the widths it states.

    That one raises ValueError for a path without a linear module, or widths that are none.
    """
    stated = getattr(config, KEY, None)
    if stated is None:
        return auto
    if not isinstance(stated, dict):
        raise ValueError(
            f"its config.json states {KEY} {stated!r:.40}, expected an object of modules; get a "
            "fresh copy."
        )
    with torch.device("meta"):
        model_class = type(auto.from_config(config))

    def begin(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        modules = dict(self.named_modules())
        for path, both in stated.items():
            if not _are_widths(both, modules.get(path)):
                raise ValueError(
                    f"its config.json states {KEY} {both!r:.40} for {path!r}, expected numbers of "
                    "inputs and of outputs of a linear module; get a fresh copy."
                )
            put(self, path, of_width(modules[path], *both))

    # Its module tells transformers that the names of its tensors are those of its own class.
    held = {"__init__": begin, "__module__": model_class.__module__}
    held["from_config"] = classmethod(lambda cls, config: cls(config))
    return type(model_class.__name__, (model_class,), held)


def _are_widths(both: Any, module: nn.Module | None) -> bool:
    """Whether they are two widths, and no more than those of a linear module."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, nn.Linear | Conv1D):
        return False
    whole = isinstance(both, list) and len(both) == 2
    return (
        whole
        and all(type(width) is int and width > 0 for width in both)
        and both[0] * both[1] <= module.weight.numel()
    )


def heads_left(config: Any, heads: int, inputs: int) -> int:
    """How many of a config's heads an output projection of so many inputs has left."""
    if not getattr(config, KEY, None):
        return heads
    return inputs // (getattr(config, "head_dim", None) or config.hidden_size // heads)
