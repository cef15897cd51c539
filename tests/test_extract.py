"""extract: what is kept of two models' difference, in how many bytes, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from console import howfine_here
from disk import base_folder, task_folder
from howfine import fingerprint, gain, pair, streams
from howfine.base import Base
from howfine.codec import decode_values, encode_places, encode_values
from howfine.delta import Delta
from howfine.errors import BaseError, BaseNotFound, DeltaError, HowfineError, SettingError
from howfine.evaluate import Score, evaluate, logits
from howfine.extract import extract
from howfine.head import answer_of
from howfine.merge import merge
from howfine.method import holding, method, methods
from howfine.readout import readout
from howfine.recipe import default_readout
from howfine.recode import recode
from howfine.spread import Search, Spread, part_of
from howfine.start import weight_at
from howfine.targets import Asked, _blank, _most_bits
from howfine.task import Task
from tiny import LABELS, fit_a_little, tiny_base, tiny_task, tiny_tokenizer, tiny_tower, wire

OUT = "out.delta.safetensors"


def heavy(shape: tuple[int, ...], generator: torch.Generator, scale: float = 1e-3) -> Tensor:
    """Differences as fine-tuning makes them: most are small, a few are not (Student's t, 3)."""
    normal = torch.randn(shape, generator=generator)
    power = torch.randn((3, *shape), generator=generator).square().mean(0)
    return scale * normal / power.sqrt()


class Models:
    """A base on disk and two models tuned from it: one bare, one with a classifier's head."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = base_folder(folder)
        state = load_file(self.base / "model.safetensors")
        generator = torch.Generator().manual_seed(3)
        self.tuned = folder / "tuned"
        changed = {
            name: value
            if name == "embeddings.position_embeddings.weight"
            else value + heavy(tuple(value.shape), generator)
            for name, value in state.items()
        }
        self.write(self.tuned, changed)
        model = BertForSequenceClassification.from_pretrained(self.tuned)
        self.classifier = folder / "classifier"
        model.save_pretrained(self.classifier)
        fitted = fit_a_little(Base.load(str(self.base)), method("full"))
        self.delta = folder / "full.delta.safetensors"
        fitted.delta().save(self.delta)

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text((self.base / "config.json").read_text())
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("extract"))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def put_on(path: Path, base: Base) -> dict[str, Tensor]:
    """Every weight with a delta on, by path inside the tower."""
    with Delta.load(path).changed(base):
        return {p.removeprefix("text."): weight_at(base, p).clone() for p in base.paths()}


# What the core needs to know.


def test_methods_that_hold_anything() -> None:
    for what in ("tensors", "entries"):
        expected = {"tensors": method("full"), "entries": method("sparse")}[what]
        assert holding(what) == expected


def test_two_neutral_methods_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods()["graft"], "neutral", True)
    with pytest.raises(SettingError, match="hold entries: found graft and sparse, expected exact"):
        holding("entries")
    monkeypatch.setattr(methods()["full"], "neutral", False)
    with pytest.raises(SettingError, match="hold tensors: found none"):
        holding("tensors")


@pytest.mark.parametrize(
    ("asked", "name"), [({"bytes": 4000}, "sparse"), ({"store": "fp16"}, "full")]
)
def test_a_file_names_the_neutral_method(
    models: Models, tmp_path: Path, asked: dict[str, Any], name: str
) -> None:
    found = extract(str(models.base), models.tuned, tmp_path / OUT, **asked)
    assert list(found.delta.header()["method"]) == [name]
    assert list(Delta.load(tmp_path / OUT).header()["method"]) == [name]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "distilbert"])
def test_an_outline_knows_what_a_loaded_base_does(name: str, tmp_path: Path) -> None:
    folder = base_folder(tmp_path, name)
    loaded = Base.load(str(folder))
    found = pair._outlined(str(folder), "body")
    if found is None:  # stored under names that only transformers knows
        assert name == "vit"
        return
    outline, source = found
    assert outline.paths() == loaded.paths() == source.names()
    assert outline.fingerprint == loaded.fingerprint
    assert outline.pooling == loaded.pooling
    assert outline.has_pooler == loaded.has_pooler
    for path in loaded.paths():
        values = np.concatenate(list(source.chunks(path, 100)))
        assert np.array_equal(values, loaded.parameter(path).detach().flatten().numpy())


def test_streamed_fingerprint_is_that_of_tensors() -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7)}
    cut = (
        (name, tuple(tensors[name].shape), tensors[name].flatten().numpy().reshape(-1)[None][0:1])
        for name in sorted(tensors)
    )
    halves = ((n, s, [v[0][:2], v[0][2:]]) for n, s, v in cut)
    assert fingerprint.of_chunks(halves) == fingerprint.of_tensors(tensors)


# Rate and distortion.


def quantised(x: np.ndarray, threshold: float, step: float) -> tuple[float, float]:
    """(bits, squared error) of a quantiser, by plain loops over the entries."""
    steps = [0 if v < threshold else min(127, max(1, round(v / step))) for v in x.tolist()]
    products = sum(v * q for v, q in zip(x.tolist(), steps, strict=True))
    scale = products / max(sum(q * q for q in steps), 1)
    error = sum((v - scale * q) ** 2 for v, q in zip(x.tolist(), steps, strict=True))
    kept = [q for q in steps if q]
    bits = math.log2(math.comb(len(x), len(kept))) + len(kept)
    for level in set(kept):
        bits -= kept.count(level) * math.log2(kept.count(level) / len(kept))
    return bits, error


def test_estimates_are_those_of_the_entries() -> None:
    x = heavy((6000,), torch.Generator().manual_seed(0)).abs().numpy()
    spread = Spread()
    assert spread.add(x.copy())
    for chosen in [
        Search(spread).within(4000, "steps"),
        Search(spread).of_density(0.1, "steps"),
        Search(spread).of_density(0.5, "steps"),
    ]:
        bits, error = quantised(x, chosen.threshold, chosen.step)
        assert chosen.error == pytest.approx(error, rel=0.01)
        assert bits < chosen.bits < 1.01 * bits + 200  # and a law of steps


def test_more_bits_never_err_more() -> None:
    spread = Spread()
    spread.add(heavy((100_000,), torch.Generator().manual_seed(1)).abs().numpy())
    search = Search(spread)
    found = [search.within(bits, "steps") for bits in np.geomspace(300, 4e6, 30)]
    assert all(b.error <= a.error * 1.0001 for a, b in itertools.pairwise(found))
    assert all(
        one.bits <= bits for one, bits in zip(found, np.geomspace(300, 4e6, 30), strict=True)
    )
    assert found[-1].precision == "fp32"
    assert found[-1].error == 0


def signs(x: Tensor) -> tuple[float, int]:
    """(least squared error of the k largest as signs with one scale, k), by trying every k."""
    x = x.double().abs().sort(descending=True).values
    k = torch.arange(1, len(x) + 1)
    saved = x.cumsum(0).square() / k
    return float(x.square().sum() - saved.max()), int(saved.argmax()) + 1


def test_more_signs_never_err_more() -> None:
    """With one magnitude for all, the error rises past an optimum; it is not gone beyond."""
    x = heavy((100_000,), torch.Generator().manual_seed(1)).abs()
    spread = Spread()
    spread.add(x.numpy())
    search = Search(spread)
    found = [search.within(bits, "sign") for bits in np.geomspace(300, 4e6, 30)]
    assert all(b.error <= a.error for a, b in itertools.pairwise(found))
    least, kept = signs(x)
    assert found[-1].error == pytest.approx(least, rel=1e-3)
    assert found[-1].kept == pytest.approx(kept, rel=0.05)


def test_a_large_budget_of_signs_stops_where_they_err_least(models: Models, tmp_path: Path) -> None:
    before, after = weights(models.base), weights(models.tuned)
    d = torch.cat([(after[name] - before[name]).flatten() for name in before])
    least, kept = signs(d)
    found = extract(str(models.base), models.tuned, tmp_path / OUT, bytes=200_000, store="sign")
    assert found.error == pytest.approx(least / float(d.double().square().sum()), rel=1e-3)
    assert found.kept == pytest.approx(kept, rel=0.05)
    search, store = Search(measured_of(d)), "sign"
    assert search.within(_most_bits(search, store), store) == search.within(math.inf, store)


def measured_of(d: Tensor) -> Spread:
    spread = Spread()
    spread.add(d.abs().numpy())
    return spread


def test_a_part_of_what_moved_alike_is_spread_evenly() -> None:
    """The share of any stretch, to an entry or two, and the same in every row and column."""
    kept = np.concatenate([part_of(start, 1000, 0.3) for start in range(0, 64_000, 1000)])
    assert np.array_equal(kept, part_of(0, 64_000, 0.3))
    assert np.abs(kept.reshape(-1, 100).sum(1) - 30).max() <= 3
    assert np.abs(kept.reshape(64, 1000).mean(0) - 0.3).max() < 0.1
    assert part_of(0, 10**6, 1e-6).sum() in (1, 2)


@pytest.fixture(scope="module")
def alike(models: Models) -> Path:
    """A model of which 30 % of the entries moved by one magnitude, to a rounding."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, value in weights(models.base).items():
        moved = torch.rand(value.shape, generator=generator) < 0.3
        sign = torch.randn(value.shape, generator=generator).sign()
        tensors[name] = value + torch.where(moved, sign / 1024, torch.zeros(()))
    return models.write(models.folder / "alike", tensors)


@pytest.mark.parametrize("store", ["steps", "sign", "fp16", "fp32"])
@pytest.mark.parametrize("budget", [600, 1000, 3000])
def test_entries_that_moved_alike_are_cut_to_a_budget(
    models: Models, alike: Path, tmp_path: Path, store: Any, budget: int
) -> None:
    found = extract(str(models.base), alike, tmp_path / OUT, bytes=budget, store=store)
    assert 0.98 * budget <= found.bytes <= budget
    before, after = weights(models.base), weights(alike)
    now = put_on(tmp_path / OUT, Base.load(str(models.base)))
    moved = {name: now[name] != value for name, value in before.items()}
    assert sum(int(mask.count_nonzero()) for mask in moved.values()) == found.kept
    error = sum(float((after[n] - now[n]).double().square().sum()) for n in before)
    energy = sum(float((after[n] - before[n]).double().square().sum()) for n in before)
    assert found.error == pytest.approx(error / energy, rel=1e-3)
    again = tmp_path / "again.delta.safetensors"
    extract(str(models.base), alike, again, bytes=budget, store=store)
    assert again.read_bytes() == (tmp_path / OUT).read_bytes()


def test_signs_are_cut_again(models: Models, tmp_path: Path) -> None:
    signed = tmp_path / "signed.delta.safetensors"
    whole = extract(str(models.base), models.delta, signed, density=0.2, store="sign")
    sizes = (whole.bytes // 2, 2 * whole.bytes // 3)
    found = [extract(str(models.base), signed, tmp_path / OUT, bytes=b) for b in sizes]
    assert all(0.95 * size <= one.bytes <= size for size, one in zip(sizes, found, strict=True))
    assert found[0].error > found[1].error


def test_what_is_asked_of_entries_that_moved_alike_and_would_do(
    models: Models, alike: Path, tmp_path: Path
) -> None:
    """The refusal says the cause and the nearest value, which is taken."""
    with pytest.raises(SettingError, match=r"the [0-9,]+ that moved most moved alike; .*") as error:
        extract(str(models.base), alike, tmp_path / OUT, density=0.01)
    least = float(str(error.value).partition("at least ")[2].partition(",")[0])
    assert extract(str(models.base), alike, tmp_path / OUT, density=least).kept
    for store in ("steps", "sign", "fp32"):
        asked: dict[str, Any] = {"store": store}
        with pytest.raises(SettingError, match="header and head alone take") as error:
            extract(str(models.base), alike, tmp_path / OUT, bytes=1, **asked)
        floor = int(str(error.value).partition("alone take ")[2].partition(";")[0])
        with pytest.raises(SettingError, match="and no entry fits beside") as error:
            extract(str(models.base), alike, tmp_path / OUT, bytes=floor + 5, **asked)
        least = int(str(error.value).rpartition(" ")[2].replace(",", ""))
        found = extract(str(models.base), alike, tmp_path / OUT, bytes=least, **asked)
        assert found.bytes <= least < floor + 100
        assert found.kept >= 1


def top_k_int4(d: Tensor, k: int, base: Base, file: Path) -> tuple[int, float]:
    """(bytes of the file, squared error) of the k largest magnitudes in four bits each."""
    mask = torch.zeros(d.numel(), dtype=torch.bool)
    mask[d.abs().topk(k).indices] = True
    coded = encode_values(d[mask], "int4")
    left = d.clone()
    left[mask] -= decode_values(coded, k)
    name = streams.joined_name("method", base.paths(), base)
    stream = streams.Stream(name, (d.numel(),), encode_places(mask), True, coded)
    chosen, read = holding("entries"), default_readout()
    delta = Delta(base.name, base.fingerprint, chosen, read, (), (stream,))
    return delta.save(file), float(left.square().sum())


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3])
def test_less_error_than_the_largest_in_four_bits(
    models: Models, tmp_path: Path, share: float
) -> None:
    before, after = weights(models.base), weights(models.tuned)
    d = torch.cat([(after[name] - before[name]).flatten() for name in before])
    base = Base.load(str(models.base))
    size, error = top_k_int4(d, int(share * d.numel()), base, tmp_path / OUT)
    found = extract(str(models.base), models.tuned, tmp_path / OUT, bytes=size)
    assert found.error * float(d.square().sum()) <= error


