"""Gates on heads and neurons: chances in closed form, a Lagrangian that holds, exact files."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from howfine import concrete, trainer, units
from howfine.base import Base
from howfine.budgets import Budget
from howfine.change import Change
from howfine.delta import SUFFIX, Delta
from howfine.errors import DamagedDelta, SettingError
from howfine.evaluate import evaluate
from howfine.method import Method, method
from howfine.recipe import Recipe
from howfine.slicing import sliced
from howfine.training import Training
from howfine.tune import tune
from howfine.unit_gates import EDGE, LEAST, MOST, TEMPERATURE, Settling
from tiny import READOUT, fit_a_little, logits_of, tiny_base, tiny_task, weight_at, wire

# Paths of what heads lead into, and neurons, in BERT's blocks.
D = "text.encoder.layer.{}.attention.output.dense.weight"
O = "text.encoder.layer.{}.output.dense.weight"  # noqa: E741
HIDDEN, INNER, LAYERS, HEADS = 32, 64, 2, 4
HEAD, NEURON = 4 * HIDDEN * 8 + 3 * 8, 2 * HIDDEN + 1
PRUNABLE = LAYERS * (HEADS * HEAD + INNER * NEURON)
SHARPNESS = 0.8 / (2 / 3)


def settling_of(change: Change) -> Settling:
    found: Settling = change.parts["settling"]
    return found


def stays(change: Change) -> int:
    """Parameters of the units that are on without chance."""
    kept = settling_of(change).kept()
    return sum(
        int(on.sum()) * (HEAD if "attention" in path else NEURON) for path, on in kept.items()
    )


def set_gates(change: Change, seed: int = 0, spread: float = 2.0, at: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in change.trainable.items():
            if name.endswith((":log_alpha", ":whole")):
                value.copy_(at + spread * torch.randn(value.shape, generator=generator))


# --- gates ---------------------------------------------------------------------------------------


def test_chances_are_those_of_the_draws() -> None:
    """In closed form: z = 0 where s ≤ -l/(r-l), that is logit u ≤ τ·log(-l/r) - log α."""
    alphas = torch.tensor([LEAST, -1.0, 0.0, 1.0, MOST])
    found = concrete.chances(alphas, TEMPERATURE)
    for alpha, chance in zip(alphas.tolist(), found.tolist(), strict=True):
        bound = TEMPERATURE * math.log(0.1 / 1.1) - alpha
        assert chance == pytest.approx(1 - 1 / (1 + math.exp(-bound)), abs=1e-6)
    assert found[2].item() == pytest.approx(0.8318, abs=1e-4)  # σ(2/3·log 11)
    noise = (torch.arange(100_000) + 0.5) / 100_000
    drawn = concrete.hard_concrete(alphas[:, None], noise[None], TEMPERATURE)
    assert torch.allclose((drawn > 0).float().mean(1), found, atol=1e-4)


def test_multipliers_go_up_where_all_else_goes_down() -> None:
    value = torch.tensor([2.0, -3.0], requires_grad=True)
    (concrete.ascended(value) * torch.tensor([5.0, 7.0])).sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [-5.0, -7.0]
    assert torch.equal(concrete.ascended(value), value)


def test_a_step_has_one_draw_and_the_next_another() -> None:
    base = tiny_base("bert")
    chosen = method("l0")
    with chosen.attach(base) as change:
        set_gates(change, at=0.0)
        base.towers.train()
        first, again = weight_at(base, D.format(0)), weight_at(base, D.format(0))
        list(chosen.passes(change, 0.5))
        other = weight_at(base, D.format(0))
        base.towers.eval()
        settled = [weight_at(base, D.format(0)) for _ in range(2)]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(*settled)


def test_a_draw_is_the_gate_times_the_weight() -> None:
    """By head and by neuron; with sub-layers, times one more gate."""
    base = tiny_base("bert")
    for layers in (False, True):
        with method("l0", layers=layers).attach(base) as change:
            set_gates(change)
            base.towers.train()
            for path, width in ((D.format(1), 8), (O.format(1), 1)):
                gate = settling_of(change).gates[path]
                assert EDGE <= gate.noise.min() <= gate.noise.max() <= 1 - EDGE
                own = torch.cat(
                    [gate.log_alpha] if gate.whole is None else [gate.log_alpha, gate.whole]
                )
                z = concrete.hard_concrete(own, gate.noise)
                count = len(gate.log_alpha)
                z = z[:count] * (z[count:] if layers else 1)
                expected = base.original(path) * z.repeat_interleave(width)[None]
                assert torch.allclose(weight_at(base, path), expected.detach())
            base.towers.eval()


# --- size ----------------------------------------------------------------------------------------


def test_costs_are_the_parameters_of_a_unit() -> None:
    for name, expected in {
        "bert": (HEAD, NEURON),
        "gpt2": (HEAD, NEURON),
        "t5": (HEAD - 24, 64),
    }.items():
        base = tiny_base(name)
        found = units.costs(base, units.counts(base))
        kinds = {units.kind(base, path): cost for path, cost in found.items()}
        assert (kinds["heads"], kinds["neurons"]) == expected, name
    base = tiny_base("llama")  # two heads share keys and values, which are neither's; gated nets
    found = {units.kind(base, p): n for p, n in units.costs(base, units.counts(base)).items()}
    assert found == {"heads": 2 * HIDDEN * 8, "neurons": 3 * HIDDEN}


@pytest.mark.parametrize("layers", [False, True])
def test_expected_size_is_all_and_nothing_at_the_ends(layers: bool) -> None:
    base = tiny_base("bert")
    with method("l0", layers=layers).attach(base) as change:
        settling = settling_of(change)
        assert settling.prunable == PRUNABLE
        for at, expected in ((60.0, 0.0), (-60.0, 1.0)):  # beyond what a training lets them be
            set_gates(change, spread=0.0, at=at)
            assert settling.expected().detach().item() == pytest.approx(expected, abs=1e-6)
        set_gates(change)
        by_hand = 0.0
        for path, gate in settling.gates.items():
            chances = torch.sigmoid(gate.log_alpha - TEMPERATURE * math.log(0.1 / 1.1))
            if gate.whole is not None:
                chances = chances * torch.sigmoid(gate.whole - TEMPERATURE * math.log(0.1 / 1.1))
            by_hand += float(chances.detach().sum()) * (HEAD if "attention" in path else NEURON)
        assert settling.expected().detach().item() == pytest.approx(
            1 - by_hand / PRUNABLE, abs=1e-6
        )


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.2, 0.9])
def test_the_penalty_is_the_papers(progress: float) -> None:
    base = tiny_base("bert")
    chosen = method("l0", keep=0.3, warm=0.2)
    with chosen.attach(base) as change:
        set_gates(change)
        assert chosen.penalty(change, progress).item() == 0  # both start at 0
        with torch.no_grad():
            change.trainable["multipliers"].copy_(torch.tensor([0.5, 3.0]))
        apart = float(settling_of(change).expected().detach()) - 0.7 * min(1, progress / 0.2)
        found = chosen.penalty(change, progress)
        assert found.item() == pytest.approx(0.5 * apart + 3 * apart**2, rel=1e-5)
        found.backward()
        gradient = change.trainable["multipliers"].grad
        assert gradient is not None
        assert gradient.tolist() == pytest.approx([-apart, -(apart**2)], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "layers"), [(0.3, False), (0.6, True)])
def test_the_lagrangian_holds_the_size(keep: float, layers: bool) -> None:
    """|ŝ - t| < 0.01 where a training ends, while λ2 has risen all the time."""
    base, steps = tiny_base("bert"), 350
    chosen = method("l0", keep=keep, layers=layers, beside=("norm",))
    torch.manual_seed(0)
    fitted = wire(base, chosen)
    fitted.wired.train()
    optimiser = torch.optim.AdamW([{"lr": 1e-3, **g} for g in chosen.groups(fitted.change)])
    batch = READOUT.collate(base, tiny_task().splits["train"][:4]).as_kwargs()
    settling, risen = settling_of(fitted.change), [0.0]
    for step in range(steps):
        list(chosen.passes(fitted.change, step / steps))
        loss = fitted.wired(**batch)["loss"] + chosen.penalty(fitted.change, step / steps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        risen.append(float(fitted.change.trainable["multipliers"][1].detach()))
    for gate in settling.gates.values():
        gate.clamp()
    assert abs(float(settling.expected().detach()) - (1 - keep)) < 0.01
    assert all(later >= earlier for earlier, later in itertools.pairwise(risen))
    assert risen[-1] > 1
    fitted.change.remove()


# --- without chance ------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("keep", [0.2, 0.37, 0.5, 0.75, 1.0])
def test_as_much_stays_as_asked(keep: float, layers: bool) -> None:
    """Never more; less by no more than a unit, wherever the gates' chances are."""
    base = tiny_base("bert")
    with method("l0", keep=keep, layers=layers).attach(base) as change:
        for at in (-1.0, 1.0, 3.0):
            set_gates(change, spread=0.4, at=at)
            assert keep * PRUNABLE - HEAD < stays(change) <= keep * PRUNABLE
            if not layers:
                assert all(on.any() for on in settling_of(change).kept().values())


