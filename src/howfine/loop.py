"""The training loop: a base, a head and a change put together and run on transformers' Trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from howfine.base import Base
from howfine.cost import PeakMemory
from howfine.delta import Delta
from howfine.errors import TrainingError
from howfine.metrics import METRICS
from howfine.probe import GradientProbe
from howfine.readout import Head, Wired
from howfine.recipe import Recipe, Training
from howfine.task import Example, Task


class Fit:
    """One training: base, head and change put together, run, and packed."""

    def __init__(
        self, base: Base, task: Task, recipe: Recipe, seed: int, folder: Path, progress: bool
    ) -> None:
        set_seed(seed)
        self.base, self.task, self.recipe = base, task, recipe
        self.memory = PeakMemory(base.device)
        self.head: Head = recipe.readout.attach(base, task.labels)
        self.model = Wired(base, recipe.readout, self.head)
        probe = GradientProbe(self.model, base, task.splits["train"], recipe.training.batch_size)
        self.change = recipe.method.attach(base, probe)
        if recipe.training.gradient_checkpointing:
            base.tower.gradient_checkpointing_enable({"use_reentrant": False})
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in parameters)
        arguments = _arguments(
            recipe.training, seed, folder, len(task.splits["train"]), progress, base
        )
        self.trainer = _Trainer(self, arguments)
        self.seconds = 0.0
        self.peak_bytes = 0

    def train(self, resume: bool) -> None:
        """Run the training loop; NaN ends it with TrainingError."""
        start = time.perf_counter()
        checkpoint = resume and any(Path(str(self.trainer.args.output_dir)).glob("checkpoint-*"))
        self.trainer.train(resume_from_checkpoint=checkpoint or None)
        self.seconds = time.perf_counter() - start
        self.peak_bytes = self.memory.growth()

    def pack(self) -> Delta:
        """What training left, as a delta."""
        if self.recipe.training.gradient_checkpointing:
            self.base.tower.gradient_checkpointing_disable()
        self.model.eval()
        return Delta.pack(
            self.base,
            self.recipe.method,
            self.change,
            self.recipe.readout,
            self.head,
            self.task.labels,
            self.recipe.store,
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
            train_dataset=_Rows(splits["train"]),
            eval_dataset=_Rows(splits["dev"]),
            data_collator=self._collate,
            compute_metrics=self._metrics,
            callbacks=stop,
        )
        # Without a progress bar Trainer prints its log to standard output, which is the user's.
        self.remove_callback(PrinterCallback)

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
        return LengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            lengths=[sum(map(len, example.texts)) for example in rows],
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Groups of the method, then the head with its own rate; no decay on biases and norms."""
        if self.optimizer is None:
            training = self.fit.recipe.training
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(_groups(self.fit, training), **options)
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The readout's loss plus the method's penalty. Raises TrainingError unless finite."""
        outputs = model(**inputs)
        loss: Tensor = outputs["loss"]
        if model.training:
            progress = self.state.global_step / max(1, self.state.max_steps)
            loss = loss + self.fit.recipe.method.penalty(self.fit.change, progress).to(loss.device)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss became {float(loss)} at step {self.state.global_step} of "
                    f"{self.state.max_steps} (recipe {self.fit.recipe.name}, learning_rate "
                    f"{self.args.learning_rate}); nothing was written. Lower --learning-rate, or "
                    "use precision fp32"
                )
        return (loss, outputs) if return_outputs else loss


class _Rows(torch.utils.data.Dataset[Example]):
    """A split as a map-style dataset."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def _groups(fit: Fit, training: Training) -> list[dict[str, Any]]:
    """Optimiser groups: the method's, split by decay, and the head's."""
    rate = training.readout_learning_rate or training.learning_rate
    groups = []
    for group in fit.recipe.method.groups(fit.change):
        lr = training.learning_rate * group.get("lr_scale", 1.0)
        decay = group.get("weight_decay", training.weight_decay)
        matrices = [p for p in group["params"] if p.ndim > 1]
        vectors = [p for p in group["params"] if p.ndim <= 1]
        groups += [
            {"params": matrices, "lr": lr, "weight_decay": decay},
            {"params": vectors, "lr": lr, "weight_decay": 0.0},
        ]
    head = list(fit.head.parameters())
    groups.append({"params": head, "lr": rate, "weight_decay": training.weight_decay})
    return [group for group in groups if group["params"]]


def _arguments(
    training: Training, seed: int, folder: Path, rows: int, progress: bool, base: Base
) -> TrainingArguments:
    """transformers' arguments for a recipe's training settings."""
    per_step = training.batch_size * training.gradient_accumulation
    steps = training.max_steps or math.ceil(rows / per_step) * training.epochs
    every = max(1, int(steps // training.evaluations)) if training.evaluations else 0
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=2 * training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
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
        report_to=training.report_to,
        disable_tqdm=not progress,
        remove_unused_columns=False,
        label_names=["targets"],
        use_cpu=base.device.type == "cpu",
        dataloader_pin_memory=base.device.type != "cpu",
    )
