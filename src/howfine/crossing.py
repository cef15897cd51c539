"""Crossing: at which rate scores that climb by S += rate·pull·σ'(S - b) get from [0, 1) past b.

The further a score has come, the faster it climbs, until it runs away (as S of skill grafting does,
Panigrahi et al. 2023). So rate, steps and pulls settle which scores cross, and the rate can be set
for a wanted number of them. `Soft` is the gate between two weights whose gradient is that climb.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Scores begin below it.
HIGHEST_START = 1.0


class Soft(torch.autograd.Function):
    """θ + f ⊙ (θ_ft - θ), and the step of S in one pass; f itself is not kept."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, weight: Tensor, tuned: Tensor, held: Tensor | None, bias: float
    ) -> Tensor:
        ctx.held, ctx.bias = held, bias
        ctx.save_for_backward(scores, weight, tuned)
        gate = torch.sigmoid(scores - bias)
        if held is not None:
            gate = torch.where(held, 1 - gate, gate)
        return torch.lerp(weight.float(), tuned.float(), gate).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        scores, weight, tuned = ctx.saved_tensors
        open_ = torch.sigmoid(scores - ctx.bias)
        step = (tuned.float() - weight.float()).mul_(gradient).mul_(open_)
        step.mul_(open_.neg_().add_(1))
        if ctx.held is not None:
            step = torch.where(ctx.held, -step, step)
        return step, None, None, None, None


def crossing(start: Tensor, steps: int, bias: float) -> Tensor:
    """The smallest x at which S, begun at `start`, reaches b in `steps` steps S += x·σ'(S - b).

    Of any shape, in double precision; starts below b. By bisection of log x.
    """
    start = start.double()
    high = ((bias - start) / _slope(start - bias)).log()  # in one step
    low = (4 * (bias - start) / steps).log()  # were σ' always at its highest, 1/4
    for _ in range(60):
        middle = (low + high) / 2
        pull, value = middle.exp(), start.clone()
        for _ in range(steps):
            value += pull * _slope(value - bias)
        low, high = torch.where(value > bias, low, middle), torch.where(value > bias, middle, high)
    return high.exp()


def _slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def rate(pulls: Tensor, starts: Tensor, count: int, steps: int, bias: float) -> float:
    """The rate at which `count` entries cross b in `steps` steps if their pulls don't change.

    `pulls` (n,) are -(1 - 2γ₀)·∂L/∂θ·(θ_ft - θ), all above 0; `starts` (n,) the first S, in [0, 1).
    An entry crosses at the rate crossing(S)/pull, so the rate lies behind the count-th smallest.
    """
    grid = crossing(torch.linspace(0, HIGHEST_START, 65), steps, bias).log()
    position = starts.double().cpu() * 64
    left = position.floor().long().clamp(0, 63)
    needed = torch.lerp(grid[left], grid[left + 1], position - left)
    rates = (needed - pulls.double().cpu().log()).sort().values
    after = rates[count] if count < len(rates) else rates[count - 1] + 0.01
    return math.exp(float(rates[count - 1] + after) / 2)
