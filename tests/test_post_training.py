"""Post-training pruning: budgets kept, searches the best, factors that bring outputs back."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from howfine import fingerprint, macs, rescaling, timing, units
from howfine.base import Base
from howfine.batch import Batch
from howfine.cuts import smaller
from howfine.delta import SUFFIX, Delta
from howfine.errors import DamagedDelta, SettingError
from howfine.evaluate import evaluate
from howfine.method import Method, method
from howfine.probe import GradientProbe
from howfine.readout import Wired, readout
from howfine.recipe import Recipe
from howfine.replay import Replay
from howfine.slicing import sliced
from howfine.task import Task
from howfine.timing import Timed
from howfine.training import Training
from howfine.tune import tune
from tiny import (
    READOUT,
    TinyProbe,
    fit_a_little,
    logits_of,
    tiny_base,
    tiny_task,
    tiny_whole,
    tuned_weights,
    weight_at,
    written_task,
)

D = "text.encoder.layer.{}.attention.output.dense.weight"
O = "text.encoder.layer.{}.output.dense.weight"  # noqa: E741
HEADS, INNER, LAYERS, HIDDEN = 4, 64, 2, 32
STAGES = ("masked", "rearranged", "rescaled")


def pruning(**settings: Any) -> Any:
    return method("post_training", **{"length": 8, "rows": 16, **settings})


def probed(base: Base, read: Any = READOUT, task: Task | None = None, batch: int = 4) -> Any:
    """A probe with a start: weights that differ from the base's."""
    torch.manual_seed(0)
    task = task or tiny_task()
    wired = Wired(base, read, read.attach(base, task.labels))
    return GradientProbe(wired, base, task.splits["train"], batch, tuned_weights(base))


def whole_probe(base: Base) -> Any:
    """Of a model that writes."""
    base.tokenizer.bos_token, base.tokenizer.eos_token = "[CLS]", "[SEP]"
    read = readout("language_model", max_length=16, max_new_tokens=8)
    return probed(base, read, written_task())


def costs_of(base: Base, length: int = 8) -> dict[str, int]:
    return {path: macs.of_unit(base, path, length) for path in units.counts(base)}


def searched(base: Base, scores: Any, costs: dict[str, int], keep: float) -> dict[str, Tensor]:
    """Within the share `keep` of what all units take, each of a layer the same."""
    each = {path: torch.full((len(own),), costs[path]) for path, own in scores.items()}
    return macs.search(base, scores, each, keep * sum(int(own.sum()) for own in each.values()))


# --- multiply-adds -------------------------------------------------------------------------------


def test_macs_are_those_counted_by_hand() -> None:
    n, d, own = 8, HIDDEN, HIDDEN // HEADS
    for name in ("bert", "gpt2", "distilbert", "t5"):
        base = tiny_base(name)
        for path, cost in costs_of(base, n).items():
            head = 3 * n * d * own + 2 * n * n * own + n * own * d
            assert cost == (head if units.kind(base, path) == "heads" else 2 * n * d), path
    llama = tiny_base("llama")  # two heads share keys and values, neurons are gated
    for path, cost in costs_of(llama, n).items():
        head = 2 * n * d * own + 2 * n * n * own
        assert cost == (head if units.kind(llama, path) == "heads" else 3 * n * d), path


def test_macs_are_what_a_forward_pass_multiplies() -> None:
    """Of a block's matrices, by their shapes and the rows they met, and of attention's products."""
    base, n = tiny_base("bert"), 8
    met: list[int] = []
    hooks = [
        module.register_forward_hook(
            lambda module, given, made: met.append(made.numel() * given[0].shape[-1])
        )
        for path, module in base.towers.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layer." in path
    ]
    base.tower(input_ids=torch.full((1, n), 7))
    for hook in hooks:
        hook.remove()
    products = LAYERS * 2 * n * n * HIDDEN
    counted = units.counts(base)
    assert sum(met) + products == sum(costs_of(base, n)[p] * count for p, count in counted.items())


# --- the search ----------------------------------------------------------------------------------