def test_as_many_are_on_as_on_average_the_likeliest_ones() -> None:
    base = tiny_base("bert")
    with method("l0", keep=1.0).attach(base) as change:
        set_gates(change, at=0.0, spread=3.0)
        settling = settling_of(change)
        size = sum(
            round(concrete.chances(gate.log_alpha).sum().item())
            * (HEAD if "attention" in path else NEURON)
            for path, gate in settling.gates.items()
        )
    with method("l0", keep=size / PRUNABLE + 1e-9).attach(base) as change:
        set_gates(change, at=0.0, spread=3.0)
        for path, on in settling_of(change).kept().items():
            gate = settling_of(change).gates[path]
            alphas, count = (
                gate.log_alpha.detach(),
                round(concrete.chances(gate.log_alpha).sum().item()),
            )
            likely = alphas >= alphas.sort(descending=True).values[count - 1]
            value = torch.sigmoid(alphas * SHARPNESS)
            assert torch.equal(on, likely)
            factors = settling_of(change).factors(gate)
            assert torch.equal(factors, torch.where(on, value, 0))


def test_whole_sub_layers_go_off() -> None:
    """Of each kind as many as on average; what is left of the size is the others'."""
    base = tiny_base("bert")
    with method("l0", keep=0.5, layers=True).attach(base) as change:
        set_gates(change, spread=0.1, at=3.0)
        with torch.no_grad():
            for path, value in ((D.format(0), 3.0), (D.format(1), LEAST), (O.format(0), LEAST)):
                change.trainable[f"{path}:whole"].fill_(value)
        kept = settling_of(change).kept()
        base.towers.eval()
        assert not weight_at(base, D.format(1)).any()
    assert [int(kept[D.format(n)].sum()) for n in range(2)] == [HEADS, 0]
    assert [int(kept[O.format(n)].sum()) for n in range(2)] == [0, INNER]


