"""What listens to a training: early stopping that knows what counts, and a clock."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class Patience(EarlyStoppingCallback):
    """transformers' early stopping, which else forgets at a resume how long it has waited.

    States that can't be the best, as they are not finished (`Method.finished`), do not count.
    """

    def on_evaluate(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **told: Any,
    ) -> None:
        """Count an evaluation."""
        if told["metrics"].get("eval_score") != -math.inf:
            super().on_evaluate(args, state, control, **told)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the evaluations since the best one, of those in a checkpoint's log."""
        self.early_stopping_patience_counter = self.waited(state.log_history)

    @staticmethod
    def waited(log: Sequence[Mapping[str, Any]]) -> int:
        """Evaluations in a log since the best one."""
        scores = [row["eval_score"] for row in log if "eval_score" in row]
        scores = [score for score in scores if score != -math.inf]
        return len(scores) - 1 - scores.index(max(scores)) if scores else 0


class Clock(TrainerCallback):
    """Seconds of training alone, those before a resume included: a checkpoint's log has them."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start, as early as the training was long when its checkpoint was saved."""
        before = state.log_history[-1].get("seconds", 0.0) if state.log_history else 0.0
        self.start = time.perf_counter() - before

    def seconds(self) -> float:
        """Since the start, without those in which it stood."""
        return time.perf_counter() - self.start

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let it stand: what is done inside is no training."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.start += time.perf_counter() - begun
