"""Hidden states that learn to be a teacher's: which layers, how far apart, and whose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from howfine import hidden, units
from howfine.base import Base
from howfine.delta import SUFFIX
from howfine.errors import SettingError
from howfine.evaluate import evaluate
from howfine.method import method
from howfine.recipe import Recipe
from howfine.training import Training
from howfine.tune import tune
from tiny import (
    HIDDEN,
    LAYERS,
    READOUT,
    fit_a_little,
    tiny_base,
    tiny_language_base,
    tiny_task,
    tiny_whole,
    tuned_weights,
)

IDENTITY = torch.eye(HIDDEN)


def inputs_of(base: Base) -> dict[str, Tensor]:
    """Four inputs, of which texts have padding."""
    generator = torch.Generator().manual_seed(0)
    if base.tower_name == "image":
        return {"pixel_values": torch.randn(4, 3, 8, 8, generator=generator)}
    ids = torch.randint(5, 90, (4, 7), generator=generator)
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[0, 4:] = mask[2, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def states_of(base: Base) -> list[Tensor]:
    """What transformers itself says that the blocks give, at positions that are no padding.

    Its last one may be after a LayerNorm on top of the blocks.
    """
    given = inputs_of(base)
    with torch.no_grad():
        found = base.body(**given, output_hidden_states=True).hidden_states[1:]
    counts = given["attention_mask"].bool()
    return [states[counts] for states in found]


@contextmanager
def listening(base: Base, at: dict[str, Tensor]) -> Iterator[hidden.Teacher]:
    teacher = hidden.Teacher(base, at)
    undo = teacher.listen()
    yield teacher
    for each in undo:
        each()


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (6, [1, 2, 4, 5]), (2, [0, 1]), (1, [0])],
)
def test_four_layers_evenly_apart_are_taught(depth: int, expected: list[int]) -> None:
    assert hidden.taught_layers(depth) == expected


@pytest.mark.parametrize(
    ("apart", "expected"),
    [
        ([[0.0, 9.0, 9.0], [9.0, 9.0, 0.0]], [0, 2]),
        # The upper one takes the first layer: nothing is left below it.
        ([[0.0, 5.0, 2.0], [0.0, 1.0, 2.0]], [0, 0]),
        # The lower one would like the same as the upper one, and takes the best below that.
        ([[5.0, 3.0, 0.0, 0.0], [9.0, 9.0, 1.0, 9.0]], [1, 2]),
    ],
)
def test_layers_are_matched_in_order_from_the_top(
    apart: list[list[float]], expected: list[int]
) -> None:
    assert hidden.nearest(torch.tensor(apart)) == expected


def test_the_distance_is_of_positions_that_are_no_padding_under_the_map() -> None:
    """Σ over layers of the mean of (t - W·s)², with states as transformers gives them."""
    base = tiny_base("bert")
    taught = {"text.encoder.layer.0.output.dense.bias": torch.full((HIDDEN,), 0.3)}
    noise = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))
    layer_map = (IDENTITY + 0.01 * noise).requires_grad_()
    with listening(base, taught) as teacher:
        base.body(**inputs_of(base))
        found = teacher.apart(layer_map, [True] * LAYERS)
        assert teacher.apart(layer_map, [True] * LAYERS).item() == 0  # what was noted is told
    mine = states_of(base)
    with method("full").unpack(base, taught):
        wanted = states_of(base)
    pairs = zip(mine, wanted, strict=True)
    mapped = layer_map.detach().T
    expected = sum(float(functional.mse_loss(own @ mapped, state)) for own, state in pairs)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert layer_map.grad is not None
    assert layer_map.grad.abs().sum() > 0
    assert base.is_untouched()


def test_half_precision_is_the_models_alone() -> None:
    """Under autocast both models run in bf16; the difference of the two is taken in full."""
    base = tiny_base("bert")
    found = []
    for scale in (1.0, 1.0 + 1e-4):  # less than bf16 can tell from 1
        with listening(base, {}) as teacher, torch.autocast("cpu", torch.bfloat16):
            base.body(**inputs_of(base))
            found.append(teacher.apart(scale * IDENTITY, [True] * LAYERS).item())
    assert found[0] == 0
    assert found[1] > 0


def test_a_layer_that_is_off_learns_nothing() -> None:
    """The one that is left stands for both of the teacher's; without any, nothing is apart."""
    base, found = tiny_base("bert"), []
    for on in ([True, True], [True, False], [False, False]):
        with listening(base, {}) as teacher:
            base.body(**inputs_of(base))
            found.append(teacher.apart(IDENTITY, on).item())
    first, last = states_of(base)
    assert found[0] == pytest.approx(0, abs=1e-10)
    assert found[1] == pytest.approx(functional.mse_loss(first, last).item(), rel=1e-5)
    assert found[2] == 0


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "albert", "t5", "vit", "dinov2"])
def test_a_student_with_all_units_on_is_its_teacher(name: str) -> None:
    """In every architecture each layer is heard, where gradients are taken and until the end."""
    base = tiny_base(name)
    with method("l0", keep=1.0, states=1.0).attach(base) as change:
        teacher, given = change.parts["teacher"], inputs_of(base)
        base.body(**given)
        ((_, _, heard),) = teacher._listened
        assert len(heard) == LAYERS
        assert all(states.grad_fn is not None for _, states in heard)
        # Gates without chance begin at σ(1.2·ln 100), a little below 1.
        assert teacher.apart(IDENTITY, [True] * base.depth).item() < 1e-2
        with torch.no_grad():
            base.body(**given)
        assert not teacher._listened
    base.body(**given)
    assert not teacher._listened
    assert base.is_untouched()


