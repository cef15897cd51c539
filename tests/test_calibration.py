"""Calibration: the error against its equation as plain loops, temperatures that are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from console import howfine_here
from disk import base_folder
from howfine import calibration
from howfine.delta import Delta
from howfine.errors import SettingError
from howfine.evaluate import evaluate, predict
from howfine.task import Example, Task
from howfine.tune import tune
from tiny import tiny_base, tiny_task

QUICK = {"max_steps": 2, "batch_size": 8}


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def drawn(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random probabilities, and targets that they don't describe well."""
    rng = np.random.default_rng(seed)
    shares = softmax(3 * rng.normal(size=(n, classes)))
    return shares, rng.integers(classes, size=n)


def bins_of(shares: np.ndarray, targets: np.ndarray, bins: int) -> list[list[tuple[float, bool]]]:
    """(confidence, right) of the answers in each bin ((b - 1) / M, b / M], one by one."""
    found: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, target in zip(shares.tolist(), targets.tolist(), strict=True):
        answer = max(range(len(row)), key=lambda c: row[c])
        for number in range(bins):
            if number / bins < row[answer] <= (number + 1) / bins:
                found[number].append((row[answer], answer == target))
    return found


def oracle(shares: np.ndarray, targets: np.ndarray, bins: int) -> float:
    """Guo et al. 2017, equation 3."""
    error = 0.0
    for rows in bins_of(shares, targets, bins):
        if rows:
            confidence = sum(value for value, _ in rows) / len(rows)
            accuracy = sum(right for _, right in rows) / len(rows)
            error += len(rows) / len(targets) * abs(accuracy - confidence)
    return error


@pytest.mark.parametrize("bins", [1, 2, 7, 10, 15, 100])
@pytest.mark.parametrize(("n", "classes"), [(1, 2), (50, 2), (400, 3), (400, 20)])
def test_the_error_is_that_of_the_equation(n: int, classes: int, bins: int) -> None:
    shares, targets = drawn(n, classes, seed=n + classes)
    found = calibration.expected_calibration_error(shares, targets, bins)
    assert found == pytest.approx(oracle(shares, targets, bins), abs=1e-12)
    table = calibration.reliability(shares, targets, bins)
    for number, rows in enumerate(bins_of(shares, targets, bins)):
        assert table.count[number] == len(rows)
        means = (table.confidence[number], table.accuracy[number])
        expected = np.array(rows).mean(axis=0) if rows else (math.nan, math.nan)
        assert means == pytest.approx(expected, nan_ok=True)


def test_the_edges_of_bins_belong_to_the_bin_below() -> None:
    """Also where k / bins is no binary fraction, and with a confidence of exactly 1."""
    for bins in (3, 10, 15):
        for number in range(math.ceil(bins / 2), bins + 1):
            edge = number / bins
            if edge > 0.5:
                shares = np.array([[edge, 1 - edge]])
                table = calibration.reliability(shares, np.array([0]), bins)
                assert table.count.tolist() == [int(b == number - 1) for b in range(bins)]


def test_certain_answers_land_in_the_last_bin() -> None:
    shares = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    table = calibration.reliability(shares, np.array([0, 1, 0, 1]))
    assert table.count.tolist() == [0] * 14 + [4]
    assert (table.confidence[-1], table.accuracy[-1]) == (1.0, 0.75)
    assert np.isnan(table.accuracy[:-1]).all()


def test_one_bin_is_the_gap_of_the_means() -> None:
    shares, targets = drawn(300, 4, seed=5)
    gap = (shares.argmax(axis=1) == targets).mean() - shares.max(axis=1).mean()
    assert calibration.expected_calibration_error(shares, targets, 1) == pytest.approx(abs(gap))


def test_what_is_calibrated_has_next_to_no_error() -> None:
    shares = np.repeat([[0.7, 0.3], [0.1, 0.9]], 10, axis=0)
    right = np.array([0] * 7 + [1] * 3 + [1] * 9 + [0])
    assert calibration.expected_calibration_error(shares, right) == pytest.approx(0, abs=1e-12)
    rng = np.random.default_rng(0)
    shares = softmax(2 * rng.normal(size=(200_000, 3)))
    targets = (shares.cumsum(axis=1) < rng.random((len(shares), 1))).sum(axis=1)
    assert calibration.expected_calibration_error(shares, targets) < 0.005
    assert calibration.expected_calibration_error(shares, (targets + 1) % 3) > 0.3


