"""All sizes from one training: nested, exact when cut, and learned as the equation says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from howfine import plugins, units
from howfine.base import Base
from howfine.delta import SUFFIX, Delta
from howfine.errors import DamagedDelta, SettingError
from howfine.evaluate import evaluate, logits
from howfine.method import method
from howfine.readout import Readout, readout
from howfine.recipe import Recipe
from howfine.slicing import sliced
from howfine.task import Task
from howfine.training import Training
from howfine.tune import tune
from tiny import (
    READOUT,
    fit_a_little,
    tiny_base,
    tiny_language_base,
    tiny_task,
    tiny_whole,
    tiny_writer,
    weight_at,
    wire,
    written_task,
)

SIZES = (1.0, 0.8, 0.6, 0.45, 0.3, 0.25)
SMALL: dict[str, Any] = {"smallest": 0.25, "by": "magnitude"}


def kept_of(base: Base, change: Any) -> dict[str, Tensor]:
    return {path: gate.on.flatten() for path, gate in change.parts["gated"].items()}


def fit(base: Base, task: Task, path: Path, read: Any = READOUT, **settings: Any) -> Any:
    training = {"max_steps": 4, "batch_size": 8, "learning_rate": 0.01}
    chosen = {**SMALL, **settings}
    training |= {k: chosen.pop(k) for k in tuple(chosen) if k in Training.__dataclass_fields__}
    made = Recipe("own", method("dynamic", **chosen), read, Training(**training))
    return tune(base, task, made, out=path, seed=1)


def of(delta: Delta, base: Base, rows: Any) -> Tensor:
    with delta.applied(base) as model:
        return logits(model, base, rows)


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart", "llama"])
def test_smaller_models_lie_within_larger_ones(name: str) -> None:
    """T1 and T4: nested, and of the size asked for, to half a unit a kind; one of each layer."""
    base = tiny_whole(name) if name == "bart" else tiny_base(name)
    last: dict[str, Tensor] = {}
    for keep in SIZES:
        keep = max(keep, 0.26) if name == "bart" else keep
        with method("dynamic", **SMALL, keep=keep).attach(base) as change:
            kept = kept_of(base, change)
        for own in units.by_kind(base, kept).values():
            total = sum(map(len, own.values()))
            assert abs(sum(int(on.sum()) for on in own.values()) - keep * total) <= 0.5
        for path, on in kept.items():
            assert on.any()
            assert not (on & ~last.get(path, torch.ones_like(on))).any()
        last = kept


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_whole_is_what_was_trained_to_the_bit(name: str) -> None:
    """T2."""
    base = tiny_base(name)
    fitted = fit_a_little(base, method("dynamic", **SMALL, beside=("all",)))
    trained = {path: value.detach().clone() for path, value in fitted.change.trainable.items()}
    for path, value in trained.items():
        assert torch.equal(weight_at(base, path), value)
    packed = fitted.method.pack(base, fitted.change)
    fitted.change.remove()
    with fitted.method.unpack(base, packed):
        for path, value in trained.items():
            assert torch.equal(weight_at(base, path), value)


@pytest.mark.parametrize(
    "name", ["bert", "distilbert", "gpt2", pytest.param("bart", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("keep", [0.7, 0.4])
def test_cut_is_masked(name: str, keep: float, tmp_path: Path) -> None:
    """T3: the smaller model's outputs are those of the whole one with units off."""
    if name == "bart":
        base, task = tiny_whole(name), written_task()
        base.tokenizer.eos_token = "[SEP]"
        read = readout("language_model", max_length=16, max_new_tokens=8)
    else:
        base, task, read = tiny_base(name), tiny_task(), READOUT
    distil = 0.0 if name == "bart" else 0.5
    path = tmp_path / f"x{SUFFIX}"
    fit(base, task, path, read, distil=distil, smallest=0.4)
    done = sliced(path, tmp_path / "small", base, keep=keep)
    assert done.parameters < done.before
    small = Base.load(str(tmp_path / "small"), kind=base.kind)
    rows = task.splits["dev"]
    masked = of(Delta.load(path).resized(keep), base, rows)
    cut = of(Delta.load(done.readout), small, rows)
    if name == "bart":
        assert read.predictions(base, masked).tolist() == read.predictions(small, cut).tolist()
    else:
        assert torch.allclose(masked, cut, atol=1e-5)