def test_a_step_counts_what_it_ran_alone() -> None:
    """Not what ran before it with gradients on, such as a loop's own validation."""
    base, chosen = tiny_base("bert"), method("l0", keep=1.0, states=1.0)
    with chosen.attach(base) as change:
        base.body(**inputs_of(base))
        list(chosen.passes(change, 0.5))
        assert not change.parts["teacher"]._listened


def test_a_teacher_of_a_language_model_is_its_body() -> None:
    base = tiny_language_base("bert")
    start = tuned_weights(base)
    with listening(base, start) as teacher:
        base.tower(**inputs_of(base))
        found = teacher.apart(IDENTITY, [True] * LAYERS)
    mine = states_of(base)
    with method("full").unpack(base, start):
        wanted = states_of(base)
    pairs = list(zip(mine, wanted, strict=True))
    assert found.item() == pytest.approx(
        sum(float(functional.mse_loss(own, state)) for own, state in pairs), rel=1e-5
    )


def test_layers_learn_the_states_of_the_model_before() -> None:
    """With the term they end nearer to it than without; the map trains and is not stored."""
    found = {}
    for weight in (0.0, 30.0):
        base = tiny_base("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        # Gates as good as fixed: which of them end closed would move states more than the weights.
        chosen = method("l0", keep=0.95, rate=1e-6, states=weight, beside=("matrices",))
        fitted = fit_a_little(base, chosen, steps=16, rate=1e-3)
        now, packed = states_of(base), fitted.method.pack(base, fitted.change)
        moved = fitted.change.trainable.get("layer_map")
        fitted.change.remove()
        before = states_of(base)
        assert (moved is None) == (weight == 0)
        assert moved is None or not torch.equal(moved, IDENTITY)
        kept, weights = units.parted(base, packed, 1)
        assert set(kept) == set(units.counts(base))
        assert set(weights) <= set(base.paths())
        pairs = zip(now, before, strict=True)
        found[weight] = sum(float(functional.mse_loss(own, state)) for own, state in pairs)
    assert found[30.0] < 0.5 * found[0.0]


def fitted(folder: Path, name: str, chosen: Any, **settings: Any) -> Any:
    start = settings.pop("start", None)
    training = Training(**{"max_steps": 4, "batch_size": 8, "learning_rate": 0.01, **settings})
    made = Recipe("own", chosen, READOUT, training, start=start)
    return tune(tiny_base("bert"), tiny_task(), made, out=folder / f"{name}{SUFFIX}", seed=1)


def test_a_checkpointed_training_is_the_same(tmp_path: Path) -> None:
    """Blocks that are computed again for their gradients are not heard twice."""
    start = str(fitted(tmp_path, "tuned", method("full")).path)
    chosen = method("l0", states=2.0)
    files = [
        fitted(tmp_path, f"{again}", chosen, start=start, gradient_checkpointing=again).path
        for again in (False, True)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    without = fitted(tmp_path, "without", method("l0"), start=start).path
    assert without.read_bytes() != files[0].read_bytes()
    done = evaluate(files[0], tiny_base("bert"), tiny_task(), split="dev")
    assert done.n == 8


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_bad_settings_are_refused(value: float) -> None:
    with pytest.raises(SettingError, match=r"l0 states .*expected a finite number, 0 or above"):
        method("l0", states=value)


def test_an_encoder_with_a_decoder_is_refused() -> None:
    base = tiny_whole("bart")
    with pytest.raises(SettingError, match="encoder with a decoder"):
        method("l0", states=1.0).attach(base)
    assert base.is_untouched()