@pytest.mark.parametrize("at", [LEAST, 0.0, 3.0])
def test_a_head_and_a_neuron_stay_however_small_the_size(at: float) -> None:
    """Without them a model would have nothing left of a kind, and nobody would be told."""
    base = tiny_base("bert")
    least = math.ceil(1000 * (HEAD + NEURON) / PRUNABLE) / 1000
    with pytest.raises(
        SettingError, match=rf"a head and a neuron have; the nearest keep is '{least}'$"
    ):
        method("l0", keep=least - 0.001, layers=True).attach(base)
    for keep in (least, 1.5 * least, 0.5):
        with method("l0", keep=keep, layers=True).attach(base) as change:
            set_gates(change, at=at, spread=0.5)
            with torch.no_grad():
                for n in range(LAYERS):
                    change.trainable[f"{D.format(n)}:whole"].fill_(LEAST)
                    change.trainable[f"{O.format(n)}:whole"].fill_(LEAST)
            kept = settling_of(change).kept()
            assert stays(change) <= keep * PRUNABLE
        for kind in (D, O):
            assert sum(int(kept[kind.format(n)].sum()) for n in range(LAYERS)) >= 1
    assert base.is_untouched()


def test_what_a_head_is_too_large_for_goes_to_neurons() -> None:
    base = tiny_base("bert")
    size = LAYERS * (HEAD + NEURON) + HEAD - 1
    assert HEAD > 2 * NEURON
    with method("l0", keep=size / PRUNABLE + 1e-9).attach(base) as change:
        set_gates(change, at=3.0, spread=0.1)
        kept = settling_of(change).kept()
    assert sum(int(on.sum()) for path, on in kept.items() if "attention" in path) == LAYERS
    neurons = sum(int(on.sum()) for path, on in kept.items() if "attention" not in path)
    assert neurons == (size - LAYERS * HEAD) // NEURON


