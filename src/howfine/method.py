"""Method: what may change in a base. The contract, and the registry, which is the folder.

A method is one file in `howfine/methods/`: a docstring that names the paper and its equation, one
frozen dataclass whose fields are its settings, and an `EXAMPLE` of it. The command line, the laws,
the docs check, the study and the cost table find it by being there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from howfine import plugins
from howfine.base import Base
from howfine.change import Change

Tensors = dict[str, Tensor]


class Probe(Protocol):
    """A task as seen through a readout: what a method may ask about the data."""

    def gradients(self, base: Base, paths: list[str]) -> dict[str, Tensor]:
        """Mean |∂loss/∂θ| per entry at the current base, over a few batches, for these paths."""
        ...


class Method(ABC):
    """Puts a trainable Change on a Base, packs it into few tensors, and puts it back exactly.

    Subclasses are final, frozen dataclasses with at most six fields.
    """

    # Whether attaching alone leaves the outputs as they were.
    starts_at_base: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        if cls.__bases__ != (Method,):
            raise TypeError(f"{cls.__name__}: methods are final; wrap one instead of subclassing")

    @abstractmethod
    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        """Put trainables on; the base stays frozen."""

    @abstractmethod
    def pack(self, base: Base, change: Change) -> Tensors:
        """The fewest tensors that say it all; bool tensors are sets of places."""

    @abstractmethod
    def unpack(self, base: Base, tensors: Tensors) -> Change:
        """Put a packed change on again, exactly."""

    def penalty(self, change: Change, progress: float) -> Tensor:
        """What the paper adds to the loss at `progress` (0 to 1) of training; 0 without one."""
        return torch.zeros(())

    def groups(self, change: Change) -> list[dict[str, Any]]:
        """Optimiser groups: `params` and, where they want their own, `lr_scale`, `weight_decay`."""
        return [{"params": list(change.trainable.values())}]

    def learning_rate(self, steps: int) -> float:
        """The peak rate where a recipe names none, for AdamW and `steps` steps of linear decay."""
        return 5e-5


def as_parameter(tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    """A frozen parameter holding `tensor` in the format and on the device of `like`."""
    return nn.Parameter(tensor.to(device=like.device, dtype=like.dtype), requires_grad=False)


def methods() -> dict[str, type[Method]]:
    """Every method by name: the modules of `howfine.methods`, and of plugin folders."""
    return plugins.registry("methods", Method)


def method(name: str, **settings: Any) -> Method:
    """A method by name. Raises SettingError with the near name for what is unknown."""
    return plugins.build("method", methods(), name, settings)


def examples() -> dict[str, Method]:
    """Every method's own EXAMPLE, by name: what laws, docs and benches run."""
    return plugins.examples("methods", Method)
