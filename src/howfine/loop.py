"""The training loop: a base, a head and a change put together and run on transformers' Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState, set_seed

from howfine import checks, features
from howfine.base import Base, TwoTowers
from howfine.change import Change
from howfine.cost import PeakMemory
from howfine.delta import Delta
from howfine.errors import SettingError, TaskError
from howfine.method import fitting
from howfine.probe import GradientProbe
from howfine.readout import Head, Wired
from howfine.recipe import Recipe
from howfine.regions import differs
from howfine.start import Start
from howfine.task import Task
from howfine.trainer import Parts, trainer_of


class Fit:
    """One training: base, head and change put together, run, and packed.

    A context manager: on leaving, the base is what it was, however the training ended. Raises
    SettingError for settings of the training that don't go together or that transformers refuses.
    """

    def __init__(
        self,
        base: Base,
        task: Task,
        recipe: Recipe,
        seed: int,
        folder: Path,
        progress: bool,
        start: Start | None = None,
        outside: Mapping[str, Tensor] | None = None,
    ) -> None:
        set_seed(seed)
        _check_task(recipe, task)
        recipe, start = _settled(recipe, base, task), start or Start({})
        self.memory = PeakMemory(base.device)
        _check_start(recipe, start)
        head = _head(recipe, base, task, start)
        training = recipe.training
        model = Wired(base, recipe.readout, head, dropout=not training.eval_mode)
        rows = task.splits["train"]
        probe = GradientProbe(
            *(model, base, rows, training.batch_size, start.weights, outside), begun=start.begun
        )
        with ExitStack() as undo:
            undo.callback(base.towers.eval)
            reuse = features.Reuse(base, on=training.reuse_frozen)
            undo.callback(reuse.remove)
            change = undo.enter_context(recipe.method.attach(base, probe))
            _check_kept_out(recipe, base, change, start, outside or {})
            reuse.start()
            _check_moves(recipe)
            if training.gradient_checkpointing:
                _check_checkpointing(recipe)
                undo.callback(_checkpoint_activations(base))
            self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            _check_trains(recipe, self.trainable)
            self.parts = Parts(base, task, recipe, model, head, change)
            self.trainer = trainer_of(self.parts, seed, folder, progress)
            self._undo = undo.pop_all()
        self.seconds, self.peak_bytes = 0.0, 0

    def __enter__(self) -> Fit:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def check(self, splits: Iterable[str]) -> None:
        """Let the readout read what it may refuse, before anything trains.

        That is the first row of each split, rows with options of their own, and rows with the mask
        token in a text. Raises TaskError with the row's place, SettingError where settings don't
        fit the base.
        """
        base, read = self.parts.base, self.parts.recipe.readout
        reads_text = not isinstance(base, TwoTowers) and base.tokenizer is not None
        mask = base.tokenizer.mask_token if reads_text else None
        for split in dict.fromkeys(splits):
            for number, row in enumerate(self.parts.task.splits[split], 1):
                marked = mask is not None and any(mask in text for text in row.texts)
                if number > 1 and not row.options and not marked:
                    continue
                try:
                    with torch.random.fork_rng(devices=[]):  # seeds are the training's
                        read.collate(base, [row])
                except TaskError as error:
                    raise TaskError(f"{split} row {number}: {error}") from error

    def train(self, checkpoint: Path | None) -> None:
        """Run the training loop, from a checkpoint on if given; NaN ends it with TrainingError."""
        if checkpoint:
            state = checkpoint / "trainer_state.json"
            self.trainer.resumed = TrainerState.load_from_json(str(state))
        self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.seconds = self.trainer.clock.seconds()
        self.peak_bytes = self.memory.growth()

    def pack(self) -> Delta:
        """What training left, as a delta. Raises TrainingError where it is not finite."""
        made = self.parts
        made.model.eval()
        self.trainer.remember()
        for name, parameter in made.model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise self.trainer.diverged(f"{name} holds NaN or infinity")
        return Delta.pack(
            made.base,
            made.recipe.method,
            made.change,
            made.recipe.readout,
            made.head,
            made.task.labels,
            made.recipe.store,
        )


def _settled(recipe: Recipe, base: Base, task: Task) -> Recipe:
    """With nothing left for base and task to say: what the delta will store."""
    readout = recipe.readout.settled(base, task.labels)
    return replace(recipe, method=fitting(recipe.method, base), readout=readout)


def _head(recipe: Recipe, base: Base, task: Task, start: Start) -> Head:
    """A fresh head, or the one of the phase before."""
    head = recipe.readout.attach(base, task.labels)
    if start.head is not None:
        head.load_state_dict(start.head.state_dict())
    return head


def _check_kept_out(
    recipe: Recipe, base: Base, change: Change, start: Start, outside: Mapping[str, Tensor]
) -> None:
    """Refuse a store that would move entries of `outside`.

    A whole tensor is rounded with all its entries. A sign is none for those of no change, and what
    the start changed there is rounded, too.
    """
    if recipe.store == "fp32" or recipe.method.holds == "entries":
        return
    for path in outside.keys() & change.trainable.keys():
        began = start.weights.get(path, base.original(path))
        moved = bool((differs(began, base.original(path)).cpu() & outside[path]).any())
        if moved or recipe.store == "sign":
            which = " what the start changed of" if moved and recipe.store != "sign" else ""
            raise SettingError(
                f"recipe {recipe.name}: store {recipe.store!r} rounds whole tensors, and moves"
                f"{which} the entries of {path} that 'outside' keeps out; use store fp32, or a "
                "method whose file holds single entries, such as sparse"
            )


def _check_start(recipe: Recipe, start: Start) -> None:
    """A method that begins at the base can go on from an earlier head, but not from weights."""
    asks = recipe.method.start
    if start.weights and asks in ("none", "own"):
        raise SettingError(
            f"recipe {recipe.name}: its method begins at the base's weights, and the start has "
            f"moved {len(start.weights)} tensors of them; start from a readout alone, or leave it "
            "out"
        )
    if not start.weights and asks == "needed":
        raise SettingError(
            f"recipe {recipe.name}: its method begins where another training ended, and the start "
            "moves no weight; name a delta, a checkpoint or a phase that does (--start)"
        )


def _check_task(recipe: Recipe, task: Task) -> None:
    """Refuse examples that the readout can't learn from."""
    _check_taught(recipe, task)
    if recipe.training.gradient_accumulation > 1 and not recipe.readout.adds_up:
        raise SettingError(
            f"recipe {recipe.name}: the loss of a batch is not the mean of its parts' (it is over "
            "tokens, or over pairs of one batch), so that gradient_accumulation would train "
            "something else; set a larger batch_size without it (with a readout's chunk, or "
            "readout_reduction=examples, where it has that)"
        )
    checks.answerable(task, recipe.readout.gives, f"the readout of recipe {recipe.name}")
    # A readout that sees no options would learn to answer by their numbers.
    if not recipe.readout.reads_options and any(row.options for row in task.splits["train"]):
        raise TaskError(
            f"the examples of task {task.name} have options of their own, which the readout of "
            f"recipe {recipe.name} does not read; choose one that does, such as the recipe unimc's"
        )


