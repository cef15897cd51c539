"""Diff pruning against its paper's equations as plain loops (Guo, Rush & Kim 2021).

The gate's chances at temperature 1, stretched from -1.5 to 1.5, are closed forms: P(z = 0) = σ(-α),
P(z = 1) = σ(α - log 5).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from howfine import concrete
from howfine.adamw import AdamW
from howfine.base import Base
from howfine.change import Change
from howfine.entries import flat_entries
from howfine.errors import SettingError
from howfine.method import Method, method
from howfine.readout import Wired
from howfine.recipe import Recipe
from howfine.tune import tune
from tiny import LABELS, READOUT, Fitted, loss_of, tiny_base, tiny_task, weight_at

# α -> P(z = 0), P(z = 1), E[z], each by integrating over u.
TABLE = {
    5: (0.0067, 0.9674, 0.985),
    3: (0.0474, 0.8007, 0.899),
    1: (0.2689, 0.3522, 0.564),
    0: (0.5000, 0.1667, 0.333),
    -1: (0.7311, 0.0685, 0.160),
    -3: (0.9526, 0.0099, 0.026),
    -5: (0.9933, 0.0013, 0.0036),
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gate(alpha: float, u: float) -> tuple[float, float]:
    """(z, dz/dα) for noise u."""
    u = min(max(u, 1e-4), 1 - 1e-4)
    s = sigmoid(math.log(u / (1 - u)) + alpha)
    stretched = 3 * s - 1.5
    z = min(1.0, max(0.0, stretched))
    return z, 3 * s * (1 - s) if 0 < stretched < 1 else 0.0


def settled(alpha: float) -> float:
    """z without chance."""
    return min(1.0, max(0.0, 3 * sigmoid(alpha) - 1.5))


@contextmanager
def put_on(base: Base, seed: int = 0, **settings: Any) -> Iterator[Fitted]:
    """Diff pruning on a base, without dropout, gates in training mode."""
    chosen = method("diff", **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with chosen.attach(base) as change:
            head = READOUT.attach(base, LABELS)
            wired = Wired(base, READOUT, head, dropout=False).train()
            yield Fitted(base, chosen, change, head, wired)


def named(change: Change, name: str) -> dict[str, Tensor]:
    """The trainable parameters of one kind ("diff", "alpha" or "group"), by path."""
    parts = {key.rpartition(":")[::2]: value for key, value in change.trainable.items()}
    return {path: value for (path, kind), value in parts.items() if kind == name}


@torch.no_grad()
def scatter(change: Change, seed: int = 0) -> None:
    """Move everything trainable away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    for kind, mean, spread in (("diff", 0, 0.1), ("alpha", 0, 2), ("group", 1, 0.5)):
        for value in named(change, kind).values():
            value.copy_(mean + spread * torch.randn(value.shape, generator=generator))


# --- the gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["entry", "group"])
def test_chances_of_a_gate(of: str) -> None:
    """Drawn gates are 0, 1 and on average as the table says, to three standard errors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for alpha, expected in TABLE.items():
            if of == "entry":
                count = 200_000
                one = torch.ones(count)
                z, _ = concrete.add_gated(0 * one, one, alpha * one)
            else:
                count, group = 20_000, torch.tensor(float(alpha))
                z = torch.tensor([concrete._drawn_group(group, None)[0] for _ in range(count)])
            found = ((z == 0).double(), (z == 1).double(), z.double())
            for values, chance in zip(found, expected, strict=True):
                error = max(float(values.std()), math.sqrt(chance / count)) / math.sqrt(count)
                # The table is rounded, and noise kept 1e-4 away from 0 and 1.
                assert abs(float(values.mean()) - chance) < 3 * error + 6e-4, (alpha, chance)


def test_gradient_of_a_gate_is_the_formula() -> None:
    """dz/dα = 3·s(1-s) where 0 < 3s - 1.5 < 1 and 0 elsewhere, at 10,000 random (u, α)."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(10_000, generator=generator)
    alpha = (3 * torch.randn(10_000, generator=generator)).requires_grad_(True)
    weight, diff = torch.zeros(10_000), torch.ones(10_000)
    fast, _ = concrete.add_gated(weight, diff, alpha, noise=(u, 0.5))
    plain = concrete.diff_gate(alpha, u)
    pairs = [gate(a, b) for a, b in zip(alpha.tolist(), u.tolist(), strict=True)]
    values, slopes = torch.tensor(pairs).T
    inside = 0
    for z in (fast, plain):
        torch.testing.assert_close(z.detach(), values, atol=2e-5, rtol=0)
        (found,) = torch.autograd.grad(z.sum(), alpha)
        off = (found - slopes).abs() > 1e-4
        edge = (values < 1e-5) | (values > 1 - 1e-5)
        assert not (off & ~edge).any()
        assert int((off & edge).sum()) <= 2  # on the very edge, rounding decides
        inside = int((slopes > 0).sum())
    assert 1000 < inside < 9000


