"""Grafting: the region, its scores and their rate, regions to keep out of, and their measures."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from howfine import compose, crossing, regions
from howfine.base import Base
from howfine.change import Change
from howfine.delta import SUFFIX, Delta
from howfine.entries import flat_entries
from howfine.errors import SettingError, WrongBase
from howfine.method import Method, method
from howfine.methods import graft as module
from howfine.readout import Wired
from howfine.recipe import Recipe
from howfine.tune import tune
from tiny import (
    LABELS,
    READOUT,
    Fitted,
    TinyProbe,
    fit_a_little,
    loss_of,
    owner_of,
    tiny_base,
    tiny_task,
    tuned_weights,
    weight_at,
    wire,
)

BIAS = 10.0


def graft(**settings: Any) -> Method:
    return method("graft", **settings)


def attached(base: Base, chosen: Method, seed: int = 0) -> Change:
    torch.manual_seed(seed)
    return chosen.attach(base, TinyProbe(READOUT, base))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- the region ----------------------------------------------------------------------------------


def test_scope_is_everything_in_the_blocks() -> None:
    base = tiny_base("bert")
    change = attached(base, graft(density=0.0))
    assert set(change.trainable) == {p for p in base.paths() if ".encoder.layer." in p}
    drawn = torch.cat([scores.detach().flatten() for scores in change.trainable.values()])
    assert bool(((drawn >= 0) & (drawn < 1)).all())
    change.remove()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_region_has_one_models_bits_or_the_others(share: float) -> None:
    """G1: θ_ft on the support and θ elsewhere, bit for bit, at both ends too."""
    base, tuned = tiny_base("bert"), tuned_weights(tiny_base("bert"))
    change = attached(base, graft(density=0.0))
    for scores in change.trainable.values():
        with torch.no_grad():
            scores.copy_(torch.where(torch.rand(scores.shape) < share, 10.5, 9.5))
    for path in base.paths():
        theta = base.original(path)
        on = change.trainable[path] > BIAS if path in change.trainable else theta != theta
        for row, (found, open_) in enumerate(
            zip(weight_at(base, path).flatten().tolist(), on.flatten().tolist(), strict=True)
        ):
            source = tuned[path] if open_ else theta
            assert found == float(source.flatten()[row]), (path, row)
    change.remove()


def test_base_mask_is_what_moved_most_and_leaves_by_crossing() -> None:
    base, tuned = tiny_base("bert"), tuned_weights(tiny_base("bert"))
    chosen = graft(density=0.0, base_mask="movement", base_density=0.01)
    change = attached(base, chosen)
    paths = list(change.trainable)
    moved = {p: (tuned[p] - base.original(p)).abs() for p in paths}
    everything = sorted((float(v) for m in moved.values() for v in m.flatten()), reverse=True)
    k = round(0.01 * len(everything))
    edge = everything[k - 1]
    expected = {p: moved[p] >= edge for p in paths}
    assert sum(int(m.sum()) for m in expected.values()) == k
    for path in paths:
        after = torch.where(expected[path], tuned[path], base.original(path))
        assert torch.equal(weight_at(base, path), after)
    with torch.no_grad():
        change.trainable[paths[0]].fill_(11.0)  # crossed: the opposite of the base mask
    other = torch.where(expected[paths[0]], base.original(paths[0]), tuned[paths[0]])
    assert torch.equal(weight_at(base, paths[0]), other)
    change.remove()


@pytest.mark.parametrize("size", [1, 7, 20, 60])
def test_a_size_keeps_the_highest_scores_that_rose(size: int) -> None:
    torch.manual_seed(size)
    scores = {"a": torch.randn(5, 6) * 6, "b": torch.randn(9) * 6}
    held: dict[str, Tensor | None] = {"a": torch.rand(5, 6) < 0.1, "b": None}
    found = module.settle(scores, held, BIAS, size)
    every = [
        (float(s), path, n)
        for path in scores
        for n, s in enumerate(scores[path].flatten().tolist())
    ]
    base = {(p, n) for _, p, n in every if p == "a" and bool(held["a"].flatten()[n])}
    stay = {(p, n) for s, p, n in every if (p, n) in base and s <= BIAS}
    rest = sorted((s, p, n) for s, p, n in every if (p, n) not in base and s > 1)
    added = {(p, n) for _, p, n in rest[::-1][: max(0, size - len(stay))]}
    got = {(p, n) for p, m in found.items() for n in m.flatten().nonzero().flatten().tolist()}
    assert got == stay | added


def test_scores_as_drawn_give_the_base_mask() -> None:
    scores = {"a": torch.rand(50)}
    assert not module.settle(scores, {"a": None}, BIAS, 10)["a"].any()


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_mask", ["zero", "movement"])
def test_soft_gate_starts_at_the_base_mask_and_steps_as_autograd(base_mask: str) -> None:
    """G2 and G3 on a whole model: against autograd through f = γ₀ + (1 - 2γ₀)·σ(S - b)."""
    base, tuned = tiny_base("bert"), tuned_weights(tiny_base("bert"))
    chosen = graft(density=0.0, base_mask=base_mask, base_density=0.02)
    torch.manual_seed(0)
    fitted = wire(base, chosen)
    change = fitted.change
    held = {p: (weight_at(base, p) != base.original(p)).float() for p in change.trainable}
    start = {p: s.detach().clone() for p, s in change.trainable.items()}
    for lift in (0.0, 9.5):  # at the start; and where gates are half open
        with torch.no_grad():
            for path, scores in change.trainable.items():
                scores.copy_(start[path] + lift)
                scores.grad = None
        for part in fitted.wired.modules():  # gates train, dropout is off
            part.training = type(part).__name__ == "_Gate"
        fitted.wired.training = False
        loss_of(fitted).backward()
        found = {p: s.grad.clone() for p, s in change.trainable.items()}
        leaves = {p: (start[p] + lift).requires_grad_() for p in start}
        plain_base = tiny_base("bert")
        plain = Wired(plain_base, READOUT, fitted.head).eval()
        weights = {}
        for path, leaf in leaves.items():
            gate = held[path] + (1 - 2 * held[path]) * torch.sigmoid(leaf - BIAS)
            if lift == 0:
                assert float((gate.detach() - held[path]).abs().max()) <= 1.3e-4
            theta = plain_base.parameter(path).detach()
            weights[f"towers.{path}"] = theta + gate * (tuned[path] - theta)
        batch = READOUT.collate(plain_base, tiny_task().splits["train"][:8])
        loss = functional_call(plain, weights, kwargs=batch.as_kwargs())["loss"]
        expected = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        # What is 0 in exact arithmetic (a key's bias) is rounding noise in both.
        noise = 1e-6 * max(float(gradient.abs().max()) for gradient in expected)
        for path, gradient in zip(leaves, expected, strict=True):
            torch.testing.assert_close(found[path], gradient, rtol=1e-4, atol=noise)
    change.remove()


@pytest.mark.parametrize("base_mask", [False, True])
def test_step_of_the_scores_is_the_papers(base_mask: bool) -> None:
    """G2 on one weight: (1 - 2γ₀)·G⊙Δ·σ(S - b)(1 - σ(S - b)), entry by entry."""
    torch.manual_seed(0)
    scores = (torch.rand(4, 5) * 12).requires_grad_()
    theta, tuned = torch.randn(4, 5), torch.randn(4, 5)
    held = torch.rand(4, 5) < 0.5 if base_mask else None
    made = crossing.Soft.apply(scores, theta, tuned, held, BIAS)
    torch.sin(made).sum().backward()
    for i in range(4):
        for j in range(5):
            base = float(held[i, j]) if held is not None else 0.0
            open_ = sigma(float(scores[i, j].detach()) - BIAS)
            moved = float(tuned[i, j]) - float(theta[i, j])
            mixed = float(theta[i, j]) + (base + (1 - 2 * base) * open_) * moved
            assert float(made[i, j].detach()) == pytest.approx(mixed, rel=1e-5, abs=1e-6)
            step = (1 - 2 * base) * math.cos(mixed) * moved * open_ * (1 - open_)
            assert float(scores.grad[i, j]) == pytest.approx(step, rel=1e-5, abs=1e-9)


def climbed(start: float, pull: float, steps: int, bias: float = BIAS) -> float:
    """S after `steps` of B2's update with everything but S held fixed."""
    for _ in range(steps):
        start += pull * sigma(start - bias) * (1 - sigma(start - bias))
    return start


