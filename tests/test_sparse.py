"""Sparse changes: gradients at chosen entries, the choice itself, and switching in place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from howfine import entries, sampled
from howfine.base import Base
from howfine.delta import SUFFIX, Delta
from howfine.entries import flat_entries
from howfine.errors import DamagedDelta, SettingError
from howfine.method import method
from howfine.methods import sparse as sparse_file
from howfine.recipe import Recipe
from howfine.tune import tune
from tiny import (
    READOUT,
    TinyProbe,
    fit_a_little,
    logits_of,
    loss_of,
    tiny_base,
    tiny_task,
    tuned_weights,
    weight_at,
    wire,
)


def draw(count: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:k].sort().values


# One share for each way of taking the product: pair by pair, sampled, whole.
@pytest.mark.parametrize("k", [1, 20, 1500, 5000])
def test_sampled_product_is_the_product_at_the_places(k: int) -> None:
    torch.manual_seed(0)
    rows, columns, tokens = 192, 200, 37
    left, right = torch.randn(tokens, rows), torch.randn(tokens, columns)
    index = draw(rows * columns, k)
    found = sampled.Sampling((rows, columns), index // columns, index % columns)
    expected = [
        sum(float(left[t, i]) * float(right[t, j]) for t in range(tokens))
        for i, j in zip((index // columns).tolist(), (index % columns).tolist(), strict=True)
    ]
    torch.testing.assert_close(
        found.product(left, right), torch.tensor(expected), rtol=1e-4, atol=1e-4
    )


def test_the_product_takes_each_of_its_ways() -> None:
    """The case above is none for all if a limit moved."""
    ways = set()
    for k in (1, 20, 1500, 5000):
        index = draw(192 * 200, k)
        few = sampled.Sampling((192, 200), index // 200, index % 200).few
        ways.add("pairs" if few else "whole" if k > sampled.WHOLE * 38400 else "sampled")
    assert ways == {"pairs", "sampled", "whole"}


class Net(nn.Module):
    """Every kind of layer that an entry may lie in."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6, padding_idx=0)
        self.linear = nn.Linear(6, 5)
        self.conv = Conv1D(4, 5)
        self.norm = nn.LayerNorm(4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.conv(torch.tanh(self.linear(self.embed(ids))))).sin()


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "roberta"])
def test_gradients_are_the_dense_ones_at_the_entries(name: str) -> None:
    """Each entry's gradient is that of the whole tensor there, whatever layer it lies in."""
    base = tiny_base(name)
    fitted = wire(base, method("sparse", where=("all",), density=0.2, by="random"))
    fitted.wired.eval()
    batch = READOUT.collate(base, tiny_task().splits["train"][:6]).as_kwargs()
    fitted.wired(**batch)["loss"].backward()
    (values,) = fitted.change.trainable.values()
    found = values.grad.clone()
    parts = fitted.change.parts
    fitted.change.remove()
    parameters = {path: base.parameter(path).requires_grad_(True) for path in parts}
    loss = fitted.wired(**batch)["loss"]
    dense = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for (path, overlay), gradient in zip(parts.items(), dense, strict=True):
        expected = torch.zeros_like(values[overlay.at])
        if gradient is not None:
            expected = gradient.flatten()[overlay.index]
        torch.testing.assert_close(found[overlay.at], expected, rtol=1e-4, atol=1e-6, msg=path)
        base.parameter(path).requires_grad_(False)


def test_a_tied_weight_sums_its_gradients() -> None:
    """Two homes, one set of entries: what each reader asks of them is added up."""
    torch.manual_seed(0)
    weight = torch.randn(4, 3)
    index = torch.tensor([1, 5, 10])
    values = weight.flatten()[index].clone().requires_grad_(True)
    put = sampled.Put.apply(weight, index, values)
    x = torch.randn(2, 3)
    functional.linear(x, put).square().sum().backward()
    whole = weight.clone().requires_grad_(True)
    functional.linear(x, whole).square().sum().backward()
    torch.testing.assert_close(values.grad, whole.grad.flatten()[index])


# --- the choice ----------------------------------------------------------------------------------


def supports(base: Base, probe: TinyProbe | None = None, **settings: object) -> dict[str, Tensor]:
    with method("sparse", **settings).attach(base, probe) as change:
        return {path: overlay.index for path, overlay in change.parts.items()}