def test_gate_at_the_ends() -> None:
    """Logits far out and noise of exactly 0 give no NaN, in value nor gradient."""
    alpha = torch.tensor([-200.0, -60.0, 60.0, 200.0], requires_grad=True)
    group = torch.tensor(-2000.0, requires_grad=True)
    for u in (0.0, 0.5, 1 - 2**-23):
        noise = (torch.full((4,), u), u)
        value, count = concrete.add_gated(torch.zeros(4), torch.ones(4), alpha, None, noise)
        assert value.tolist() == [0, 0, 1, 1]
        value, _ = concrete.add_gated(torch.zeros(4), torch.ones(4), alpha, group, noise)
        assert value.tolist() == [0, 0, 0, 0]
        for found in torch.autograd.grad(value.sum() + count, (alpha, group)):
            assert torch.isfinite(found).all()


def test_memory_kept_between_calls_changes_nothing() -> None:
    """With and without spare memory: the same values and gradients, two reads in one forward."""
    generator = torch.Generator().manual_seed(0)
    weight, diff = torch.randn(2, 3, 5, generator=generator)
    alpha = torch.randn(3, 5, generator=generator).requires_grad_(True)
    spare: concrete.Spare = []
    for _ in range(3):
        noises = [(torch.rand(3, 5, generator=generator), 0.5) for _ in range(2)]
        found = []
        for kept in (None, spare):
            parts = [concrete.add_gated(weight, diff, alpha, None, n, kept)[0] for n in noises]
            product = parts[0] * parts[1]
            found.append((product.detach(), *torch.autograd.grad(product.sum(), alpha)))
        for plain, kept_one in zip(*found, strict=True):
            assert torch.equal(plain, kept_one)
    assert len(spare) == 2


def test_memory_that_is_kept_serves_every_mode_and_precision() -> None:
    """Whatever asked for it first: evaluation in inference mode, or numbers of another format."""
    weight, diff = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    noise = (torch.full((3, 5), 0.6), 0.5)

    def drawn(dtype: torch.dtype) -> Tensor:
        alpha = torch.zeros(3, 5, dtype=dtype, requires_grad=True)
        value, _ = concrete.add_gated(weight.to(dtype), diff.to(dtype), alpha, None, noise)
        value.sum().backward()
        return alpha.grad

    concrete._KEPT.__dict__.clear()
    with torch.inference_mode():
        concrete.add_gated(weight, diff, torch.zeros(3, 5), None, noise)
    expected = drawn(torch.float32)
    assert expected.abs().sum() > 1
    torch.testing.assert_close(drawn(torch.float64).float(), expected)
    torch.testing.assert_close(drawn(torch.float32), expected, rtol=0, atol=0)


