"""Modules put into a base's layers: where, by path, and how they come off again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from howfine import surgery, whole
from howfine.base import Base
from howfine.change import Change, Undo
from howfine.codec import rounded
from howfine.errors import DamagedDelta, SettingError

_HELD = "howfine_inserted"


class Point(NamedTuple):
    """Where a module stands: on what another one gives, or ahead of it, on what it takes."""

    # Of the other module, which holds the one put in.
    path: str
    ahead: bool = False


def points(base: Base, layer: int, place: str) -> list[Point]:
    """The points of a block that a placement names.

    `feed_forward` is the feed-forward net's output, `block` the block's own, `layerwise` what lies
    ahead of either LayerNorm: see `Anatomy.branches`. Raises SettingError for an architecture
    without a row for it.
    """
    block = f"{base.body_prefix}{base.anatomy.block_path(layer)}"
    if place == "block":
        return [Point(block)]
    stack = base.anatomy.stack_of(layer)
    if place == "layerwise":
        rows = [row.split(":") for row in stack.branches]
        found = [Point(f"{block}.{path}", when == "before") for when, path in rows]
    else:
        found = [Point(f"{block}.{stack.feed_forward}")] if stack.feed_forward else []
    if not found:
        field = "branches" if place == "layerwise" else place
        raise SettingError(
            f"{base.config.model_type} has no row for the placement {place!r}; add {field} to its "
            "row in howfine.architectures"
        )
    return found


def put(base: Base, point: Point, module: nn.Module) -> Undo:
    """Let a module map what stands at a point.

    The host's own module holds it, so that it is found, moved and trained like any other.
    """
    host = base.towers.get_submodule(point.path)
    released = surgery.hold(host, _HELD, module)
    compute = host.forward

    def ahead(states: Any, *args: Any, **kwargs: Any) -> Any:
        return compute(module(states), *args, **kwargs)

    def after(*args: Any, **kwargs: Any) -> Any:
        found = compute(*args, **kwargs)
        if isinstance(found, tuple):  # a block that gives more than its states
            return (module(found[0]), *found[1:])
        return module(found)

    restored = surgery.rewire(host, ahead if point.ahead else after)

    def undo() -> None:
        restored()
        released()

    return undo


def stored(change: Change, store: str) -> dict[str, Tensor]:
    """What trains, as a file gives it back: new modules' values, and those of weights beside them.

    `change.parts["beside"]` is the change of the weights.
    """
    beside: Change = change.parts["beside"]
    own = {
        name: rounded(value.detach(), store).to(value.device)
        for name, value in change.trainable.items()
        if name not in beside.trainable
    }
    return own | whole.stored(beside, store)


def check(base: Base, what: str, own: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises DamagedDelta unless stored tensors have the names and shapes of the modules' own."""
    found = {n: (*value.shape, value.is_floating_point()) for n, value in own.items()}
    wanted = {n: (*value.shape, True) for n, value in expected.items()}
    if found != wanted:
        odd = sorted(set(found.items()) ^ set(wanted.items()))[0]
        raise DamagedDelta(
            f"{what} tensors don't fit the base {base.name}, such as {odd[0]} of shape "
            f"{odd[1][:-1]}; the file is damaged, or made for another model"
        )
