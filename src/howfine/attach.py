"""attach: a method on any model, for training loops of one's own."""

from __future__ import annotations

from typing import Any

from torch import nn

from howfine.base import Base
from howfine.change import Change
from howfine.method import Method, Probe
from howfine.method import method as method_by_name


class Attached:
    """A model with a method on. A context manager; leaving it restores the model bit for bit.

    `change.trainable` names what trains; `parameters()` gives optimiser groups; `tensors()` packs
    the change for storage.
    """

    def __init__(self, base: Base, method: Method, change: Change) -> None:
        self.base, self.method, self.change = base, method, change

    def parameters(self) -> list[dict[str, Any]]:
        """Groups for a torch optimiser: only what the method trains."""
        known = ("params", "weight_decay")
        return [
            {key: value for key, value in group.items() if key in known}
            for group in self.method.groups(self.change)
        ]

    def tensors(self) -> dict[str, Any]:
        """The packed change: the fewest tensors that say it all."""
        return self.method.pack(self.base, self.change)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.change.remove()


def attach(
    model: nn.Module, method: Method | str, *, probe: Probe | None = None, **settings: Any
) -> Attached:
    """Put a method on a Hugging Face model, frozen otherwise, for a training loop of one's own.

        with howfine.attach(model, "mask", initial_sparsity=0.1) as attached:
            optimizer = torch.optim.AdamW(attached.parameters(), lr=0.1)
            ...

    `requires_grad` of every parameter is as before on leaving. Raises SettingError for an unknown
    method or setting, UnknownArchitecture for a model without an anatomy row.
    """
    if isinstance(method, str):
        method = method_by_name(method, **settings)
    flags = {id(p): p.requires_grad for p in model.parameters()}
    training = model.training
    base = Base(getattr(model.config, "_name_or_path", "") or type(model).__name__, model)
    model.train(training)
    change = method.attach(base, probe)

    def restore() -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(flags[id(parameter)])

    change.finally_do(restore)
    return Attached(base, method, change)
