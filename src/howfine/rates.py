"""Optimiser groups of a fit: which rate, decay, schedule and clip each trained part has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from howfine.change import Change
from howfine.readout import Head
from howfine.recipe import Recipe

# A head without a rate of its own has the method's, up to this: methods of scores and gates climb
# at rates that would throw a head about. Where a head trains alone the rate is its own.
HEAD_LIMITS, HEAD_RATE = {"adamw": 1e-2, "sgd": 1.0}, 1e-3


def groups(
    recipe: Recipe, change: Change, head: Head, learning_rate: float
) -> list[dict[str, Any]]:
    """The method's groups and the head's, each split by decay: none on biases and norms."""
    training = recipe.training
    own: dict[str, Any] = {"params": list(head.parameters()), "lr": HEAD_RATE}
    if training.readout_learning_rate is not None:
        own["lr"] = training.readout_learning_rate
    elif training.learning_rate is not None:
        limit = HEAD_LIMITS[training.optimizer] if change.trainable else training.learning_rate
        own["lr"] = min(training.learning_rate, limit)
    made = []
    for group in [*recipe.method.groups(change), own]:
        shared = {
            "lr": group.get("lr", learning_rate * group.get("lr_scale", 1.0)),
            "constant": group.get("constant", False),
            "clip": group.get("clip", ""),
        }
        decay = group.get("weight_decay", training.weight_decay)
        matrices = [p for p in group["params"] if p.ndim > 1]
        vectors = [p for p in group["params"] if p.ndim <= 1]
        made += [
            {"params": matrices, "weight_decay": decay, **shared},
            {"params": vectors, "weight_decay": 0.0, **shared},
        ]
    return [group for group in made if group["params"]]


def hold_constant(scheduler: Any) -> Any:
    """A scheduler that leaves the rate of groups marked `constant` alone."""
    for number, group in enumerate(scheduler.optimizer.param_groups):
        if group.get("constant"):
            scheduler.lr_lambdas[number] = _always
            group["lr"] = group["initial_lr"]
    return scheduler


def _always(step: int) -> float:
    return 1.0


def clipped_apart(optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """Parameters by the name of the norm they are clipped by; "" for the training's own."""
    apart: dict[str, list[Tensor]] = {"": []}
    for group in optimizer.param_groups:
        apart.setdefault(group.get("clip", ""), []).extend(group["params"])
    return apart
