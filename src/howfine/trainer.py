"""transformers' Trainer as a fit needs it: a rate for each part, a penalty, an order, a clock."""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from howfine import arguments, rates
from howfine.adamw import AdamW
from howfine.base import Base
from howfine.callbacks import Clock, Patience
from howfine.change import Change
from howfine.errors import SettingError, StorageError, TrainingError
from howfine.metrics import METRICS
from howfine.readout import Head, Wired
from howfine.recipe import Recipe
from howfine.rounding import Rounding
from howfine.sampler import ByLength
from howfine.task import Example, Task

# What a batch's answers of a teacher are called, and the share of the loss that is about them.
_TAUGHT, _TEACHER_SHARE = "taught", 0.5


@dataclass(frozen=True)
class Parts:
    """What a training puts together."""

    base: Base
    task: Task
    recipe: Recipe
    model: Wired
    head: Head
    change: Change


def trainer_of(parts: Parts, seed: int, folder: Path, progress: bool) -> PartsTrainer:
    """The Trainer of a fit. Raises SettingError for what it or transformers refuses of settings."""
    recipe, device = parts.recipe, parts.base.device
    training = recipe.training
    if training.patience and not training.evaluations:
        raise SettingError(
            f"recipe {recipe.name}: patience {training.patience} counts evaluations, but there "
            "are none; set evaluations to how often a training is evaluated, such as 10"
        )
    if training.precision == "fp16" and device.type == "cpu":
        raise SettingError(
            f"recipe {recipe.name}: precision fp16 would train in fp32 on a CPU; use bf16"
        )
    try:
        if device.type == "cuda":  # Trainer takes the current one
            torch.cuda.set_device(device)
        rows = len(parts.task.splits["train"])
        made = arguments.of(recipe, parts.change, device, rows, seed, folder, progress)
        # One process trains on one device; with several, Trainer would copy the model to all.
        made._n_gpu = min(made.n_gpu, 1)
        return PartsTrainer(parts, made)
    except (ValueError, RuntimeError, ImportError) as error:
        raise SettingError(
            f"recipe {recipe.name}, training: {str(error).strip().splitlines()[0]}"
        ) from error


