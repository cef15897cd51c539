"""tune: from a base, a task and a recipe to a delta, on transformers' Trainer."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from howfine.base import Base
from howfine.change import Change
from howfine.cost import PeakMemory
from howfine.delta import SUFFIX, Delta
from howfine.errors import TrainingError
from howfine.evaluate import Score, evaluate
from howfine.metrics import METRICS
from howfine.readout import Head, Wired
from howfine.recipe import Recipe, Training
from howfine.task import Example, Task

PROBE_BATCHES = 16


@dataclass(frozen=True)
class Tuned:
    """A finished run: its delta as stored, the dev score of that file, and what it cost."""

    delta: Delta
    path: Path
    bytes: int
    score: Score
    seconds: float  # training alone
    steps: int
    peak_bytes: int  # growth of the process's memory over the loaded base, at its highest
    trainable: int  # parameters


def tune(
    base: Base | str,
    task: Task | str,
    recipe: Recipe | str,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    split: str = "dev",
    work: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Tuned:
    """Fit a recipe and store the delta at `out`; the score is of the file, loaded again.

    `settings` override the recipe's. `work` keeps the training checkpoints; with `resume` the
    newest of them is picked up. Raises TrainingError where the loss stops being finite.
    """
    recipe = (Recipe.load(recipe) if isinstance(recipe, str) else recipe).override(**settings)
    base = Base.load(base, kind=recipe.readout.kind) if isinstance(base, str) else base
    task = Task.load(task) if isinstance(task, str) else task
    out = Path(out) if out else Path("runs") / f"{task.name.replace('/', '-')}-{recipe.name}{SUFFIX}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(work) if work else Path(scratch)
        fit = _Fit(base, task, recipe, seed, folder, progress)
        with fit.change:
            fit.train(resume)
            packed = fit.pack()
    if fit.trainer.is_world_process_zero():
        _store(packed, out, base, task, split)
    fit.trainer.accelerator.wait_for_everyone()
    delta = Delta.load(out)
    return Tuned(
        delta=delta,
        path=out,
        bytes=out.stat().st_size,
        score=evaluate(delta, base, task, split=split),
        seconds=fit.seconds,
        steps=fit.trainer.state.global_step,
        peak_bytes=fit.peak_bytes,
        trainable=fit.trainable,
    )


def _store(packed: Delta, out: Path, base: Base, task: Task, split: str) -> None:
    """Write, read back, score what was read, and write that score into the header."""
    packed.save(out)
    score = evaluate(Delta.load(out), base, task, split=split)
    low, high = score.interval
    stated = {
        "metric": score.metric,
        "value": round(score.value, 6),
        "interval": [round(low, 6), round(high, 6)],
        "on": f"{task.name}/{split}",
        "n": score.n,
    }
    packed.with_score(stated).save(out)


class _Fit:
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
        arguments = _arguments(recipe.training, seed, folder, len(task.splits["train"]), progress, base)
        self.trainer = _Trainer(self, arguments)
        self.seconds = 0.0
        self.peak_bytes = 0

    def train(self, resume: bool) -> None:
        """Run the training loop; NaN ends it with TrainingError."""
        start = time.perf_counter()
        checkpoint = resume and any(Path(self.trainer.args.output_dir).glob("checkpoint-*"))
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

    def __init__(self, fit: _Fit, arguments: TrainingArguments) -> None:
        self.fit = fit
        splits, training = fit.task.splits, fit.recipe.training
        stop = [EarlyStoppingCallback(training.patience)] if training.patience else []
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


class GradientProbe:
    """Answers a method's questions about the data: see `howfine.method.Probe`."""

    def __init__(
        self, model: Wired, base: Base, examples: Sequence[Example], batch_size: int
    ) -> None:
        self.model, self.base = model, base
        self.examples, self.batch_size = examples, batch_size

    def gradients(self, base: Base, paths: list[str]) -> dict[str, Tensor]:
        """Mean |∂loss/∂θ| per entry over a few batches, dropout off, at the current base."""
        parameters = {path: base.parameter(path) for path in paths}
        sums = {path: torch.zeros_like(p, dtype=torch.float32) for path, p in parameters.items()}
        was_training = self.model.training
        self.model.eval()
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        rows = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        rows = rows[:PROBE_BATCHES]
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        try:
            for chosen in rows:
                batch = self.model.readout.collate(base, [self.examples[i] for i in chosen])
                fields = {k: _to(v, base.device) for k, v in batch.as_kwargs().items()}
                loss = self.model(**fields)["loss"]
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for path, gradient in zip(parameters, found, strict=True):
                    if gradient is not None:  # a pooler that the readout never reads
                        sums[path] += gradient.float().abs() / len(rows)
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
            self.model.train(was_training)
        return sums


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value.to(device)


def _groups(fit: _Fit, training: Training) -> list[dict[str, Any]]:
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