# --- a training step -----------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["tensor", "none"])
def test_starts_at_the_base(structure: str) -> None:
    """w = 0: draws give exactly θ⁰; only the penalty moves the gates at first."""
    base = tiny_base("bert")
    before = {path: weight_at(base, path) for path in base.paths()}
    with put_on(base, structure=structure, l0=1e-3) as fitted:
        for path in base.paths():
            assert torch.equal(weight_at(base, path), before[path]), path
        diffs = named(fitted.change, "diff")
        gates = {**named(fitted.change, "alpha"), **named(fitted.change, "group")}
        assert diffs.keys() == set(base.paths())  # embeddings, biases and norms among them
        assert len(named(fitted.change, "group")) == (len(diffs) if structure == "tensor" else 0)
        assert {v for g in gates.values() for v in g.flatten().tolist()} == {5.0}
        penalty = fitted.method.penalty(fitted.change, 0.0)
        (loss_of(fitted) - penalty).backward()
        assert all(gate.grad is None or not gate.grad.any() for gate in gates.values())
        assert sum(bool(diff.grad is not None and diff.grad.any()) for diff in diffs.values()) > 20
        loss_of(fitted).backward()
        p = sigmoid(5)
        slope = 1e-3 * p * (1 - p) * (p if structure == "tensor" else 1)
        for alpha in named(fitted.change, "alpha").values():
            torch.testing.assert_close(alpha.grad, torch.full_like(alpha, slope), rtol=1e-3, atol=0)


@pytest.mark.parametrize("form", ["product", "sum"])
@pytest.mark.parametrize("structure", ["tensor", "none"])
def test_gradients_of_a_step(structure: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """grad w = G·z·z_g, grad α = G·w·z_g·dz/dα, grad α_g = Σ G·w·z·dz_g/dα_g, and λ·∇L0."""
    base = tiny_base("bert")
    where, weight = ("Q@0", "norm@1"), 0.01
    outer_u = 0.6
    drawn: list[Tensor] = []
    floats, group = concrete.gates.random_floats, concrete._drawn_group

    def recorded(stream: Any, count: int) -> Tensor:
        drawn.append(floats(stream, count))
        return drawn[-1].clone()

    monkeypatch.setattr(concrete.gates, "random_floats", recorded)
    monkeypatch.setattr(concrete, "_drawn_group", lambda alpha, _: group(alpha, outer_u))
    settings = {"where": where, "structure": structure, "form": form, "l0": weight}
    with put_on(base, **settings) as fitted:
        scatter(fitted.change)
        diffs, alphas = named(fitted.change, "diff"), named(fitted.change, "alpha")
        groups = named(fitted.change, "group")
        loss = loss_of(fitted)
        loss.backward()
        noise = {len(u): [] for u in drawn}
        for u in drawn:
            noise[len(u)].append(u)
    # In the order they are read: by size there is one matrix, and norms of one size in turn.
    order = sorted(diffs, key=list(base.paths()).index)
    # The same point without gates, for G.
    points, rows = {}, {}
    for path in order:
        u = noise[diffs[path].numel()].pop(0) - 1
        z_group, slope_group = gate(groups[path].item(), outer_u) if groups else (1.0, 0.0)
        rows[path] = [
            (w, *gate(a, float(n)), a)
            for w, a, n in zip(
                diffs[path].flatten().tolist(), alphas[path].flatten().tolist(), u, strict=True
            )
        ]
        moved = torch.tensor([w * z * z_group for w, z, _, _ in rows[path]])
        points[path] = base.parameter(path).detach() + moved.view(diffs[path].shape)
        rows[path] = [(*row, z_group, slope_group) for row in rows[path]]
    assert not any(noise.values())
    plain: Method = method("select", train=tuple(p.removeprefix("text.") + "*" for p in order))
    with plain.attach(base) as change:
        with torch.no_grad():
            for path in order:
                change.trainable[path].copy_(points[path])
        again = Fitted(base, plain, change, fitted.head, Wired(base, READOUT, fitted.head, False))
        again.wired.train()
        (data := loss_of(again)).backward()
        upstream = {p: value.grad.flatten().tolist() for p, value in change.trainable.items()}
    penalty = 0.0
    for path in order:
        p_group = sigmoid(groups[path].item()) if groups else 1.0
        times = p_group if form == "product" else 1.0
        count = sum(sigmoid(a) for _, _, _, a, _, _ in rows[path])
        to_w, to_alpha, to_group = [], [], 0.0
        for g, (w, z, dz, a, zg, dzg) in zip(upstream[path], rows[path], strict=True):
            to_w.append(g * z * zg)
            p = sigmoid(a)
            to_alpha.append(g * w * zg * dz + weight * p * (1 - p) * times)
            to_group += g * w * z * dzg
        for values, expected in ((diffs, to_w), (alphas, to_alpha)):
            found = values[path].grad.flatten()
            torch.testing.assert_close(found, torch.tensor(expected), atol=2e-5, rtol=1e-3)
        if not groups:
            penalty += weight * count
            continue
        penalty += weight * (count * p_group if form == "product" else count + p_group)
        to_group += weight * p_group * (1 - p_group) * (count if form == "product" else 1)
        assert groups[path].grad.item() == pytest.approx(to_group, rel=1e-3, abs=2e-5)
    assert loss.item() == pytest.approx(data.item() + penalty, rel=1e-4)


def test_expected_count_is_that_of_draws() -> None:
    """The product form is E‖δ‖₀ of draws; the sum form, which forgets that z_g = 0, is not."""
    base = tiny_base("bert")
    with put_on(base, where=("Q@0",), l0=1.0) as fitted:
        scatter(fitted.change)
        ((path, diff),) = named(fitted.change, "diff").items()
        (group,) = named(fitted.change, "group").values()
        with torch.no_grad():
            diff.fill_(1.0)
            group.fill_(0.3)
        before = base.parameter(path)
        product = fitted.method.penalty(fitted.change, 0.0).item()
        total = method("diff", l0=1.0, form="sum").penalty(fitted.change, 0.0).item()
        counts = [float((weight_at(base, path) != before).sum()) for _ in range(2000)]
    mean = torch.tensor(counts).mean().item()
    error = torch.tensor(counts).std().item() / math.sqrt(len(counts))
    assert abs(product - mean) < 4 * error
    assert abs(total - mean) > 20 * error


def test_penalty_before_and_after_a_forward_is_the_same() -> None:
    """What a forward pass counted along the way is what is counted without one."""
    with put_on(tiny_base("bert"), l0=1e-3) as fitted:
        scatter(fitted.change)
        gates = [*named(fitted.change, "alpha").values(), *named(fitted.change, "group").values()]

        def gradients(loss: Tensor) -> list[Tensor]:
            return list(torch.autograd.grad(loss, gates))

        alone = fitted.method.penalty(fitted.change, 0.0)
        expected = gradients(alone)
        loss = loss_of(fitted) - fitted.method.penalty(fitted.change, 0.0)
        counted = fitted.method.penalty(fitted.change, 0.0)
        assert counted.item() == pytest.approx(alone.item(), rel=1e-5)
        loss_of(fitted)
        counted = fitted.method.penalty(fitted.change, 0.0)
        assert counted.item() == pytest.approx(alone.item(), rel=1e-5)
        for one, other in zip(gradients(counted), expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-4)
        loss = loss_of(fitted)
        loss.backward()  # and on its own after the data's backward pass
        for one, other in zip(
            gradients(fitted.method.penalty(fitted.change, 0.0)), expected, strict=True
        ):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-4)


