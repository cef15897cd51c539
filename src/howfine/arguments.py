"""transformers' arguments for a training."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate.utils import get_int_from_env
from transformers import TrainingArguments

from howfine.change import Change
from howfine.recipe import Recipe

# Where torchrun, MPICH and Open MPI tell each process how many there are.
_WORLD_SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"]


# long: one call, one line an argument
def of(
    recipe: Recipe,
    change: Change,
    device: torch.device,
    rows: int,
    seed: int,
    folder: Path,
    progress: bool,
) -> TrainingArguments:
    """Arguments for a recipe's training settings, on so many rows."""
    training = recipe.training
    processes = get_int_from_env(_WORLD_SIZES, 1)
    per_step = training.batch_size * training.gradient_accumulation * processes
    steps = training.max_steps or math.ceil(rows / per_step) * training.epochs
    # The last step is one of them, so there are never more than asked.
    every = math.ceil(math.ceil(steps) / training.evaluations) if training.evaluations else 0
    rate = training.learning_rate
    if rate is None:
        rate = recipe.method.rate_for(change, math.ceil(steps))
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
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
    )
