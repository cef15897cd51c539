"""Free keys and values in front of every layer's attention; nothing else changes.

Li & Liang 2021, "Prefix-tuning: Optimizing continuous prompts for generation": p positions that
every position attends to, in training made by a small net, P = W_2·tanh(W_1·P' + b_1) + b_2, of
which the result alone is stored. Positions of the text start at p.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from howfine import attention, language, surgery
from howfine.base import Base
from howfine.change import Change, all_or_nothing
from howfine.codec import rounded
from howfine.errors import DamagedDelta, SettingError
from howfine.method import Method, Probe, Tensors
from howfine.tokens import later, numbered
from howfine.worn import later as put_later
from howfine.worn import stacked

_HELD = "howfine_prefix"
# Fitting the net to real words' keys and values: the authors' rate and steps.
_FIT_RATE, _FIT_STEPS = 1e-4, 500


class _Net(nn.Module):
    """P' (p, H), through one hidden layer of tanh, to (p, numbers)."""

    def __init__(self, length: int, hidden: int, width: int, numbers: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(length, width))
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, numbers)

    def forward(self) -> Tensor:
        made: Tensor = self.outer(torch.tanh(self.inner(self.rows)))
        return made

    def fit(self, target: Tensor) -> None:
        """Make the net give `target` as nearly as the authors' steps go; P' stays."""
        optimiser = torch.optim.Adam(
            [*self.inner.parameters(), *self.outer.parameters()], _FIT_RATE
        )
        with torch.enable_grad():
            for _ in range(_FIT_STEPS):
                optimiser.zero_grad()
                nn.functional.mse_loss(self(), target).backward()
                optimiser.step()
        self.zero_grad()