@pytest.mark.parametrize(
    "keep", ["0.6 encoder", "0.9 parameters", "0.5 macs@16", "0.3 macs", "1 parameters"]
)
def test_other_budgets_hold(keep: str) -> None:
    """What stays on is within them, and one neuron more is not."""
    base, budget = tiny_base("bert"), Budget.parse(keep)
    with method("l0", keep=keep).attach(base) as change:
        set_gates(change, at=0.0, spread=2.0)
        settling = settling_of(change)
        kept = settling.kept()
        prices = budget.prices(base, settling.units)
        spent = prices.whole - sum(
            float(prices.costs[path][0]) * int((~on).sum()) for path, on in kept.items()
        )
        neuron = float(prices.costs[O.format(0)][0])
        assert spent <= budget.amount * prices.whole
        if all(bool(on.all()) for on in kept.values()):
            assert budget.amount == 1
        else:
            assert spent + neuron > budget.amount * prices.whole
    assert base.is_untouched()


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("keep", ["0.01 encoder", "0.1 parameters", "0.02 macs@16"])
def test_the_nearest_of_other_budgets_is_taken(keep: str, layers: bool) -> None:
    base = tiny_base("bert")
    with pytest.raises(SettingError, match="the nearest keep is ") as refused:
        method("l0", keep=keep, layers=layers).attach(base)
    nearest = str(refused.value).split("nearest keep is '")[1].split("'")[0]
    with method("l0", keep=nearest, layers=layers).attach(base) as change:
        on = settling_of(change).kept()
        assert sum(int(own.sum()) for own in on.values()) > 0
    assert base.is_untouched()


