"""What frozen blocks make of an example, computed once: the states that enter the lowest change.

Where nothing that trains lies under a block, and nothing random either, its output for an example
is the same in every epoch. It is kept by the example's content, so that whatever changes the input
(a random crop) is simply never found again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from howfine import surgery
from howfine.base import Base, TwoTowers
from howfine.unread import in_one_row

# States are kept up to so many bytes, of all towers; examples that come later are computed each
# time, and so is a batch that one of them is in.
KEPT_BYTES = 2**31
_OF_TEXTS = ("input_ids", "attention_mask", "token_type_ids")


class Reuse:
    """Lets each tower of a base keep what its frozen lower blocks give.

    Put on before a change, so that what the change does after a block is not part of what is kept;
    nothing is kept before `start`. What lies under the change is seen in the first training step
    after that: it is what needs no gradient.
    """

    def __init__(self, base: Base, on: bool = True) -> None:
        parts = base.parts.values() if isinstance(base, TwoTowers) else [base]
        chosen = [part for part in parts if on and in_one_row(part)]
        self.kept = [_Kept(part, KEPT_BYTES // len(chosen)) for part in chosen]

    def start(self) -> None:
        """From here on, blocks under every change run once for an example."""
        for each in self.kept:
            each.started = True

    def remove(self) -> None:
        """Let all blocks compute as before, and forget what they gave."""
        for each in reversed(self.kept):
            each.remove()


class _Kept:
    """States of one tower: those that leave its highest block under every change."""

    def __init__(self, part: Base, most: int) -> None:
        self.part, self.held, self.bytes, self.most = part, dict[bytes, Tensor](), 0, most
        prefix, block_path = part.body_prefix, part.anatomy.block_path
        self.blocks = [part.towers.get_submodule(prefix + block_path(n)) for n in range(part.depth)]
        # Blocks under every change, once a training step has told; of a batch, its rows' keys.
        self.under: int | None = None
        self.keys: list[bytes] = []
        self.hit = self.in_tuple = False
        self.lengths: list[int] = []
        self.frozen: list[bool] = []
        self.started = False
        self.undo = [surgery.rewire(part.body, self._entry(part.body.forward))]
        for number, block in enumerate(self.blocks):
            self.undo.append(surgery.rewire(block, self._block(number, block.forward)))

    def remove(self) -> None:
        while self.undo:
            self.undo.pop()()
        self.held.clear()

    def _entry(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.started:
                return compute(*args, **kwargs)
            self.keys, self.lengths = ([], []) if args else _keys(kwargs)
            self.hit = bool(self.keys) and all(key in self.held for key in self.keys)
            self.frozen = []
            found = compute(*args, **kwargs)
            if self.under is None and self.frozen and torch.is_grad_enabled():
                moving = self.frozen.index(False) if False in self.frozen else len(self.frozen)
                self.under = self._steady(moving)
            return found

        return forward

    def _block(self, number: int, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(states: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.started:
                return compute(states, *args, **kwargs)
            last = number + 1 == self.under
            if self.hit and self.under is not None and number < self.under:
                given = self._found(states) if last else states
                return (given,) if self.in_tuple else given
            found = compute(states, *args, **kwargs)
            self.in_tuple = isinstance(found, tuple)
            made: Tensor = found[0] if self.in_tuple else found
            if self.under is None:
                # Blocks that give more than their states give it to the next one.
                plain = not self.in_tuple or len(found) == 1
                self.frozen.append(plain and not made.requires_grad)
            elif last and self.keys and torch.is_grad_enabled() and not made.requires_grad:
                self._keep(made)
            return found

        return forward

    def _steady(self, count: int) -> int:
        """Of the lowest blocks those that compute the same each time: without dropout at work."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        for module in self.part.body.modules():
            drops = isinstance(module, nn.Dropout) and module.training and module.p
            if drops and id(module) not in inside:
                return 0
        told = vars(self.part.config)
        rates = [v for k, v in told.items() if "drop" in k and isinstance(v, int | float)]
        moods = [block.training and any(rates) for block in self.blocks[:count]]
        return moods.index(True) if True in moods else count

    def _keep(self, states: Tensor) -> None:
        for key, length, row in zip(self.keys, self.lengths, states.detach(), strict=True):
            if key not in self.held and self.bytes < self.most:
                own = self.held[key] = row[:length].clone()
                self.bytes += own.numel() * own.element_size()

    def _found(self, like: Tensor) -> Tensor:
        """The states of a batch's rows; zeros where they are padded."""
        rows = [self.held[key] for key in self.keys]
        return nn.utils.rnn.pad_sequence(
            [*rows, rows[0].new_zeros(like.shape[1], like.shape[2])], batch_first=True
        )[:-1]


def _keys(inputs: dict[str, Any]) -> tuple[list[bytes], list[int]]:
    """What tells a batch's rows apart, and how many positions count of each.

    Nothing for inputs that say more than tokens and where they end, or pictures alone.
    """
    told = {name for name, value in inputs.items() if isinstance(value, Tensor)}
    if told == {"pixel_values"}:
        rows = inputs["pixel_values"].detach().cpu()
        return [_digest(row) for row in rows], [2**31] * len(rows)
    if not {"input_ids", "attention_mask"} <= told <= {*_OF_TEXTS}:
        return [], []
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    ends = mask.ndim == 2 and bool((mask.cumprod(1) == mask).all()) and bool(mask[:, 0].all())
    if not ends:  # padded on the left, or positions see each other by a rule of their own
        return [], []
    types = inputs.get("token_type_ids", torch.zeros_like(tokens))
    lengths = mask.sum(1).tolist()
    both = torch.stack([tokens, types], dim=2).cpu()
    made = [row[:length] for row, length in zip(both, lengths, strict=True)]
    return [_digest(row) for row in made], lengths


def _digest(row: Tensor) -> bytes:
    held = row.contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(held.data, digest_size=16).digest()