def test_ranks_are_exact_in_files_of_few_bits(tmp_path: Path) -> None:
    base = tiny_base("bert")
    chosen = method("dynamic", **SMALL, beside=("norm",))
    fitted = fit_a_little(base, chosen)
    ranks = fitted.change.parts["ranks"]
    delta = fitted.delta("int2")
    fitted.change.remove()
    path = tmp_path / f"x{SUFFIX}"
    delta.save(path)
    for keep in SIZES:
        expected = {
            place: on
            for own in units.by_kind(base, ranks).values()
            for place, on in units.by_rank(own, keep).items()
        }
        with Delta.load(path).resized(keep).changed(base):
            for place, on in expected.items():
                live = (weight_at(base, place) != 0).any(0).unflatten(0, (len(on), -1)).any(1)
                assert torch.equal(live, on)


def test_the_ranks_go_by_importance() -> None:
    """Fraction of units that matter less; the first of each layer ahead of all that are not."""
    base = tiny_base("bert")
    with method("dynamic", **SMALL).attach(base) as change:
        ranks = change.parts["ranks"]
    scores = units.magnitudes(base, units.counts(base), {})
    for own in units.by_kind(base, scores).values():
        normed = {path: score / score.norm() for path, score in own.items()}
        total = sum(map(len, own.values()))
        assert sorted(torch.cat([ranks[path] for path in own]).tolist()) == list(range(total))
        firsts = {(path, int(score.argmax())) for path, score in normed.items()}
        assert all(ranks[path][unit] >= total - len(own) for path, unit in firsts)
        rest = [
            (float(score), int(ranks[path][unit]))
            for path, each in normed.items()
            for unit, score in enumerate(each)
            if (path, unit) not in firsts
        ]
        assert [rank for _, rank in sorted(rest)] == sorted(rank for _, rank in rest)


# --- learning ------------------------------------------------------------------------------------


def test_a_step_is_the_mean_over_the_whole_the_smallest_and_drawn_ones(tmp_path: Path) -> None:
    """Computed apart, by deltas of those sizes: cross-entropy, and KL from the whole's answers."""
    base, task = tiny_base("bert"), tiny_task()
    chosen = method("dynamic", **SMALL, drawn=2, distil=0.3, beside=("all",))
    fitted = wire(base, chosen)
    wired = fitted.wired.eval()
    batch = READOUT.collate(base, task.splits["train"][:6])
    torch.manual_seed(5)
    found, sizes, first = [], [], None
    for share in chosen.passes(fitted.change, 0.5):
        outputs = wired(**batch.as_kwargs())
        first = outputs["logits"].detach() if first is None else first
        kept = kept_of(base, fitted.change)
        sizes.append(sum(int(on.sum()) for on in kept.values()) / sum(map(len, kept.values())))
        apart = READOUT.imitation(outputs["logits"], first)
        assert share == (0.0 if len(sizes) == 1 else 0.3)
        found.append((1 - share) * outputs["loss"] + share * apart)
    torch.manual_seed(5)
    drawn = torch.empty(2).uniform_(0.25, 1).tolist()
    assert sizes == pytest.approx([1.0, 0.25, *drawn], abs=0.02)
    delta = fitted.delta()
    assert kept_of(base, fitted.change).keys() == kept.keys()
    assert all(on.all() for on in kept_of(base, fitted.change).values())  # as it was
    fitted.change.remove()
    expected = []
    for size in (1.0, 0.25, *drawn):
        with delta.resized(size).applied(base) as model:
            own = model(**batch.as_kwargs())
        p, q = first.softmax(-1), own["logits"].softmax(-1)
        divergence = (p * (p.log() - q.log())).sum(-1).mean()
        share = 0.0 if size == 1.0 else 0.3
        expected.append((1 - share) * own["loss"] + share * divergence)
    assert torch.stack(found).tolist() == pytest.approx(torch.stack(expected).tolist(), abs=1e-5)