def test_a_time_becomes_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose layers are cut alike and that is as fast."""
    base = tiny_base("bert")
    monkeypatch.setattr(Budget, "_as_fast", lambda *_: 0.4)
    with method("l0", keep="5 ms@1x16").attach(base) as change:
        assert settling_of(change).budget == int(0.4 * PRUNABLE)


def test_evaluation_follows_the_gates() -> None:
    """What is computed once is computed anew after a step, and after a state is loaded."""
    base = tiny_base("bert")
    chosen = method("l0", beside=())
    fitted = wire(base, chosen)
    fitted.wired.eval()
    before = fitted.logits()
    state = {name: value.clone() for name, value in fitted.wired.state_dict().items()}
    set_gates(fitted.change, at=0.0)
    moved = fitted.logits()
    assert not torch.equal(before, moved)
    fitted.wired.load_state_dict(state, strict=False)
    assert torch.equal(fitted.logits(), before)
    fitted.change.remove()
    assert base.is_untouched()


# --- from end to end -----------------------------------------------------------------------------


def fit(
    base: Base, task: Any, folder: Path, chosen: Method, name: str = "x", **training: Any
) -> Any:
    start = training.pop("start", None)
    settings = {"max_steps": 4, "batch_size": 8, "learning_rate": 0.01, **training}
    made = Recipe("own", chosen, READOUT, Training(**settings), start=start)
    return tune(base, task, made, out=folder / f"{name}{SUFFIX}", seed=1)


@pytest.mark.parametrize("layers", [False, True])
def test_a_fine_tuned_model_is_pruned_stored_and_cut(layers: bool, tmp_path: Path) -> None:
    base, task = tiny_base("bert"), tiny_task()
    tuned = fit(base, task, tmp_path, method("full"), "tuned", max_steps=10)
    chosen = method("l0", keep=0.5, layers=layers)
    done = fit(base, task, tmp_path, chosen, start=str(tuned.path), max_steps=15)
    assert evaluate(done.path, base, task, split="dev").scores == done.score.scores
    kept, _ = units.parted(base, done.delta.tensors(base)[0], 1)
    size = sum(int(on.sum()) * (HEAD if "attention" in p else NEURON) for p, on in kept.items())
    assert size <= 0.5 * PRUNABLE
    small = sliced(done.path, tmp_path / "small", base)
    for number in range(LAYERS):  # a module without inputs is none
        assert small.heads[number] == max(1, int(kept[D.format(number)].sum()))
        assert small.neurons[number] == max(1, int(kept[O.format(number)].sum()))
    examples = task.splits["dev"]
    with done.delta.applied(base) as wired:
        masked = logits_of(wired, base, examples)
    cut = Base.load(str(small.folder))
    with Delta.load(small.readout).applied(cut) as wired:
        assert torch.allclose(logits_of(wired, cut, examples), masked, atol=1e-5)
    assert base.is_untouched()


def test_what_is_off_takes_no_place_in_the_file() -> None:
    """Factors are folded into what units lead into; rows that make units that are off stay."""
    base = tiny_base("bert")
    fitted = fit_a_little(base, method("l0", keep=0.5))
    set_gates(fitted.change)
    with torch.no_grad():
        fitted.change.trainable[f"{D.format(0)}:log_alpha"][1:3] = LEAST
    packed = fitted.method.pack(base, fitted.change)
    settling = settling_of(fitted.change)
    factors = {path: settling.factors(gate) for path, gate in settling.gates.items()}
    trained = {path: value.detach().clone() for path, value in fitted.change.trainable.items()}
    fitted.change.remove()
    own = factors[D.format(0)].repeat_interleave(8)
    assert 0 < int((own == 0).sum()) < HIDDEN
    assert torch.equal(packed[D.format(0)][:, own == 0], base.original(D.format(0))[:, own == 0])
    expected = (trained[D.format(0)] * own)[:, own != 0]
    assert torch.equal(packed[D.format(0)][:, own != 0], expected)
    for part in ("query", "key", "value"):
        path = f"text.encoder.layer.0.attention.self.{part}.weight"
        assert torch.equal(packed[path][own == 0], base.original(path)[own == 0])
        assert torch.equal(packed[path][own != 0], trained[path][own != 0])


def test_gates_alone_are_trained_and_stored() -> None:
    base = tiny_base("bert")
    fitted = fit_a_little(base, method("l0", beside=()))
    packed = fitted.method.pack(base, fitted.change)
    trained = fitted.logits()
    fitted.change.remove()
    assert {path for path in packed if not path.startswith("units:")} <= set(units.counts(base))
    with fitted.method.unpack(base, packed):
        assert torch.equal(fitted.logits(), trained)


class Killed(BaseException):
    """Stands in for a kill: no `except Exception` may see it."""


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates and multipliers are in the checkpoint; each step's draw comes from its random state."""
    chosen = method("l0", layers=True)
    made = Recipe(
        "own", chosen, READOUT, Training(max_steps=8, batch_size=8, evaluations=4, warmup=0.0)
    )
    real, at = trainer.PartsTrainer.training_step, list[int]()

    def step(self: Any, *rest: Any, **more: Any) -> Any:
        if self.state.global_step in at:
            raise Killed
        return real(self, *rest, **more)

    def score(self: Any, _: Any) -> dict[str, float]:  # the last state is the best one
        return {"score": float(self.state.global_step)}

    monkeypatch.setattr(trainer.PartsTrainer, "training_step", step)
    monkeypatch.setattr(trainer.PartsTrainer, "_metrics", score)
    task, files = tiny_task(), [tmp_path / f"{name}{SUFFIX}" for name in ("whole", "resumed")]
    tune(tiny_base("bert"), task, made, out=files[0], work=tmp_path / "whole")
    at.append(5)
    with pytest.raises(Killed):
        tune(tiny_base("bert"), task, made, out=files[1], work=tmp_path / "work")
    at.clear()
    tune(tiny_base("bert"), task, made, out=files[1], work=tmp_path / "work", resume=True)
    assert files[0].read_bytes() == files[1].read_bytes()


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"keep": 0.0}, "above 0 and at most 1"),
        ({"keep": 1.5}, "above 0 and at most 1"),
        ({"warm": -0.1}, "a share of the training"),
        ({"rate": 0.0}, r"l0 rate 0\.0: expected a finite number above 0"),
        ({"rate": math.inf}, "l0 rate inf"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        method("l0", **settings)


def test_a_size_below_one_unit_a_layer_names_the_nearest() -> None:
    base = tiny_base("bert")
    least = LAYERS * (HEAD + NEURON) / PRUNABLE
    with pytest.raises(SettingError, match=rf"nearest keep is '{math.ceil(1000 * least) / 1000}'"):
        method("l0", keep=0.1).attach(base)
    with method("l0", keep=math.ceil(1000 * least) / 1000).attach(base) as change:
        assert all(int(on.sum()) == 1 for on in settling_of(change).kept().values())
    with method("l0", keep=0.1, layers=True).attach(base) as change:
        assert 0 < stays(change) <= 0.1 * PRUNABLE
    assert base.is_untouched()


def test_a_start_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), tiny_task()
    tuned = fit(base, task, tmp_path, method("full"), "tuned")
    with pytest.raises(SettingError, match="name them in beside"):
        fit(base, task, tmp_path, method("l0", beside=("norm",)), start=str(tuned.path))
    assert base.is_untouched()


def test_a_file_of_other_units_is_refused() -> None:
    base = tiny_base("bert")
    fitted = fit_a_little(base, method("l0", beside=()))
    packed = fitted.method.pack(base, fitted.change)
    fitted.change.remove()
    name = f"units:{D.format(0)}"
    for odd in (packed[name][:-1], packed[name].float(), packed[name][None]):
        with pytest.raises(DamagedDelta, match="does not fit the base"):
            fitted.method.unpack(base, {**packed, name: odd})
    assert base.is_untouched()