# --- the budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["tensor", "none"])
def test_exactly_the_budget_of_all_tensors_together(structure: str) -> None:
    """floor(t·d) entries change, those of largest |z·z_g·w|; all others are θ⁰ to the bit."""
    base, density = tiny_base("bert"), 0.03
    with put_on(base, density=density, structure=structure) as fitted:
        scatter(fitted.change)
        groups = named(fitted.change, "group")
        alphas = named(fitted.change, "alpha")
        packed = fitted.method.pack(base, fitted.change)
        ranked = []
        for path, diff in named(fitted.change, "diff").items():
            zg = settled(groups[path].item()) if groups else 1.0
            pairs = zip(diff.flatten().tolist(), alphas[path].flatten().tolist(), strict=True)
            ranked += [
                (abs(settled(a) * w * zg), path, n, settled(a) * w * zg)
                for n, (w, a) in enumerate(pairs)
            ]
    keep = math.floor(density * len(ranked))
    assert keep > 500
    ranked.sort(key=lambda row: -row[0])
    clear = {(path, n): moved for size, path, n, moved in ranked if size > ranked[keep][0] + 1e-6}
    assert len(clear) > keep - 3
    found = {}
    for path, tensor in packed.items():
        original = base.parameter(path).flatten()
        for n, value in zip(*(part.tolist() for part in flat_entries(tensor)), strict=True):
            found[path, n] = value - original[n].item()
    assert len(found) == keep
    assert clear.keys() <= found.keys()
    assert all(abs(found[place] - moved) < 1e-6 for place, moved in clear.items())
    assert len({path for path, _ in found}) > 20
    before = {path: base.parameter(path).clone() for path in base.paths()}
    with fitted.method.unpack(base, packed):
        changed = sum(int((weight_at(base, p) != before[p]).sum()) for p in base.paths())
    assert changed == keep


