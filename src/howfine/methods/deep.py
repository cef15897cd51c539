"""One more block on top of a tower, new and trained whole: LilT's deep adapter.

Khan & Fu 2023, "Contrastive alignment of vision to language through parameter-efficient transfer
learning": everything beneath stays frozen, but for what trains beside it. The block is of the
tower's own kind, drawn from N(0, 0.02²), with biases of 0 and scales of 1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Cache, EncoderDecoderCache

from howfine import first, inserted, surgery, whole
from howfine.base import ON_TOP, Base
from howfine.change import Change, Undo, all_or_nothing
from howfine.errors import SettingError
from howfine.method import Method, Probe, Tensors
from howfine.pooling import first_alone


@dataclass(frozen=True)
class Deep(Method):
    """How the block begins, and what trains beside it."""

    starts_at_base: ClassVar[bool] = False
    start: ClassVar[Any] = "own"
    meaning: ClassVar[tuple[str, ...]] = ("beside",)

    # Deviation of the weights it begins with.
    std: float = 0.02
    # Parameters of the base that train, too, as selectors.
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.std < 10:
            raise SettingError(f"deep std {self.std}: expected a deviation above 0, such as 0.02")

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        whole.check_format(base, base.paths()[:1])
        made = _blocks(base)
        for block in made.values():
            _draw(block, self.std)
        begun: Tensors = dict(probe.begun) if probe is not None else {}
        if begun:
            _fill(base, made, begun)
        with all_or_nothing() as undo:
            _insert(base, made, undo)
            beside = whole.attach(base, base.choose(self.beside) if self.beside else [])
            undo.append(beside.remove)
            with torch.no_grad():
                for path in beside.trainable.keys() & begun.keys():
                    beside.trainable[path].copy_(begun[path])
            trainable = {
                f"{_path(base, layer)}:{name}": value
                for layer, block in made.items()
                for name, value in block.named_parameters()
            }
            parts = {"made": made, "beside": beside}
            return Change(trainable | beside.trainable, undo, parts)

    def pack(self, base: Base, change: Change) -> Tensors:
        own = {name: value.detach().clone() for name, value in _named(change.parts["made"]).items()}
        return own | whole.pack(change.parts["beside"])

    def stored(self, change: Change, store: str) -> Tensors:
        return inserted.stored(change, store)

    def learning_rate(self, steps: int) -> float:
        return 1e-4

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        made = _blocks(base)
        own = _fill(base, made, tensors)
        with all_or_nothing() as undo:
            _insert(base, {n: b.requires_grad_(False) for n, b in made.items()}, undo)
            rest = {name: value for name, value in tensors.items() if name not in own}
            undo.append(whole.unpack(base, rest).remove)
            return Change({}, undo)


def _path(base: Base, layer: int) -> str:
    return f"{base.body_prefix}{base.anatomy.block_path(layer)}"


def _blocks(base: Base) -> dict[int, nn.Module]:
    """A block like the last one of each stack, by the number of that one.

    Raises SettingError where several layers share a block: there is no last one.
    """
    layers = getattr(base.config, "num_hidden_layers", None) or base.depth
    if int(layers) > base.depth:
        raise SettingError(
            f"{base.name} runs one block {layers} times, so none can stand on top of the last; "
            "choose another method, such as adapters"
        )
    tops = [stack.first - 1 for stack in base.anatomy.stacks[1:]] + [base.depth - 1]
    made = {}
    for layer in tops:
        made[layer] = block = copy.deepcopy(base.towers.get_submodule(_path(base, layer)))
        for module in block.modules():
            module.__dict__.pop("forward", None)  # what was put on the original is not copied
            # Where a cache keeps its keys and values.
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = base.depth  # type: ignore[assignment]
        block.requires_grad_(True)
        first.prepare(block)
    return made


def _draw(block: nn.Module, std: float) -> None:
    for name, value in block.named_parameters():
        if value.ndim > 1:
            nn.init.normal_(value, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(value)
        else:
            nn.init.ones_(value)


def _insert(base: Base, made: Mapping[int, nn.Module], undo: list[Undo]) -> None:
    for layer, block in made.items():
        host = base.towers.get_submodule(_path(base, layer))
        compute = host.forward
        undo.append(surgery.hold(host, ON_TOP, block))
        undo.append(surgery.rewire(host, _on_top(compute, block, base)))


def _on_top(compute: Any, block: nn.Module, base: Base) -> Any:
    def forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        found = compute(hidden_states, *args, **kwargs)
        states = found[0] if isinstance(found, tuple) else found
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                _make_room(value, base.depth)
        if first_alone() and not base.reserved:  # with positions in front, the first is another
            return first.at_first(block, states, *args, **kwargs)
        return block(states, *args, **kwargs)

    return forward


def _make_room(found: Cache, number: int) -> None:
    """Let a cache that knows how many layers its model has keep another one's keys and values.

    Of an encoder-decoder both its caches. Raises SettingError for one of a fixed size.
    """
    caches: list[Any] = [found]
    if isinstance(found, EncoderDecoderCache):
        caches = [found.self_attention_cache, found.cross_attention_cache]
    for cache in caches:
        while 0 < len(cache.layers) <= number:
            last = cache.layers[-1]
            if hasattr(last, "max_cache_len"):
                raise SettingError(
                    f"deep: found a cache of a fixed size ({type(last).__name__}), expected one "
                    "that grows, as the new block keeps keys and values, too; use a dynamic cache"
                )
            window = getattr(last, "sliding_window", None)
            cache.layers.append(type(last)() if window is None else type(last)(window))


def _named(made: Mapping[int, nn.Module]) -> Tensors:
    return {
        f"deep.{layer}.{name}": value
        for layer, block in made.items()
        for name, value in block.named_parameters()
    }


def _fill(base: Base, made: Mapping[int, nn.Module], tensors: Tensors) -> Tensors:
    """Put stored values into blocks; those that are theirs. Raises DamagedDelta."""
    own = {name: value for name, value in tensors.items() if name.startswith("deep.")}
    expected = _named(made)
    inserted.check(base, "the new block's", own, expected)
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(own[name])
    return own


EXAMPLE = Deep(beside=("norm",))
