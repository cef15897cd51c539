"""attach: a method on any model, for training loops of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from howfine.base import Base
from howfine.change import Change
from howfine.errors import SettingError
from howfine.method import Method, Probe
from howfine.method import method as method_by_name


class Attached:
    """A model with a method on. A context manager; leaving it restores the model bit for bit.

    The training mode of its modules and `requires_grad` are part of that.

    `change.trainable` names what trains; `parameters()` gives optimiser groups; `tensors()` packs
    the change for storage.
    """

    def __init__(self, base: Base, method: Method, change: Change) -> None:
        self.base, self.method, self.change = base, method, change
        self._asked: set[str] = set()

    def parameters(self, learning_rate: float | None = None) -> list[dict[str, Any]]:
        """Groups for a torch optimiser: only what the method trains.

        A group that has a rate of its own (`lr`) keeps it. The others have the optimiser's, or
        `learning_rate` where it is given; some methods train some of them at a multiple of it,
        which only this can put in. A scheduler would change all of them, and clipping is the
        loop's own affair.
        """
        made = []
        for group in self.method.groups(self.change):
            kept: dict[str, Any] = {
                key: group[key] for key in ("params", "weight_decay", "lr") if key in group
            }
            if learning_rate is not None:
                kept.setdefault("lr", learning_rate * group.get("lr_scale", 1.0))
            made.append(kept)
        return made

    def passes(self, progress: float) -> Iterator[float]:
        """Set the change up for each forward pass of a step, at `progress` (0 to 1) of the loop.

        Yields for each the share of its loss that is how far its outputs are from the first pass's;
        the step's loss is the mean over passes. Most methods have one pass, of which that is 0.
        """
        self._asked.add("passes")
        return self.method.passes(self.change, progress)

    def penalty(self, progress: float) -> Tensor:
        """What the method's paper adds to the loss, at `progress` (0 to 1); 0 for most."""
        self._asked.add("penalty")
        return self.method.penalty(self.change, progress)

    def tensors(self) -> dict[str, Any]:
        """The packed change: the fewest tensors that say it all.

        Warns where the loop has left out what the method does in each step.
        """
        own = [name for name in ("passes", "penalty") if name in vars(type(self.method))]
        with torch.enable_grad():  # what nothing depends on is nobody's loss
            if "penalty" in own and not self.method.penalty(self.change, 1.0).requires_grad:
                own.remove("penalty")
        if "penalty" not in own and not self.method.moves:  # nothing is set up between passes
            own = []
        if left := [name for name in own if name not in self._asked]:
            calls = " and ".join(f"attached.{name}(progress)" for name in left)
            warnings.warn(
                f"{type(self.method).__name__} has a part in each step of a training that this "
                f"loop never asked for: call {calls}",
                stacklevel=2,
            )
        return self.method.pack(self.base, self.change)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.change.remove()


def attach(
    model: nn.Module,
    method: Method | str,
    *,
    probe: Probe | None = None,
    tokenizer: Any = None,
    **settings: Any,
) -> Attached:
    """Put a method on a Hugging Face model, for a training loop of one's own.

        with howfine.attach(model, "mask", initial_sparsity=0.1) as attached:
            optimizer = torch.optim.AdamW(attached.parameters(), lr=0.1)
            ...
            packed = attached.tensors()

    Some methods (of gates that are drawn or held to a size) have a part in each step: run the model
    once for each of `attached.passes(progress)`, and add `attached.penalty(progress)` to the loss.

    The model's body is frozen but for what the method trains. A head on the body, such as that of
    an `AutoModelForSequenceClassification`, is left as it is: train it beside, or freeze it.

    Methods that begin as words need the model's `tokenizer`.

    On leaving, every parameter has its `requires_grad` and every module its training mode of
    before. Raises SettingError for an unknown method or setting, UnknownArchitecture for a model
    without an anatomy row; the model is then as it was, too.
    """
    if isinstance(method, str):
        method = method_by_name(method, **settings)
    elif settings:
        raise SettingError(
            f"settings {', '.join(settings)} were given beside a {type(method).__name__} that has "
            "its own; give a method's name, or set them on it"
        )
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for parameter, flag in parameters:
            parameter.requires_grad_(flag)
        _set_modes(modes)

    try:
        body = model.base_model if isinstance(model, PreTrainedModel) else model
        base = Base(
            getattr(model.config, "_name_or_path", "") or type(model).__name__, body, tokenizer
        )
        _check_blocks(model, base)
        change = method.attach(base, probe)
        _refuse_ties(model, body, base, change)
    except BaseException:
        restore()
        raise
    model.train(modes[0][1])  # reaches the gates that the method put on
    _set_modes(modes)
    change.finally_do(restore)
    return Attached(base, method, change)


def _check_blocks(model: nn.Module, base: Base) -> None:
    """An encoder-decoder has two stacks, whose layers have the same numbers."""
    pattern = base.anatomy.block
    if not base.depth:
        raise SettingError(
            f"{type(model).__name__} has no layers at {pattern.format('0')!r}, where those of a "
            f"{base.config.model_type} stack are; attach to the stack itself, such as "
            "model.get_encoder()"
        )


def _refuse_ties(model: nn.Module, body: nn.Module, base: Base, change: Change) -> None:
    """A head that shares a weight with the body would keep the old one: undo, and say so."""
    inside = {id(module) for module in body.modules()}
    outside = {
        id(parameter)
        for module in model.modules()
        if id(module) not in inside
        for parameter in module.parameters(recurse=False)
    }
    now = dict(base.towers.named_parameters())  # a changed one is another, or lies elsewhere
    changed = [path for path in base.paths() if now.get(path) is not base.parameter(path)]
    tied = [path for path in changed if id(base.parameter(path)) in outside]
    if tied:
        change.remove()
        raise SettingError(
            f"{tied[0]} is shared with the model's head, which the change does not reach; leave "
            "it out (freeze=embedding), or untie the head"
        )


def _set_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    """Each module's own training mode: `train` would set those below it too."""
    for module, training in modes:
        module.training = training