class PartsTrainer(Trainer):
    """transformers' Trainer with the method's penalty, rates per part, and a NaN that ends it."""

    def __init__(self, parts: Parts, made: TrainingArguments) -> None:
        self.parts = parts
        splits, training = parts.task.splits, parts.recipe.training
        self.clock = Clock()
        self.resumed: TrainerState | None = None  # of the checkpoint that it goes on from
        self._rows: list[int] = []
        callbacks: list[TrainerCallback] = [self.clock]
        if training.patience:
            callbacks.append(Patience(training.patience))
        super().__init__(
            model=parts.model,
            args=made,
            train_dataset=list(splits["train"]),
            eval_dataset=list(splits["dev"]),
            data_collator=self._collate,
            compute_metrics=self._metrics,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with no epoch left after a checkpoint of the end: it takes a step more."""
        epochs, *others = super().set_initial_training_values(*args, **kwargs)
        state, patience = self.resumed, self.parts.recipe.training.patience
        if state is None:
            return (epochs, *others)
        over = state.global_step >= int(others[-1] or 0)
        waited = patience > 0 and Patience.waited(state.log_history) >= patience
        return (0 if over or waited else epochs, *others)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, kept off standard output, which is the user's: the progress bar writes it."""
        logs["seconds"] = round(self.clock.seconds(), 3)
        with redirect_stdout(sys.stderr):
            super().log(logs, start_time)

    def _collate(self, examples: list[Example]) -> dict[str, Any]:
        fields = self.parts.recipe.readout.collate(self.parts.base, examples).as_kwargs()
        taught = [example.taught for example in examples]
        return {**fields, **({_TAUGHT: torch.tensor(taught)} if taught[0] else {})}

    def _metrics(self, outcome: Any) -> dict[str, float]:
        made = self.parts
        if not made.recipe.method.finished(made.change):
            return {"score": -math.inf}
        outputs, metric = torch.as_tensor(outcome.predictions), METRICS[made.task.metric]
        score = self.parts.recipe.readout.progress(outputs, outcome.label_ids, metric)
        return {"score": score}

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.parts.recipe.training.group_by_length:
            return super()._get_train_sampler(train_dataset)
        rows = self.parts.task.splits["train"]
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ByLength(
            per_step * self.args.world_size,
            [sum(map(len, (*example.texts, *example.targets[:1]))) for example in rows],
            self.args.seed,
        )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Checkpoints hold the trainable parameters alone; that nothing else is in them is right.

        Raises TrainingError for a checkpoint of other trainable parameters.
        """
        lacking = set(load_result.missing_keys) & set(self.parts.model.state_dict())
        if odd := sorted(lacking | set(load_result.unexpected_keys)):
            raise TrainingError(
                f"the checkpoint in {self.args.output_dir} is of another recipe: it differs in "
                f"{len(odd)} parameters, such as {odd[0]}; name another folder with --work"
            )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Groups of the method, then the head with its own rate; no decay on biases and norms."""
        if self.optimizer is None:
            groups = rates.groups(
                self.parts.recipe, self.parts.change, self.parts.head, self.args.learning_rate
            )
            if self.parts.recipe.training.optimizer == "sgd":
                self.optimizer = torch.optim.SGD(groups)
            else:
                _, options = self.get_optimizer_cls_and_kwargs(self.args)
                self.optimizer = AdamW(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's, but for groups whose rate is constant."""
        return rates.hold_constant(super().create_scheduler(num_training_steps, optimizer))

    def _clip_grad_norm(self, model: Any) -> Any:
        """Trainer's over all groups but those that are clipped by a norm of their own."""
        assert self.optimizer is not None
        apart = rates.clipped_apart(self.optimizer)
        if len(apart) == 1:
            return super()._clip_grad_norm(model)
        norm = self.accelerator.clip_grad_norm_(apart.pop(""), self.args.max_grad_norm)
        for parameters in apart.values():
            torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
        return norm

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's; towards the end with the values as they will be stored."""
        with self._as_stored():
            return super().training_step(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, of what would be stored now: the best state is to be the best file."""
        with self.clock.stopped(), self._as_stored(evaluating=True):
            self._remember()
            return super().evaluation_loop(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's. Raises StorageError where there is no room: torch says it in other words."""
        try:
            with self.clock.stopped():
                super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise StorageError(
                f"training checkpoints can't be kept in {self.args.output_dir}: {error}; no delta "
                "was written. Free some space, or name another folder with --work"
            ) from error

    def remember(self) -> None:
        """Let the readout take what it needs of the training examples, from what is stored."""
        with self._as_stored(evaluating=True):
            self._remember()

    def _remember(self) -> None:
        made = self.parts
        made.recipe.readout.remember(made.model, made.base, made.task.splits["train"])

    def _as_stored(self, evaluating: bool = False) -> AbstractContextManager[None]:
        made = self.parts
        training, store = made.recipe.training, made.recipe.store
        rounding = Rounding(made.recipe.method, made.change, made.head, store, training.rounding)
        progress = self.state.global_step / max(1, self.state.max_steps)
        due = rounding.coarse if evaluating else rounding.due(progress)
        return rounding.stored() if due else nullcontext()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The readout's loss plus the method's penalty. Raises TrainingError unless finite."""
        fields = {name: value for name, value in inputs.items() if name != _TAUGHT}
        if not model.training:
            outputs = model(**fields)
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]
        recipe, change = self.parts.recipe, self.parts.change
        method, read = recipe.method, recipe.readout
        progress = self.state.global_step / max(1, self.state.max_steps)
        taught = inputs.get(_TAUGHT)
        of_teacher = 0.0 if taught is None else _teacher_share(recipe)
        losses, first = [], None
        for share in method.passes(change, progress):
            outputs = model(**fields)
            first = outputs if first is None else first
            loss: Tensor = outputs["loss"]
            if share:  # what it learns from is the first pass, whoever has taught that
                like = read.learned(first["logits"]).detach()
                loss = (1 - share) * loss + share * read.imitation(outputs["logits"], like)
            elif of_teacher:
                like = read.imitation(outputs["logits"], taught)
                loss = (1 - of_teacher) * loss + of_teacher * like
            losses.append(loss)
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        loss = loss * self._weight(inputs) + method.penalty(change, progress).to(loss.device)
        if not torch.isfinite(loss):
            raise self.diverged(f"the loss became {loss.item()}")
        return (loss, first) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, of the batches that make one step; their rows are counted."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._rows = [len(batch["targets"]) for batch in batches if "targets" in batch]
        return batches, items

    def _weight(self, inputs: Any) -> float:
        """A batch's rows over the mean of those it makes a step with: an epoch's last has fewer."""
        if len(set(self._rows)) < 2:
            return 1.0
        return float(len(inputs["targets"]) * len(self._rows) / sum(self._rows))

    def diverged(self, what: str) -> TrainingError:
        """The error for `what` is not finite, with the step and the rate."""
        return TrainingError(
            f"{what} at step {self.state.global_step} of {self.state.max_steps} (recipe "
            f"{self.parts.recipe.name}, learning_rate {self.args.learning_rate}); nothing was "
            "written. Lower --learning-rate, or use precision fp32"
        )


def _teacher_share(recipe: Recipe) -> float:
    share = recipe.training.teacher_share
    return _TEACHER_SHARE if share is None else share