def test_the_error_is_the_power_of_what_is_left_out(models: Models, tmp_path: Path) -> None:
    """However little that is beside the whole: it is no difference of two large sums."""
    before, generator = weights(models.base), torch.Generator().manual_seed(0)
    after = {name: v + torch.randn(v.shape, generator=generator) for name, v in before.items()}
    d = torch.cat([(after[name] - before[name]).flatten() for name in before]).double().square()
    tuned = models.write(tmp_path / "far", after)
    found = extract(str(models.base), tuned, tmp_path / OUT, density=0.99, store="fp32")
    left = d.sort().values[: d.numel() - found.kept].sum()
    assert found.error == pytest.approx(float(left / d.sum()), rel=1e-3)


# Targets.


@pytest.mark.parametrize(
    ("store", "budget"),
    [("steps", 800), ("steps", 4000), ("steps", 9000), ("sign", 1200), ("sign", 2500)],
)
def test_a_byte_budget_is_met_and_used(
    models: Models, tmp_path: Path, store: Any, budget: int
) -> None:
    found = extract(str(models.base), models.tuned, tmp_path / OUT, bytes=budget, store=store)
    assert found.bytes == (tmp_path / OUT).stat().st_size <= budget
    assert found.bytes >= 0.9 * budget


def long_task() -> Task:
    """The tiny task with a dev split of 97 rows: scores of many digits."""
    task = tiny_task()
    rows = [row for split in task.splits.values() for row in split]
    return replace(task, splits={**task.splits, "dev": [*rows, *rows, *rows, rows[0]]})


