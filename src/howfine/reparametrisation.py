"""Nets that make rows of numbers in training: what they make is stored, and they are not.

Li & Liang 2021, "Prefix-tuning", §4.3: P = W_2·tanh(W_1·P' + b_1) + b_2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Fitting the net to real words' keys and values: the authors' rate and steps.
_FIT_RATE, _FIT_STEPS = 1e-4, 500


class Net(nn.Module):
    """P' (p, H), through one hidden layer of tanh, to (p, numbers)."""

    def __init__(self, length: int, hidden: int, width: int, numbers: int) -> None:
        super().__init__()
        self.length, self.rows = length, nn.Parameter(torch.randn(length, width))
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, numbers)

    def forward(self) -> Tensor:
        made: Tensor = self.outer(torch.tanh(self.inner(self.rows)))
        return made

    def of(self, kind: int) -> Tensor:
        """(p, numbers) of the one kind of attention that there is."""
        made: Tensor = self()
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


class Nets(nn.Module):
    """A net for each kind of attention; their numbers stand side by side."""

    def __init__(self, nets: list[Net]) -> None:
        super().__init__()
        self.length, self.nets = nets[0].length, nn.ModuleList(nets)

    def forward(self) -> Tensor:
        return torch.cat([net() for net in self.nets], dim=1)

    def of(self, kind: int) -> Tensor:
        made: Tensor = self.nets[kind]()
        return made


class Rows(nn.Module):
    """P (p, numbers) as it is, so many numbers for each kind of attention."""

    def __init__(self, rows: Tensor, sizes: list[int]) -> None:
        super().__init__()
        self.length, self.sizes, self.rows = len(rows), sizes, nn.Parameter(rows)

    def forward(self) -> Tensor:
        return self.rows

    def of(self, kind: int) -> Tensor:
        return self.rows.split(self.sizes, dim=1)[kind]