@pytest.mark.parametrize("steps", [1, 20, 100])
@pytest.mark.parametrize("bias", [2.0, 10.0])
def test_crossing_is_the_smallest_pull_that_gets_there(steps: int, bias: float) -> None:
    starts = [0.0, 0.37, 0.99]
    for start, pull in zip(
        starts, crossing.crossing(torch.tensor(starts), steps, bias).tolist(), strict=True
    ):
        assert climbed(start, pull * 1.0001, steps, bias) > bias
        assert climbed(start, pull * 0.9999, steps, bias) < bias


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("count", [1, 30, 400])
def test_rate_lets_as_many_cross_as_asked(count: int, steps: int) -> None:
    torch.manual_seed(0)
    pulls, starts = torch.rand(400) ** 3 * 1e-4 + 1e-9, torch.rand(400)
    rate = crossing.rate(pulls, starts, count, steps, BIAS)
    ends = [
        climbed(s, rate * p, steps) for s, p in zip(starts.tolist(), pulls.tolist(), strict=True)
    ]
    assert sum(end > BIAS for end in ends) == count


def test_published_rate_has_the_published_thresholds() -> None:
    """The thresholds on -G·Δ that lr = 1e7 means, as the specification's table derives them."""
    table = {(0.0, 10): 2.9e-4, (0.5, 10): 1.7e-4, (1.0, 10): 1.1e-4}
    table |= {(0.0, 100): 2.3e-5, (0.5, 100): 1.4e-5, (1.0, 100): 8.4e-6}
    for (start, steps), threshold in table.items():
        (found,) = (crossing.crossing(torch.tensor([start]), steps, BIAS) / 1e7).tolist()
        assert found == pytest.approx(threshold, rel=0.05)


