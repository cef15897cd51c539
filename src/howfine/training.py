"""Training: the settings of a fit that are no method's and no readout's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from howfine.errors import SettingError

# Those of transformers that are a factor of the rate by the step alone. reduce_lr_on_plateau and
# greedy lower it while what dev gives grows: a loss is what they are made for.
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"),
    *("constant", "constant_with_warmup"),
)


@dataclass(frozen=True)
class Training:
    """How a fit is run; the names are transformers' where it has one."""

    # Passes over the training split.
    epochs: float = 3.0
    # Optimiser steps; above 0 it overrides epochs.
    max_steps: int = 0
    # Examples per optimiser step and process.
    batch_size: int = 32
    # Batches added up before an optimiser step.
    gradient_accumulation: int = 1
    # Peak learning rate of the method's parameters; None for the method's own.
    learning_rate: float | None = None
    # Peak learning rate of the readout's head; None for the same where one is named,
    # up to 1e-2 (SGD: 1) beside a method that trains something, else 1e-3.
    readout_learning_rate: float | None = None
    # AdamW's decoupled weight decay, of matrices; methods of scores, entries and vectors have none.
    weight_decay: float = 0.01
    # Share of the steps that warm up linearly.
    warmup: float = 0.1
    # Learning-rate schedule, as transformers calls it: linear, cosine, cosine_with_restarts,
    # polynomial, inverse_sqrt, constant (which has no warm-up) or constant_with_warmup.
    schedule: str = "linear"
    # Gradient norm above which gradients are scaled down; 0 for never.
    max_grad_norm: float = 1.0
    # Number format of the forward and backward pass: fp32, bf16 or fp16 (mixed precision).
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # Evaluations on dev per training that pick the best state; 0 keeps the last state.
    evaluations: int = 0
    # Evaluations without improvement before training stops; 0 for never.
    patience: int = 0
    # Batch examples of similar length (saves padding).
    group_by_length: bool = True
    # Share of the steps, the last ones, taken with values as a file of few bits will hold them.
    rounding: float = 0.3
    # Recompute activations in the backward pass (saves memory, costs time).
    gradient_checkpointing: bool = False
    # adamw, or sgd without momentum.
    optimizer: Literal["adamw", "sgd"] = "adamw"
    # Share of the loss that is how far answers are from a teacher's, where examples have them; None
    # for a half.
    teacher_share: float | None = None
    # Train in evaluation mode: no dropout, in the base nor in the head.
    eval_mode: bool = False
    # Compute what frozen blocks under every change make of an example once, and keep it in memory.
    reuse_frozen: bool = False
    # Where to log: none, tensorboard, trackio, … as transformers' report_to.
    report_to: str = "none"

    def __post_init__(self) -> None:
        for name, fits, expected in _RANGES:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and fits(value)):
                raise SettingError(f"training {name}: found {value}, expected {expected}")
        if self.schedule not in SCHEDULES:
            raise SettingError(
                f"training schedule: found {self.schedule!r}, expected one of "
                f"{', '.join(SCHEDULES)}; transformers' others have settings of their own, or wait "
                "for a loss of dev where a fit has a score"
            )


_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("epochs", lambda value: value > 0, "more than 0"),
    ("max_steps", lambda value: value >= 0, "0 (so that epochs count) or more"),
    ("batch_size", lambda value: value >= 1, "1 or more"),
    ("gradient_accumulation", lambda value: value >= 1, "1 or more"),
    ("learning_rate", lambda value: value >= 0, "a finite number from 0"),
    ("readout_learning_rate", lambda value: value >= 0, "a finite number from 0"),
    ("weight_decay", lambda value: value >= 0, "a finite number from 0"),
    ("warmup", lambda value: 0 <= value < 1, "a share from 0 to below 1"),
    ("teacher_share", lambda value: 0 <= value <= 1, "a share from 0 to 1"),
    ("rounding", lambda value: 0 <= value <= 1, "a share from 0 to 1"),
    ("max_grad_norm", lambda value: value >= 0, "0 (for never) or more"),
    ("evaluations", lambda value: value >= 0, "0 (for none) or more"),
    ("patience", lambda value: value >= 0, "0 (for never) or more"),
)