def drawn(base: Base, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {path: torch.rand(count).square() for path, count in units.counts(base).items()}


@pytest.mark.parametrize("keep", [0.25, 0.3, 0.5, 0.77, 1.0])
def test_the_search_finds_the_best_number_of_heads(keep: float) -> None:
    """Against every subset of the heads, and every number of the best neurons beside it."""
    base = tiny_base("bert", intermediate_size=10)
    costs = costs_of(base)
    for seed in range(5):
        scores = drawn(base, seed)
        kept = searched(base, scores, costs, keep)
        budget = keep * sum(costs[p] * len(v) for p, v in scores.items())
        assert sum(costs[p] * int(on.sum()) for p, on in kept.items()) <= budget
        assert all(on.any() for on in kept.values())
        found = sum(float(scores[p].double()[on].sum()) for p, on in kept.items())
        assert found == pytest.approx(best_sum(base, scores, costs, budget), rel=1e-6)


def best_sum(base: Base, scores: Any, costs: dict[str, int], budget: float) -> float:
    heads, neurons = (units.by_kind(base, scores)[kind] for kind in ("heads", "neurons"))
    places = [(path, unit) for path in heads for unit in range(len(heads[path]))]
    firm = [own.max() for own in neurons.values()]
    others = torch.cat([own.sort(descending=True).values[1:] for own in neurons.values()])
    others = others.sort(descending=True).values
    best = 0.0
    for size in range(LAYERS, len(places) + 1):
        for chosen in itertools.combinations(places, size):
            if {path for path, _ in chosen} != set(heads):
                continue
            left = budget - size * costs[next(iter(heads))]
            room = int(left // costs[next(iter(neurons))]) - len(firm)
            if room >= 0:
                own = sum(float(heads[path][unit]) for path, unit in chosen)
                best = max(best, own + float(sum(firm)) + float(others[:room].sum()))
    return best


def test_a_budget_out_of_reach_names_the_nearest() -> None:
    """Which leaves a head and a neuron of each layer."""
    base = tiny_base("bert")
    for of in ("macs@8", "encoder", "parameters"):
        with pytest.raises(SettingError, match="one of both of each layer, take") as error:
            pruning(keep=f"0.01 {of}").attach(base, probed(base))
        nearest = str(error.value).rpartition("nearest keep is ")[2].strip("'")
        with pruning(keep=nearest, stage="masked").attach(base, probed(base)) as change:
            assert [int(on.sum()) for on in change.parts["kept"].values()] == [1] * 2 * LAYERS
        less = f"{float(nearest.partition(' ')[0]) - 1e-3} {of}"
        with pytest.raises(SettingError, match="the nearest keep is"):
            pruning(keep=less).attach(base, probed(base))
    with pytest.raises(SettingError, match="the nearest keep is"):
        pruning(keep=0.01).attach(base, probed(base))
    assert base.is_untouched()
    for wrong in ({"keep": 0.0}, {"keep": 1.1}, {"keep": "half"}, {"keep": "5 s"}):
        with pytest.raises(SettingError, match="expected a share above 0"):
            pruning(**wrong)
    for wrong in ({"length": 0}, {"rows": 0}):
        with pytest.raises(SettingError, match="expected numbers from 1 on"):
            pruning(**wrong)


def cut(base: Base, chosen: Any) -> Any:
    """The model without what is off."""
    with chosen.attach(base, probed(base)) as change:
        packed = chosen.pack(base, change)
    with chosen.unpack(base, packed):
        return smaller(base)


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_as_many_parameters_stay_as_asked(share: float) -> None:
    """Counted in the model that is cut; one neuron more would be too many."""
    base = tiny_base("bert")
    whole = sum(p.numel() for p in base.tower.parameters())
    matrices = LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER + 5 * HIDDEN + INNER)
    for of, total in (("encoder", matrices), ("parameters", whole)):
        keep = share if of == "encoder" else 1 - (1 - share) * matrices / whole
        model = cut(base, pruning(keep=f"{keep:.6f} {of}", stage="masked"))
        spent = total - whole + sum(p.numel() for p in model.parameters())
        assert total * keep - (2 * HIDDEN + 1) < spent <= total * keep


def test_a_time_is_met_by_the_tables_of_heads_and_neurons(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a clock to which a head is ten neurons, and half of a layer's neurons are for nothing."""
    base, d = tiny_base("bert"), HIDDEN // HEADS

    def took(base: Base, model: Any, rows: int, tokens: int) -> Timed:
        blocks = model.encoder.layer
        heads = sum(block.attention.self.query.out_features // d for block in blocks)
        neurons = [block.intermediate.dense.out_features for block in blocks]
        free = INNER // 2
        spent = 5.0 + heads + 0.1 * sum(max(0, own - free) for own in neurons)
        return Timed(spent, 5.0 + LAYERS * (HEADS + 0.1 * free), 1)

    monkeypatch.setattr(timing, "of_model", took)
    monkeypatch.setattr(fingerprint, "cache_folder", lambda: tmp_path / "cache")
    whole = 5.0 + LAYERS * (HEADS + 0.1 * INNER / 2)
    for asked in (18.0, 12.0, 9.0):
        assert asked < whole
        model = cut(base, pruning(keep=f"{asked} ms@1x8", stage="masked"))
        spent = took(base, model, 1, 8).milliseconds
        assert asked - 0.3 < spent <= asked + 0.05  # between two sizes, time goes straight
    with pruning(keep=f"{whole} ms@1x8").attach(base, probed(base)) as change:
        assert all(on.all() for on in change.parts["kept"].values())
    with pytest.raises(SettingError, match="take 7 ms; the nearest keep is '7.0 ms@1x8'"):
        pruning(keep="6 ms@1x8").attach(base, probed(base))
    assert base.is_untouched()


# --- the rearrangement ---------------------------------------------------------------------------


def objective(on: Tensor, gradients: Tensor) -> float:
    """(1-m)ᵀ·F·(1-m) of a block F = Σ g gᵀ."""
    return float(gradients.double()[:, ~on].sum(1).square().sum())


def test_rearranging_lowers_the_blocks_objective_and_keeps_counts() -> None:
    lower = 0
    for seed in range(20):
        torch.manual_seed(seed)
        gradients = torch.randn(6, 12) @ torch.randn(12, 12)  # units that have much in common
        scores = gradients.square().sum(0)
        on = scores >= scores.sort(descending=True).values[seed % 11]
        found = macs.rearranged(on, gradients)
        before, after = objective(on, gradients), objective(found, gradients)
        assert int(found.sum()) == int(on.sum())
        assert after <= before * (1 + 1e-9)
        lower += after < 0.99 * before
    assert lower > 10
    assert macs.rearranged(torch.ones(12, dtype=torch.bool), gradients).all()


def test_two_that_cancel_each_other_go_together() -> None:
    gradients = torch.tensor([[1.0, 1.1, -1.05, 0.2]])  # without 0 and 2 almost nothing is missing
    on = torch.tensor([False, True, True, False])
    assert macs.rearranged(on, gradients).tolist() == [False, True, False, True]


# --- factors -------------------------------------------------------------------------------------


def test_the_system_is_that_of_the_units_outputs() -> None:
    """AᵀA and Aᵀe against A written out: a column a unit, a row for each number of the output."""
    torch.manual_seed(0)
    for name, number in (("bert", 1), ("gpt2", 1), ("bert", 0), ("gpt2", 0)):
        base = tiny_base(name)
        path = list(units.counts(base))[number]
        on = torch.rand(base.units_into(path)) < 0.6
        weight = base.original(path)
        system = rescaling.System(base, path, weight, on)
        size = weight.shape[units.axis(base, "in")]
        inputs, missing = torch.randn(7, size), torch.randn(7, HIDDEN)
        system.add(inputs[:3], missing[:3])
        system.add(inputs[3:], missing[3:])
        matrix = weight.T if units.axis(base, "in") == 1 else weight
        parts = torch.einsum(
            "tuc,uco->tou", inputs.view(7, len(on), -1), matrix.reshape(len(on), -1, HIDDEN)
        )
        columns = parts[..., on].reshape(7 * HIDDEN, -1)
        if units.kind(base, path) == "heads":
            columns = torch.cat([columns, torch.ones(len(columns), 1)], dim=1)
        left, right = system.normal()
        torch.testing.assert_close(left.float(), columns.T @ columns, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            right.float(), columns.T @ missing.flatten(), rtol=1e-4, atol=1e-4
        )


def gap(base: Base, probe: Any, path: str, at: dict[str, Tensor]) -> float:
    """How far a layer's outputs before its LayerNorm are from those at the start."""
    streams = []
    for weights in (probe.start, at):
        with ExitStack() as undo:
            heard = rescaling.Heard(base, path, undo)
            each = [heard.taken(batch) for batch in probe.runs(base, weights, rows=16)]
        streams.append(torch.cat([stream for calls in each for _, stream in calls]))
    return float((streams[0] - streams[1]).square().mean())


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama"])
def test_factors_bring_a_layers_outputs_nearer(name: str, monkeypatch: Any) -> None:
    """On the rows that they were fitted on, of one layer after another; the teacher is whole."""
    base = tiny_base(name)
    probe, counts = probed(base), units.counts(base)
    everything = {path: torch.ones(count, dtype=torch.bool) for path, count in counts.items()}
    monkeypatch.setattr(rescaling, "MOST", 1e6)
    with pruning(stage="rearranged", keep=0.6).attach(base, probe) as change:
        kept = change.parts["kept"]
    found = rescaling.factors(base, probe, probe.start, kept, everything, 16)
    at = {p: units.without(base, p, probe.start[p], on) for p, on in kept.items()}
    fitted = 0
    for path, on in kept.items():
        before = gap(base, probe, path, {**probe.start, **at})
        at[path] = rescaling.scaled(base, probe.start[path], on, found[path])
        if (found[path] != 1).any():
            fitted += 1
            share = 1.0 if units.kind(base, path) == "heads" else 0.98
            assert gap(base, probe, path, {**probe.start, **at}) < share * before
    assert fitted == len(kept) - 1


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "albert", "distilbert", "llama", "electra"])
def test_nothing_is_rescaled_where_nothing_went_off(name: str) -> None:
    base = tiny_base(name)
    everything = {p: torch.ones(n, dtype=torch.bool) for p, n in units.counts(base).items()}
    probe = probed(base)
    for path, own in rescaling.factors(
        base, probe, probe.start, everything, everything, 16
    ).items():
        assert torch.equal(own, torch.ones_like(own)), path
    assert base.is_untouched()


def test_the_lowest_attention_keeps_its_factors_and_wild_ones_end_it(monkeypatch: Any) -> None:
    base = tiny_base("bert")
    probe = probed(base)
    monkeypatch.setattr(rescaling, "MOST", 1e6)
    with pruning(keep=0.5).attach(base, probe) as change:
        apart, kept = change.parts["apart"], change.parts["kept"]
    assert not apart[D.format(0)].any()
    assert all(apart[path].any() for path in (O.format(0), D.format(1), O.format(1)))
    assert not any(own[~kept[path]].any() for path, own in apart.items())
    monkeypatch.setattr(rescaling, "MOST", 1e-3)
    with pruning(keep=0.5).attach(base, probe) as change:
        assert not any(own.any() for own in change.parts["apart"].values())


def test_replayed_blocks_give_what_a_whole_pass_gives() -> None:
    for base, made in (
        (tiny_base("bert"), probed),
        (tiny_base("t5"), probed),
        (tiny_whole("bart"), whole_probe),
        (tiny_whole("t5"), whole_probe),
    ):
        probe = made(base)
        replay = Replay(base, probe, probe.start, 8)
        top = replay.blocks[-1]
        whole: list[Any] = []
        hook = top.register_forward_hook(lambda module, given, made, held=whole: held.append(made))
        for _ in probe.runs(base, probe.start, rows=8):
            pass
        hook.remove()
        for number in range(base.depth):
            assert len(list(replay.block(number, done=True))) == 2
        again = replay._given[base.anatomy.stack_of(base.depth - 1).first]
        for one, (other,) in zip(whole, again[:2], strict=True):
            one, other = (x[0] if isinstance(x, tuple) else x for x in (one, other))
            assert torch.equal(one, other)
        assert base.is_untouched()


def test_the_first_position_alone_counts_where_nothing_else_is_read() -> None:
    base = tiny_base("bert")
    for pooling, first in (("cls", True), ("pooler", True), ("mean", False)):
        probe = probed(base, readout("classifier", max_length=32, pooling=pooling))
        for path in (O.format(0), O.format(1), D.format(1)):
            with ExitStack() as undo:
                heard = rescaling.Heard(base, path, undo)
                for batch in probe.runs(base, rows=4):
                    ((inputs, stream),) = heard.taken(batch)
            alone = first and path == O.format(1)
            assert len(inputs) == (4 if alone else int(batch.inputs["attention_mask"].sum()))
            assert stream.shape == (len(inputs), HIDDEN)


def test_layers_that_scale_what_units_give_are_not_rescaled() -> None:
    base = tiny_base("gemma2")
    with pytest.raises(SettingError, match="choose stage=rearranged"):
        pruning().attach(base, probed(base))
    assert base.is_untouched()
    with pruning(stage="rearranged").attach(base, probed(base)) as change:
        assert not all(on.all() for on in change.parts["kept"].values())


# --- from end to end -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "distilbert", "albert", "mpnet"])
def test_a_file_gives_the_very_same_outputs(name: str, tmp_path: Path) -> None:
    base = tiny_base(name)
    fitted = fit_a_little(base, pruning(keep=0.4), steps=0)
    expected, delta = fitted.logits(), fitted.delta()
    fitted.change.remove()
    delta.save(tmp_path / f"x{SUFFIX}")
    with Delta.load(tmp_path / f"x{SUFFIX}").applied(base) as wired:
        assert torch.equal(logits_of(wired, base), expected)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_decoders_are_pruned(name: str) -> None:
    base = tiny_whole(name)
    with pruning().attach(base, whole_probe(base)) as change:
        packed = pruning().pack(base, change)
        read_then = {path: weight_at(base, path) for path in units.counts(base)}
    assert any(name.startswith("factors:") for name in packed)
    with pruning().unpack(base, packed):
        assert all(torch.equal(weight_at(base, path), own) for path, own in read_then.items())
    assert base.is_untouched()


def fit(base: Base, task: Task, folder: Path, chosen: Method, name: str, **training: Any) -> Any:
    start = training.pop("start", None)
    made = Recipe("own", chosen, READOUT, Training(**training), start=start)
    return tune(base, task, made, out=folder / f"{name}{SUFFIX}", seed=1)


def test_a_fine_tuned_model_is_pruned_and_nothing_trains(tmp_path: Path) -> None:
    """Weights and head are those of the start, but for what went off and the factors."""
    base, task = tiny_base("bert"), tiny_task()
    rates = {"learning_rate": 0.01, "batch_size": 8}
    tuned = fit(base, task, tmp_path, method("full"), "tuned", max_steps=8, **rates)
    training = replace(Recipe.load("post-training").training, batch_size=8)
    still = dict(vars(training))
    same = fit(base, task, tmp_path, pruning(keep=1.0), "same", start=str(tuned.path), **still)
    assert same.score.scores == tuned.score.scores
    theirs, head = tuned.delta.tensors(base)
    ours, own_head = same.delta.tensors(base)
    assert all(torch.equal(head[key], own_head[key]) for key in head)
    assert {key: v for key, v in ours.items() if v.dtype != torch.bool}.keys() == theirs.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    half = fit(base, task, tmp_path, pruning(keep=0.5), "half", start=str(tuned.path), **still)
    assert evaluate(half.path, base, task, split="dev").scores == half.score.scores
    held, own_head = half.delta.tensors(base)
    assert all(torch.equal(head[key], own_head[key]) for key in head)
    on = {n.removeprefix("units:"): int(v.sum()) for n, v in held.items() if v.dtype == torch.bool}
    costs, counts = costs_of(base), units.counts(base)
    whole = sum(costs[p] * n for p, n in counts.items())
    assert 0.4 * whole < sum(costs[p] * n for p, n in on.items()) <= 0.5 * whole
    assert base.is_untouched()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_sliced_model_gives_what_the_masked_one_gives(name: str, tmp_path: Path) -> None:
    base = tiny_base(name)
    fitted = fit_a_little(base, pruning(keep=0.5), steps=0)
    expected, delta = fitted.logits(), fitted.delta()
    fitted.change.remove()
    base.tower.save_pretrained(tmp_path / "whole")
    done = sliced(delta, tmp_path / "small", base)
    assert done.parameters < done.before
    small = Base.load(str(done.folder))
    small.tokenizer = base.tokenizer
    with Delta.load(done.readout).applied(small) as wired:
        torch.testing.assert_close(logits_of(wired, small), expected, atol=1e-5, rtol=0)


# --- bad input -----------------------------------------------------------------------------------


def test_a_task_and_a_start_are_needed(tmp_path: Path) -> None:
    base = tiny_base("bert")
    with pytest.raises(SettingError, match="which needs a task"):
        pruning().attach(base)
    with pytest.raises(SettingError, match="the start moves no weight"):
        fit(base, tiny_task(), tmp_path, pruning(), "x", max_steps=1)


def test_a_start_that_would_be_lost_is_refused() -> None:
    base = tiny_base("bert")
    with pytest.raises(SettingError, match="left out of the file; name them in beside"):
        pruning(beside=("norm",)).attach(base, TinyProbe(READOUT, base))
    assert base.is_untouched()


def test_a_file_of_other_factors_is_refused() -> None:
    base = tiny_base("bert")
    with pruning().attach(base, TinyProbe(READOUT, base)) as change:
        packed = pruning().pack(base, change)
    name = next(name for name in packed if name.startswith("factors:"))
    own = packed[name]
    for odd in (own[:-1], own[None], own.bool()):
        with pytest.raises(DamagedDelta, match="do not fit which of them are on"):
            pruning().unpack(base, {**packed, name: odd})
    alone = {key: v for key, v in packed.items() if key != f"units:{name.partition(':')[2]}"}
    with pytest.raises(DamagedDelta, match="do not fit which of them are on"):
        pruning().unpack(base, alone)
    assert base.is_untouched()


def test_a_shared_blocks_runs_count_but_for_what_they_read() -> None:
    """ALBERT: attention of the first run reads embeddings; neurons of the last, one position."""
    base = tiny_base("albert")
    with pruning().attach(base, probed(base)) as change:
        apart = change.parts["apart"]
    for path, own in apart.items():
        assert own.any(), path
    assert base.is_untouched()


def test_padding_of_a_decoder_is_known_by_its_targets() -> None:
    targets = torch.tensor([[-100, 5, 6, -100], [-100, 7, -100, -100]])
    batch = Batch(inputs={}, targets=targets)
    found = rescaling._of_decoder(batch, torch.ones(2, 4, dtype=torch.bool))
    assert found.tolist() == [[True, True, True, False], [True, True, False, False]]
    other = rescaling._of_decoder(batch, torch.ones(2, 5, dtype=torch.bool))
    assert other.all()


def test_a_base_without_neurons_that_are_known_is_refused() -> None:
    """Instead of a budget that the heads alone would keep."""
    base = tiny_base("bert")
    heads = {path: own for path, own in drawn(base, 0).items() if "attention" in path}
    costs = costs_of(base)
    with pytest.raises(SettingError, match="no matrix of tiny-bert that neurons lead into"):
        searched(base, heads, costs, 0.5)
    letters = {letter: own for letter, own in base.anatomy.letters.items() if letter != "O"}
    base.anatomy = replace(base.anatomy, letters=letters)
    for which in ("both", "neurons"):
        with pytest.raises(SettingError, match="no matrix of tiny-bert that neurons lead into"):
            units.counts(base, which)
    assert units.counts(base, "heads").keys() == heads.keys()
    chosen = method("prune", by="magnitude", units="heads")
    with chosen.attach(base) as change:
        packed = chosen.pack(base, change)
    with chosen.unpack(base, packed):
        pass
    assert base.is_untouched()


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_importances_that_are_no_numbers_are_refused(odd: float) -> None:
    """They would be taken for the highest, and say what stays."""
    base = tiny_base("bert")
    information, costs = drawn(base, 0), costs_of(base)
    path = list(information)[1]
    information[path][3] = odd
    with pytest.raises(SettingError, match=f"1 of .* units at {path} .*load the base in float32"):
        searched(base, information, costs, 0.5)
    for scope in ("global", "layer"):
        with pytest.raises(SettingError, match="NaN or infinite, so that none can be ranked"):
            units.strongest(base, information, 0.5, scope)


def test_a_budget_is_exact_beyond_single_precision() -> None:
    """Everything stays at keep 1, however large the multiply-adds are."""
    base = tiny_base("bert")
    counts = units.counts(base)
    information = {path: torch.rand(count) for path, count in counts.items()}
    costs = {path: 700_000_049 if "attention" in path else 90_000_017 for path in counts}
    kept = searched(base, information, costs, 1.0)
    assert all(on.all() for on in kept.values())


def test_a_base_in_half_precision_is_pruned_as_it_is() -> None:
    """Nothing trains, so that no update is lost to the format."""
    base = tiny_base("bert")
    base.towers.to(torch.bfloat16)
    with pruning().attach(base, probed(base)) as change:
        found = {path: weight_at(base, path).clone() for path in base.paths()}
        packed = pruning().pack(base, change)
    assert any(not torch.equal(value, base.parameter(path)) for path, value in found.items())
    with pruning().unpack(base, packed):
        for path, value in found.items():
            torch.testing.assert_close(weight_at(base, path), value, rtol=0.02, atol=1e-3)
