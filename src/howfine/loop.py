"""The training loop: a base, a head and a change put together and run on transformers' Trainer."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_int_from_env
from torch import Tensor
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from howfine.base import Base
from howfine.cost import PeakMemory
from howfine.delta import Delta
from howfine.errors import SettingError, TrainingError
from howfine.metrics import METRICS
from howfine.probe import GradientProbe
from howfine.readout import Head, Wired
from howfine.recipe import Recipe
from howfine.sampler import ByLength
from howfine.task import Example, Task

# Where torchrun, MPICH and Open MPI tell each process how many there are.
_WORLD_SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"]


class Fit:
    """One training: base, head and change put together, run, and packed.

    A context manager: on leaving, the base is what it was, however the training ended. Raises
    SettingError for settings of the training that don't go together or that transformers refuses.
    """

    def __init__(
        self, base: Base, task: Task, recipe: Recipe, seed: int, folder: Path, progress: bool
    ) -> None:
        set_seed(seed)
        self.base, self.task, self.recipe = base, task, recipe
        self.memory = PeakMemory(base.device)
        self.head: Head = recipe.readout.attach(base, task.labels)
        self.model = Wired(base, recipe.readout, self.head)
        probe = GradientProbe(self.model, base, task.splits["train"], recipe.training.batch_size)
        with ExitStack() as undo:
            undo.callback(base.towers.eval)
            self.change = undo.enter_context(recipe.method.attach(base, probe))
            if recipe.training.gradient_checkpointing:
                undo.callback(_checkpoint_activations(base))
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            self.trainable = sum(p.numel() for p in parameters)
            self.trainer = _trainer(self, seed, folder, progress)
            self._undo = undo.pop_all()
        self.seconds, self.peak_bytes = 0.0, 0

    def __enter__(self) -> Fit:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def train(self, checkpoint: Path | None) -> None:
        """Run the training loop, from a checkpoint on if given; NaN ends it with TrainingError."""
        start = time.perf_counter()
        self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.seconds = time.perf_counter() - start
        self.peak_bytes = self.memory.growth()

    def pack(self) -> Delta:
        """What training left, as a delta. Raises TrainingError where it is not finite."""
        self.model.eval()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise _diverged(self.trainer, f"{name} holds NaN or infinity")
        return Delta.pack(
            self.base,
            self.recipe.method,
            self.change,
            self.recipe.readout,
            self.head,
            self.task.labels,
            self.recipe.store,
        )


def _checkpoint_activations(base: Base) -> Callable[[], None]:
    """Recompute activations of the tower in the backward pass; returns the undo."""
    # The old names are the ones that every supported transformers has; newer ones warn of them.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            base.tower.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise SettingError(
                f"gradient_checkpointing: {error} Train {base.name} without it"
            ) from error

    def undo() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            base.tower.gradient_checkpointing_disable()

    return undo


def _trainer(fit: Fit, seed: int, folder: Path, progress: bool) -> _Trainer:
    """The Trainer of a fit; what transformers refuses of the settings is a SettingError."""
    training = fit.recipe.training
    if training.patience and not training.evaluations:
        raise SettingError(
            f"recipe {fit.recipe.name}: patience {training.patience} counts evaluations, but there "
            "are none; set evaluations to how often a training is evaluated, such as 10"
        )
    if training.precision == "fp16" and fit.base.device.type == "cpu":
        raise SettingError(
            f"recipe {fit.recipe.name}: precision fp16 would train in fp32 on a CPU; use bf16"
        )
    try:
        if fit.base.device.type == "cuda":  # Trainer takes the current one
            torch.cuda.set_device(fit.base.device)
        arguments = _arguments(fit, seed, folder, progress)
        # One process trains on one device; with several, Trainer would copy the model to all.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        return _Trainer(fit, arguments)
    except (ValueError, RuntimeError, ImportError) as error:
        raise SettingError(
            f"recipe {fit.recipe.name}, training: {str(error).strip().splitlines()[0]}"
        ) from error


def _diverged(trainer: _Trainer, what: str) -> TrainingError:
    return TrainingError(
        f"{what} at step {trainer.state.global_step} of {trainer.state.max_steps} (recipe "
        f"{trainer.fit.recipe.name}, learning_rate {trainer.args.learning_rate}); nothing was "
        "written. Lower --learning-rate, or use precision fp32"
    )


class _Trainer(Trainer):
    """transformers' Trainer with the method's penalty, rates per part, and a NaN that ends it."""

    def __init__(self, fit: Fit, arguments: TrainingArguments) -> None:
        self.fit = fit
        splits, training = fit.task.splits, fit.recipe.training
        stop: list[TrainerCallback] = []
        if training.patience:
            stop.append(EarlyStoppingCallback(training.patience))
        super().__init__(
            model=fit.model,
            args=arguments,
            train_dataset=list(splits["train"]),
            eval_dataset=list(splits["dev"]),
            data_collator=self._collate,
            compute_metrics=self._metrics,
            callbacks=stop,
        )
        self.remove_callback(PrinterCallback)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, kept off standard output, which is the user's: the progress bar writes it."""
        with redirect_stdout(sys.stderr):
            super().log(logs, start_time)

    def _collate(self, examples: list[Example]) -> dict[str, Any]:
        return self.fit.recipe.readout.collate(self.fit.base, examples).as_kwargs()

    def _metrics(self, outcome: Any) -> dict[str, float]:
        predictions = self.fit.recipe.readout.predict(torch.as_tensor(outcome.predictions))
        metric = METRICS[self.fit.task.metric]
        return {"score": float(metric.function(predictions.numpy(), outcome.label_ids))}

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.fit.recipe.training.group_by_length:
            return super()._get_train_sampler(train_dataset)
        rows = self.fit.task.splits["train"]
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ByLength(
            per_step * self.args.world_size,
            [sum(map(len, example.texts)) for example in rows],
            self.args.seed,
        )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Checkpoints hold the trainable parameters alone; that nothing else is in them is right.

        Raises TrainingError for a checkpoint of other trainable parameters.
        """
        lacking = set(load_result.missing_keys) & set(self.fit.model.state_dict())
        if odd := sorted(lacking | set(load_result.unexpected_keys)):
            raise TrainingError(
                f"the checkpoint in {self.args.output_dir} is of another recipe: it differs in "
                f"{len(odd)} parameters, such as {odd[0]}; name another folder with --work"
            )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Groups of the method, then the head with its own rate; no decay on biases and norms."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(_groups(self.fit, self.args.learning_rate), **options)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The readout's loss plus the method's penalty. Raises TrainingError unless finite."""
        outputs = model(**inputs)
        loss: Tensor = outputs["loss"]
        if model.training:
            progress = self.state.global_step / max(1, self.state.max_steps)
            loss = loss + self.fit.recipe.method.penalty(self.fit.change, progress).to(loss.device)
            if not torch.isfinite(loss):
                raise _diverged(self, f"the loss became {loss.item()}")
        return (loss, outputs) if return_outputs else loss