@pytest.mark.slow
def test_one_training_serves_every_size(tmp_path: Path) -> None:
    """T5 in small: better at small sizes than the same weights trained whole."""
    base, task = tiny_base("bert"), tiny_task()
    rows = [*task.splits["train"], *task.splits["test"]]
    task = Task("tiny-more", {**task.splits, "train": rows}, task.labels, task.metric, "")
    common = {"max_steps": 60, "learning_rate": 3e-3, "group_by_length": False}
    fit(base, task, tmp_path / f"all{SUFFIX}", **common)
    fit(base, task, tmp_path / f"one{SUFFIX}", smallest=1.0, drawn=0, **common)
    of = {}
    for name in ("all", "one"):
        delta = Delta.load(tmp_path / f"{name}{SUFFIX}")
        delta = replace(delta, method=method("dynamic", **SMALL))  # "one" has no other sizes
        of[name] = {
            keep: evaluate(delta.resized(keep), base, task, split="train").value
            for keep in (1.0, 0.5, 0.25)
        }
    assert of["all"][1.0] >= 0.9
    assert of["all"][0.25] > of["one"][0.25] + 0.1


def test_readouts_that_write_learn_without_imitation(tmp_path: Path) -> None:
    base = tiny_writer("gpt2")
    read = readout("language_model", max_length=16, max_new_tokens=8)
    path = tmp_path / f"x{SUFFIX}"
    with pytest.raises(SettingError, match="distil=0"):
        fit(base, written_task(), path, read)
    assert base.is_untouched()
    fit(base, written_task(), path, read, distil=0.0)
    assert Delta.load(path).resized(0.5).method.keep == 0.5


def test_imitation_of_itself_is_nothing() -> None:
    one, other = torch.randn(4, 3), torch.randn(4, 3)
    assert float(READOUT.imitation(one, one)) == pytest.approx(0, abs=1e-6)
    assert float(READOUT.imitation(one, other)) > 0
    barred = torch.tensor([[1.0, -torch.inf, 0.5]])  # an option that is not there
    assert float(READOUT.imitation(barred, barred)) == pytest.approx(0, abs=1e-6)
    assert float(READOUT.imitation(one[:, :1], other[:, :1])) == pytest.approx(
        float((one[:, 0] - other[:, 0]).square().mean()), rel=1e-5
    )


@pytest.mark.parametrize("name", sorted(plugins.examples("readouts", Readout)))
def test_imitation_asks_for_nothing_but_answers(name: str) -> None:
    """What no answer is read from takes no part; what one is does."""
    read = plugins.examples("readouts", Readout)[name]
    if read.writes or read.aligns:
        with pytest.raises(SettingError, match="distil=0"):
            read.imitation(torch.zeros(2, 3), torch.zeros(2, 3))
        return
    generator = torch.Generator().manual_seed(0)
    shape = (4, 2, 3, 5) if name == "label_embedding" else (4, 5)
    one, other = (torch.randn(shape, generator=generator) for _ in range(2))
    unread = {"multiple_choice": (..., -1), "label_embedding": (slice(None), 1)}.get(name)
    like = read.learned(other)
    assert float(read.imitation(one, like)) > 0
    if unread is not None:
        moved = one.clone()
        moved[unread] += 3 * torch.randn(moved[unread].shape, generator=generator)
        assert float(read.imitation(moved, read.learned(one))) == pytest.approx(0, abs=1e-6)
        assert float(read.imitation(moved, like)) == pytest.approx(
            float(read.imitation(one, like)), rel=1e-5
        )


@pytest.mark.parametrize(
    ("name", "settings", "training"),
    [
        ("dynamic", SMALL, "gradient_checkpointing"),
        ("dynamic", SMALL, "reuse_frozen"),
        ("prune", {"rounds": 2, "by": "random", "beside": ["all@-1"]}, "reuse_frozen"),
    ],
)
def test_what_is_kept_or_computed_again_must_not_have_moved(
    name: str, settings: dict[str, Any], training: str, tmp_path: Path
) -> None:
    base = tiny_base("bert")
    made = Recipe("own", method(name, **settings), READOUT, Training(**{training: True}))
    with pytest.raises(SettingError, match=f"set {training} to false"):
        tune(base, tiny_task(), made, out=tmp_path / f"x{SUFFIX}")
    assert base.is_untouched()