@pytest.mark.parametrize("known", [0.4, 1.0, 2.5])
def test_a_temperature_undoes_what_logits_were_multiplied_by(known: float) -> None:
    rng = np.random.default_rng(1)
    logits = 1.5 * rng.normal(size=(40_000, 3))
    targets = (softmax(logits).cumsum(axis=1) < rng.random((len(logits), 1))).sum(axis=1)
    shares = softmax(known * logits)
    found = calibration.temperature(shares, targets)
    assert found == pytest.approx(known, rel=0.03)
    cooled = calibration.tempered(shares, found)
    np.testing.assert_allclose(cooled, softmax(known * logits / found), atol=1e-9)
    assert (cooled.argmax(axis=1) == shares.argmax(axis=1)).all()
    assert calibration.expected_calibration_error(cooled, targets) < 0.01


def test_a_temperature_is_the_best_there_is() -> None:
    """Mean -log p of the targets, by loops over a grid of temperatures."""
    shares, targets = drawn(60, 3, seed=8)
    targets[:30] = shares[:30].argmax(axis=1)

    def loss(value: float) -> float:
        rows = [[p ** (1 / value) for p in row] for row in shares.tolist()]
        return -sum(
            math.log(row[target] / sum(row)) for row, target in zip(rows, targets, strict=True)
        )

    found = calibration.temperature(shares, targets)
    assert all(loss(found) <= loss(found * factor) for factor in (0.9, 0.999, 1.001, 1.1))
    assert loss(found) <= min(loss(10 ** (step / 20 - 1)) for step in range(61))


def test_a_temperature_stays_within_its_bounds() -> None:
    shares = np.array([[0.8, 0.2], [0.3, 0.7]])
    # The loss is 0 up to rounding long before the least temperature.
    assert 0.01 <= calibration.temperature(shares, np.array([0, 1])) < 0.05
    assert calibration.temperature(shares, np.array([1, 0])) == pytest.approx(100, rel=1e-3)
    certain = calibration.tempered(np.array([[1.0, 0.0]]), 0.01)
    assert certain.tolist() == [[1.0, 0.0]]