def _groups(fit: Fit, learning_rate: float) -> list[dict[str, Any]]:
    """Optimiser groups: the method's, split by decay, and the head's."""
    training = fit.recipe.training
    rates = (training.readout_learning_rate, training.learning_rate, 1e-3)
    groups = []
    for group in fit.recipe.method.groups(fit.change):
        lr = learning_rate * group.get("lr_scale", 1.0)
        decay = group.get("weight_decay", training.weight_decay)
        matrices = [p for p in group["params"] if p.ndim > 1]
        vectors = [p for p in group["params"] if p.ndim <= 1]
        groups += [
            {"params": matrices, "lr": lr, "weight_decay": decay},
            {"params": vectors, "lr": lr, "weight_decay": 0.0},
        ]
    head = list(fit.head.parameters())
    rate = next(rate for rate in rates if rate is not None)
    groups.append({"params": head, "lr": rate, "weight_decay": training.weight_decay})
    return [group for group in groups if group["params"]]


# long: one call, one line an argument
def _arguments(fit: Fit, seed: int, folder: Path, progress: bool) -> TrainingArguments:
    """transformers' arguments for a recipe's training settings."""
    training, rows = fit.recipe.training, len(fit.task.splits["train"])
    processes = get_int_from_env(_WORLD_SIZES, 1)
    per_step = training.batch_size * training.gradient_accumulation * processes
    steps = training.max_steps or math.ceil(rows / per_step) * training.epochs
    every = max(1, int(steps // training.evaluations)) if training.evaluations else 0
    rate = training.learning_rate
    if rate is None:
        rate = fit.recipe.method.learning_rate(math.ceil(steps))
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=2 * training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=rate,
        weight_decay=training.weight_decay,
        warmup_steps=training.warmup,
        lr_scheduler_type=training.schedule,
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        seed=seed,
        data_seed=seed,
        eval_strategy="steps" if every else "no",
        eval_steps=every or None,
        save_strategy="steps" if every else "no",
        save_steps=every or 500,
        save_total_limit=1,
        load_best_model_at_end=bool(every),
        metric_for_best_model="score" if every else None,
        greater_is_better=True,
        logging_strategy="steps",
        logging_steps=50,
        logging_nan_inf_filter=False,
        log_level_replica="error",
        report_to=training.report_to,
        disable_tqdm=not progress,
        remove_unused_columns=False,
        label_names=["targets"],
        use_cpu=fit.base.device.type == "cpu",
        dataloader_pin_memory=fit.base.device.type != "cpu",
    )
