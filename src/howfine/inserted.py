"""Modules put into a base's layers: where, by path, and how they come off again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from howfine import surgery
from howfine.base import Base
from howfine.change import Undo
from howfine.errors import SettingError

_HELD = "howfine_inserted"


def path(base: Base, layer: int) -> str:
    """Path of the module whose output is the feed-forward net's, in a block.

    Raises SettingError for an architecture without a row for it.
    """
    place = base.anatomy.stack_of(layer).feed_forward
    if not place:
        raise SettingError(
            f"{base.config.model_type} has no row for where its feed-forward net ends; add "
            "feed_forward to its row in howfine.architectures"
        )
    return f"{base.body_prefix}{base.anatomy.block_path(layer)}.{place}"


def after_feed_forward(base: Base, layer: int, module: nn.Module) -> Undo:
    """Let a module map the feed-forward net's output in a block, before the residual is added.

    The block's own module holds it, so that it is found, moved and trained like any other.
    """
    host = base.towers.get_submodule(path(base, layer))
    released = surgery.hold(host, _HELD, module)
    compute = host.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        made: Tensor = module(compute(*args, **kwargs))
        return made

    restored = surgery.rewire(host, forward)

    def undo() -> None:
        restored()
        released()

    return undo