def test_an_option_that_an_example_lacks_never_gets_a_probability() -> None:
    shares = np.array([[0.7, 0.3, 0.0], [0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
    for value in (0.01, 1.0, 87.0, 1e6):
        cooled = calibration.tempered(shares, value)
        assert (cooled[shares == 0] == 0).all()
        np.testing.assert_allclose(cooled.sum(axis=1), 1, atol=1e-12)
    # Nor does it weigh on the temperature: a class that no example has is as none.
    shares, targets = drawn(60, 3, seed=8)
    wider = np.pad(shares, ((0, 0), (0, 1)))
    assert calibration.temperature(wider, targets) == calibration.temperature(shares, targets)
    # A target without a probability leaves the loss finite.
    assert math.isfinite(calibration.temperature(wider, np.full(60, 3)))


def test_bins_of_several_runs_are_those_of_all_their_answers() -> None:
    runs = [drawn(90, 3, seed) for seed in (1, 2, 3)]
    tables = [calibration.calibration(*run)["reliability"] for run in runs]
    shares, targets = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    whole = calibration.calibration(shares, targets)["reliability"]
    found = calibration.pooled(tables)
    assert found["count"] == whole["count"]
    assert 0 in found["count"]
    for name in ("confidence", "accuracy"):
        assert [value is None for value in found[name]] == [value is None for value in whole[name]]
        ours, theirs = (np.array(each[name], float) for each in (found, whole))
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize(
    ("shares", "targets", "said"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), r"shape \(0, 2\), expected \(examples, classes\)"),
        (np.ones(3), np.zeros(3, int), r"shape \(3,\)"),
        (np.array([[0.5, 0.5], [2.0, -1.0]]), np.array([0, 0]), "row 1 .*take softmax"),
        (np.array([[0.5, 0.6]]), np.array([0]), "row 0 .*take softmax"),
        (np.array([[math.nan, 0.5]]), np.array([0]), "row 0"),
        (np.array([[0.5, 0.5]]), np.array([2]), "1 class indices below 2"),
        (np.array([[0.5, 0.5]]), np.array([-1]), "1 class indices below 2"),
        (np.array([[0.5, 0.5]]), np.array([0, 1]), r"targets have shape \(2,\)"),
        (np.array([[0.5, 0.5]]), np.array([0.5]), "type float64"),
    ],
)
def test_what_does_not_fit_is_refused(shares: Any, targets: Any, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        calibration.expected_calibration_error(shares, targets)
    with pytest.raises(SettingError, match=said):
        calibration.temperature(shares, targets)


def test_odd_bins_and_temperatures_are_refused() -> None:
    with pytest.raises(SettingError, match="bins is 0"):
        calibration.reliability(np.array([[0.5, 0.5]]), np.array([0]), 0)
    for value in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(SettingError, match="temperature is"):
            calibration.tempered(np.array([[0.5, 0.5]]), value)


# Of a delta, as `evaluate` gives it.


class Made:
    """A delta of two classes on a base and a task, with the task as a folder has it."""

    def __init__(self, folder: Path) -> None:
        self.base, self.task = tiny_base("bert"), tiny_task()
        self.path = folder / "made.delta.safetensors"
        tune(self.base, self.task, "bitfit", out=self.path, **QUICK)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("calibration"))


def test_evaluate_measures_what_predict_says(made: Made) -> None:
    score = evaluate(made.path, made.base, made.task)
    examples = made.task.splits["test"]
    answers = predict(made.path, [example.texts[0] for example in examples], made.base)
    confidences = np.array([answer["probability"] for answer in answers])
    picked = np.array([made.task.labels.index(answer["label"]) for answer in answers])
    shares = np.full((len(examples), 2), np.nan)
    shares[np.arange(len(examples)), picked] = confidences
    shares[np.arange(len(examples)), 1 - picked] = 1 - confidences
    targets = np.array([example.label for example in examples])
    assert score.calibration is not None
    assert score.calibration["ece"] == pytest.approx(oracle(shares, targets, 15), abs=1e-6)
    assert score.calibration["ece_10"] == pytest.approx(oracle(shares, targets, 10), abs=1e-6)
    assert score.calibration["confidence"] == pytest.approx(confidences.mean(), abs=1e-6)
    assert score.calibration["accuracy"] == score.value
    assert score.calibration["n"] == sum(score.calibration["reliability"]["count"]) == score.n
    assert score.as_dict()["calibration"] == score.calibration


def test_a_temperature_from_another_split_leaves_the_score(made: Made) -> None:
    plain = evaluate(made.path, made.base, made.task)
    found = evaluate(made.path, made.base, made.task, temperature_from="dev")
    assert found.calibration is not None
    gained = found.calibration["temperature"]
    assert {**found.calibration, "temperature": None} == {**plain.calibration, "temperature": None}  # type: ignore[dict-item]
    assert (found.value, found.interval, found.scores) == (
        plain.value, plain.interval, plain.scores
    )  # fmt: skip
    assert gained["fitted_on"] == "dev"
    with Delta.load(made.path).applied(made.base) as model, torch.inference_mode():
        logits = [
            model(**model.readout.collate(made.base, made.task.splits[split]).as_kwargs())["logits"]
            for split in ("dev", "test")
        ]
    dev, test = (
        (softmax(outputs.double().numpy()), np.array([e.label for e in made.task.splits[split]]))
        for outputs, split in zip(logits, ("dev", "test"), strict=True)
    )
    assert gained["value"] == pytest.approx(calibration.temperature(*dev), rel=1e-3)
    cooled = softmax(np.log(test[0]) / gained["value"])
    assert gained["ece"] == pytest.approx(oracle(cooled, test[1], 15), abs=1e-4)


def test_a_temperature_that_cannot_be_fitted_is_refused(made: Made) -> None:
    with pytest.raises(SettingError, match="fitted on test, the split that is scored"):
        evaluate(made.path, made.base, made.task, temperature_from="test")
    with pytest.raises(SettingError, match="split 'dve' is unknown.*'dev'"):
        evaluate(made.path, made.base, made.task, temperature_from="dve")


def scores_task() -> Task:
    rng = np.random.default_rng(0)
    rows = [Example((f"w{i % 7} w{i % 5}",), float(rng.normal())) for i in range(24)]
    splits = {"train": rows[:8], "dev": rows[8:16], "test": rows[16:]}
    return Task("numbers", splits, (), "pearson", "drawn")


def test_regression_has_no_calibration(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), scores_task()
    tuned = tune(base, task, "bitfit", out=tmp_path / "x.delta.safetensors", **QUICK)
    assert tuned.score.calibration is None
    assert evaluate(tuned.path, base, task).as_dict()["calibration"] is None
    with pytest.raises(SettingError, match="has no classes"):
        evaluate(tuned.path, base, task, temperature_from="dev")


def test_the_command_line_says_the_error(tmp_path: Path) -> None:
    folder, data = base_folder(tmp_path), tmp_path / "numbers.csv"
    rows = [f"w{i % 7} w{i % 5},{i / 3:.3f}" for i in range(60)]
    data.write_text("\n".join(["text,label", *rows]))
    made_on = ("--base", folder, "--task", data)
    steps = ("--max-steps", 2, "--batch-size", 8)
    out = tmp_path / "x.delta.safetensors"
    assert (
        "ECE" not in howfine_here("tune", *made_on, "--recipe", "bitfit", *steps, "--out", out).out
    )
    said = howfine_here("evaluate", out, *made_on, "--json").json
    assert said["calibration"] is None
    assert "ECE" not in howfine_here("evaluate", out, *made_on).out
