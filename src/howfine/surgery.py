"""Ways to touch a model, each returning its undo.

A parameter may have several homes (tied weights): every verb finds them all. Undo puts the very
same Parameter object back into every home, so a base is untouched bit for bit, whatever happened
in between.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from howfine.change import Undo
from howfine.errors import SettingError


def homes(model: nn.Module, path: str) -> list[tuple[nn.Module, str]]:
    """Every (module, attribute) under `model` that holds the parameter at `path`.

    Raises SettingError where the model has no such parameter.
    """
    owner, _, name = path.rpartition(".")
    try:
        parameter = model.get_submodule(owner)._parameters[name]
    except (AttributeError, KeyError):
        raise SettingError(
            f"parameter {path!r} is not in this model; list its names with "
            "`[name for name, _ in model.named_parameters()]`"
        ) from None
    return [
        (module, attribute)
        for module in model.modules()
        for attribute, value in module._parameters.items()
        if value is parameter
    ]


def replace(model: nn.Module, path: str, value: nn.Parameter) -> Undo:
    """Put `value` in place of the parameter at `path`, in all its homes.

    Raises SettingError where the shape differs.
    """
    places = homes(model, path)
    original = places[0][0]._parameters[places[0][1]]
    assert original is not None
    if original.shape != value.shape:
        raise SettingError(
            f"parameter {path!r}: found shape {tuple(value.shape)}, expected "
            f"{tuple(original.shape)}; was it made on another model?"
        )
    for module, attribute in places:
        module._parameters[attribute] = value

    def undo() -> None:
        for module, attribute in places:
            module._parameters[attribute] = original

    return undo


def reweight(model: nn.Module, path: str, gate: nn.Module) -> Undo:
    """Let the weight at `path` be `gate(weight)` wherever it is read, in all its homes.

    `gate` maps a tensor to one of the same shape and dtype. Its own parameters train; the weight
    stays as it is. Built on torch.nn.utils.parametrize, which knows no tied weights: each home is
    registered with the same gate.
    """
    places = homes(model, path)
    orders = [(module, list(module._parameters)) for module, _ in places]
    for module, attribute in places:
        # unsafe: skips a trial forward, which would draw random numbers from a sampling gate.
        parametrize.register_parametrization(module, attribute, gate, unsafe=True)

    def undo() -> None:
        for module, attribute in places:
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
        # It comes back as the last of its module; sums over all parameters round by their order.
        for module, order in orders:
            for name in order:
                module._parameters[name] = module._parameters.pop(name)

    return undo


def rewire(module: nn.Module, forward: Callable[..., Tensor]) -> Undo:
    """Let a module compute by `forward` instead of its own: the same outputs, another backward."""
    before = module.__dict__.get("forward")  # an instance's own: accelerate's hooks are
    # Callers read the signature, this package's own among them.
    forward.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]
    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before

    return undo


def hold(module: nn.Module, name: str, value: nn.Parameter | nn.Module) -> Undo:
    """Let a module of the tree hold a new parameter or module, so that it is found and moved.

    Raises SettingError where it has that name already: two such changes at once.
    """
    if hasattr(module, name):
        raise SettingError(
            f"{type(module).__name__} holds {name!r} already: another change of this kind is on; "
            "take it off first"
        )
    setattr(module, name, value)
    return lambda: delattr(module, name)


def convert(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Put a model into another number format; None for its own.

    Raises SettingError for a weight that this would make infinite.
    """
    if dtype is None:
        return
    for name, value in model.named_parameters():
        if bool(value.isfinite().all()) and not bool(value.to(dtype).isfinite().all()):
            held, most = float(value.abs().max()), torch.finfo(dtype).max
            raise SettingError(
                f"{name} holds {held:.6g}, beyond the {most:g} that "
                f"{str(dtype).removeprefix('torch.')} holds; use bfloat16 or float32"
            )
    model.to(dtype)


@contextmanager
def converted(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """A model in another number format, see `convert`. Its very own tensors come back."""
    values = [(value, value.data) for value in model.parameters()]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        convert(model, dtype)
        yield
    finally:
        for value, data in values:
            value.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


def trainable_copy(model: nn.Module, path: str) -> tuple[nn.Parameter, Undo]:
    """Put a trainable copy of the parameter at `path` in its place; the original waits in undo."""
    module, attribute = homes(model, path)[0]
    original: Tensor = module._parameters[attribute]  # type: ignore[assignment]
    copy = nn.Parameter(original.detach().clone(), requires_grad=True)
    return copy, replace(model, path, copy)