@pytest.mark.parametrize("by", ["gradient", "fisher", "saliency"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_strongest_entries_are_chosen(by: str, scope: str) -> None:
    base, density = tiny_base("bert"), 0.03
    probe = TinyProbe(READOUT)
    found = supports(base, probe, by=by, density=density, scope=scope)
    paths = base.choose(("matrices",))
    of = "square" if by == "fisher" else "mean"
    gradients = probe.gradients(base, paths, of)
    scores: list[tuple[float, str, int]] = []
    for path in paths:
        size = gradients[path].abs()
        if by == "saliency":
            size = size * base.parameter(path).abs()
        scores += [(value, path, i) for i, value in enumerate(size.flatten().tolist())]
    groups = [scores] if scope == "global" else [[s for s in scores if s[1] == p] for p in paths]
    expected: dict[str, set[int]] = {}
    for group in groups:
        for _, path, i in sorted(group, reverse=True)[: round(density * len(group))]:
            expected.setdefault(path, set()).add(i)
    assert {path: set(index.tolist()) for path, index in found.items()} == expected


def test_ties_are_settled_by_position() -> None:
    scores = {"a": torch.zeros(5), "b": torch.ones(3)}
    found = entries.strongest(scores, 5)
    assert found["a"].tolist() == [0, 1]
    assert found["b"].tolist() == [0, 1, 2]


def test_movement_and_start_take_an_earlier_training() -> None:
    base = tiny_base("bert")
    probe = TinyProbe(READOUT, base)
    paths = base.choose(("matrices",))
    moved = {path: (probe.start[path] - base.parameter(path)).abs() for path in paths}
    count = sum(size.numel() for size in moved.values())
    found = supports(base, probe, by="movement", density=0.01)
    chosen = torch.cat([moved[path].flatten()[index] for path, index in found.items()])
    assert len(chosen) == round(0.01 * count)
    left = torch.cat([size.flatten() for size in moved.values()]).sort(descending=True).values
    assert torch.equal(chosen.sort(descending=True).values, left[: len(chosen)])
    probe.start = {path: probe.start[path] for path in paths}
    whole = supports(base, probe, by="start")
    assert sum(map(len, whole.values())) == count
    with pytest.raises(SettingError, match="takes its places from an earlier training"):
        supports(base, None, by="movement")


def test_training_goes_on_from_the_start() -> None:
    """At the entries the start's weights, elsewhere the base's."""
    base = tiny_base("bert")
    probe = TinyProbe(READOUT, base)
    with method("sparse", by="movement", density=0.1).attach(base, probe) as change:
        for path, overlay in change.parts.items():
            weight, original = weight_at(base, path).flatten(), base.parameter(path).flatten()
            there = torch.zeros(len(weight), dtype=torch.bool)
            there[overlay.index] = True
            torch.testing.assert_close(weight[there], probe.start[path].flatten()[there])
            assert torch.equal(weight[~there], original[~there])


def test_regrowth_gives_up_the_least_moved() -> None:
    base = tiny_base("bert")
    probe = TinyProbe(READOUT)
    first = supports(base, TinyProbe(READOUT, base), by="movement", density=0.02)
    weights = tuned_weights(base)
    start = {}
    for path, index in first.items():
        value = base.parameter(path).detach().clone()
        value.view(-1)[index] = weights[path].flatten()[index]
        start[path] = value
    probe.start = start
    found = supports(base, probe, by="gradient", regrow=0.25)
    before = {(path, i) for path, index in first.items() for i in index.tolist()}
    after = {(path, i) for path, index in found.items() for i in index.tolist()}
    assert len(after) == len(before)
    given_up = before - after
    assert len(given_up) == round(0.25 * len(before))
    size = {
        (path, i): abs(float((start[path] - base.parameter(path)).flatten()[i]))
        for path, i in before
    }
    assert max(size[place] for place in given_up) <= min(size[p] for p in before & after)


def test_places_that_have_not_moved_are_not_chosen_among() -> None:
    """All of them are equally good, and the first ones would be taken."""
    for by in ("movement", "start"):
        with pytest.raises(SettingError, match="free places have not moved"):
            method("sparse", by=by, regrow=0.2)
    base = tiny_base("bert")
    probe, path = TinyProbe(READOUT), base.choose(("Q",))[0]
    value = base.parameter(path).detach().clone()
    value.view(-1)[:50] += 1
    probe.start = {path: value}
    total = sum(base.parameter(each).numel() for each in base.choose(("matrices",)))
    found = supports(base, probe, by="movement", density=50 / total)
    assert {each: index.tolist() for each, index in found.items()} == {path: list(range(50))}
    with pytest.raises(SettingError, match=r"the start moved 50 of the .*nearest density is 0\.0"):
        supports(base, probe, by="movement", density=51 / total)
    with pytest.raises(SettingError, match="the start moved 0 of the"):
        supports(base, probe, by="movement", density=0.01, scope="tensor")


def nearest(error: pytest.ExceptionInfo[SettingError]) -> float:
    return float(str(error.value).partition("nearest density is ")[2].partition(",")[0])


def test_places_to_keep_out_of_have_not_moved() -> None:
    """They are asked for by no density that is named, and what is named works."""
    base = tiny_base("bert")
    probe, path = TinyProbe(READOUT), base.choose(("Q",))[0]
    value = base.parameter(path).detach().clone()
    value.view(-1)[:50] += 1
    kept_out = torch.zeros(value.shape, dtype=torch.bool)
    kept_out.view(-1)[:10] = True
    kept_out.view(-1)[100:400] = True
    probe.start, probe.outside = {path: value}, {path: kept_out}
    total = sum(base.parameter(each).numel() for each in base.choose(("matrices",)))
    with pytest.raises(SettingError, match="moved 40 of .* less those that outside") as error:
        supports(base, probe, by="movement", density=45 / total)
    found = supports(base, probe, by="movement", density=nearest(error))
    assert {each: index.tolist() for each, index in found.items()} == {path: list(range(10, 50))}


def test_the_nearest_density_works_for_every_tensor() -> None:
    """Of each tensor by itself, the one that moved least decides; one that did not allows none."""
    base, where = tiny_base("bert"), ("Q", "K")
    probe, paths = TinyProbe(READOUT), base.choose(("Q", "K"))
    probe.start = {}
    for number, path in enumerate(paths):
        value = base.parameter(path).detach().clone()
        value.view(-1)[: 90 - 20 * number] += 1
        probe.start[path] = value
    least = 90 - 20 * (len(paths) - 1)
    asked = {"by": "movement", "scope": "tensor", "where": where}
    with pytest.raises(SettingError, match="scope=global") as error:
        supports(base, probe, density=0.5, **asked)
    found = supports(base, probe, density=nearest(error), **asked)
    assert [len(index) for index in found.values()] == [least] * len(paths)
    del probe.start[paths[-1]]
    with pytest.raises(SettingError, match="no density fits, or choose scope=global, other"):
        supports(base, probe, density=0.01, **asked)


def test_a_small_share_is_rounded_down_and_is_none_of_0() -> None:
    assert [sparse_file._down(share) for share in (1 / 3, 8e-8, 0.05)] == [0.333333, 8e-8, 0.05]


@pytest.mark.parametrize("density", [0.0, 1.0, -0.1, math.nan])
def test_a_density_of_none_or_all_is_refused(density: float) -> None:
    with pytest.raises(SettingError, match="sparse density"):
        method("sparse", density=density)


# --- in place ------------------------------------------------------------------------------------


def packed(base: Base, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    fitted = fit_a_little(base, method("sparse", by="random", density=0.02), seed=seed)
    tensors = fitted.method.pack(base, fitted.change)
    fitted.change.remove()
    return tensors


def test_switching_writes_the_entries_alone_and_restores_every_bit() -> None:
    base = tiny_base("bert")
    memory = {path: base.parameter(path).data_ptr() for path in base.paths()}
    before = {path: base.parameter(path).detach().clone() for path in base.paths()}
    tensors = packed(base, 0)
    with entries.unpack(base, tensors) as change:
        for path in base.paths():
            expected = before[path].clone()
            if path in tensors:
                index, values = flat_entries(tensors[path])
                expected.view(-1)[index] = values
            assert torch.equal(base.parameter(path), expected), path
            assert torch.equal(base.original(path), before[path]), path
        assert not base.is_untouched()
        switch = change.parts["switch"]
        switch.off()
        assert base.is_untouched()
        switch.on()
    assert base.is_untouched()
    assert {path: base.parameter(path).data_ptr() for path in base.paths()} == memory


def test_entries_train_in_the_bases_own_memory() -> None:
    base = tiny_base("bert")
    before = {path: base.parameter(path).detach().clone() for path in base.paths()}
    memory = {path: base.parameter(path).data_ptr() for path in base.paths()}
    torch.manual_seed(0)
    fitted = fit_a_little(base, method("sparse", by="random", density=0.02), seed=0)
    tensors = fitted.method.pack(base, fitted.change)
    assert len(tensors) > 10
    loss_of(fitted)  # a forward pass writes what the last step made
    for path in base.paths():
        expected = before[path].clone()
        if path in tensors:
            index, values = flat_entries(tensors[path])
            expected.view(-1)[index] = values
        assert torch.equal(base.parameter(path), expected), path
        assert torch.equal(base.original(path), before[path]), path
    with pytest.raises(SettingError, match="entries in use by another delta"):
        entries.unpack(base, tensors)
    fitted.change.remove()
    assert base.is_untouched()
    assert all(torch.equal(base.parameter(path), before[path]) for path in base.paths())
    assert {path: base.parameter(path).data_ptr() for path in base.paths()} == memory


@pytest.mark.parametrize("between", ["removal", "other values"])
def test_a_gradient_of_weights_that_are_gone_is_refused(between: str) -> None:
    """As torch does where a parameter was modified in place; the same values again are no harm."""
    base = tiny_base("bert")
    fitted = fit_a_little(base, method("sparse", by="random", density=0.02), seed=0)
    (values,) = fitted.change.trainable.values()
    loss = loss_of(fitted)
    loss_of(fitted)
    loss.backward()
    loss = loss_of(fitted)
    if between == "removal":
        fitted.change.remove()
    else:
        with torch.no_grad():
            values.add_(0.1)
        loss_of(fitted)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    fitted.change.remove()
    assert base.is_untouched()


def test_a_second_derivative_is_refused() -> None:
    """The gradient of a sampled weight is no function of its input that autograd knows."""
    index = draw(24 * 30, 20)
    sampling = sampled.Sampling((24, 30), index // 30, index % 30)
    x, values = torch.randn(5, 30, requires_grad=True), torch.zeros(20, requires_grad=True)
    made = sampled.Linear.apply(x, values, torch.randn(24, 30), None, sampling, False)
    (first,) = torch.autograd.grad(made.square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_base_that_is_cast_while_entries_train_gives_them() -> None:
    base = tiny_base("bert")
    fitted = fit_a_little(base, method("sparse", by="random", density=0.02), seed=0)
    before = fitted.method.pack(base, fitted.change)
    base.towers.to(torch.bfloat16)
    after = fitted.method.pack(base, fitted.change)
    assert after.keys() <= before.keys()
    assert sum(len(flat_entries(part)[0]) for part in after.values()) > 100
    fitted.change.remove()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [3, 32, 69])
def test_a_wide_layer_keeps_what_its_entries_read(
    transposed: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an input much wider than there are entries only their columns are kept."""
    monkeypatch.setattr(sampled, "AT_ONCE", 50 * 64)  # 64 tokens at once
    width, out = sampled.SPARED + 80, 24
    torch.manual_seed(0)
    shape = (width, out) if transposed else (out, width)
    weight, x = torch.randn(shape), torch.randn(2, tokens, width, requires_grad=True)
    index = draw(width * out, 50)
    values = torch.zeros(50, requires_grad=True)
    sampling = sampled.Sampling(shape, index // shape[1], index % shape[1])
    made = sampled.Linear.apply(x, values, weight, None, sampling, transposed)
    assert made.grad_fn.saved_tensors[0].shape == (2 * tokens, 50)
    upstream = torch.randn_like(made)
    found = torch.autograd.grad(made, (x, values), upstream)
    plain = weight.clone().requires_grad_(True)
    expected = torch.autograd.grad(x @ (plain if transposed else plain.t()), (x, plain), upstream)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1].flatten()[index], rtol=1e-4, atol=1e-4)


def test_two_switches_may_be_on_where_they_share_no_entry() -> None:
    base = tiny_base("bert")
    path = base.choose(("matrices",))[0]
    shape = tuple(base.parameter(path).shape)

    def made(*places: int) -> dict[str, Tensor]:
        return {path: entries.sparse(torch.tensor(places), torch.ones(len(places)), shape)}

    first = entries.unpack(base, made(1, 4))
    second = entries.unpack(base, made(2, 7))
    with pytest.raises(SettingError, match=r"entries in use by another delta: 1 of .*query"):
        entries.unpack(base, made(4, 5, 7))
    first.remove()  # in any order
    assert base.parameter(path).flatten()[[2, 7]].tolist() == [1, 1]
    second.remove()
    assert base.is_untouched()


def test_a_delta_decodes_the_same_while_another_is_on(tmp_path: Path) -> None:
    """Stored differences are from the pretrained values, not from what lies over them."""
    base = tiny_base("bert")
    fitted = fit_a_little(base, method("sparse", by="random", density=0.02))
    delta = fitted.delta("fp16")
    fitted.change.remove()
    alone, _ = delta.tensors(base)
    with delta.applied(base):
        again, _ = delta.tensors(base)
    for path, tensor in alone.items():
        assert torch.equal(tensor.values(), again[path].values())


def test_entries_of_another_model_are_refused() -> None:
    base = tiny_base("bert")
    wrong = {"text.nothing": entries.sparse(torch.tensor([0]), torch.ones(1), (2, 2))}
    with pytest.raises(DamagedDelta, match=r"text\.nothing"):
        entries.unpack(base, wrong)
    assert base.is_untouched()


# --- phases --------------------------------------------------------------------------------------


def recipe(**sparse: object) -> Recipe:
    training = {"max_steps": 3, "batch_size": 8}
    start = {"method": "full", "training": {**training, "learning_rate": 1e-2}}
    raw = {"method": {"sparse": sparse}, "training": training, "start": start}
    return Recipe.parse("phases", {**raw, "readout": {"classifier": {"max_length": 32}}})


def test_a_phase_goes_on_from_the_one_before(tmp_path: Path) -> None:
    """With rate 0 the second phase stores the first one's weights at its places, and its head."""
    base, task = tiny_base("bert"), tiny_task()
    still = recipe(by="movement", density=0.05)
    still = still.override(learning_rate=0.0, readout_learning_rate=0.0)
    tuned = tune(base, task, still, out=tmp_path / f"b{SUFFIX}", starts=tmp_path / "starts")
    assert tuned.steps == 6
    (first,) = (tmp_path / "starts").glob(f"*{SUFFIX}")
    before, head = Delta.load(first).tensors(base)
    after, same_head = tuned.delta.tensors(base)
    for path, tensor in after.items():
        index, values = flat_entries(tensor)
        torch.testing.assert_close(values, before[path].flatten()[index], rtol=0, atol=1e-6)
    assert all(torch.equal(head[name], same_head[name]) for name in head)
    assert base.is_untouched()


@pytest.mark.slow
def test_a_phase_that_is_there_is_not_fitted_again(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), tiny_task()
    made = recipe(by="movement", density=0.05)
    first = tune(base, task, made, out=tmp_path / f"a{SUFFIX}", starts=tmp_path / "starts")
    (file,) = (tmp_path / "starts").glob(f"*{SUFFIX}")
    stamp = file.stat().st_mtime_ns
    again = tune(base, task, made, out=tmp_path / f"b{SUFFIX}", starts=tmp_path / "starts")
    assert file.stat().st_mtime_ns == stamp
    assert (tmp_path / f"a{SUFFIX}").read_bytes() == (tmp_path / f"b{SUFFIX}").read_bytes()
    assert (first.steps, again.steps) == (6, 6)
    tune(
        base,
        task,
        made.override(start_max_steps=2),
        out=tmp_path / f"c{SUFFIX}",
        starts=tmp_path / "starts",
    )
    assert len(list((tmp_path / "starts").glob(f"*{SUFFIX}"))) == 2


def test_phases_leave_no_file_behind(tmp_path: Path) -> None:
    made = recipe(by="movement", density=0.05)
    tune(tiny_base("bert"), tiny_task(), made, out=tmp_path / f"a{SUFFIX}")
    assert [path.name for path in tmp_path.iterdir()] == [f"a{SUFFIX}"]


def test_a_delta_file_may_be_the_start(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), tiny_task()
    first = tune(base, task, recipe().start, out=tmp_path / f"full{SUFFIX}")
    made = recipe(by="movement", density=0.05)
    raw = Recipe(made.name, made.method, made.readout, made.training, start=str(first.path))
    tuned = tune(base, task, raw, out=tmp_path / f"b{SUFFIX}")
    assert tuned.bytes < first.bytes
    with pytest.raises(SettingError, match="neither a recipe, nor a delta file"):
        tune(base, task, raw.override(start=str(tmp_path / "none")), out=tmp_path / f"c{SUFFIX}")


def test_a_method_without_a_start_refuses_moved_weights(tmp_path: Path) -> None:
    """But goes on from a head."""
    base, task, training = tiny_base("bert"), tiny_task(), {"max_steps": 2, "batch_size": 8}
    raw = {"method": "mask", "training": training, "readout": {"classifier": {"max_length": 32}}}
    moved = Recipe.parse("odd", {**raw, "start": {"method": "full", "training": training}})
    with pytest.raises(SettingError, match=r"begins at the base's weights, .* has moved"):
        tune(base, task, moved, out=tmp_path / f"a{SUFFIX}")
    assert base.is_untouched()
    head = {"method": {"select": {"train": ["none"]}}, "training": training}
    kept = Recipe.parse("even", {**raw, "start": head}).override(
        learning_rate=0.0, readout_learning_rate=0.0
    )
    tuned = tune(base, task, kept, out=tmp_path / f"b{SUFFIX}", starts=tmp_path / "starts")
    (first,) = (tmp_path / "starts").glob(f"*{SUFFIX}")
    assert Delta.load(first).tensors(base)[1].keys() == tuned.delta.tensors(base)[1].keys()
    for name, value in Delta.load(first).tensors(base)[1].items():
        assert torch.equal(value, tuned.delta.tensors(base)[1][name])


def test_evaluation_mode_trains_without_dropout() -> None:
    """Two forwards in training mode are the same, gates and trained modules apart."""
    base = tiny_base("bert")
    fitted = wire(base, method("sparse", by="random"))
    dropping = fitted.wired.train()
    assert not torch.equal(logits_of_training(dropping, base), logits_of_training(dropping, base))
    still = type(dropping)(base, READOUT, fitted.head, dropout=False).train()
    assert torch.equal(logits_of_training(still, base), logits_of_training(still, base))
    assert torch.equal(logits_of_training(still, base), logits_of_training(still.eval(), base))


def logits_of_training(wired: nn.Module, base: Base) -> Tensor:
    batch = READOUT.collate(base, tiny_task().splits["train"][:8], labelled=False)
    return wired(**batch.as_kwargs())["logits"].detach()


def test_a_start_may_be_named_from_the_outside(tmp_path: Path) -> None:
    """A file, a recipe, or nothing, whatever the recipe itself says."""
    made = recipe(by="movement")
    assert made.override(start=str(tmp_path / "x")).start == str(tmp_path / "x")
    assert made.override(start=None).start is None
    named = made.override(start="full").start
    assert isinstance(named, Recipe)
    assert named.readout == made.readout
    assert made.override(start="full", max_length=16).start.readout.max_length == 16


def test_every_phase_reads_alike() -> None:
    first = {"method": {"select": {"train": ["none"]}}}
    raw = {"method": "sparse", "start": {"method": "full", "start": first}}
    made = Recipe.parse("three", {**raw, "readout": {"classifier": {"max_length": 9}}})
    assert made.start.readout.max_length == 9
    assert made.start.start.readout.max_length == 9
    assert made.override(max_length=7).start.start.readout.max_length == 7


def test_a_start_counts_by_what_it_holds(tmp_path: Path) -> None:
    """Another file under the same name is another training."""
    path = tmp_path / f"start{SUFFIX}"
    made = recipe(by="movement").override(start=str(path))
    records = []
    for content in (b"one", b"two"):
        path.write_bytes(content)
        records.append(made.as_dict()["start"])
    assert records[0]["path"] == records[1]["path"]
    assert records[0]["sha256"] != records[1]["sha256"]


@pytest.mark.parametrize("late", [False, True])
def test_a_base_that_is_cast_meanwhile_comes_back(late: bool) -> None:
    """Switches write where the parameters are now, in the format that they have now."""
    base, expected = tiny_base("bert"), tiny_base("bert")
    tensors = packed(base, 0)
    change = entries.unpack(base, tensors)
    switch = change.parts["switch"]
    if late:
        switch.off()
        base.towers.to(torch.bfloat16)
        switch.on()
        path = next(iter(tensors))
        index, values = flat_entries(tensors[path])
        assert torch.equal(base.parameter(path).flatten()[index], values.bfloat16())
    else:
        base.towers.to(torch.bfloat16)
    change.remove()
    expected.towers.to(torch.bfloat16)
    for path in base.paths():
        assert torch.equal(base.parameter(path), expected.parameter(path)), path


def test_an_interrupted_switch_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("bert")
    tensors = packed(base, 0)
    write, calls = entries.Entries.write, []

    def interrupted(self: entries.Entries, values: Tensor) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, values)

    monkeypatch.setattr(entries.Entries, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        entries.unpack(base, tensors)
    assert base.is_untouched()
    assert not base.switches


def test_switching_twice_does_nothing_more() -> None:
    base = tiny_base("bert")
    change = entries.unpack(base, packed(base, 0))
    switch = change.parts["switch"]
    switch.on()
    switch.off()
    switch.off()
    change.remove()
    assert base.is_untouched()


def test_weights_in_another_order_of_memory() -> None:
    """A transposed weight trains, is switched, and shares entries with nobody unasked."""
    base = tiny_base("bert")
    path = base.choose(("matrices",))[0]
    parameter = base.parameter(path)
    parameter.data = parameter.data.t().contiguous().t()
    assert not parameter.is_contiguous()
    before = parameter.detach().clone()
    fitted = fit_a_little(base, method("sparse", where=("matrices",), by="random", density=0.1))
    trained, delta = fitted.logits(), fitted.delta()
    fitted.change.remove()
    with delta.applied(base) as wired:
        assert torch.equal(logits_of(wired, base), trained)
    assert torch.equal(parameter, before)
    shape = tuple(parameter.shape)
    first = entries.unpack(base, {path: entries.sparse(torch.tensor([1]), torch.ones(1), shape)})
    second = entries.unpack(base, {path: entries.sparse(torch.tensor([5]), torch.ones(1), shape)})
    assert parameter.flatten()[[1, 5]].tolist() == [1, 1]
    first.remove()
    assert parameter.flatten()[[1, 5]].tolist() == [float(before.flatten()[1]), 1]
    second.remove()
    assert torch.equal(parameter, before)


def test_regrowth_without_room_is_refused() -> None:
    base = tiny_base("bert")
    with pytest.raises(SettingError, match="others are free"):
        supports(base, TinyProbe(READOUT, base), where=("all",), by="gradient", regrow=0.25)


@pytest.mark.parametrize("settings", [{"by": "start"}, {"by": "random", "regrow": 0.25}])
def test_a_start_that_would_be_lost_is_refused(settings: dict[str, Any]) -> None:
    """Outside `where`, or with no change inside it."""
    base, chosen = tiny_base("bert"), method("sparse", where=("Q",), **settings)
    query, key = (base.choose((part,))[0] for part in ("Q", "K"))
    probe = TinyProbe(READOUT)
    probe.start = {path: base.original(path).clone() for path in (query, key)}
    with pytest.raises(SettingError, match="the start has the base's own values in all 2 tensors"):
        chosen.attach(base, probe)
    probe.start[query][0, :4] += 1
    with chosen.attach(base, probe) as change:
        assert len(change.trainable["values"]) == 4
    probe.start[key][0, 0] += 1
    with pytest.raises(SettingError, match=f"a change of {key} and 0 others, which would be left"):
        chosen.attach(base, probe)
    assert base.is_untouched()


def test_places_to_keep_out_of_are_not_free() -> None:
    """They leave too little room for regrowth, which is said before anything is chosen twice."""
    base = tiny_base("bert")
    (path, *_) = base.choose(("Q",))
    start, taken = base.original(path).clone(), torch.ones_like(base.original(path)).bool()
    start[0] += 1
    taken[0], taken[-1, -3:] = False, False
    probe = TinyProbe(READOUT)
    probe.start, probe.outside = {path: start}, {path: taken}
    where = (path.removeprefix("text."),)
    with pytest.raises(SettingError, match="8 of 32 places would be given up, and 3 others are"):
        method("sparse", where=where, by="random", regrow=0.25).attach(base, probe)
    with method("sparse", where=where, by="random", regrow=0.1).attach(base, probe) as change:
        places = next(iter(change.parts.values())).index
        assert len(places.unique()) == len(places) == 32
    assert base.is_untouched()


def test_places_that_repeat_are_refused() -> None:
    with pytest.raises(SettingError, match="repeat or fall"):
        entries.sparse(torch.tensor([1, 1]), torch.ones(2), (2, 2))
