"""Small modules after each feed-forward net: A(x) = W_up·act(W_down·x + b_down) + b_up + x.

Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP", in the placement of Karimi
Mahabadi et al. 2022, "PERFECT: Prompt-free and efficient few-shot learning with language models":
one in each layer, after the feed-forward net's output and dropout, before the residual is added and
the layer's LayerNorm is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from howfine import inserted, whole
from howfine.base import Base
from howfine.batch import worn_rows
from howfine.change import Change, all_or_nothing
from howfine.codec import rounded
from howfine.errors import DamagedDelta, SettingError, near
from howfine.method import Method, Probe, Tensors
from howfine.worn import bottlenecks, norms


class Bottleneck(nn.Module):
    """An adapter between H and `width` numbers a position; computes in its own precision."""

    def __init__(self, hidden: int, width: int, activation: str) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, width)
        self.act = ACT2FN[activation]
        self.up = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.up(self.act(self.down(x.to(self.down.weight.dtype))))
        return x + made.to(x.dtype)


@dataclass(frozen=True)
class Adapter(Method):
    """How narrow adapters are, how they begin, and what trains beside them."""

    starts_at_base: ClassVar[bool] = False
    start: ClassVar[Any] = "own"
    meaning: ClassVar[tuple[str, ...]] = ("placement", "reduction", "activation", "beside")

    # Where they stand in a layer: on the feed-forward net's output, before the residual.
    placement: Literal["feed_forward"] = "feed_forward"
    # Hidden numbers for each number between down and up.
    reduction: int = 16
    # The nonlinearity, by transformers' name.
    activation: str = "gelu_new"
    # Deviation of the weights they begin with; 0 for an up-projection of zeros: then they begin as
    # the base.
    std: float = 0.02
    # Parameters of the base that train, too, as selectors.
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.reduction < 1 or not 0 <= self.std < 10:
            raise SettingError(
                f"adapter: found reduction {self.reduction} and std {self.std}, expected 1 or more "
                "and a deviation from 0"
            )
        if self.activation not in ACT2FN:
            raise SettingError(
                f"adapter activation {self.activation!r} is unknown. "
                f"{near(self.activation, list(ACT2FN))}"
            )

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        made = {}
        for layer in range(base.depth):
            module = made[layer] = self._module(base)
            std = self.std or 0.02
            for linear in (module.down, module.up):
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)
            if not self.std:
                nn.init.zeros_(module.up.weight)
        begun: Tensors = dict(probe.begun) if probe is not None else {}
        if begun:
            self._fill(base, made, begun)
        with all_or_nothing() as undo:
            self._insert(base, made, undo)
            paths = base.choose(self.beside) if self.beside else []
            beside = whole.attach(base, paths)
            undo.append(beside.remove)
            with torch.no_grad():
                for path in beside.trainable.keys() & begun.keys():
                    beside.trainable[path].copy_(begun[path])
            trainable = {
                f"{inserted.path(base, layer)}:{name}": value
                for layer, module in made.items()
                for name, value in module.named_parameters()
            }
            trainable |= beside.trainable
            return Change(trainable, undo, parts={"made": made, "beside": beside})

    def _module(self, base: Base) -> Bottleneck:
        width = max(1, base.hidden_size // self.reduction)
        return Bottleneck(base.hidden_size, width, self.activation).to(base.device)

    def _insert(self, base: Base, made: dict[int, Bottleneck], undo: list[Any]) -> None:
        for layer, module in made.items():
            undo.append(inserted.after_feed_forward(base, layer, module))

    def pack(self, base: Base, change: Change) -> Tensors:
        own = {
            f"adapter.{layer}.{name}": value.detach().clone()
            for layer, module in change.parts["made"].items()
            for name, value in module.named_parameters()
        }
        return own | whole.pack(change.parts["beside"])

    def stored(self, change: Change, store: str) -> Tensors:
        beside: Change = change.parts["beside"]
        own = {
            name: rounded(value.detach(), store).to(value.device)
            for name, value in change.trainable.items()
            if name not in beside.trainable
        }
        return own | whole.stored(beside, store)

    def learning_rate(self, steps: int) -> float:
        return 1e-4

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        made = {}
        for layer in range(base.depth):
            made[layer] = self._module(base).requires_grad_(False)
        own = self._fill(base, made, tensors)
        with all_or_nothing() as undo:
            self._insert(base, made, undo)
            rest = {name: value for name, value in tensors.items() if name not in own}
            undo.append(whole.unpack(base, rest).remove)
            return Change({}, undo)

    def _fill(self, base: Base, made: dict[int, Bottleneck], tensors: Tensors) -> Tensors:
        """Put stored values into modules; those that are the adapters'. Raises DamagedDelta."""
        own = {name: value for name, value in tensors.items() if name.startswith("adapter.")}
        expected = {
            f"adapter.{layer}.{name}": value
            for layer, module in made.items()
            for name, value in module.named_parameters()
        }
        found = {n: (*value.shape, value.is_floating_point()) for n, value in own.items()}
        wanted = {n: (*value.shape, True) for n, value in expected.items()}
        if found != wanted:
            odd = sorted(set(found.items()) ^ set(wanted.items()))[0]
            raise DamagedDelta(
                f"adapter tensors don't fit the base {base.name}, such as {odd[0]} of shape "
                f"{odd[1][:-1]}; the file is damaged, or made for another model"
            )
        with torch.no_grad():
            for name, value in expected.items():
                value.copy_(own[name])
        return own

    @classmethod
    def wear(
        cls, base: Base, worn: Mapping[int, tuple[Adapter, Tensors]], count: int
    ) -> Change | None:
        activations = {method.activation for method, _ in worn.values()}
        if len(activations) > 1:
            return None
        rest = {
            row: {name: value for name, value in tensors.items() if name in set(base.paths())}
            for row, (_, tensors) in worn.items()
        }
        with all_or_nothing() as undo:
            beside = norms(base, rest, count)
            if beside is None:
                return None
            undo.extend(beside)
            for layer in range(base.depth):
                parts: list[Tensors | None] = [None] * (count + 1)
                for row, (_, tensors) in worn.items():
                    start = f"adapter.{layer}."
                    parts[row] = {
                        name.removeprefix(start): value
                        for name, value in tensors.items()
                        if name.startswith(start)
                    }
                tables = bottlenecks(parts, base.hidden_size)
                module = _Worn(tables, *activations).to(base.device)
                undo.append(inserted.after_feed_forward(base, layer, module))
            return Change({}, undo)


class _Worn(nn.Module):
    """A bottleneck for each row of a batch, of tables with one for each change."""

    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor

    def __init__(self, tables: Tensors, activation: str) -> None:
        super().__init__()
        self.act = ACT2FN[activation]
        for name, value in tables.items():
            self.register_buffer(name.replace(".", "_"), value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = worn_rows(len(x)).to(x.device)
        down, up = self.down_weight[rows], self.up_weight[rows]
        own = x.to(down.dtype)
        inner = torch.baddbmm(self.down_bias[rows].unsqueeze(1), own, down.transpose(1, 2))
        made = torch.baddbmm(self.up_bias[rows].unsqueeze(1), self.act(inner), up.transpose(1, 2))
        return x + made.to(x.dtype)


EXAMPLE = Adapter(reduction=4, beside=("norm",))
