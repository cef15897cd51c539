"""Training: its loop, its settings, its stops and its resumptions, on tiny models."""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import get_scheduler

import disk
import howfine
from console import settle
from howfine import callbacks, container, rates, trainer
from howfine.base import Base
from howfine.delta import SUFFIX, Delta
from howfine.errors import (
    DeltaError,
    SettingError,
    StorageError,
    TaskError,
    TrainingError,
)
from howfine.evaluate import evaluate
from howfine.loop import Fit
from howfine.method import method
from howfine.methods.mask import VARIANTS
from howfine.readout import readout
from howfine.recipe import Recipe
from howfine.sampler import ByLength
from howfine.task import Example, Task
from howfine.training import SCHEDULES
from howfine.tune import Tuned, tune
from tiny import (
    LABELS,
    TINY,
    tiny_base,
    tiny_language_base,
    tiny_task,
    tiny_tokenizer,
    tiny_tower,
)

# Rates at which a tiny model learns its 32 examples by heart in a second.
LEARNS = {"batch_size": 8, "epochs": 4, "readout_learning_rate": 1e-2, "pooling": "mean"}
RATES = {"full": 3e-3, "mask": 1.0, "bitfit": 1e-2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module", autouse=True)
def _settled() -> None:
    settle()


def known_task(kind: str = "class") -> Task:
    """Train, dev and test are the same examples, so that learning shows on dev."""
    examples: list[Example] = [e for split in tiny_task().splits.values() for e in split]
    if kind == "score":  # how far into the vocabulary the first word stands, 0 to 5
        examples = [Example(e.texts, int(e.texts[0].split()[0][1:]) / 18) for e in examples]
    splits = dict.fromkeys(("train", "dev", "test"), examples)
    if kind == "score":
        return Task("scores", splits, (), "pearson_spearman", "drawn at random, seed 0")
    return Task("known", splits, LABELS, "accuracy", "drawn at random, seed 0")


def run(
    folder: Path, recipe: str = "mask", base: Base | None = None, **settings: Any
) -> tuple[Tuned, bytes]:
    """A finished run and the bytes of its file."""
    folder.mkdir(exist_ok=True)
    settings = {**LEARNS, "learning_rate": RATES.get(recipe, 1e-2), **settings}
    task = settings.pop("task", None) or known_task()
    tuned = tune(
        base or tiny_base("bert"), task, recipe, out=folder / "x.delta.safetensors", **settings
    )
    return tuned, (folder / "x.delta.safetensors").read_bytes()


# What comes of a run.


@pytest.mark.parametrize("recipe", ["full", "mask"])
def test_a_seed_fixes_the_bytes_and_another_changes_them(recipe: str, tmp_path: Path) -> None:
    first, again, other = (
        run(tmp_path / str(number), recipe, seed=seed)[1] for number, seed in enumerate((3, 3, 4))
    )
    assert first == again
    assert first != other


def test_the_score_is_that_of_the_file(tmp_path: Path) -> None:
    base = tiny_base("bert")
    tuned, data = run(tmp_path, "full", base)
    header, _ = container.read(tuned.path)
    assert tuned.score == evaluate(tuned.path, base, known_task(), split="dev")
    stated = dict(zip(("metric", "value", "interval", "on", "n"), header["score"], strict=True))
    assert stated["value"] == round(tuned.score.value, 6)
    assert stated["interval"] == [round(edge, 6) for edge in tuned.score.interval]
    assert (stated["metric"], stated["on"], stated["n"]) == ("accuracy", "known/dev", 32)
    # By hand: the share of examples whose larger logit is the right one.
    with tuned.delta.applied(base) as model:
        batch = model.readout.collate(base, known_task().splits["dev"])
        right = model(**batch.as_kwargs())["logits"].argmax(-1) == batch.targets
    assert tuned.score.value == pytest.approx(right.double().mean().item())
    assert tuned.bytes == len(data)
    assert tuned.steps == 16
    assert tuned.trainable == sum(p.numel() for p in tiny_tower("bert").parameters()) + 2 * 32 + 2


def test_the_base_is_left_as_it_was(tmp_path: Path) -> None:
    base = tiny_base("bert")
    before = dict(base.towers.named_parameters())
    run(tmp_path, "mask", base, gradient_checkpointing=True)
    assert base.is_untouched()
    assert not base.towers.training
    after = dict(base.towers.named_parameters())
    assert all(after[path] is parameter for path, parameter in before.items())
    assert not any(parameter.requires_grad for parameter in after.values())
    assert not base.tower.is_gradient_checkpointing


def test_a_mask_leaves_the_order_of_parameters(tmp_path: Path) -> None:
    """Norms over all gradients round by their order: the next run's bytes would depend on it."""
    base = tiny_base("bert")
    before = [path for path, _ in base.towers.named_parameters()]
    run(tmp_path, "mask", base, epochs=1)
    assert [path for path, _ in base.towers.named_parameters()] == before


def test_training_learns(tmp_path: Path) -> None:
    assert run(tmp_path, "full", epochs=8)[0].score.value > 0.9


@pytest.mark.parametrize("name", ["t5", "gpt2", "llama"])
@pytest.mark.parametrize("recipe", ["full", "mask", "top-layers"])
def test_other_architectures(name: str, recipe: str, tmp_path: Path) -> None:
    base = tiny_base(name)
    tuned, _ = run(tmp_path, recipe, base, pooling="base", epochs=1)
    assert base.is_untouched()
    assert evaluate(tuned.path, base, known_task(), split="dev") == tuned.score
    method_tensors, _ = tuned.delta.tensors(base)
    assert method_tensors


def test_a_task_of_options_is_not_scored_by_its_name_alone(tmp_path: Path) -> None:
    """Under its name other rows are the test split's, most of them trained on."""
    file, base = tmp_path / "rows.csv", tiny_base("bert")
    rows = (f"w{i % 9} w{(i * 7 + i // 9) % 90},{'yes' if i % 2 else 'no'}" for i in range(60))
    file.write_text("text,label\n" + "\n".join(rows) + "\n")
    usual, other = Task.load(file), Task.load(file, seed=3)
    assert {e.texts for e in usual.splits["test"]} & {e.texts for e in other.splits["train"]}
    settings = {"max_steps": 1, "batch_size": 8, "max_length": 16}
    made = {
        name: tune(base, task, "bitfit", out=tmp_path / f"{name}{SUFFIX}", **settings)
        for name, task in (("usual", usual), ("other", other))
    }
    assert evaluate(made["usual"].path, base).n == len(usual.splits["test"])
    with pytest.raises(TaskError, match="columns, splits or a seed that its header does not hold"):
        evaluate(made["other"].path, base)
    assert evaluate(made["other"].path, base, other).n == len(other.splits["test"])


def test_regression_learns_its_scores(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), known_task("score")
    tuned, _ = run(tmp_path, "full", base, task=task, epochs=12)
    assert tuned.delta.labels == ()
    assert tuned.score.metric == "pearson_spearman"
    assert 0.7 < tuned.score.value <= 1
    targets = torch.tensor([float(example.label) for example in task.splits["dev"]])
    pearson = torch.corrcoef(torch.stack([targets, torch.tensor(tuned.score.predictions)]))[0, 1]
    assert tuned.score.scores["pearson"] == pytest.approx(pearson.item(), abs=1e-5)
    (answer,) = howfine.predict(tuned.path, [task.splits["dev"][0].texts[0]], base)
    assert answer == {"score": pytest.approx(float(tuned.score.predictions[0]), abs=1e-5)}


# Settings of the loop.


def losses_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Gets the loss of every batch that is trained on."""
    seen: list[float] = []
    real = trainer.PartsTrainer.compute_loss

    def watched(self: Any, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        loss = real(self, model, inputs, *rest, **more)
        if model.training:
            seen.append(loss.item())
        return loss

    monkeypatch.setattr(trainer.PartsTrainer, "compute_loss", watched)
    return seen


def tensors_of(tuned: Tuned) -> dict[str, torch.Tensor]:
    """All that is stored: the method's tensors and the head's, by name."""
    changed, head = tuned.delta.tensors(tiny_base("bert"))
    return {**changed, **head}


def test_accumulated_gradients_equal_a_large_batch(tmp_path: Path) -> None:
    """Without dropout, and with plain float noise: four times 8 examples are 32."""
    runs = []
    for number, (size, times) in enumerate(((32, 1), (8, 4))):
        base = tiny_base("bert", **NO_DROPOUT)
        tuned, _ = run(
            tmp_path / str(number), "bitfit", base, batch_size=size, gradient_accumulation=times,
            dropout=0.0, epochs=3, store="fp32",
        )  # fmt: skip
        assert tuned.steps == 3
        runs.append(tensors_of(tuned))
    start = dict(tiny_base("bert").towers.named_parameters())
    assert runs[0].keys() == runs[1].keys()
    for path, once in runs[0].items():
        if path.endswith("key.bias"):  # softmax cancels it: its gradient is rounding alone
            continue
        moved = (once - start[path]).abs().max().item() if path in start else 1.0
        assert (once - runs[1][path]).abs().max().item() < 0.02 * moved, path


def test_a_step_of_unequal_batches_is_that_of_all_their_rows(tmp_path: Path) -> None:
    """An epoch of 13 rows: 8 and 5 at once, or in parts of 2 and a last one of 1."""
    task = known_task()
    task = replace(task, splits={**task.splits, "train": task.splits["train"][:13]})
    runs = []
    for number, (size, times) in enumerate(((8, 1), (2, 4))):
        tuned, _ = run(
            tmp_path / str(number), "bitfit", tiny_base("bert", **NO_DROPOUT), batch_size=size,
            gradient_accumulation=times, dropout=0.0, epochs=1, store="fp32", task=task,
            optimizer="sgd", schedule="constant", learning_rate=0.5, readout_learning_rate=0.5,
            max_grad_norm=0.0,
        )  # fmt: skip
        assert tuned.steps == 2
        runs.append(tensors_of(tuned))
    for path, once in runs[0].items():
        torch.testing.assert_close(once, runs[1][path], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("asked", "done"), [(9, 8), (5, 4), (16, 16), (1, 1)])
def test_there_are_no_more_evaluations_than_asked(asked: int, done: int, tmp_path: Path) -> None:
    found: list[int] = []

    class Counted(trainer.PartsTrainer):
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            found.append(self.state.global_step)
            return super().evaluation_loop(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "PartsTrainer", Counted)
        run(tmp_path, "bitfit", max_steps=16, evaluations=asked)
    assert len(found) == done <= asked
    assert found[-1] == 16


def test_seconds_are_of_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that steps take 1 of, an evaluation 100 and a checkpoint 1,000."""
    now = [0.0]
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def timed(real: Any, takes: int) -> Any:
        def slow(*args: Any) -> Any:
            now[0] += takes
            return real(*args)

        return slow

    own = trainer.PartsTrainer
    steps = {"training_step": 1, "_remember": 100, "_save_optimizer_and_scheduler": 1000}
    for name, takes in steps.items():
        monkeypatch.setattr(own, name, timed(getattr(own, name), takes))
    tuned, _ = run(tmp_path, "bitfit", max_steps=4, evaluations=4)
    assert tuned.seconds == 4
    assert now[0] >= 4404


def test_what_phases_before_took_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of fine-tuning is needed, however little the last phase needs."""
    peaks = iter([10_000, 50])
    monkeypatch.setattr("howfine.cost.PeakMemory.growth", lambda _: next(peaks))
    tuned, _ = run(tmp_path, "prune", max_steps=1, start_max_steps=1, keep=0.5)
    assert (tuned.peak_bytes, tuned.steps) == (10_000, 2)


def test_an_order_is_drawn_once_an_epoch() -> None:
    """And is what a sampler that begins at that epoch gives."""
    calls: list[int] = []

    class Counted(ByLength):
        def __iter__(self) -> Iterator[int]:
            calls.append(1)
            return super().__iter__()

    lengths = list(range(40))
    one = Counted(4, lengths, 3)
    orders = []
    for epoch in range(20):
        one.set_epoch(epoch)
        orders.append(list(one))
    assert len(calls) < 3 * 20
    for epoch in (7, 2):
        one.set_epoch(epoch)
        assert list(one) == orders[epoch]
        fresh = ByLength(4, lengths, 3)
        fresh.set_epoch(epoch)
        assert list(fresh) == orders[epoch]


def test_what_fills_a_disk_is_told_from_what_a_network_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos")

    def lost(*_: Any, **__: Any) -> None:
        raise ConnectionError("the tracker does not answer")

    for name, fails, error, said in (
        ("_save_optimizer_and_scheduler", full, StorageError, "checkpoints can't be kept in"),
        ("log", lost, ConnectionError, "the tracker does not answer"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(trainer.PartsTrainer, name, fails)
            with pytest.raises(error, match=said):
                run(tmp_path, "bitfit", evaluations=1, epochs=1)
    assert not list(tmp_path.glob("*"))


def test_bf16_is_near_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = losses_of(monkeypatch)
    run(tmp_path, "full", epochs=2)
    full, seen[:] = list(seen), []
    run(tmp_path, "full", epochs=2, precision="bf16")
    assert seen != full
    assert seen == pytest.approx(full, abs=0.05)


@pytest.mark.parametrize("recipe", ["full", "mask"])
def test_gradient_checkpointing_gives_the_same_bytes(recipe: str, tmp_path: Path) -> None:
    """With dropout and, for masks, sampling: what is computed again draws the same numbers."""
    plain, recomputed = (
        run(tmp_path / str(on), recipe, epochs=2, gradient_checkpointing=on)[1]
        for on in (False, True)
    )
    assert plain == recomputed


def test_evaluations_keep_the_best_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []
    real = trainer.PartsTrainer._metrics

    def watched(self: Any, outcome: Any) -> dict[str, float]:
        heard.append(real(self, outcome)["score"])
        return {"score": heard[-1]}

    monkeypatch.setattr(trainer.PartsTrainer, "_metrics", watched)
    tuned, _ = run(tmp_path, "bitfit", evaluations=4, work=tmp_path / "work", store="fp32")
    assert len(heard) == 4
    assert heard[-1] < max(heard), "the case shows nothing: its last state is its best"
    assert tuned.score.value == max(heard)
    (kept,) = (tmp_path / "work").glob("checkpoint-*")
    assert kept.name == f"checkpoint-{4 * (1 + heard.index(max(heard)))}"
    state = load_file(kept / "model.safetensors")
    stored = tensors_of(tuned)
    for name, value in state.items():
        own = name.removeprefix("towers.").removeprefix("head.")
        assert own not in stored or torch.equal(stored.pop(own), value), own
    assert not stored


def test_patience_ends_a_training_that_no_longer_improves(tmp_path: Path) -> None:
    tuned, _ = run(tmp_path, "head-only", learning_rate=0.0, readout_learning_rate=0.0,
                   evaluations=16, patience=2)  # fmt: skip
    # The first evaluation is the best so far; two more bring nothing.
    assert tuned.steps == 3


def test_the_readout_has_a_rate_of_its_own(tmp_path: Path) -> None:
    base = tiny_base("bert")

    def moved(**rates: float) -> tuple[bool, bool]:
        torch.manual_seed(0)
        tuned, _ = run(tmp_path, "bitfit", base, epochs=1, store="fp32", **rates)
        changed, head = tuned.delta.tensors(base)
        return bool(changed), bool(head["linear.bias"].any())  # the bias starts at 0

    assert moved(learning_rate=0.0, readout_learning_rate=1e-2) == (False, True)
    assert moved(learning_rate=1e-2, readout_learning_rate=0.0) == (True, False)
    assert moved(learning_rate=1e-2, readout_learning_rate=None) == (True, True)
    assert moved(learning_rate=0.0, readout_learning_rate=None) == (False, False)


def test_tensorboard_gets_its_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, "full", work=tmp_path / "work", report_to="tensorboard", evaluations=2)
    (events,) = (tmp_path / "work").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events))
    board.Reload()
    assert [scalar.step for scalar in board.Scalars("eval/score")] == [8, 16]


def test_a_training_prints_nothing_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for progress in (False, True):
        run(tmp_path, "full", epochs=1, progress=progress)
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size: found 0, expected 1 or more"),
        ({"gradient_accumulation": 0}, "gradient_accumulation: found 0"),
        ({"epochs": 0}, "epochs: found 0.0, expected more than 0"),
        ({"max_steps": -1}, "max_steps: found -1"),
        ({"learning_rate": -1}, "learning_rate: found -1.0"),
        ({"learning_rate": math.nan}, "learning_rate: found nan"),
        ({"warmup": 1}, "warmup: found 1.0, expected a share from 0 to below 1"),
        ({"evaluations": -1}, "evaluations: found -1"),
        ({"patience": 2}, "patience 2 counts evaluations, but there are none"),
        ({"schedule": "zigzag"}, "training schedule: found 'zigzag', expected one of linear"),
        ({"schedule": "reduce_lr_on_plateau"}, "found 'reduce_lr_on_plateau', expected one of"),
        ({"schedule": "greedy"}, "found 'greedy', expected one of linear, cosine"),
        ({"report_to": "pigeon"}, "pigeon is not supported"),
        ({"report_to": "tensorboard"}, "tensorboard writes beside the checkpoints"),
        ({"schedule": "warmup_stable_decay"}, "found 'warmup_stable_decay', expected one of"),
        ({"schedule": "cosine_with_min_lr"}, "inverse_sqrt, constant, constant_with_warmup; "),
        ({"precision": "fp16"}, "precision fp16 would train in fp32 on a CPU; use bf16"),
        ({"precision": "fp8"}, "setting 'precision': found 'fp8'"),
        ({"seed": -1}, "seed -1: expected a whole number from 0"),
        ({"split": "tset"}, "split 'tset' is unknown. Did you mean 'test'?"),
        ({"resume": True}, "resume needs the folder of the checkpoints"),
        ({"learning_rat": 1}, "has no setting 'learning_rat'. Did you mean 'learning_rate'?"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_training(
    setting: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = tiny_base("bert")
    with pytest.raises(SettingError, match=re.escape(message)):
        run(tmp_path, "mask", base, **setting)
    assert base.is_untouched()
    assert not (tmp_path / "x.delta.safetensors").exists()


@pytest.mark.parametrize("recipe", ["graft", "diff-pruning"])
def test_a_schedule_that_waits_for_scores_is_refused_before_the_first_phase(
    recipe: str, tmp_path: Path
) -> None:
    """Groups of a constant rate were an AttributeError in the middle of the last phase."""
    with pytest.raises(SettingError, match=r"'reduce_lr_on_plateau', expected one of linear"):
        run(tmp_path, recipe, schedule="reduce_lr_on_plateau", starts=tmp_path / "starts")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_leaves_a_constant_rate_alone(schedule: str, tmp_path: Path) -> None:
    """Of groups beside: the constant one has its rate at every step, the other the schedule's."""
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    optimiser.add_param_group({"params": [torch.zeros(1)], "constant": True})
    held = rates.hold_constant(get_scheduler(schedule, optimiser, 2, 10))
    seen = []
    for _ in range(10):
        seen.append([group["lr"] for group in optimiser.param_groups])
        optimiser.step()
        held.step()
    assert [own for _, own in seen] == [1.0] * 10
    assert len({other for other, _ in seen}) > 1 or schedule == "constant"
    asked = {"max_steps": 2, "start_max_steps": 2, "learning_rate": None}
    run(tmp_path, "graft", schedule=schedule, start_schedule=schedule, **asked)


def test_settings_are_judged_together(tmp_path: Path) -> None:
    """Neither order of two settings may pass through a combination that nobody asked for."""
    zhou = howfine.Recipe.load("mask").override(variant="zhou", initial_sparsity=0.5)
    for order in (("variant", "initial_sparsity"), ("initial_sparsity", "variant")):
        wanted = {"variant": "bernoulli", "initial_sparsity": 0.0}
        made = zhou.override(**{name: wanted[name] for name in order})
        assert made.method == method("mask", initial_sparsity=0.0)


# Trainings that end badly.


@pytest.mark.parametrize("recipe", ["full", "bitfit"])
def test_a_loss_that_is_not_finite_ends_the_training(recipe: str, tmp_path: Path) -> None:
    base = tiny_base("bert")
    with pytest.raises(TrainingError, match=r"the loss became nan at step 2 of 16 \(recipe") as e:
        run(tmp_path, recipe, base, learning_rate=1e30, gradient_checkpointing=True)
    assert "Lower --learning-rate" in str(e.value)
    assert base.is_untouched()
    assert not base.towers.training
    assert not base.tower.is_gradient_checkpointing
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("learning_rate", [1e30, 1e38])
def test_a_last_step_that_diverges_writes_nothing(learning_rate: float, tmp_path: Path) -> None:
    """No later loss tells: what was trained does, or the file's own outputs."""
    with pytest.raises((TrainingError, DeltaError), match="NaN or infinity"):
        run(tmp_path, "full", learning_rate=learning_rate, max_steps=1, warmup=0)
    assert list(tmp_path.iterdir()) == []


def test_scores_that_diverge_are_no_mask(tmp_path: Path) -> None:
    """A score of NaN is below any threshold: a mask there would be, and finite outputs too."""
    with pytest.raises(TrainingError, match="scores holds NaN or infinity at step 16 of 16"):
        run(tmp_path, "mask", learning_rate=1e38)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_keeps_the_file_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, good = run(tmp_path, "bitfit", epochs=1)
    asked: list[int] = []

    def short_of_memory(*_: Any, batch_size: int, **__: Any) -> Any:
        asked.append(batch_size)
        raise RuntimeError("out of memory")

    def refused(*_: Any, **__: Any) -> Any:
        raise TaskError("row 3 is odd")

    for fails, error in ((short_of_memory, RuntimeError), (refused, TaskError)):
        with monkeypatch.context() as patch:
            patch.setattr("howfine.tune.evaluate", fails)
            with pytest.raises(error) as raised:
                run(tmp_path, "bitfit", epochs=2, batch_size=2)
        told = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
        # What was trained is not lost with its score.
        kept = tmp_path / f"x.unscored{SUFFIX}"
        assert f"the trained delta is kept at {kept}: score it with `howfine evaluate`" in told
        assert Delta.load(kept).score == {}
        assert (tmp_path / f"x{SUFFIX}").read_bytes() == good
        assert {path.name for path in tmp_path.iterdir()} == {f"x{SUFFIX}", kept.name}
    assert asked == [16]  # eight rows for each that was trained at once


def test_a_folder_is_no_place_for_a_delta(tmp_path: Path) -> None:
    (tmp_path / "x.delta.safetensors").mkdir()
    with pytest.raises(StorageError, match="is there and no regular file"):
        run(tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("steps", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_a_rate_left_to_the_method_flips_some_entries_in_however_many_steps(
    variant: str, steps: int, tmp_path: Path
) -> None:
    given = {"variant": variant, "initial_sparsity": 0.2, "max_steps": steps, "seed": 1}
    own, _ = run(tmp_path, learning_rate=None, **given)
    still, _ = run(tmp_path, learning_rate=0.0, **given)
    masks, start = (tuned.delta.tensors(tiny_base("bert"))[0] for tuned in (own, still))
    flipped = sum(int((masks[path] != start[path]).sum()) for path in masks)
    assert 0.002 < flipped / sum(mask.numel() for mask in masks.values()) < 0.4


def test_checkpointing_goes_with_frozen_blocks_below(tmp_path: Path) -> None:
    made = {"train": ("all@-1",), "gradient_checkpointing": True, "max_steps": 1}
    tuned, _ = run(tmp_path, "top-layers", tiny_base("gpt2"), **made)
    assert tuned.steps == 1


def test_matrices_decay_and_vectors_do_not(tmp_path: Path) -> None:
    recipe = Recipe.load("full").override(weight_decay=0.1)
    with Fit(tiny_base("bert"), known_task(), recipe, 0, tmp_path, progress=False) as fit:
        groups = fit.trainer.create_optimizer().param_groups
        trained = sum(len(group["params"]) for group in groups)
        assert trained == sum(p.requires_grad for p in fit.parts.model.parameters())
        for group in groups:
            for parameter in group["params"]:
                assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)


def test_a_head_follows_only_a_rate_that_is_named(tmp_path: Path) -> None:
    def rate(**settings: Any) -> float:
        recipe = Recipe.load("mask").override(**settings)
        with Fit(tiny_base("bert"), known_task(), recipe, 0, tmp_path, progress=False) as fit:
            return float(fit.trainer.create_optimizer().param_groups[-1]["lr"])

    assert rate(learning_rate=None, readout_learning_rate=None) == 1e-3
    assert rate(learning_rate=4e-3, readout_learning_rate=None) == 4e-3
    # What scores climb at is no rate for a head.
    assert rate(learning_rate=0.5, readout_learning_rate=None) == 1e-2
    assert rate(learning_rate=0.5, readout_learning_rate=2e-3) == 2e-3


def test_a_file_without_a_name_is_called_after_task_and_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task = replace(known_task(), name="/data/my task/train.csv")
    tune(tiny_base("bert"), task, "head-only", max_steps=1)
    (file,) = (tmp_path / "runs").iterdir()
    assert file.name == "data-my-task-train.csv-head-only.delta.safetensors"


# Stops and resumptions.


class Killed(BaseException):
    """Stands in for a kill: no `except Exception` may see it."""


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Put a step into the list, and training dies as it begins that step.

    Every evaluation finds a better score than the one before: the last state is kept, whatever
    the random numbers are.
    """
    at: list[int] = []
    real = trainer.PartsTrainer.training_step

    def step(self: Any, *rest: Any, **more: Any) -> Any:
        if self.state.global_step in at:
            raise Killed
        return real(self, *rest, **more)

    monkeypatch.setattr(trainer.PartsTrainer, "training_step", step)
    monkeypatch.setattr(
        trainer.PartsTrainer, "_metrics", lambda self, _: {"score": float(self.state.global_step)}
    )
    return at


@pytest.mark.parametrize(
    ("recipe", "step", "settings"),
    [
        ("full", 6, {}),  # in the middle of an epoch: checkpoints lie at 4, 8, 12, 16
        ("mask", 10, {"evaluations": 5}),  # at 3, 6, 9, 12, 15: resumed in the third epoch
        ("full", 9, {"group_by_length": False}),
        ("full", 7, {"batch_size": 4, "gradient_accumulation": 2}),
        ("prune", 6, {"start": None, "rounds": 3}),  # units went off at 0, 4 and 7
        ("prune", 10, {"start": None, "rounds": 3}),
        ("dynamic", 10, {"start": None, "smallest": 0.25}),
    ],
)
def test_a_killed_training_resumes_to_the_same_bytes(
    recipe: str, step: int, settings: dict[str, Any], tmp_path: Path, killed_at: list[int]
) -> None:
    settings = {"evaluations": 4, **settings}
    _, whole = run(tmp_path / "whole", recipe, work=tmp_path / "whole" / "work", **settings)
    killed_at.append(step)
    base, work = tiny_base("bert"), tmp_path / "work"
    with pytest.raises(Killed):
        run(tmp_path, recipe, base, work=work, **settings)
    assert not (tmp_path / "x.delta.safetensors").exists()
    assert base.is_untouched()
    killed_at.clear()
    tuned, resumed = run(tmp_path, recipe, base, work=work, resume=True, **settings)
    assert resumed == whole
    assert tuned.steps == 16


@pytest.mark.parametrize("step", [3, 6])
def test_patience_and_the_clock_outlive_a_kill(
    step: int, tmp_path: Path, killed_at: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best is at step 4; three evaluations later, at step 7, patience is at its end."""
    monkeypatch.setattr(
        trainer.PartsTrainer, "_metrics", lambda self, _: {"score": min(4, self.state.global_step)}
    )
    settings: dict[str, Any] = {"evaluations": 16, "patience": 3}
    whole, written = run(tmp_path / "whole", "bitfit", **settings)
    assert whole.steps == 7
    killed_at.append(step)
    work = tmp_path / "work"
    with pytest.raises(Killed):
        run(tmp_path, "bitfit", work=work, **settings)
    killed_at.clear()
    newest = max(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = json.loads((newest / "trainer_state.json").read_text())
    spent = state["log_history"][-1]["seconds"]
    assert spent > 0
    tuned, resumed = run(tmp_path, "bitfit", work=work, resume=True, **settings)
    assert (tuned.steps, resumed) == (7, written)
    assert tuned.seconds > spent
    # Killed between its last checkpoint and its file, it takes no further step.
    again, same = run(tmp_path, "bitfit", work=work, resume=True, **settings)
    assert (again.steps, same) == (7, written)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_text_that_the_readout_refuses_is_found_before_training(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its place; what seeds draw is not touched by looking for it."""
    monkeypatch.setattr(Fit, "train", lambda *_: pytest.fail("it trains"))
    task = tiny_task()
    rows = list(task.splits[split])
    rows[2] = replace(rows[2], texts=("w1 [MASK] w2",))
    marked = replace(task, splits={**task.splits, split: rows})
    base, out = tiny_language_base("bert"), tmp_path / f"x{SUFFIX}"
    template = {"readout": readout("verbalizer", template="{text} {mask}")}
    recipe = replace(Recipe.load("full"), **template)
    with pytest.raises(TaskError, match=rf"{split} row 3: a text holds the mask token \[MASK\]"):
        tune(base, marked, recipe, out=out, split="test")
    assert not list(tmp_path.iterdir())
    before = torch.get_rng_state()
    with Fit(base, task, recipe, 0, tmp_path, False) as fit:
        torch.manual_seed(3)
        drawn = torch.get_rng_state()
        fit.check(("train", "dev"))
        assert torch.equal(torch.get_rng_state(), drawn)
    torch.set_rng_state(before)


@pytest.mark.parametrize("settings", [{"max_steps": 6}, {"max_steps": 8}, {}])
def test_a_training_that_was_at_its_end_takes_no_step_more(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """At a rate that does not fall to 0, a step more would be seen."""
    settings = {"evaluations": 2, "schedule": "constant", **settings}
    work = tmp_path / "work"
    whole, written = run(tmp_path, "bitfit", work=work, **settings)
    tuned, resumed = run(tmp_path, "bitfit", work=work, resume=True, **settings)
    assert (tuned.steps, resumed) == (whole.steps, written)
    assert tuned.score == whole.score


@pytest.mark.slow
def test_a_process_killed_outright_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    made = [
        "--base",
        disk.base_folder(tmp_path),
        "--task",
        disk.task_folder(tmp_path),
        "--recipe",
        "mask",
    ]
    made += ["--batch-size", 4, "--max-steps", 400, "--evaluations", 40, "--learning-rate", 0.5]
    done = disk.howfine(
        "tune",
        *made,
        "--out",
        tmp_path / "whole.delta.safetensors",
        "--work",
        tmp_path / "whole-work",
    )
    assert done.returncode == 0, done.stderr
    work, out = tmp_path / "work", tmp_path / "resumed.delta.safetensors"
    worker = disk.howfine_started("tune", *made, "--out", out, "--work", work)
    deadline = time.monotonic() + 120
    while not any(work.glob("checkpoint-??0")) and time.monotonic() < deadline:
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL, "it was faster than the clock"
    assert not out.exists()
    done = disk.howfine("tune", *made, "--out", out, "--work", work, "--resume")
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == (tmp_path / "whole.delta.safetensors").read_bytes()


def test_checkpoints_hold_the_trainable_parameters_alone(tmp_path: Path) -> None:
    tuned, _ = run(tmp_path, "bitfit", work=tmp_path / "work", evaluations=1)
    (checkpoint,) = (tmp_path / "work").glob("checkpoint-*")
    size = (checkpoint / "model.safetensors").stat().st_size
    header = int.from_bytes((checkpoint / "model.safetensors").read_bytes()[:8], "little")
    assert size == 8 + header + 4 * tuned.trainable
    # AdamW's two moments of each, and torch's own wrapping of some hundred bytes a tensor.
    assert (checkpoint / "optimizer.pt").stat().st_size < 8 * tuned.trainable + 20_000


@pytest.mark.parametrize("state", [None, "", '{"epoch": 2.0, "glob'])
def test_a_checkpoint_half_written_is_passed_over(
    tmp_path: Path, killed_at: list[int], state: str | None
) -> None:
    work = tmp_path / "work"
    _, whole = run(tmp_path / "whole", "full", evaluations=4)
    killed_at.append(9)
    with pytest.raises(Killed):
        run(tmp_path, "full", work=work, evaluations=4)
    killed_at.clear()
    torn = work / "checkpoint-12"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"\x00" * 9)
    if state is not None:
        (torn / "trainer_state.json").write_text(state)
    _, resumed = run(tmp_path, "full", work=work, evaluations=4, resume=True)
    assert resumed == whole


def test_resume_without_a_checkpoint_begins_at_the_beginning(tmp_path: Path) -> None:
    _, whole = run(tmp_path / "whole", epochs=1, evaluations=1)
    more = {"work": tmp_path / "work", "resume": True}
    assert run(tmp_path, epochs=1, evaluations=1, **more)[1] == whole
    with pytest.raises(SettingError, match="as many as evaluations, and those are 0"):
        run(tmp_path, epochs=1, **more)


def test_a_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    work, settings = tmp_path / "work", {"evaluations": 2, "epochs": 1}
    run(tmp_path, "bitfit", work=work, **settings)
    with pytest.raises(SettingError, match="of an earlier training; add --resume"):
        run(tmp_path, "bitfit", work=work, **settings)
    for other in ({"seed": 1}, {"learning_rate": 0.5}, {"task": known_task("score")}):
        with pytest.raises(SettingError, match="holds checkpoints of another training"):
            run(tmp_path, "bitfit", work=work, resume=True, **{**settings, **other})
    with pytest.raises(SettingError, match="another training: base was"):
        run(tmp_path, "bitfit", tiny_base("bert", 1), work=work, resume=True, **settings)
    half = tiny_base("bert")
    assert half.fingerprint  # of the checkpoint, as a loaded base's is
    half.towers.to(torch.bfloat16)
    with pytest.raises(SettingError, match="another training: dtype was torch.float32"):
        run(tmp_path, "prompt", half, work=work, resume=True, **settings, learning_rate=1e-2)
    f1 = replace(known_task(), metric="f1")
    with pytest.raises(SettingError, match="another training: metric was accuracy, now it is f1"):
        run(tmp_path, "bitfit", work=work, resume=True, task=f1, **settings)
    with pytest.raises(SettingError, match="another training: method was"):
        run(tmp_path, "layernorm", work=work, resume=True, **settings, learning_rate=1e-2)
    # Whoever takes the record away is still told.
    (work / "training.json").unlink()
    with pytest.raises(TrainingError, match="is of another recipe: it differs in"):
        run(tmp_path, "layernorm", work=work, resume=True, **settings)


# attach, in a training loop of one's own.


class Loop:
    """A loop as anyone would write it: tokens of the tiny task, a linear head, AdamW."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        torch.manual_seed(0)
        self.head = nn.Linear(32, 2)
        examples = known_task().splits["train"]
        tokenizer = tiny_tokenizer()
        self.inputs = tokenizer([e.texts[0] for e in examples], padding=True, return_tensors="pt")
        self.targets = torch.tensor([int(e.label) for e in examples])

    def loss(self) -> torch.Tensor:
        hidden = self.model(**self.inputs).last_hidden_state.mean(1)
        return nn.functional.cross_entropy(self.head(hidden), self.targets)

    @torch.no_grad()
    def outputs(self) -> torch.Tensor:
        """Of the model in evaluation mode; every module's own mode is put back."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        hidden = self.model(**self.inputs).last_hidden_state
        for module, mode in modes.items():
            module.training = mode
        return hidden

    def train(self, groups: list[dict[str, Any]], steps: int) -> list[float]:
        optimiser = torch.optim.AdamW([*groups, {"params": self.head.parameters()}], lr=1e-2)
        losses = []
        for _ in range(steps):
            loss = self.loss()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses


def mixed_model() -> nn.Module:
    """A model whose flags are as no `train()` and no `requires_grad_()` would set them all."""
    model = tiny_tower("bert")
    model.train()
    model.encoder.layer[0].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    return model


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """All that attach may not leave changed, the parameters as the very objects."""
    named = sorted(model.named_parameters())
    return (
        [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in named],
        [(name, type(module), module.training) for name, module in model.named_modules()],
    )


def assert_same(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    assert [row[:3] for row in before[0]] == [row[:3] for row in after[0]]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("mask", {"initial_sparsity": 0.05}), ("select", {"train": ("bias",)}), ("full", {})],
)
def test_attach_trains_in_a_loop_of_ones_own(name: str, settings: dict[str, Any]) -> None:
    model = mixed_model()
    mine = Loop(model)
    before, outputs = state_of(model), mine.outputs()
    with howfine.attach(model, name, **settings) as attached:
        groups = attached.parameters()
        held = {id(p) for group in groups for p in group["params"]}
        assert held == {id(p) for p in attached.change.trainable.values()}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}
        assert held.isdisjoint(row[1] for row in before[0])
        modes = {name: training for name, _, training in before[1]}
        assert all(modes.get(n, m.training) == m.training for n, m in model.named_modules())
        losses = mine.train(groups, 60)
        assert losses[-1] < losses[0] - 0.1
        assert not torch.equal(mine.outputs(), outputs)
        packed = attached.tensors()
        assert packed
        model.train()
    assert_same(before, state_of(model))
    assert torch.equal(mine.outputs(), outputs)
    # What was packed gives, on a model of its own, what the loop left.
    other = Base("tiny", tiny_tower("bert"))
    with attached.method.unpack(other, packed):
        assert not torch.equal(Loop(other.tower).outputs(), outputs)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        *(("l0", "passes"), ("l0", "penalty"), ("diff", "penalty"), ("dynamic", "passes")),
        *(("mask", ""), ("prune", "")),
    ],
)
def test_a_loop_that_leaves_out_a_methods_part_is_told(name: str, left: str) -> None:
    """What is packed then is not what the paper trains."""
    settings: dict[str, Any] = {"by": "magnitude"} if name in ("dynamic", "prune") else {}
    settings |= {"smallest": 0.3} if name == "dynamic" else {}
    with howfine.attach(tiny_tower("bert"), name, **settings) as attached:
        for part in {"passes", "penalty"} - {left}:
            found = getattr(attached, part)(0.5)
            assert part == "penalty" or list(found) == [0.0]
        told = pytest.warns(UserWarning, match=rf"call attached\.{left}\(progress\)")
        with told if left else contextlib.nullcontext():
            attached.tensors()


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_attach_to_an_encoder_decoder_names_its_stacks(name: str) -> None:
    prefix, settings = TINY[name]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    with pytest.raises(SettingError, match=r"has no layers at .*model\.get_encoder"):
        howfine.attach(model, "mask")
    with howfine.attach(model.get_encoder(), "mask") as attached:
        assert len(attached.change.trainable) == 12


def test_attach_hashes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("howfine.fingerprint.of_tensors", lambda _: pytest.fail("hashed"))
    with howfine.attach(tiny_tower("bert"), "mask") as attached:
        assert attached.tensors()


def test_attach_leaves_a_head_to_the_loop() -> None:
    prefix, settings = TINY["bert"]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).train()
    inputs = Loop(model).inputs
    with howfine.attach(model, "mask") as attached:
        assert len(attached.change.trainable) == 12
        model(**inputs, labels=Loop(model).targets).loss.backward()
        assert all(p.grad is not None for p in attached.change.trainable.values())
        assert all(p.grad is not None for p in model.classifier.parameters())
        assert model.bert.pooler.dense.weight.grad is None
    model.zero_grad()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_what_attach_puts_on_has_the_mode_of_the_model(training: bool) -> None:
    """In training a gate samples, and gives other outputs each time; there is no dropout here."""
    model = tiny_tower("bert", **NO_DROPOUT).train(training)
    with howfine.attach(model, "mask", variant="zhou", initial_sparsity=0.5):
        inputs = Loop(model).inputs
        with torch.no_grad():
            first, second = (model(**inputs).last_hidden_state for _ in range(2))
        assert torch.equal(first, second) != training


def test_an_error_inside_takes_the_method_off() -> None:
    model = mixed_model()
    before = state_of(model)
    with pytest.raises(KeyError), howfine.attach(model, "mask"):
        raise KeyError
    assert_same(before, state_of(model))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("maks", {}, "'maks' is unknown. Did you mean 'mask'?"),
        ("mask", {"sparsity": 0.1}, "has no setting 'sparsity'"),
        ("mask", {"where": ("Z",)}, "selector 'Z' names nothing"),
        ("select", {"top": 2}, "needs a task"),
        (method("mask"), {"initial_sparsity": 0.1}, "were given beside a Mask"),
    ],
    ids=str,
)
def test_attach_that_fails_leaves_the_model(
    name: Any, settings: dict[str, Any], message: str
) -> None:
    model = mixed_model()
    before = state_of(model)
    with pytest.raises(SettingError, match=re.escape(message)):
        howfine.attach(model, name, **settings)
    assert_same(before, state_of(model))
