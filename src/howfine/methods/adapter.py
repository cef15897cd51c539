"""Small modules in each block: A(x) = x + W_up·act(W_down·x + b_down) + b_up.

Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP", in three placements:

- `feed_forward`, of Karimi Mahabadi et al. 2022, "PERFECT: Prompt-free and efficient few-shot
  learning with language models": after the feed-forward net's output and dropout, before the
  residual is added and the layer's LayerNorm is applied;
- `block`, of Lin, Madotto & Fung 2020, "Exploring versatile generative language model via
  parameter-efficient transfer learning": after the whole block, on x normalised by a LayerNorm of
  its own, A(x) = x + W_up·act(W_down·LN(x) + b_down) + b_up;
- `layerwise`, of Khan & Fu 2023, "Contrastive alignment of vision to language through
  parameter-efficient transfer learning" (LilT): two a block, each ahead of a LayerNorm. Where that
  reads a branch's input (pre-LN: ViT), x + Attn(LN(A(x))): the skip carries the raw x; where it
  reads the sum (post-LN: BERT), LN(A(Attn(x)) + x).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from howfine import inserted, whole
from howfine.base import Base
from howfine.batch import worn_rows, worn_runs
from howfine.change import Change, all_or_nothing
from howfine.errors import SettingError, near
from howfine.method import Method, Probe, Tensors
from howfine.worn import bottlenecks, norms

# Of a LayerNorm's own: GPT-2's.
EPSILON = 1e-5


class Bottleneck(nn.Module):
    """An adapter between H and `width` numbers a position; computes in its own precision.

    With `normed` it reads its input through a LayerNorm of its own.
    """

    def __init__(self, hidden: int, width: int, activation: str, normed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, eps=EPSILON) if normed else None
        self.down = nn.Linear(hidden, width)
        self.act = ACT2FN[activation]
        self.up = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        own = x.to(self.down.weight.dtype)
        if self.norm is not None:
            own = self.norm(own)
        made: Tensor = self.up(self.act(self.down(own)))
        return x + made.to(x.dtype)


@dataclass(frozen=True)
class Adapter(Method):
    """How narrow adapters are, how they begin, and what trains beside them."""

    starts_at_base: ClassVar[bool] = False
    start: ClassVar[Any] = "own"
    meaning: ClassVar[tuple[str, ...]] = ("placement", "narrowness", "activation", "beside")

    # Where they stand: on the feed-forward net's output, before the residual is added; after the
    # whole block; or ahead of both LayerNorms of a block.
    placement: Literal["feed_forward", "block", "layerwise"] = "feed_forward"
    # Hidden numbers for each number between down and up.
    reduction: int = 16
    # The nonlinearity, by transformers' name.
    activation: str = "gelu_new"
    # Deviation of the weights they begin with; 0 for an up-projection of zeros: then they begin as
    # the base.
    std: float = 0.02
    # Parameters of the base that train, too, as selectors.
    beside: tuple[str, ...] = ()
    # Numbers between down and up; 0 for as many as `reduction` says.
    width: int = 0

    def __post_init__(self) -> None:
        if self.reduction < 1 or self.width < 0 or not 0 <= self.std < 10:
            raise SettingError(
                f"adapter: found reduction {self.reduction}, width {self.width} and std "
                f"{self.std}, expected 1 or more, 0 or more, and a deviation from 0"
            )
        if self.activation not in ACT2FN:
            raise SettingError(
                f"adapter activation {self.activation!r} is unknown. "
                f"{near(self.activation, list(ACT2FN))}"
            )

    @property
    def narrowness(self) -> str:
        """What the number between down and up hangs on."""
        return f"width {self.width}" if self.width else f"reduction {self.reduction}"

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        made = {key: self._module(base) for key in self._points(base)}
        for module in made.values():
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
            hosts = self._points(base)
            trainable = {
                f"{hosts[key].path}:{name}": value
                for key, module in made.items()
                for name, value in module.named_parameters()
            }
            trainable |= beside.trainable
            return Change(trainable, undo, parts={"made": made, "beside": beside})

    def _points(self, base: Base) -> dict[str, inserted.Point]:
        """Where adapters stand, by what their tensors' names begin with."""
        found = {}
        for layer in range(base.depth):
            own = inserted.points(base, layer, self.placement)
            for number, point in enumerate(own):
                key = f"adapter.{layer}." if len(own) == 1 else f"adapter.{layer}.{number}."
                found[key] = point
        return found

    def _module(self, base: Base, device: Any = None) -> Bottleneck:
        width = self.width or max(1, base.hidden_size // self.reduction)
        normed = self.placement == "block"
        with torch.device(device or base.device):
            return Bottleneck(base.hidden_size, width, self.activation, normed)

    def _insert(self, base: Base, made: Mapping[str, Bottleneck], undo: list[Any]) -> None:
        for key, point in self._points(base).items():
            undo.append(inserted.put(base, point, made[key]))

    def pack(self, base: Base, change: Change) -> Tensors:
        own = {
            f"{key}{name}": value.detach().clone()
            for key, module in change.parts["made"].items()
            for name, value in module.named_parameters()
        }
        return own | whole.pack(change.parts["beside"])

    def stored(self, change: Change, store: str) -> Tensors:
        return inserted.stored(change, store)

    def learning_rate(self, steps: int) -> float:
        return 1e-4

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        # Without memory until a file's shapes are known to be theirs.
        made = {key: self._module(base, "meta") for key in self._points(base)}
        own = self._fill(base, made, tensors)
        with all_or_nothing() as undo:
            self._insert(base, made, undo)
            rest = {name: value for name, value in tensors.items() if name not in own}
            undo.append(whole.unpack(base, rest).remove)
            return Change({}, undo)

    def _fill(self, base: Base, made: Mapping[str, Bottleneck], tensors: Tensors) -> Tensors:
        """Put stored values into modules; those that are the adapters'. Raises DamagedDelta."""
        own = {name: value for name, value in tensors.items() if name.startswith("adapter.")}
        expected = {
            f"{key}{name}": value
            for key, module in made.items()
            for name, value in module.named_parameters()
        }
        inserted.check(base, "adapter", own, expected)
        with torch.no_grad():
            for key, module in made.items():
                if next(module.parameters()).is_meta:
                    module.to_empty(device=base.device).requires_grad_(False)
                for name, value in module.named_parameters():
                    value.copy_(own[f"{key}{name}"])
        return own

    @classmethod
    def wear(
        cls, base: Base, worn: Mapping[int, tuple[Adapter, Tensors]], count: int
    ) -> Change | None:
        paths = set(base.paths())
        rest = {
            row: {name: value for name, value in tensors.items() if name in paths}
            for row, (_, tensors) in worn.items()
        }
        kinds: dict[tuple[str, str], Adapter] = {}
        for method, _ in worn.values():
            kinds.setdefault((method.placement, method.activation), method)
        with all_or_nothing() as undo:
            beside = norms(base, rest, count)
            if beside is None:
                return None
            undo.extend(beside)
            # Two placements may share a point: of one row there is at most one.
            made: dict[inserted.Point, list[nn.Module]] = {}
            for kind, method in sorted(kinds.items()):
                for key, point in method._points(base).items():
                    tables = _tables(base, worn, count, key, kind)
                    made.setdefault(point, []).append(_Worn(tables, kind[1]))
            for point, modules in made.items():
                module = nn.Sequential(*modules).to(base.device)
                undo.append(inserted.put(base, point, module))
            return Change({}, undo)


def _tables(
    base: Base,
    worn: Mapping[int, tuple[Adapter, Tensors]],
    count: int,
    start: str,
    kind: tuple[str, str],
) -> Tensors:
    """Tables of a point with a row for each change; of those of another kind, nothing.

    The names of its tensors begin with `start`.
    """
    parts: list[Tensors | None] = [None] * (count + 1)
    for row, (method, tensors) in worn.items():
        if (method.placement, method.activation) == kind:
            parts[row] = {
                name.removeprefix(start): value
                for name, value in tensors.items()
                if name.startswith(start)
            }
    return bottlenecks(parts, base.hidden_size)


class _Worn(nn.Module):
    """A bottleneck for each row of a batch, of tables with one for each change.

    A row without one is mapped to itself: its table is of zeros.
    """

    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    def __init__(self, tables: Tensors, activation: str) -> None:
        super().__init__()
        self.act = ACT2FN[activation]
        self.normed = "norm.weight" in tables
        for name, value in tables.items():
            self.register_buffer(name.replace(".", "_"), value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        own = x.to(self.down_weight.dtype)
        if self.normed:
            own = functional.layer_norm(own, own.shape[-1:], eps=EPSILON)
        runs = worn_runs(len(x))
        # A copy of its weights for each row costs more than the products, where rows are short.
        apart = 2 * len(runs) > len(x)
        made = self._by_row(own) if apart else torch.cat([self._one(own[s], n) for n, s in runs])
        return x + made.to(x.dtype)

    def _by_row(self, own: Tensor) -> Tensor:
        rows = worn_rows(len(own)).to(own.device)
        if self.normed:
            scale, shift = self.norm_weight[rows].unsqueeze(1), self.norm_bias[rows].unsqueeze(1)
            own = torch.addcmul(shift, own, scale)
        down, up = self.down_weight[rows], self.up_weight[rows]
        inner = torch.baddbmm(self.down_bias[rows].unsqueeze(1), own, down.transpose(1, 2))
        return torch.baddbmm(self.up_bias[rows].unsqueeze(1), self.act(inner), up.transpose(1, 2))

    def _one(self, own: Tensor, number: int) -> Tensor:
        """Rows that all wear one change."""
        if self.normed:
            own = torch.addcmul(self.norm_bias[number], own, self.norm_weight[number])
        inner = functional.linear(own, self.down_weight[number], self.down_bias[number])
        return functional.linear(self.act(inner), self.up_weight[number], self.up_bias[number])


EXAMPLE = Adapter(reduction=4, beside=("norm",))