# --- bad input -----------------------------------------------------------------------------------


def test_a_file_of_one_size_has_no_other(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), tiny_task()
    made = Recipe("own", method("prune", by="random"), READOUT, Training(max_steps=1))
    done = tune(base, task, made, out=tmp_path / f"x{SUFFIX}")
    with pytest.raises(SettingError, match=r"of one size.*dynamic"):
        done.delta.resized(0.5)
    with pytest.raises(SettingError, match="of one size"):
        sliced(done.path, tmp_path / "small", base, keep=0.5)
    assert not (tmp_path / "small").exists()


def test_a_size_without_a_unit_for_each_layer_names_the_nearest(tmp_path: Path) -> None:
    base = tiny_base("bert")
    with pytest.raises(SettingError, match=r"^smallest 0\.1: 1 of 8.*nearest smallest is 0\.25"):
        method("dynamic", smallest=0.1, by="magnitude").attach(base)
    delta = fit_a_little(base, method("dynamic", **SMALL)).delta()
    other = tiny_base("bert")
    small = replace(delta, method=method("dynamic", **{**SMALL, "smallest": 0.1}))
    with (
        pytest.raises(SettingError, match=r"nearest keep is 0\.25"),
        small.resized(0.1).changed(other),
    ):
        pass
    with pytest.raises(SettingError, match="keep 0.0: expected a share of the units"):
        delta.resized(0.0)


def test_a_size_that_was_not_trained_is_refused() -> None:
    base = tiny_base("bert")
    delta = fit_a_little(base, method("dynamic", smallest=0.5, by="magnitude")).delta()
    with pytest.raises(SettingError, match=r"no size below 0\.5.*nearest keep is 0\.5"):
        delta.resized(0.3)


def test_a_head_that_remembers_the_whole_is_of_no_other_size() -> None:
    """Means of the whole model's states would be the answers of every size."""
    base = tiny_language_base("bert")
    read = readout("label_embedding", max_length=32)
    fitted = wire(base, method("dynamic", **SMALL), read)
    with pytest.raises(SettingError, match="which no other size has"):
        fitted.delta().resized(0.5)
    read = readout("label_embedding", max_length=32, inference="scores")
    fitted.change.remove()
    fitted = wire(base, method("dynamic", **SMALL), read)
    assert fitted.delta().resized(0.5).method.keep == 0.5


def test_ranks_that_are_not_the_bases_are_refused() -> None:
    base = tiny_base("bert")
    fitted = fit_a_little(base, method("dynamic", **SMALL, beside=()))
    packed = fitted.method.pack(base, fitted.change)
    fitted.change.remove()
    name = next(name for name in packed if name.startswith(units.KEPT))
    for odd in (packed[name][:, :-1], packed[name].float(), packed[name][None]):
        with pytest.raises(DamagedDelta, match="does not fit the base"):
            fitted.method.unpack(base, {**packed, name: odd})
    with pytest.raises(DamagedDelta, match="no ranks"):
        fitted.method.unpack(base, {k: v for k, v in packed.items() if k != name})
    with pytest.raises(DamagedDelta, match="found 31 digits, expected 32"):
        fitted.method.unpack(base, {**packed, name: packed[name][:-1]})
    twice = packed[name].clone()
    twice[:, 0] = twice[:, 1]
    for odd in (torch.zeros_like(twice), twice):
        with pytest.raises(DamagedDelta, match="ranks of heads that repeat or leave gaps"):
            fitted.method.unpack(base, {**packed, name: odd})
    assert base.is_untouched()


def test_a_wired_model_keeps_its_size_between_steps() -> None:
    """What is evaluated in training is the size that would be stored."""
    base = tiny_base("bert")
    chosen = method("dynamic", **SMALL, keep=0.5)
    with chosen.attach(base) as change:
        before = kept_of(base, change)
        for _ in chosen.passes(change, 0.0):
            assert isinstance(change.parts["gated"], dict)
        after = kept_of(base, change)
        assert all(torch.equal(before[path], after[path]) for path in before)
        assert sum(int(on.sum()) for on in after.values()) < sum(map(len, after.values()))