def _check_taught(recipe: Recipe, task: Task) -> None:
    """A teacher's answers for every example or none, and a share of the loss only with them."""
    rows = task.splits["train"]
    sizes = {len(row.taught) for row in rows}
    if sizes == {0} and recipe.training.teacher_share is not None:
        raise SettingError(
            f"recipe {recipe.name}: teacher_share {recipe.training.teacher_share} is the share of "
            "what a teacher answers, and there is none, or it writes texts, which stand in the "
            "place of the task's; name one with --teacher (howfine.distilled), or leave it out"
        )
    expected = len(task.labels) or 1
    if not sizes <= {0} and sizes != {expected}:
        raise TaskError(
            f"train examples of task {task.name} have {' and '.join(map(str, sorted(sizes)))} "
            f"numbers of a teacher's answer, expected {expected} in each (one of every class, or a "
            "score); make the task with howfine.distilled"
        )


def _check_trains(recipe: Recipe, trainable: int) -> None:
    if not trainable:
        raise SettingError(
            f"recipe {recipe.name}: its method changes nothing of the base, and its readout has no "
            "parameters of its own, so nothing would train; choose a method that changes the base"
        )


def _check_moves(recipe: Recipe) -> None:
    """What is computed again, or kept, has to be what it was."""
    moves = recipe.method.moves
    if recipe.training.reuse_frozen and moves:
        raise SettingError(
            f"recipe {recipe.name}: reuse_frozen keeps what frozen blocks gave, and its method "
            f"changes them between {moves}; set reuse_frozen to false"
        )
    if recipe.training.gradient_checkpointing and moves == "passes":
        raise SettingError(
            f"recipe {recipe.name}: gradient_checkpointing computes blocks again when its method "
            "has already changed them for the next pass; set gradient_checkpointing to false"
        )


def _check_checkpointing(recipe: Recipe) -> None:
    """transformers' layers recompute nothing in evaluation mode."""
    if recipe.training.eval_mode:
        raise SettingError(
            f"recipe {recipe.name}: gradient_checkpointing has no effect with eval_mode; set one "
            "of them to false"
        )
    if recipe.training.reuse_frozen:
        raise SettingError(
            f"recipe {recipe.name}: gradient_checkpointing computes again what reuse_frozen keeps; "
            "set one of them to false"
        )


def _checkpoint_activations(base: Base) -> Callable[[], None]:
    """Recompute activations of the tower in the backward pass; returns the undo."""
    # The old names are the ones that every supported transformers has; newer ones warn of them.
    towers: list[Any] = list(base.towers.values())

    def undo() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            for tower in towers:
                tower.gradient_checkpointing_disable()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            for tower in towers:
                tower.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            undo()
            raise SettingError(
                f"gradient_checkpointing: {error} Train {base.name} without it"
            ) from error
    return undo