def test_ties_go_to_the_earlier_entry() -> None:
    base = tiny_base("bert")
    with put_on(base, where=("Q",), density=0.3) as fitted:
        with torch.no_grad():
            for diff in named(fitted.change, "diff").values():
                diff.fill_(0.5)
        packed = fitted.method.pack(base, fitted.change)
    paths = base.choose(("Q",))
    keep = math.floor(0.3 * sum(base.parameter(path).numel() for path in paths))
    places = [flat_entries(packed[path])[0].tolist() if path in packed else [] for path in paths]
    size = base.parameter(paths[0]).numel()
    flat = [number * size + n for number, part in enumerate(places) for n in part]
    assert flat[: base.parameter(paths[0]).numel()] == list(range(min(keep, size)))
    assert len(flat) == keep


def test_a_difference_that_rounding_swallows_takes_no_place() -> None:
    base = tiny_base("bert")
    with put_on(base, where=("Q@0",), density=0.5) as fitted:
        (diff,) = named(fitted.change, "diff").values()
        with torch.no_grad():
            diff.fill_(1e-12)
            diff[0, :5] = 1e-2
        (packed,) = fitted.method.pack(base, fitted.change).values()
    assert flat_entries(packed)[0].tolist() == [0, 1, 2, 3, 4]


def test_evaluation_keeps_up_with_training() -> None:
    """Whatever changes the parameters, evaluation computes what pack would store just then."""
    base = tiny_base("bert")
    with put_on(base, density=0.05) as fitted:
        optimiser = AdamW(fitted.method.groups(fitted.change)[0]["params"], lr=0.05, fused=True)

        def read() -> dict[str, Tensor]:
            fitted.wired.eval()
            with torch.inference_mode():
                found = {path: weight_at(base, path) for path in base.paths()}
            packed = fitted.method.pack(base, fitted.change)
            for path, value in found.items():
                expected = base.parameter(path).detach().flatten().clone()
                if path in packed:
                    index, values = flat_entries(packed[path])
                    expected[index] = values
                assert torch.equal(value.flatten(), expected), path
            fitted.wired.train()
            return found

        seen = [read()]
        for _ in range(2):
            loss_of(fitted).backward()
            optimiser.step()
            seen.append(read())
        state = {key: value.clone() for key, value in fitted.wired.state_dict().items()}
        scatter(fitted.change)
        seen.append(read())
        fitted.wired.load_state_dict(state, strict=False)
        last = read()
        for one, other in pairwise(seen):
            assert any(not torch.equal(one[path], other[path]) for path in one)
        assert all(torch.equal(last[path], seen[2][path]) for path in last)


# --- training ------------------------------------------------------------------------------------


def density_after(l0: float) -> float:
    """Expected share of entries before projection, after 25 steps."""
    with put_on(tiny_base("bert"), where=("matrices",), l0=l0) as fitted:
        groups = fitted.method.groups(fitted.change)
        diffs, gates = groups
        optimiser = AdamW(
            [
                {"params": diffs["params"], "lr": 1e-3, "weight_decay": diffs["weight_decay"]},
                {"params": gates["params"], "lr": gates["lr"], "weight_decay": 0.0},
            ]
        )
        for step in range(25):
            optimiser.zero_grad()
            loss_of(fitted, step).backward()
            optimiser.step()
        count = method("diff", l0=1.0).penalty(fitted.change, 1.0).item()
        return count / sum(diff.numel() for diff in named(fitted.change, "diff").values())


