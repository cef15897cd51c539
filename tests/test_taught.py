"""Distillation of classes and scores: a teacher's answers have a share of the student's loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from howfine.base import Base
from howfine.delta import SUFFIX, Delta
from howfine.distill import distilled
from howfine.errors import SettingError, TaskError
from howfine.evaluate import predict
from howfine.method import Method, method
from howfine.readout import Readout, readout
from howfine.recipe import Recipe
from howfine.task import Task
from howfine.tune import tune
from tiny import READOUT, captioned_task, tiny_base, tiny_task, written_task

# One exact step: what it moves is the rate times the loss's gradient.
STEP = {
    "max_steps": 1,
    "batch_size": 16,
    "optimizer": "sgd",
    "schedule": "constant",
    "learning_rate": 0.5,
    "readout_learning_rate": 0.5,
    "warmup": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "eval_mode": True,
}
Taught = tuple[Base, Task, Path]


def scored_task() -> Task:
    """The tiny sentences with a score."""
    task = tiny_task()
    splits = {
        name: [replace(row, label=len(row.texts[0]) / 40) for row in rows]
        for name, rows in task.splits.items()
    }
    return Task("scored", splits, (), "pearson", task.provenance)


def run(
    base: Base,
    task: Task,
    path: Path,
    chosen: Method | None = None,
    read: Readout = READOUT,
    **training: Any,
) -> dict[str, Tensor]:
    """Tune; the stored numbers, the method's and the head's."""
    recipe = Recipe("x", chosen or method("full"), read, store="fp32").override(**training)
    tune(base, task, recipe, out=path)
    own, head = Delta.load(path).tensors(base)
    return own | {f"head:{name}": value for name, value in head.items()}


def teach(tmp_path: Path, task: Task) -> Taught:
    base, path = tiny_base("bert"), tmp_path / f"teacher{SUFFIX}"
    run(base, task, path, epochs=10, learning_rate=3e-3)
    return base, task, path


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    return teach(tmp_path_factory.mktemp("teacher"), tiny_task())


def moved(base: Base, found: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value - before[name] for name, value in found.items()}


def test_train_has_the_teachers_probabilities(taught: Taught, tmp_path: Path) -> None:
    base, task, path = taught
    made = distilled(task, path, base, cache=tmp_path)
    rows = made.splits["train"]
    assert [replace(row, taught=()) for row in rows] == list(task.splits["train"])
    told = predict(path, [row.texts[0] for row in rows], base)
    for row, answer in zip(rows, told, strict=True):
        shares = [math.exp(value) for value in row.taught]
        assert sum(shares) == pytest.approx(1, abs=1e-6)
        assert shares[task.labels.index(answer["label"])] == pytest.approx(
            answer["probability"], abs=1e-6
        )
    assert made.splits["dev"] is task.splits["dev"]
    assert made.splits["test"] is task.splits["test"]
    assert made.fingerprint != task.fingerprint
    assert f"16 train examples answered by teacher{SUFFIX}" in made.provenance
    assert distilled(task, path, base, cache=tmp_path) == made  # from the cache
    assert base.is_untouched()


def test_the_loss_is_shared(taught: Taught, tmp_path: Path) -> None:
    """One step of plain SGD is linear in the share, and at 1 it has no use for the labels."""
    base, task, path = taught
    made = distilled(task, path, base, cache=tmp_path)
    dev = [replace(row, taught=(-0.1, -2.4)) for row in task.splits["dev"]]
    made = replace(made, splits={**made.splits, "dev": dev})  # of which nothing is learned
    turned = [replace(row, label=1 - int(row.label)) for row in made.splits["train"]]
    others = replace(made, splits={**made.splits, "train": turned})

    def after(which: Task, **more: Any) -> dict[str, Tensor]:
        # Biases of keys have no gradient but rounding's, which leaves some as they were.
        found = run(base, which, tmp_path / f"x{SUFFIX}", **STEP, **more)
        return {path: base.original(path) for path in base.paths()} | found

    alone, none = after(task), after(made, teacher_share=0.0)
    whole, third = after(made, teacher_share=1.0), after(made, teacher_share=0.3)
    half, blind = after(made), after(others, teacher_share=1.0)
    assert any(not torch.equal(alone[name], whole[name]) for name in alone)
    for name in alone:
        assert torch.equal(none[name], alone[name])
        assert torch.equal(blind[name], whole[name])
        mixed = torch.lerp(alone[name], whole[name], 0.3)
        assert torch.allclose(third[name], mixed, atol=1e-6)
        assert torch.allclose(half[name], (alone[name] + whole[name]) / 2, atol=1e-6)


@pytest.mark.parametrize("scores", [False, True])
def test_what_is_learned_is_the_divergence(scores: bool, tmp_path: Path) -> None:
    """The head's bias after one step, against torch's own KL and squared error."""
    base, task, path = teach(tmp_path, scored_task() if scores else tiny_task())
    made = distilled(task, path, base, cache=tmp_path)
    held = tmp_path / f"x{SUFFIX}"
    only_head = method("select", train=("none",))
    settings = {**STEP, "teacher_share": 1.0}
    before = run(base, made, held, only_head, **{**settings, "readout_learning_rate": 0.0})
    with Delta.load(held).applied(base) as model:
        batch = READOUT.collate(base, made.splits["train"])
        outputs = model(**batch.as_kwargs())["logits"].detach().requires_grad_()
    told = torch.tensor([row.taught for row in made.splits["train"]])
    if scores:
        loss = functional.mse_loss(outputs, told)
    else:
        loss = functional.kl_div(
            outputs.log_softmax(-1), told, log_target=True, reduction="batchmean"
        )
    loss.backward()
    assert outputs.grad is not None
    expected = -0.5 * outputs.grad.sum(0)
    after = run(base, made, held, only_head, **settings)
    (bias,) = (name for name in before if name.endswith("bias") and len(before[name]) < 3)
    assert torch.allclose(after[bias] - before[bias], expected, atol=1e-6)
    assert expected.abs().max() > 1e-4


def test_a_teacher_of_another_base_and_readout(tmp_path: Path) -> None:
    """What is learned are classes, whatever they were read from."""
    folder = tmp_path / "roberta"
    other = tiny_base("roberta")
    other.tower.save_pretrained(folder)
    other.tokenizer.save_pretrained(folder)
    other = Base.load(folder)
    assert other.name == str(folder)
    path = tmp_path / f"teacher{SUFFIX}"
    run(other, tiny_task(), path, epochs=5, learning_rate=3e-3)
    base = tiny_base("bert")
    made = distilled(tiny_task(), path, base, cache=tmp_path / "kept")
    assert made == distilled(tiny_task(), path, other, cache=tmp_path / "again")
    read = readout("label_embedding", template="{text} {mask} {mask}", max_length=32)
    found = run(base, made, tmp_path / f"x{SUFFIX}", read=read, **STEP)
    unlike = run(base, tiny_task(), tmp_path / f"y{SUFFIX}", read=read, **STEP)
    assert any(not torch.equal(found[name], unlike[name]) for name in found)


def test_all_sizes_learn_from_the_whole_and_that_from_the_teacher(
    taught: Taught, tmp_path: Path
) -> None:
    """A method of several passes: the first learns from the teacher, others from the first."""
    base, task, path = taught
    made = distilled(task, path, base, cache=tmp_path)

    def after(which: Task, distil: float) -> dict[str, Tensor]:
        sized = method("dynamic", smallest=0.5, by="magnitude", drawn=0, distil=distil)
        return run(base, which, tmp_path / f"x{SUFFIX}", sized, **STEP, teacher_share=share)

    share: float | None = None
    plain, apart = after(task, 0.0), after(task, 1.0)
    share = 1.0
    both = after(made, 1.0)
    assert any(not torch.equal(plain[name], apart[name]) for name in plain)
    assert any(not torch.equal(apart[name], both[name]) for name in plain)
    turned = [replace(row, label=1 - int(row.label)) for row in made.splits["train"]]
    blind = after(replace(made, splits={**made.splits, "train": turned}), 1.0)
    assert all(torch.equal(blind[name], both[name]) for name in both)  # no pass had labels


Given = Callable[[Taught, Path], Any]


def _rows_lacking(held: Taught, folder: Path) -> Any:
    base, task, path = held
    made = distilled(task, path, base, cache=folder)
    rows = [*made.splits["train"][:-1], task.splits["train"][-1]]
    return tune(base, replace(made, splits={**made.splits, "train": rows}), "bitfit")


def _other_labels(held: Taught, folder: Path) -> Any:
    base, task, path = held
    return distilled(replace(task, labels=("never", "always")), path, base, cache=folder)


BAD: dict[str, tuple[Given, type[Exception], str]] = {
    "a share of nothing": (
        lambda held, _: tune(
            held[0], held[1], Recipe.load("bitfit").override(teacher_share=0.2, max_steps=1)
        ),
        SettingError,
        "there is none, or it writes texts",
    ),
    "a share above 1": (
        lambda *_: Recipe.load("bitfit").override(teacher_share=1.5),
        SettingError,
        "expected a share from 0 to 1",
    ),
    "rows without": (_rows_lacking, TaskError, "have 0 and 2 numbers .* expected 2 in each"),
    "other labels": (_other_labels, TaskError, r"was trained for \['no', 'yes'\]"),
    "texts from classes": (
        lambda held, folder: distilled(written_task(), held[2], held[0], cache=folder),
        TaskError,
        "has texts to be written, and the teacher",
    ),
    "pictures": (
        lambda held, folder: distilled(captioned_task(), held[2], held[0], cache=folder),
        TaskError,
        "a teacher has no answers",
    ),
    "a model without its head": (
        lambda held, folder: distilled(held[1], folder, held[0], readout=READOUT, cache=folder),
        SettingError,
        "vectors of its own",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name: str, taught: Taught, tmp_path: Path) -> None:
    base = taught[0]
    base.tower.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    run_it, error, said = BAD[name]
    with pytest.raises(error, match=said):
        run_it(taught, tmp_path)
    assert base.is_untouched()