def regions_at(rate: float, steps: int, **settings: Any) -> dict[str, Tensor]:
    """The region after `steps` with gradients held at those of the base, rounded."""
    base = tiny_base("bert")
    gradients = TinyProbe(READOUT, base).gradients(base, base.choose(("all@0--1",)), "mean")
    change = attached(base, graft(density=0.0, **settings))
    optimiser = torch.optim.SGD(change.trainable.values(), lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        for path, gradient in gradients.items():
            owner, name = owner_of(base, path)
            for gate in owner.parametrizations[name]:
                gate.train()
            getattr(owner, name).backward(gradient)
            for gate in owner.parametrizations[name]:
                gate.eval()
        optimiser.step()
    found = {p: weight_at(base, p) != base.original(p) for p in change.trainable}
    change.remove()
    return found


def test_the_region_grows_with_rate_and_steps_and_has_the_size_asked_for() -> None:
    """G12, and the calibration against the method's own steps."""
    base, density, steps = tiny_base("bert"), 0.02, 10
    chosen = graft(density=density)
    change = attached(base, chosen)
    rate = chosen.rate_for(change, steps)
    total = sum(s.numel() for s in change.trainable.values())
    change.remove()
    sizes = {
        (scale, count): regions.size(regions_at(rate * scale, count))
        for scale, count in ((0.01, 10), (0.5, 10), (1.0, 5), (1.0, 10), (1.0, 20), (2.0, 10))
    }
    assert sizes[1.0, 10] == pytest.approx(density * total, rel=0.05)
    assert sizes[0.01, 10] == 0
    assert sizes[0.5, 10] < sizes[1.0, 10] < sizes[2.0, 10]
    assert sizes[1.0, 5] < sizes[1.0, 10] < sizes[1.0, 20]


def test_a_rate_far_too_small_leaves_a_base_mask_as_it_was() -> None:
    before = regions_at(0.0, 0, base_mask="movement", base_density=0.01)
    after = regions_at(1e-3, 10, base_mask="movement", base_density=0.01)
    assert regions.size(before) > 0
    assert all(torch.equal(before[path], after[path]) for path in before)


def test_without_a_density_the_rate_is_the_published_one() -> None:
    change = attached(base := tiny_base("bert"), chosen := graft(density=0.0))
    assert chosen.rate_for(change, 10) == 1e7
    change.remove()
    assert method("mask").rate_for(attached(base, method("mask")), 50) == pytest.approx(1.0)


def test_a_calibrated_region_lowers_the_loss() -> None:
    """The steps that a fit takes, by hand: no larger than asked for, and better than the base."""
    base, chosen, steps = tiny_base("bert"), graft(density=0.05), 10
    torch.manual_seed(0)
    fitted = wire(base, chosen)
    total = sum(s.numel() for s in fitted.change.trainable.values())
    fitted.wired.eval()
    before = float((loss_of(fitted) + loss_of(fitted, 1)).detach()) / 2
    rate = chosen.rate_for(fitted.change, steps)
    optimiser = torch.optim.SGD(fitted.change.trainable.values(), lr=rate)
    for part in fitted.wired.modules():
        part.training = type(part).__name__ == "_Gate"
    for _ in range(steps):
        optimiser.zero_grad()
        (loss_of(fitted) + loss_of(fitted, 1)).div(2).backward()
        optimiser.step()
    fitted.wired.eval()
    after = float((loss_of(fitted) + loss_of(fitted, 1)).detach()) / 2
    region = {p: weight_at(base, p) != base.original(p) for p in fitted.change.trainable}
    assert regions.size(region) <= round(0.05 * total)
    assert after < before
    fitted.change.remove()


# --- files and phases ----------------------------------------------------------------------------


def fine_tuned(base: Base, folder: Path, name: str = "tuned") -> Path:
    path = folder / f"{name}{SUFFIX}"
    tune(base, tiny_task(), "full", out=path, epochs=4, learning_rate=1e-2)
    return path


SHORT = {"max_steps": 6, "batch_size": 8, "gradient_accumulation": 2, "evaluations": 0}


def from_file(start: Path, density: float = 0.05) -> Recipe:
    """The shipped recipe, short, from a fine-tuned model in a file."""
    recipe = Recipe.load("graft").override(density=density, **SHORT)
    return replace(recipe, start=str(start))


def test_a_region_file_has_the_fine_tuned_values_and_head(tmp_path: Path) -> None:
    """G13: from a file and back, values are θ_ft's, bit for bit, and the head is θ_ft's."""
    base = tiny_base("bert")
    first = Delta.load(fine_tuned(base, tmp_path))
    recipe = from_file(tmp_path / f"tuned{SUFFIX}").override(store="fp32")
    made = tune(base, tiny_task(), recipe, out=tmp_path / f"graft{SUFFIX}")
    changed, head = Delta.load(made.path).tensors(base)
    tuned, tuned_head = first.tensors(base)
    entries = sum(base.parameter(p).numel() for p in base.choose(("all@0--1",)))
    assert sum(t._nnz() for t in changed.values()) == round(0.05 * entries)
    for path, tensor in changed.items():
        index, values = flat_entries(tensor)
        assert torch.equal(values, tuned[path].flatten()[index])
    assert head.keys() == tuned_head.keys()
    assert all(torch.equal(head[name], tuned_head[name]) for name in head)


@pytest.mark.parametrize(
    ("asked", "works", "message"),
    [
        (
            {"density": 0.0},
            {"density": 0.01},
            "found an empty region.*score rose above 10; set density, such as 0.01",
        ),
        (
            {"learning_rate": 1e-3},
            {"learning_rate": None},
            "found an empty region.*score rose above 1; leave learning_rate out",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("evaluations", [0, 3])
def test_an_empty_region_is_refused_with_what_works(
    asked: dict[str, Any], works: dict[str, Any], message: str, evaluations: int, tmp_path: Path
) -> None:
    base = tiny_base("bert")
    recipe = from_file(fine_tuned(base, tmp_path)).override(evaluations=evaluations)
    out = tmp_path / f"graft{SUFFIX}"
    with pytest.raises(SettingError, match=message):
        tune(base, tiny_task(), recipe, out=out, **asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"tuned{SUFFIX}"]
    made = tune(base, tiny_task(), recipe, out=out, **works)
    assert made.changed == regions.size(regions.support(made.delta, base)) > 0


def test_an_empty_region_is_never_the_best_state() -> None:
    change = attached(tiny_base("bert"), chosen := graft())
    assert not chosen.finished(change)
    with torch.no_grad():
        next(iter(change.trainable.values())).fill_(11.0)
    assert chosen.finished(change)
    change.remove()


def test_the_shipped_recipe_runs_from_its_own_phase(tmp_path: Path) -> None:
    out = tmp_path / f"graft{SUFFIX}"
    made = tune(tiny_base("bert"), tiny_task(), "graft", out=out, **SHORT)
    assert made.steps == 3 + 6  # the full fine-tuning: 16 examples, a batch in each of 3 epochs
    assert regions.size(regions.support(made.delta, tiny_base("bert"))) > 0


@pytest.mark.parametrize(
    "chosen",
    [
        graft(density=0.1),
        method("sparse", density=0.1, by="gradient"),
        method("sparse", where=("all", "embedding", "pooler"), by="start"),
    ],
    ids=str,
)
def test_entries_to_keep_out_of_stay_the_bases(chosen: Method) -> None:
    base = tiny_base("bert")
    probe = TinyProbe(READOUT, base)
    probe.outside = {path: torch.rand(base.parameter(path).shape) < 0.5 for path in base.paths()}
    torch.manual_seed(0)
    change = chosen.attach(base, probe)
    with torch.no_grad():
        for parameter in change.trainable.values():
            parameter.add_(torch.rand_like(parameter) * 10)
    inside = 0
    for path in base.paths():
        moved = weight_at(base, path) != base.original(path)
        assert not bool((moved & probe.outside[path]).any()), path
        inside += int(moved.count_nonzero())
    assert inside > 0
    change.remove()
    probe.outside = {path: torch.ones_like(mask) for path, mask in probe.outside.items()}
    with pytest.raises(SettingError):
        chosen.attach(base, probe)
    assert base.is_untouched()


def test_a_second_region_is_found_outside_the_first(tmp_path: Path) -> None:
    base = tiny_base("bert")
    recipe = from_file(fine_tuned(base, tmp_path))
    first, second = (str(tmp_path / f"{name}{SUFFIX}") for name in ("first", "second"))
    tune(base, tiny_task(), recipe, out=first)
    tune(base, tiny_task(), recipe, out=second, outside=first)
    found = [regions.support(Delta.load(path), base) for path in (first, second)]
    assert min(map(regions.size, found)) > 0
    assert regions.overlap(*found) == 0
    both = regions.outside([first, second], base)
    assert regions.size(both) == sum(map(regions.size, found))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_tensors_train_around_entries_that_stay_as_they_began(name: str) -> None:
    """Whatever the optimiser does: the start's value where that moved them, else the base's."""
    base = tiny_base("bert")
    probe = TinyProbe(READOUT, base)
    paths = base.choose(("all@0--1",))
    probe.start = {path: probe.start[path] for path in paths[::2]}
    torch.manual_seed(0)
    probe.outside = {path: torch.rand(base.parameter(path).shape) < 0.5 for path in base.paths()}
    begun = {path: probe.start.get(path, base.original(path)).clone() for path in paths}
    chosen = method("select", train=("all@0--1",))
    change = chosen.attach(base, probe)
    wired = Wired(base, READOUT, READOUT.attach(base, LABELS))
    fitted = Fitted(base, chosen, change, wired.head, wired)
    optimiser = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name](
        change.trainable.values(), lr=0.1, weight_decay=0.1
    )
    for step in range(3):
        optimiser.zero_grad()
        loss_of(fitted, step).backward()
        optimiser.step()
    packed, stored = chosen.pack(base, change), chosen.stored(change, "int8")
    for path in paths:
        mask, now = probe.outside[path], weight_at(base, path)
        assert torch.equal(now[mask], begun[path][mask]), path
        assert torch.equal(packed.get(path, base.original(path)), now)
        assert not torch.equal(now[~mask], begun[path][~mask]), path
        assert stored[path].shape == now.shape
    change.remove()
    assert base.is_untouched()
    probe.outside = {path: torch.ones_like(mask) for path, mask in probe.outside.items()}
    with pytest.raises(SettingError, match="lies in the region that 'outside' keeps out"):
        chosen.attach(base, probe)
    assert base.is_untouched()


def test_a_task_is_learned_from_the_grafts_before_it(tmp_path: Path) -> None:
    """B4: fine-tuned from the base with the earlier graft on, which stays; grafted outside it."""
    base, task = tiny_base("bert"), tiny_task()
    other = replace(task, labels=("a", "b"))
    first, begun, second = (tmp_path / f"{name}{SUFFIX}" for name in ("first", "begun", "second"))
    tune(base, task, from_file(fine_tuned(base, tmp_path)), out=first)
    compose.union([first], base, head="none").save(begun)
    asked = {**SHORT, "density": 0.05, "store": "fp32", "outside": str(first)}
    asked |= {"start_outside": str(first), "start_start": str(begun), "start_epochs": 2}
    asked |= {"start_learning_rate": 1e-2}
    tune(base, other, "graft", out=second, starts=tmp_path / "starts", **asked)
    (phase,) = (tmp_path / "starts").glob(f"*{SUFFIX}")
    region = regions.support(Delta.load(first), base)
    with Delta.load(first).changed(base):
        grafted = {path: weight_at(base, path) for path in base.paths()}
    with Delta.load(phase).changed(base):
        tuned = {path: weight_at(base, path) for path in base.paths()}
    for path, mask in region.items():
        assert torch.equal(tuned[path][mask], grafted[path][mask]), path
    found = regions.support(Delta.load(second), base)
    assert regions.overlap(region, found) == 0
    with Delta.load(second).changed(base):
        for path, mask in found.items():
            assert torch.equal(weight_at(base, path)[mask], tuned[path][mask])
    both = compose.union([first, second], base, head=1)
    assert both.labels == ("a", "b")
    assert regions.count(both, base) == regions.size(region) + regions.size(found)


def test_a_rounded_file_of_whole_tensors_would_move_what_is_kept_out(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), tiny_task()
    first, out = tmp_path / f"first{SUFFIX}", tmp_path / f"x{SUFFIX}"
    tune(base, task, from_file(fine_tuned(base, tmp_path)), out=first)
    region = regions.support(Delta.load(first), base)
    asked: dict[str, Any] = {"outside": str(first), "out": out, "max_steps": 2}
    blocks = "all@0-1"

    def tuned(train: tuple[str, ...], **more: Any) -> None:
        recipe = replace(Recipe.load("bitfit"), method=method("select", train=train))
        tune(base, task, recipe, **asked, **more)

    for more in ({"store": "sign"}, {"store": "fp16", "start": str(first)}):
        with pytest.raises(SettingError, match="rounds whole tensors, and moves.*store fp32, or"):
            tuned((blocks,), **more)
        assert not out.exists()
    # What moves nothing that is kept out: other tensors, a rounded difference, all of float32.
    bias = tmp_path / f"bias{SUFFIX}"
    tune(base, task, "bitfit", out=bias, max_steps=2, store="fp32", outside=str(first))
    for train, more in (
        (("none",), {"store": "sign"}),
        ((blocks,), {"store": "int4"}),
        ((blocks,), {"store": "fp32", "start": str(first)}),
        (("all",), {"store": "fp16", "start": str(bias)}),
    ):
        tuned(train, **more)
        began = Delta.load(more["start"]) if "start" in more else None
        with began.changed(base) if began else nullcontext():
            kept = {path: weight_at(base, path).clone() for path in region}
        with Delta.load(out).changed(base):
            for path, mask in region.items():
                assert torch.equal(weight_at(base, path)[mask], kept[path][mask])


def test_the_region_to_keep_out_of_is_checked_and_part_of_the_record(tmp_path: Path) -> None:
    recipe = Recipe.load("sparse")
    assert "outside" not in recipe.as_dict()
    named = [{"path": "a", "sha256": ""}, {"path": "b", "sha256": ""}]
    assert recipe.override(outside="a, b").as_dict()["outside"] == named
    record = {key: value for key, value in recipe.as_dict().items() if key != "recipe"}
    assert Recipe.parse("x", {**record, "outside": ["a"]}).outside == ("a",)
    with pytest.raises(SettingError, match="outside: found 3, expected paths of delta files"):
        Recipe.parse("x", {**record, "outside": 3})
    with pytest.raises(SettingError, match="takes no 'outside'"):
        Recipe.parse("x", {"method": "full", "outside": "a"})
    with pytest.raises(SettingError, match="has no setting 'outside'"):
        Recipe.load("full").override(outside="a")
    fine_tuned(tiny_base("bert", seed=1), tmp_path)
    other = str(tmp_path / f"tuned{SUFFIX}")
    for file, message in ((other, "support file of another base"), ("gone", "is no delta file")):
        with pytest.raises(SettingError, match=message):
            tune(
                tiny_base("bert"),
                tiny_task(),
                "sparse",
                outside=file,
                out=tmp_path / "x.delta.safetensors",
            )
    assert not (tmp_path / "x.delta.safetensors").exists()


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 1.0}, "density: found 1.0, expected a share below 1"),
        ({"density": -0.1}, "density: found -0.1"),
        ({"base_mask": "movement", "base_density": 0.0}, "base_density: found 0.0, expected"),
        ({"base_mask": "movement", "base_density": 1.0}, "base_density: found 1.0, expected"),
        ({"base_mask": "movement", "base_density": 0.1, "density": 0.05}, "below 0.05"),
        ({"bias": 1.0}, "bias: found 1.0, expected more than 1"),
        ({"bias": math.nan}, "bias: found nan"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        graft(**settings)


def test_bad_fine_tuned_models_are_refused() -> None:
    base = tiny_base("bert")
    path = base.choose(("Q@0",))[0]
    probe = TinyProbe(READOUT, base)
    good = dict(probe.start)

    def refused(message: str, start: dict[str, Tensor], **settings: Any) -> None:
        probe.start = start
        with pytest.raises(SettingError, match=message):
            graft(**settings).attach(base, probe)
        assert base.is_untouched()

    refused("holds NaN", {**good, path: good[path] * math.nan})
    refused("has the shape", {**good, path: good[path][:3]})
    refused("name it as the recipe's start", {})
    refused("differs between the base and the fine-tuned model", {path: base.original(path)})
    refused("only .* would lower the loss", good, density=0.95)
    with pytest.raises(SettingError, match="name it as the recipe's start"):
        graft().attach(base)


# --- measures ------------------------------------------------------------------------------------


def test_overlap_counts_common_entries_over_the_second_region() -> None:
    torch.manual_seed(0)
    first = {"a": torch.rand(6, 5) < 0.4, "b": torch.rand(9) < 0.5}
    second = {"a": torch.rand(6, 5) < 0.4, "c": torch.rand(4) < 2}
    places = [
        {(p, n) for p, m in region.items() for n, on in enumerate(m.flatten().tolist()) if on}
        for region in (first, second)
    ]
    both = len(places[0] & places[1])
    assert regions.overlap(first, second) == both / len(places[1])
    assert regions.overlap(second, first) == both / len(places[0])
    assert regions.chance(first, second) == len(places[0]) / (6 * 5 + 9 + 4)
    assert regions.chance(second, {}) == len(places[1]) / (6 * 5 + 4)
    assert math.isnan(regions.chance({}, {}))
    assert math.isnan(regions.overlap(first, {}))


def test_effect_is_the_share_of_each_tasks_gain() -> None:
    before, tuned = [0.5, 0.25, 0.4], [0.9, 0.75, 0.4]
    grafted = [[0.9, 0.25, 0.5], [0.6, 0.65, 0.4]]
    found = regions.effect(grafted, before, tuned)
    for i in range(2):
        for t in range(2):
            expected = (grafted[i][t] - before[t]) / (tuned[t] - before[t])
            assert found[i][t] == pytest.approx(expected)
        assert math.isnan(found[i][2])
    with pytest.raises(SettingError, match="expected 3 in each"):
        regions.effect([[0.1]], before, tuned)


@pytest.mark.parametrize("name", ["full", "select", "mask", "sparse", "graft", "subspace"])
def test_where_a_delta_changes_the_base(name: str) -> None:
    """Of whole tensors, masks and entries alike: counted against the weights that are read."""
    base = tiny_base("bert")
    chosen = method("select", train=("K@1", "norm@0")) if name == "select" else None
    fitted = fit_a_little(base, chosen or Recipe.load(name).method)
    delta = fitted.delta()
    fitted.change.remove()
    counts: dict[tuple[int | None, str], list[int]] = {}
    with delta.applied(base):
        for path in base.paths():
            row = counts.setdefault(base.place(path), [0, 0])
            theta, now = base.original(path).flatten().tolist(), weight_at(base, path).flatten()
            row[0] += sum(a != b for a, b in zip(theta, now.tolist(), strict=True))
            row[1] += len(theta)
    found = regions.where_changed(delta, base)
    assert {(r.layer, r.part): [r.changed, r.entries] for r in found} == {
        place: row for place, row in counts.items() if row[0]
    }
    assert sum(r.changed for r in found) == regions.size(regions.support(delta, base)) > 0
    assert base.is_untouched()
    with pytest.raises(WrongBase):
        regions.support(delta, tiny_base("bert", seed=1))