def test_density_falls_as_the_penalty_grows() -> None:
    found = [density_after(l0) for l0 in (0.0, 1e-6, 1e-4)]
    assert found[0] > found[1] + 0.02 > found[2] + 0.04


def untouched_tensors(structure: str, seed: int) -> int:
    """Tensors without a changed entry at a budget of half a per cent, after 60 steps."""
    base = tiny_base("bert")
    with put_on(base, seed, structure=structure, l0=2e-4, density=0.005) as fitted:
        head = {"params": list(fitted.head.parameters())}
        groups = [{"lr": 1e-2, **group} for group in fitted.method.groups(fitted.change)]
        optimiser = AdamW([*groups, {"lr": 1e-2, **head}], weight_decay=0.0)
        losses = []
        for _ in range(60):
            optimiser.zero_grad()
            losses.append(loss_of(fitted))
            (losses[-1] + fitted.method.penalty(fitted.change, 0.5)).backward()
            optimiser.step()
        assert losses[-1] < 0.8 * losses[0]  # it learned something with what it kept
        return len(base.paths()) - len(fitted.method.pack(base, fitted.change))


@pytest.mark.slow
def test_gates_over_tensors_leave_more_of_them_untouched() -> None:
    """At least 1.5 times as many as gates of entries alone do, at equal penalty and budget."""
    found = {s: [untouched_tensors(s, seed) for seed in range(3)] for s in ("tensor", "none")}
    assert sum(found["tensor"]) >= 1.5 * sum(found["none"]) > 0, found


def test_groups_and_settings() -> None:
    """Rates, clips and decay as in the paper's code; bad settings are refused before training."""
    base = tiny_base("bert")
    with put_on(base) as fitted:
        diffs, gates = fitted.method.groups(fitted.change)
        assert {"lr", "constant", "clip"}.isdisjoint(diffs)
        assert (gates["lr"], gates["constant"]) == (0.1, True)
        assert gates["clip"]
        assert diffs["weight_decay"] == gates["weight_decay"] == 0
        assert len(gates["params"]) == 2 * len(diffs["params"])
    for settings, message in (
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({"l0": -1.0}, "l0"),
        ({"l0": math.nan}, "l0"),
    ):
        with pytest.raises(SettingError, match=message):
            method("diff", **settings)
    with pytest.raises(SettingError, match="not one entry"):
        method("diff", density=1e-9).attach(base)
    base.towers.bfloat16()
    with pytest.raises(SettingError, match="float32"):
        method("diff").attach(base)


@pytest.mark.slow
def test_the_second_phase_trains_the_support_of_the_first(tmp_path: Path) -> None:
    """The recipe: the same places before and after, other values; all else is θ⁰ to the bit."""
    base, found = tiny_base("bert"), []
    recipe = Recipe.load("diff-pruning").override(start_density=0.02, store="fp32")
    for start, said in (("none", "the base"), ("x.delta.safetensors", "x.delta.safetensors")):
        with pytest.raises(SettingError, match=f"start_density .* and the start is {said}"):
            recipe.override(start=start, start_density=0.1)
    assert recipe.override(start="none").start is None
    assert isinstance(recipe.start, Recipe)
    for number, phase in enumerate((recipe.start, recipe)):
        settings = {"max_steps": 4, "learning_rate": 1e-2}
        if phase is recipe:
            settings |= {f"start_{key}": value for key, value in settings.items()}
        out = tmp_path / f"{number}.delta.safetensors"
        tensors, _ = tune(base, tiny_task(), phase, out=out, **settings).delta.tensors(base)
        found.append({path: flat_entries(tensor) for path, tensor in tensors.items()})
    first, second = found
    total = sum(base.parameter(path).numel() for path in base.paths())
    assert sum(len(index) for index, _ in first.values()) == math.floor(0.02 * total)
    assert first.keys() == second.keys()
    for path, (index, _) in first.items():
        assert torch.equal(index, second[path][0]), path
    assert any(not torch.equal(first[path][1], second[path][1]) for path in first)