class _Rows(nn.Module):
    """P (p, numbers) as it is."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self) -> Tensor:
        return self.rows


@dataclass(frozen=True)
class Prefix(Method):
    """How many positions, how they are made in training, and what they begin as."""

    starts_at_base: ClassVar[bool] = False
    start: ClassVar[Any] = "own"
    meaning: ClassVar[tuple[str, ...]] = ("length", "shift")

    # Positions in front. With init_text 0: as many as it has tokens.
    length: int = 10
    # Width of the net's hidden layer; 0 trains keys and values themselves.
    hidden: int = 512
    # Words whose keys and values it begins as; "" for random ones.
    init_text: str = ""
    # Whether positions of the text start after the prefix, where positions are numbered.
    shift: bool = True

    def __post_init__(self) -> None:
        if self.hidden < 0 or self.length < (0 if self.init_text else 1):
            raise SettingError(
                f"prefix: found length {self.length} and hidden {self.hidden}, expected at least 1 "
                "and 0 (a length of 0 goes with an init_text)"
            )

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        if base.tower_name != "text":
            raise SettingError(f"prefix: {base.name} reads no tokens; give a text base")
        if probe is not None and probe.begun:
            return self._put_on(base, _Rows(self._earlier(probe)).to(base.device))
        target = self._words(base) if self.init_text else None
        length = self.length if target is None else len(target)
        numbers = _numbers(base)
        if not self.hidden:
            rows = torch.randn(length, numbers) if target is None else target
            return self._put_on(base, _Rows(rows).to(base.device))
        net = _Net(length, self.hidden, base.hidden_size, numbers)
        if target is not None:
            net.fit(target.cpu())
        return self._put_on(base, net.to(base.device))

    def _earlier(self, probe: Probe) -> Tensor:
        """Keys and values of an earlier delta, which train themselves: no net is stored."""
        if self.hidden:
            raise SettingError(
                "prefix: a delta holds keys and values and not the net that made them; set "
                "hidden=0 to go on from one"
            )
        return probe.begun["keys_values"].clone()

    def _words(self, base: Base) -> Tensor:
        """(p, numbers): keys and values of the words, p being their tokens or `length`."""
        ids = language.pieces(base, self.init_text)
        length = self.length or len(ids)
        if not 0 < length <= len(ids):
            raise SettingError(
                f"prefix init_text {self.init_text!r} has {len(ids)} tokens, and length is "
                f"{self.length}; expected as many at most"
            )
        found = attention.recorded(base, torch.tensor(ids[:length]), once=True)
        both = torch.stack([part for pair in found for part in pair])  # (2n, heads, p, width)
        return both.permute(2, 0, 1, 3).flatten(1).float()

    def _put_on(self, base: Base, net: _Net | _Rows) -> Change:
        heads = _shapes(base)
        with all_or_nothing() as undo:
            fronts, off = attention.put_on(base)
            undo.append(off)
            undo.append(surgery.hold(base.body, _HELD, net))

            def renew() -> None:
                rows = net()  # (p, 2n·heads·width): keys and values of each layer in turn
                parts = rows.view(len(rows), 2 * len(fronts), *heads).permute(1, 2, 0, 3)
                for layer, front in enumerate(fronts):
                    front.keys, front.values = parts[2 * layer], parts[2 * layer + 1]

            length = len(net.rows)
            undo.append(later(base, renew, length if self.shift else 0))
            return Change(dict(net.named_parameters()), undo, parts={"net": net})

    def pack(self, base: Base, change: Change) -> Tensors:
        with torch.no_grad():
            return {"keys_values": change.parts["net"]().detach().clone()}

    def stored(self, change: Change, store: str) -> Tensors:
        net: _Net | _Rows = change.parts["net"]
        if isinstance(net, _Net):  # what is stored is not what trains
            return {}
        return {"rows": rounded(net.rows.detach(), store).to(net.rows.device)}

    def groups(self, change: Change) -> list[dict[str, Any]]:
        return [{"params": list(change.trainable.values()), "weight_decay": 0.0}]

    def learning_rate(self, steps: int) -> float:
        # The paper's 5e-5 is for sums over a target's tokens and five to thirty epochs.
        return 1e-3

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        numbers = _numbers(base)
        found = tensors.get("keys_values", torch.zeros(0))
        fits = len(tensors) == 1 and not found.is_sparse and found.is_floating_point()
        if not fits or found.ndim != 2 or not len(found) or found.shape[1] != numbers:
            shapes = {name: tuple(value.shape) for name, value in tensors.items()}
            raise DamagedDelta(
                f"prefix: found {shapes}, expected keys_values of rows of {numbers} numbers; the "
                "file is damaged, or made for another model"
            )
        net = _Rows(found.to(base.device)).requires_grad_(False)
        return self._put_on(base, net)

    def takes(self, base: Base, tensors: Tensors) -> int:
        return len(tensors["keys_values"]) if self.shift and numbered(base) else 0

    @classmethod
    def wear(
        cls, base: Base, worn: Mapping[int, tuple[Prefix, Tensors]], count: int
    ) -> Change | None:
        rows = {row: tensors["keys_values"] for row, (_, tensors) in worn.items()}
        table = stacked(rows, count, next(iter(rows.values()))).to(base.device)
        visible = torch.zeros(table.shape[:2], dtype=torch.bool, device=base.device)
        for row, own in rows.items():
            visible[row, : len(own)] = True
        heads = _shapes(base)
        starts = {row: method.takes(base, tensors) for row, (method, tensors) in worn.items()}
        with all_or_nothing() as undo:
            fronts, off = attention.put_on(base)
            undo.append(off)
            parts = table.view(*table.shape[:2], 2 * len(fronts), *heads).permute(2, 0, 3, 1, 4)
            for layer, front in enumerate(fronts):
                front.keys, front.values = parts[2 * layer], parts[2 * layer + 1]
                front.visible = visible
            undo.append(put_later(base, starts, count))
            return Change({}, undo)


def _shapes(base: Base) -> tuple[int, int]:
    """(heads, width) of keys, the same in every layer. Raises SettingError where they differ."""
    token = base.embedding.num_embeddings - 1
    found = {tuple(keys.shape[::2]) for keys, _ in attention.recorded(base, torch.tensor([token]))}
    if len(found) != 1:
        raise SettingError(
            f"{base.name} has keys of {len(found)} shapes in its layers, and a prefix is of one; "
            "give another base"
        )
    heads, width = found.pop()
    return int(heads), int(width)


def _numbers(base: Base) -> int:
    """Numbers of a position: a key and a value in each layer."""
    heads, width = _shapes(base)
    return 2 * len(attention.modules(base)) * heads * width


EXAMPLE = Prefix(length=3, hidden=8)