def test_a_blank_score_is_no_shorter_than_any_other(models: Models, tmp_path: Path) -> None:
    found = extract(str(models.base), models.delta, tmp_path / OUT, density=0.01).delta
    asked = Asked(tmp_path / OUT, "steps", 5000, None, None, long_task(), "dev", False)
    blank = found.with_score(_blank(asked)).save(tmp_path / "blank")
    for right in range(98):
        low, high = max(right - 11, 0) / 97, min(right + 9, 97) / 97
        score = Score("accuracy", right / 97, (low, high), "dev", 97, "tiny", {}, np.empty(0))
        assert found.with_score(score.stated()).save(tmp_path / "real") <= blank


def test_a_byte_budget_holds_where_the_score_is_longer_than_expected(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first try leaves a hundredth of the budget free, which is less than any score takes."""
    monkeypatch.setattr("howfine.targets._blank", lambda asked: {})
    asked: dict[str, Any] = {"bytes": 2000, "task": long_task()}
    found = extract(str(models.base), models.classifier, tmp_path / OUT, **asked)
    assert (tmp_path / OUT).stat().st_size == found.bytes <= 2000
    assert found.score is not None
    assert len(found.tried) > 1


def test_more_bytes_less_error(models: Models, tmp_path: Path) -> None:
    errors = [
        extract(str(models.base), models.tuned, tmp_path / OUT, bytes=budget).error
        for budget in (1000, 2000, 4000, 8000, 16000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3 > 0.01 > errors[-1]


@pytest.mark.parametrize("store", ["steps", "sign"])
def test_a_gain_brings_the_answers_closer(models: Models, tmp_path: Path, store: Any) -> None:
    """Same places and steps; the least divergence among the factors that were tried."""
    asked: dict[str, Any] = {"density": 0.02, "store": store, "task": tiny_task()}
    base = Base.load(str(models.base))
    plain = extract(base, models.delta, tmp_path / OUT, gain=False, **asked)
    found = extract(base, models.delta, tmp_path / OUT, **asked)
    assert (plain.gain, plain.error, plain.kept) == (1, found.error, found.kept)
    assert found.gain != 1
    (one,) = (s for s in plain.delta.streams if s.name.startswith("method/"))
    (other,) = (s for s in found.delta.streams if s.name.startswith("method/"))
    assert one.coded == other.coded
    assert one.values.payload == other.values.payload
    assert other.values.params == pytest.approx([found.gain * p for p in one.values.params])
    teacher = gain.teacher_of(Delta.load(models.delta), base, tiny_task())
    reached = teacher.divergence(found.delta)
    assert reached < teacher.divergence(plain.delta)
    for factor in (0.75, 1.3):
        assert teacher.divergence(gain.scaled(found.delta, factor)) > reached - 1e-6
    heads = [
        {s.name: s for s in d.streams if "readout" in s.name} for d in (plain.delta, found.delta)
    ]
    assert heads[0] == heads[1]


def test_a_factor_right_for_a_smaller_file_does_not_trap_the_search(models: Models) -> None:
    """Where all factors near it answer alike, the search begins at 1 instead."""

    class Valley:
        """Least at a factor of 2; from 16 on answers are saturated, and slowly less wrong."""

        def divergence(self, delta: Delta) -> float:
            (params,) = (s.values.params for s in delta.streams if s.values and s.values.params)
            factor = params[0] / first
            return abs(math.log2(factor) - 1) if factor < 16 else 9 - math.log2(factor) / 100

    base = Base.load(str(models.base))
    delta = extract(base, models.tuned, models.base.parent / OUT, density=0.02).delta
    (first,) = (s.values.params[0] for s in delta.streams if s.values and s.values.params)
    for begin in (1.0, 4.0, 64.0):
        found, factor = gain.best(delta, Valley(), begin)
        assert factor == pytest.approx(2.0)
        assert Valley().divergence(found) == pytest.approx(0, abs=1e-6)


def test_the_divergence_is_that_of_the_answers(models: Models) -> None:
    """Σ p·log(p / q) by a plain loop, averaged over texts; 0 of a model from itself."""
    base, delta = Base.load(str(models.base)), Delta.load(models.delta)
    teacher = gain.teacher_of(delta, base, tiny_task())
    assert teacher.divergence(delta) == pytest.approx(0, abs=1e-9)
    head = replace(delta, streams=tuple(s for s in delta.streams if "readout" in s.name))
    with head.applied(base) as model:
        outputs = logits(model, base, teacher.examples).double().softmax(-1)
    rows = zip(teacher.shares.tolist(), outputs.tolist(), strict=True)
    each = [sum(p * math.log(p / q) for p, q in zip(*row, strict=True)) for row in rows]
    assert teacher.divergence(head) == pytest.approx(sum(each) / len(each), rel=1e-6)
    assert sum(each) > 0


def test_without_scales_or_a_task_there_is_no_gain(models: Models, tmp_path: Path) -> None:
    for asked in ({"density": 0.02}, {"density": 0.02, "store": "fp16", "task": tiny_task()}):
        assert extract(str(models.base), models.delta, tmp_path / OUT, **asked).gain == 1


@pytest.mark.parametrize("density", [0.001, 0.3])
@pytest.mark.parametrize("store", ["steps", "sign", "fp16", "fp32"])
def test_a_density_keeps_the_largest(
    models: Models, tmp_path: Path, density: float, store: Any
) -> None:
    found = extract(str(models.base), models.tuned, tmp_path / OUT, density=density, store=store)
    before, after = weights(models.base), weights(models.tuned)
    d = torch.cat([(after[name] - before[name]).flatten() for name in before]).abs()
    now = put_on(tmp_path / OUT, Base.load(str(models.base)))
    moved = torch.cat([(now[name] != before[name]).flatten() for name in before])
    assert 0.95 * density * d.numel() - 3 <= found.kept <= density * d.numel()
    assert int(moved.count_nonzero()) == found.kept
    assert d[moved].min() >= d[~moved].max()


def test_the_reported_error_is_that_of_the_file(models: Models, tmp_path: Path) -> None:
    before, after = weights(models.base), weights(models.tuned)
    energy = sum(float((after[n] - before[n]).double().square().sum()) for n in before)
    for asked in ({"bytes": 5000}, {"density": 0.1, "store": "sign"}, {"store": "bitdelta"}):
        found = extract(str(models.base), models.tuned, tmp_path / OUT, **asked)
        now = put_on(tmp_path / OUT, Base.load(str(models.base)))
        error = sum(float((after[n] - now[n]).double().square().sum()) for n in before)
        assert found.error == pytest.approx(error / energy, rel=1e-3)


@pytest.mark.parametrize("asked", [{"density": 0.99}, {}])
def test_float32_is_exact(models: Models, tmp_path: Path, asked: dict[str, Any]) -> None:
    extract(str(models.base), models.tuned, tmp_path / OUT, store="fp32", **asked)
    now, after = put_on(tmp_path / OUT, Base.load(str(models.base))), weights(models.tuned)
    assert all(torch.equal(now[name], after[name]) for name in after)


def test_bitdelta_is_signs_with_a_mean(models: Models, tmp_path: Path) -> None:
    extract(str(models.base), models.tuned, tmp_path / OUT, store="bitdelta")
    now = put_on(tmp_path / OUT, Base.load(str(models.base)))
    before, after = weights(models.base), weights(models.tuned)
    name = "encoder.layer.1.intermediate.dense.weight"
    d = after[name] - before[name]
    expected = before[name] + torch.where(d > 0, d.abs().mean(), -d.abs().mean())
    assert torch.allclose(now[name], expected, atol=1e-6)
    other = "embeddings.word_embeddings.weight"
    error = (now[other] - after[other]).abs()
    assert (error <= (after[other] - before[other]).abs() / 1024 + 1e-6).all()


def test_a_loss_finds_the_smallest_file_that_holds(models: Models, tmp_path: Path) -> None:
    task = tiny_task()
    found = extract(str(models.base), models.delta, tmp_path / OUT, loss=0.1, task=task)
    assert found.score is not None
    assert found.reference is not None
    assert found.score.value >= 0.9 * found.reference.value
    assert len(found.tried) <= 10
    holds = [size for size, value in found.tried if value >= 0.9 * found.reference.value]
    assert found.bytes == min(holds)
    again = evaluate(tmp_path / OUT, Base.load(str(models.base)), task, split="dev")
    assert again.value == found.score.value == Delta.load(tmp_path / OUT).score["value"]


def test_fisher_gives_sensitive_tensors_finer_steps(models: Models, tmp_path: Path) -> None:
    base = Base.load(str(models.base))
    fitted = wire(base, method("full"), readout("classifier", max_length=32, pooling="mean"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in fitted.change.trainable.values():
            value.add_(heavy(tuple(value.shape), generator))
    fitted.delta().save(tmp_path / "tuned.delta.safetensors")
    fitted.change.remove()
    asked: dict[str, Any] = {"task": tiny_task(), "bytes": 6000}
    plain = extract(base, tmp_path / "tuned.delta.safetensors", tmp_path / OUT, **asked)
    before = {path: base.original(path).clone() for path in base.paths()}
    asked["weigh"] = "fisher"
    found = extract(base, tmp_path / "tuned.delta.safetensors", tmp_path / OUT, **asked)
    (values,) = (s.values for s in found.delta.streams if s.values is not None)
    assert len(set(values.params)) > 3
    assert found.bytes <= 6000
    assert plain.error < found.error  # in squares that all count alike
    check_scaled(tmp_path / OUT, base, values.params)
    now = put_on(tmp_path / OUT, base)
    for path in base.paths():  # what the readout never reads has no gradient, and gets nothing
        same = torch.equal(now[path.removeprefix("text.")], before[path])
        assert same == ("pooler" in path) or before[path].numel() < 100


def check_scaled(path: Path, base: Base, scales: tuple[float | int, ...]) -> None:
    """Steps of several scales stay what they are where entries go or the change is scaled."""
    found = next(s for s in Delta.load(path).streams if s.values is not None)
    members = streams.members_of(found, base.paths())
    first = torch.ones(base.parameter(members[0]).numel(), dtype=torch.bool)
    made = recode(found, base, {members[0]: first}, times=0.5)
    assert made is not None
    assert made.values is not None
    assert made.values.coding == "steps"
    assert made.values.params == tuple(0.5 * scale for scale in scales[1:])
    whole = streams.decode((found,), base)["method"]
    half = streams.decode((made,), base)["method"]
    assert set(half) == set(members[1:])
    for name, tensor in half.items():
        start = base.original(name)
        expected = start + (whole[name].to_dense() - start) / 2
        moved = tensor.to_dense() != 0
        assert torch.allclose(tensor.to_dense()[moved], expected[moved], atol=1e-6)


def test_large_models_are_cut_into_groups(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("howfine.harvest.MOST_JOINED", 4096)
    whole = extract(str(models.base), models.tuned, tmp_path / OUT, density=0.1)
    streams_of = [s for s in whole.delta.streams if s.values is not None]
    assert len(streams_of) > 3
    now = put_on(tmp_path / OUT, Base.load(str(models.base)))
    before = weights(models.base)
    moved = sum(int((now[name] != before[name]).count_nonzero()) for name in before)
    assert moved == whole.kept


# Heads.


def test_a_head_of_the_tuned_model_answers_as_it_does(models: Models, tmp_path: Path) -> None:
    base = Base.load(str(models.base))
    extract(str(models.base), models.classifier, tmp_path / OUT, store="fp32")
    model = AutoModelForSequenceClassification.from_pretrained(models.classifier).eval()
    delta = Delta.load(tmp_path / OUT)
    batch = delta.readout.collate(base, tiny_task().splits["dev"], labelled=False)
    with delta.applied(base) as wired, torch.no_grad():
        ours = wired(**batch.as_kwargs())["logits"]
        theirs = model(**batch.inputs).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert delta.labels == ("LABEL_0", "LABEL_1")


def test_labels_come_from_the_task_where_the_model_has_none(models: Models, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"bytes": 6000, "task": tiny_task()}
    found = extract(str(models.base), models.classifier, tmp_path / OUT, **asked)
    assert found.delta.labels == LABELS
    assert found.score is not None
    assert found.bytes <= 6000


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["BertForTokenClassification"]},
        {"architectures": None},
        {"problem_type": "multi_label_classification"},
    ],
)
def test_heads_that_give_no_sentence_one_class(
    models: Models, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = models.write(tmp_path / "other", weights(models.classifier))
    config = json.loads((models.classifier / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    found = extract(str(models.base), folder, tmp_path / OUT, store="fp16")
    assert not found.head
    assert set(found.left_out) == {"classifier.weight", "classifier.bias"}


def test_an_adapter_for_tokens_brings_no_head(models: Models, tmp_path: Path) -> None:
    model = BertForTokenClassification.from_pretrained(models.base)
    settings = {"task_type": "TOKEN_CLS", "target_modules": ["query"]}
    folder, _ = adapters(models, tmp_path / "adapter", model, **settings)
    found = extract(str(models.base), folder, tmp_path / OUT, store="fp16")
    assert not found.head
    assert set(found.left_out) == {"classifier.weight", "classifier.bias"}


def test_without_a_head_it_merges_and_says_so(models: Models, tmp_path: Path) -> None:
    found = extract(str(models.base), models.tuned, tmp_path / OUT, store="fp32")
    assert not found.head
    base = Base.load(str(models.base))
    with pytest.raises(DeltaError, match="has no head, so it gives no answers"):
        evaluate(tmp_path / OUT, base, tiny_task())
    merged = AutoModel.from_pretrained(merge(found.delta, tmp_path / "merged", base))
    tuned = AutoModel.from_pretrained(models.tuned)
    for name, value in tuned.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value)
    assert not (tmp_path / "merged" / "readout.json").exists()
    assert base.is_untouched()


@pytest.mark.parametrize("asked", [{"bytes": 4000}, {"density": 0.05}, {"store": "fp16"}], ids=str)
def test_a_delta_without_a_head_is_extracted_from(
    models: Models, tmp_path: Path, asked: dict[str, Any]
) -> None:
    """As the model is that it was extracted from: the same file, from another form of it."""
    first, again = tmp_path / f"first.{OUT}", tmp_path / OUT
    extract(str(models.base), models.tuned, first, store="fp32")
    found = extract(str(models.base), first, again, **asked)
    assert not found.head
    assert found.score is None
    plain = extract(str(models.base), models.tuned, tmp_path / f"plain.{OUT}", **asked)
    base = Base.load(str(models.base))
    theirs = put_on(plain.path, base)
    assert all(torch.equal(value, theirs[path]) for path, value in put_on(again, base).items())
    scored = extract(str(models.base), first, again, **asked, task=tiny_task(), gain=False)
    assert scored.score is None
    for needed in ({"loss": 0.1}, {"bytes": 4000, "weigh": "fisher"}):
        refused(models, first, tmp_path, "need a head|needs a head", task=tiny_task(), **needed)


# LoRA.


def adapters(models: Models, folder: Path, model: Any, **settings: Any) -> tuple[Path, Any]:
    """A PEFT adapter with random factors on disk, and PEFT's own merge of it."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name or value.requires_grad:
                value.add_(0.02 * torch.randn(value.shape, generator=torch.manual_seed(len(name))))
    wrapped.save_pretrained(folder)
    return folder, wrapped.merge_and_unload()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query", "value"]},
        {"target_modules": "all-linear", "use_rslora": True, "r": 4},
        {"target_modules": ["dense", "word_embeddings"], "bias": "all"},
        {
            "target_modules": ["query", "key"],
            "rank_pattern": {"layer.0.attention.self.query": 2},
            "alpha_pattern": {"key": 32, "0.attention.self.query": 1},
        },
    ],
)
def test_a_lora_adapter_is_what_peft_merges(
    models: Models, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = AutoModel.from_pretrained(models.base)
    folder, merged = adapters(models, tmp_path / "adapter", model, **settings)
    extract(str(models.base), folder, tmp_path / OUT, store="fp32")
    now = put_on(tmp_path / OUT, Base.load(str(models.base)))
    expected = merged.state_dict()
    assert any(not torch.equal(now[name], weights(models.base)[name]) for name in now)
    for name, value in now.items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


def test_a_lora_adapter_on_layers_stored_in_out(tmp_path: Path) -> None:
    folder = base_folder(tmp_path, "gpt2")
    models: Any = None
    target = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    adapter, merged = adapters(
        models, tmp_path / "adapter", AutoModel.from_pretrained(folder), **target
    )
    extract(str(folder), adapter, tmp_path / OUT, store="fp32")
    now = put_on(tmp_path / OUT, Base.load(str(folder)))
    for name, value in merged.state_dict().items():
        assert torch.allclose(now[name], value, atol=1e-6), name


def test_a_lora_adapter_brings_its_head(models: Models, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(models.classifier)
    settings = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    folder, merged = adapters(models, tmp_path / "adapter", model, **settings)
    found = extract(str(models.base), folder, tmp_path / OUT, store="fp32")
    assert found.head
    base = Base.load(str(models.base))
    _, head = found.delta.tensors(base)
    weight = next(value for value in head.values() if value.ndim == 2)
    assert torch.equal(weight, merged.classifier.weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "an adapter of type IA3, expected LORA"),
        ({"use_dora": True}, "the adapter has use_dora"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "the adapter has layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa"),
    ],
)
def test_an_adapter_that_is_no_plain_lora(
    models: Models, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    model = AutoModel.from_pretrained(models.base)
    folder, _ = adapters(models, tmp_path / "adapter", model, target_modules=["query"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    refused(models, folder, tmp_path, said, error=BaseError)


def test_an_adapter_of_another_model(models: Models, tmp_path: Path) -> None:
    other = AutoModel.from_pretrained(base_folder(tmp_path, "gpt2"))
    folder, _ = adapters(
        models, tmp_path / "adapter", other, target_modules=["c_attn"], fan_in_fan_out=True
    )
    refused(models, folder, tmp_path, "c_attn, which the base has not", error=BaseError)


def encoder_decoder(folder: Path) -> Path:
    """A tiny T5 with its decoder and tokenizer, as a Hugging Face folder."""
    config = tiny_tower("t5").config.to_dict() | {"is_encoder_decoder": True, "use_cache": True}
    model = T5ForConditionalGeneration(T5Config(**config))
    model.save_pretrained(folder)
    tiny_tokenizer(pair=False).save_pretrained(folder)
    return folder


def test_an_adapter_of_a_decoder_is_none_of_the_encoder(models: Models, tmp_path: Path) -> None:
    folder = encoder_decoder(tmp_path / "t5")
    base = Base.load(str(folder))
    for only, name in ((r"encoder.*\.q", "encoder"), (r".*\.q", "both"), (r"decoder.*\.q", "de")):
        model = T5ForConditionalGeneration.from_pretrained(folder)
        adapter, merged = adapters(models, tmp_path / name, model, target_modules=only)
        if name != "encoder":
            with pytest.raises(BaseError, match=r"changes decoder\.block\.0.*the base has not"):
                extract(base, adapter, tmp_path / OUT, store="fp32")
            continue
        extract(base, adapter, tmp_path / OUT, store="fp32")
        with Delta.load(tmp_path / OUT).changed(base):
            for path in base.paths():
                expected = merged.encoder.get_parameter(path.removeprefix(f"{base.tower_name}."))
                assert torch.allclose(weight_at(base, path), expected, atol=1e-6), path


def test_an_adapter_that_changes_a_tensor_twice(models: Models, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(models.base)
    folder, _ = adapters(models, tmp_path / "adapter", model, target_modules=["query"])
    stored = load_file(folder / "adapter_model.safetensors")
    first = next(iter(stored))
    again = first.replace("base_model.model.", "base_model.model.bert.")
    save_file({**stored, again: stored[first].clone()}, folder / "adapter_model.safetensors")
    refused(models, folder, tmp_path, "for one tensor of the base", error=BaseError)


def test_a_matrix_saved_beside_its_factors_is_what_they_add_to(
    models: Models, tmp_path: Path
) -> None:
    model = AutoModel.from_pretrained(models.base)
    folder, merged = adapters(models, tmp_path / "adapter", model, target_modules=["query"])
    stored = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in stored if name.endswith("lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        inside = module.removeprefix("base_model.model.") + ".weight"
        stored[f"{module}.base_layer.weight"] = weights(models.base)[inside]
    save_file(stored, folder / "adapter_model.safetensors")
    extract(str(models.base), folder, tmp_path / OUT, store="fp32")
    now = put_on(tmp_path / OUT, Base.load(str(models.base)))
    for name, value in merged.state_dict().items():
        assert torch.allclose(now[name], value, atol=1e-6), name


# What is refused.


def refused(
    models: Models,
    after: Path,
    folder: Path,
    said: str,
    error: type[HowfineError] = SettingError,
    **asked: Any,
) -> None:
    out = folder / "results" / OUT
    asked = asked or {"bytes": 5000}
    with pytest.raises(error, match=said):
        extract(str(models.base), after, out, **asked)
    assert not out.parent.exists() or not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"bytes": 100},
            r"bytes: found 100, but header and head alone take \d+; give at least \d+",
        ),
        ({"density": 0.0}, "density: found 0.0, expected a share above 0 and below 1"),
        ({"density": 1.0}, "density: found 1.0, expected a share"),
        ({"density": 1e-9}, "keeps none of 23,360 entries; expected at least 4.31e-05, or a byte"),
        ({"density": math.nan}, "density: found nan"),
        ({"loss": 1.5, "task": tiny_task()}, "loss: found 1.5"),
        ({"loss": 0.1}, "measured on a task; give one"),
        ({"loss": 0.1, "task": tiny_task()}, "needs a head"),
        ({"bytes": 5000, "density": 0.1}, "bytes and density are targets of their own"),
        ({"store": "steps"}, "store 'steps' needs a target"),
        ({"store": "bitdelta", "bytes": 5000}, "keeps every entry; leave bytes out"),
        ({"store": "int8"}, "store 'int8' is unknown"),
        ({"bytes": 5000, "weigh": "hessian"}, "weigh 'hessian' is unknown"),
        ({"bytes": 5000, "weigh": "fisher"}, "measured on a task; give one"),
        ({"store": "fp16", "weigh": "fisher", "task": tiny_task()}, "'fp16' keeps all alike"),
        ({"store": "bitdelta", "weigh": "fisher", "task": tiny_task()}, "keeps all alike"),
        ({"bytes": 5000, "task": tiny_task(), "split": "val"}, "split 'val' is unknown"),
    ],
)
def test_targets_that_make_no_sense(
    models: Models, tmp_path: Path, asked: dict[str, Any], said: str
) -> None:
    refused(models, models.tuned, tmp_path, said, **asked)


def test_models_that_are_the_same(models: Models, tmp_path: Path) -> None:
    refused(models, models.base, tmp_path, "the same in all 39 tensors", BaseError)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_model_with_no_numbers(models: Models, tmp_path: Path, odd: float) -> None:
    tensors = weights(models.tuned)
    tensors["encoder.layer.1.output.dense.weight"][3, 4] = odd
    said = r"text\.encoder\.layer\.1\.output\.dense\.weight holds NaN or infinity in the tuned"
    refused(models, models.write(tmp_path / "odd", tensors), tmp_path, said, BaseError)
    classifier = weights(models.classifier)
    classifier["bert.encoder.layer.1.output.dense.weight"][3, 4] = odd
    folder = models.write(tmp_path / "head", classifier)
    (folder / "config.json").write_text((models.classifier / "config.json").read_text())
    for asked in ({"bytes": 5000}, {"bytes": 5000, "weigh": "fisher"}, {"loss": 0.1}):
        refused(models, folder, tmp_path, said, BaseError, task=tiny_task(), **asked)


def test_another_vocabulary(models: Models, tmp_path: Path) -> None:
    tensors = weights(models.tuned)
    name = "embeddings.word_embeddings.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    said = r"word_embeddings.weight has shape \(96, 32\), where .* \(95, 32\): it is another"
    refused(models, models.write(tmp_path / "odd", tensors), tmp_path, said, BaseError)


def test_another_number_format(models: Models, tmp_path: Path) -> None:
    tensors = {name: value.bfloat16() for name, value in weights(models.tuned).items()}
    said = "is stored as BF16, the base's as F32: what differs would be mostly rounding"
    odd = models.write(tmp_path / "odd", tensors)
    refused(models, odd, tmp_path, said, BaseError)
    refused(models, odd, tmp_path, said, BaseError, bytes=5000, task=tiny_task())
    with pytest.raises(BaseError, match=said):
        extract(Base.load(str(models.base)), odd, tmp_path / OUT, bytes=5000)


def test_a_base_in_half_precision(models: Models, tmp_path: Path) -> None:
    """In memory its weights are rounded, whatever its fingerprint names."""
    cast = Base.load(str(models.base), dtype="bfloat16")
    for tuned in (models.delta, models.tuned):
        with pytest.raises(SettingError, match=r"bfloat16, expected .*Load the base in float32"):
            extract(cast, tuned, tmp_path / OUT, store="fp16")
    assert not (tmp_path / OUT).exists()


def test_another_architecture(models: Models, tmp_path: Path) -> None:
    said = "is a model of type gpt2, the base .* of type bert"
    refused(models, base_folder(tmp_path, "gpt2"), tmp_path, said, BaseError)


def test_a_model_with_less_in_it(models: Models, tmp_path: Path) -> None:
    tensors = dict(list(weights(models.tuned).items())[:9])
    said = "lacks|has no|missing"
    refused(models, models.write(tmp_path / "odd", tensors), tmp_path, said, BaseError)


def test_nothing_there(models: Models, tmp_path: Path) -> None:
    refused(models, tmp_path / "nowhere", tmp_path, "no such file or folder", BaseNotFound)


# The command.


def test_the_command_says_what_it_made(models: Models, tmp_path: Path) -> None:
    task = task_folder(tmp_path)
    out = tmp_path / OUT
    asked = ("--bytes", 6000, "--task", task, "--split", "dev")
    said = howfine_here("extract", models.base, models.delta, out, *asked, "--json").json
    assert said["file"] == str(out)
    assert said["bytes"] == out.stat().st_size <= 6000
    assert said["score"]["n"] == 8
    plain = howfine_here("extract", models.base, models.tuned, out, "--density", 0.01)
    assert plain.code == 0
    assert f"{out}: {out.stat().st_size:,} bytes, " in plain.out
    assert "without a head" in plain.out
    refused_one = howfine_here("extract", models.base, models.tuned, out, "--bytes", 10)
    assert refused_one.code == 2
    assert "header and head alone take" in refused_one.sentence


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--no-gain"], "--no-gain:"),
        (["--gain"], "--gain:"),
        (["--split", "dev"], "--split:"),
        (["--text", "text", "--label", "label"], "--text and --label:"),
        (["--data", "."], "--data:"),
    ],
)
def test_what_is_for_a_task_is_refused_without_one(
    models: Models, tmp_path: Path, flags: list[str], named: str
) -> None:
    out = tmp_path / OUT
    asked = howfine_here("extract", models.base, models.tuned, out, "--density", 0.1, *flags)
    assert asked.code == 2
    assert asked.sentence == f"{named} only for --task; give that, too, or neither"
    assert not out.exists()


def test_joined_streams_are_named_alike(models: Models) -> None:
    base = Base.load(str(models.base))
    chosen = [base.paths()[2], base.paths()[5]]
    found = streams.Stream(streams.joined_name("method", chosen, base), (1,), None)  # type: ignore[arg-type]
    assert streams.members_of(found, base.paths()) == chosen


def test_classes_that_a_config_gives_one_name_are_numbered() -> None:
    """A delta's classes have names of their own, or its answers would say nothing."""
    head = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.zeros(3)}
    config = {"id2label": {"0": "same", "1": "same", "2": "other"}}
    assert answer_of(tiny_base("bert"), config, head).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    config["id2label"]["1"] = "different"
    named = answer_of(tiny_base("bert"), config, head).labels
    assert named == ("same", "different", "other")
