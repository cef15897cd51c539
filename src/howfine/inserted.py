"""Modules put into a base's layers: where, by path, and how they come off again."""

from __future__ import annotations

from typing import Any

from torch import nn

from howfine import surgery
from howfine.base import Base
from howfine.change import Undo
from howfine.errors import SettingError

_HELD = "howfine_inserted"


# Of a block: the feed-forward net's output, or its own.
PLACES = ("feed_forward", "block")


def path(base: Base, layer: int, place: str) -> str:
    """Path of the module whose output is what stands at a place of a block: see `PLACES`.

    Raises SettingError for an architecture without a row for it.
    """
    block = f"{base.body_prefix}{base.anatomy.block_path(layer)}"
    if place == "block":
        return block
    inside = base.anatomy.stack_of(layer).feed_forward
    if not inside:
        raise SettingError(
            f"{base.config.model_type} has no row for where its feed-forward net ends; add "
            "feed_forward to its row in howfine.architectures"
        )
    return f"{block}.{inside}"


def after(base: Base, layer: int, place: str, module: nn.Module) -> Undo:
    """Let a module map what stands at a place of a block: see `PLACES`.

    The block's own module holds it, so that it is found, moved and trained like any other.
    """
    host = base.towers.get_submodule(path(base, layer, place))
    released = surgery.hold(host, _HELD, module)
    compute = host.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = compute(*args, **kwargs)
        if isinstance(found, tuple):  # a block that gives more than its states
            return (module(found[0]), *found[1:])
        return module(found)

    restored = surgery.rewire(host, forward)

    def undo() -> None:
        restored()
        released()

    return undo
