"""Oracles: the papers' equations as slow loops, held against gates, mask, select and anatomy.

Radiya-Dixit & Wang 2020 ("how-fine" below) unless another paper is named.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import howfine
from howfine import concrete, gates
from howfine.base import Base
from howfine.delta import SUFFIX, Delta
from howfine.errors import SettingError, UnknownArchitecture
from howfine.method import method
from howfine.methods.mask import VARIANTS
from howfine.readout import Wired
from howfine.recipe import Recipe
from howfine.tune import tune
from tiny import (
    HEADS,
    HIDDEN,
    INNER,
    LABELS,
    LAYERS,
    READOUT,
    TINY,
    Fitted,
    TinyProbe,
    fit_a_little,
    loss_of,
    matrices_of,
    tiny_base,
    tiny_task,
    tiny_tower,
    weight_at,
    wire,
)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gradient_of(gate: Callable[[Tensor], Tensor], scores: Tensor) -> tuple[Tensor, Tensor]:
    """(value, gradient) of a gate under the upstream gradient 1, 2, 3, …"""
    scores = scores.clone().requires_grad_(True)
    value = gate(scores)
    upstream = torch.arange(1.0, scores.numel() + 1).view(scores.shape)
    (gradient,) = torch.autograd.grad(value, scores, upstream)
    return value.detach(), gradient / upstream


# --- gates: relax and sample ---------------------------------------------------------------------


@pytest.mark.parametrize("at", [0.0, 5e-3, -1.0])
def test_threshold(at: float) -> None:
    """Exactly 1[s > at], gradient exactly 1; at the threshold itself 0 (Mallya et al. 2018)."""
    scores = torch.cat([draws(4000), torch.full((3,), at)])
    value, gradient = gradient_of(lambda s: gates.threshold(s, at), scores)
    limit = torch.tensor(at)
    assert value.tolist() == [float(s > limit) for s in scores]
    assert torch.equal(gradient, torch.ones_like(scores))


def test_surrogate() -> None:
    scores = 10 * draws(4000)
    hard = uniform(4000, seed=1) < 0.5
    value, gradient = gradient_of(lambda s: gates.surrogate(s, hard), scores)
    assert value.tolist() == [float(h) for h in hard]
    assert torch.equal(gradient, torch.ones_like(scores))


@pytest.mark.parametrize("through_sigmoid", [True, False])
def test_bernoulli(through_sigmoid: bool) -> None:
    """1[u < σ(s)]; gradient σ(1-σ) (how-fine B3), or 1 (Zhao et al. 2020, scheme 3)."""
    scores, noise = 3 * draws(2000), uniform(2000, seed=1)
    value, gradient = gradient_of(lambda s: gates.bernoulli(s, noise, through_sigmoid), scores)
    assert value.tolist() == [
        float(u < sigmoid(s)) for s, u in zip(scores.tolist(), noise.tolist(), strict=True)
    ]
    expected = [sigmoid(s) * (1 - sigmoid(s)) if through_sigmoid else 1.0 for s in scores.tolist()]
    torch.testing.assert_close(gradient, torch.tensor(expected), rtol=1e-4, atol=1e-7)


def test_sample() -> None:
    """Draws keep σ(s) of the entries: within five standard deviations over 40 000 draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for logit in (-5.0, -1.0, 0.0, 2.0, 5.0):
            hard = gates.sample(torch.full((200, 200), logit))
            assert hard.dtype == torch.bool
            p = sigmoid(logit)
            assert abs(hard.double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / 40_000)


def hard_concrete(log_alpha: float, u: float, tau: float, left: float, right: float) -> float:
    """Louizos et al. 2018, equations 10 and 11."""
    s = sigmoid((math.log(u) - math.log(1 - u) + log_alpha) / tau)
    return min(1.0, max(0.0, s * (right - left) + left))


@pytest.mark.parametrize("tau", [2 / 3, 0.3, 1.0])
@pytest.mark.parametrize("stretch", [(-0.1, 1.1), (-1.5, 1.5)])
def test_hard_concrete(tau: float, stretch: tuple[float, float]) -> None:
    log_alpha, noise = 3 * draws(500).double(), uniform(500, seed=1).double().clamp(1e-6, 1 - 1e-6)
    found = concrete.hard_concrete(log_alpha, noise, tau, stretch)
    pairs = zip(log_alpha.tolist(), noise.tolist(), strict=True)
    expected = [hard_concrete(a, u, tau, *stretch) for a, u in pairs]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=1e-7)
    assert (found == 0).sum() > 20
    assert (found == 1).sum() > 20


def test_hard_concrete_settled() -> None:
    """Louizos et al. 2018, equation 13: clamp(σ(log α)(ζ-γ)+γ, 0, 1)."""
    log_alpha = 3 * draws(500)
    found = concrete.hard_concrete_settled(log_alpha)
    expected = [min(1.0, max(0.0, sigmoid(a) * 1.2 - 0.1)) for a in log_alpha.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


def test_expected_l0_against_monte_carlo() -> None:
    """Σ P(gate ≠ 0) (equation 12) is how often drawn gates are not 0, to five deviations."""
    log_alpha, count = torch.tensor([-4.0, -1.5, 0.0, 0.7, 3.0]), 40_000
    noise = uniform(count, 5).clamp(1e-6, 1 - 1e-6)
    drawn = concrete.hard_concrete(log_alpha.expand(count, 5), noise) != 0
    p = drawn.double().mean(0)
    deviation = math.sqrt((p * (1 - p)).sum().item() / count)
    assert abs(concrete.expected_l0(log_alpha).item() - p.sum().item()) < 5 * deviation
    one = sum(sigmoid(a - 2 / 3 * math.log(0.1 / 1.1)) for a in log_alpha.tolist())
    assert concrete.expected_l0(log_alpha).item() == pytest.approx(one, rel=1e-5)


# --- gates: settle and count ---------------------------------------------------------------------


def best(scores: list[float], keep: int) -> tuple[set[int], set[int]]:
    """(places that must be kept, places that may be): ties at the border are free."""
    if keep == 0:
        return set(), set()
    border = sorted(scores, reverse=True)[keep - 1]
    return (
        {i for i, s in enumerate(scores) if s > border},
        {i for i, s in enumerate(scores) if s >= border},
    )


@pytest.mark.parametrize("keep", [0, 1, 17, 59, 60])
@pytest.mark.parametrize("levels", [1, 4, 1000])
def test_top_k(keep: int, levels: int) -> None:
    """Exactly k, whatever the ties; the gradient is 1 everywhere (Ramanujan et al. 2020)."""
    scores = (draws(6, 10) * levels).round() / levels if levels > 1 else torch.zeros(6, 10)
    value, gradient = gradient_of(lambda s: gates.top_k(s, keep), scores)
    kept = set(value.flatten().nonzero().flatten().tolist())
    must, may = best(scores.flatten().tolist(), keep)
    assert len(kept) == keep
    assert must <= kept <= may
    assert set(value.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(gradient, torch.ones_like(scores))
    settled = gates.settle_top_k(scores, keep)
    assert settled.dtype == torch.bool
    assert torch.equal(settled, value.bool())
    assert torch.equal(settled, gates.settle_top_k(scores, keep))


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8), (1, 2)])
def test_n_of_m(keep: int, group: int) -> None:
    scores = (draws(5, 16) * 2).round()  # many ties
    found = gates.settle_n_of_m(scores, keep, group)
    assert found.dtype == torch.bool
    for row in range(5):
        for start in range(0, 16, group):
            must, may = best(scores[row, start : start + group].tolist(), keep)
            kept = set(found[row, start : start + group].nonzero().flatten().tolist())
            assert len(kept) == keep
            assert must <= kept <= may


def test_n_of_m_refuses_a_rest() -> None:
    with pytest.raises(SettingError, match=r"2:4.*10.*multiple of 4"):
        gates.settle_n_of_m(draws(3, 10), 2, 4)


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    [
        *((0.29, 100, 29), (0.57, 100, 57), (0.285, 1000, 285), (1e-05, 300_000, 3), (0.5, 7, 3)),
        *((0.0, 9, 0), (1, 9, 9), (1.0, 9, 9), (0.005, 33_360_000, 166_800)),
    ],
)
def test_a_share_of_entries_is_as_written(share: float, count: int, expected: int) -> None:
    """Products of floats such as 100·.29 = 28.999… would be one short."""
    assert gates.count_of(share, count) == expected


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.6, 0.99])
@pytest.mark.parametrize("shape", [(1, 7), (13, 17), (32, 32)])
def test_smallest(share: float, shape: tuple[int, int]) -> None:
    """Exactly floor(n·s) entries, and none of the others is smaller."""
    values = draws(*shape)
    found = gates.smallest(values, share, torch.Generator().manual_seed(0))
    assert found.shape == values.shape
    assert found.dtype == torch.bool
    count = int(values.numel() * round(100 * share)) // 100
    order = sorted(range(values.numel()), key=lambda i: abs(values.flatten()[i].item()))
    assert set(found.flatten().nonzero().flatten().tolist()) == set(order[:count])


def test_smallest_breaks_ties_at_random() -> None:
    """Each of 20 zeros is among the 10 chosen in about half of 400 draws; the seed decides."""
    values = torch.cat([torch.zeros(20), torch.ones(20)])
    chosen = torch.zeros(40)
    for seed in range(400):
        found = gates.smallest(values, 0.25, torch.Generator().manual_seed(seed))
        again = gates.smallest(values, 0.25, torch.Generator().manual_seed(seed))
        assert torch.equal(found, again)
        assert found.sum() == 10
        chosen += found
    assert chosen[20:].sum() == 0
    assert (chosen[:20] - 200).abs().max() < 50  # five standard deviations of Binomial(400, 1/2)


AXES = [("out", "in"), ("in", "out")]
UNITS = ["entry", "row", "column", "head"]


def unit_of(
    place: tuple[int, int], shape: tuple[int, int], axes: tuple[str, str], kind: str
) -> object:
    """Which unit an entry belongs to: its output, its input, or the head of its output."""
    out, inner = place if axes == ("out", "in") else place[::-1]
    outputs = shape[axes.index("out")]
    return {"entry": place, "row": out, "column": inner, "head": out // (outputs // 4)}[kind]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("kind", UNITS)
def test_granularity(kind: str, axes: tuple[str, str]) -> None:
    """One score a unit; it spreads over that unit's entries and no others, and counts them."""
    shape = (8, 12) if axes == ("out", "in") else (12, 8)
    small = gates.gate_shape(shape, kind, axes, 4)
    units = {"entry": 96, "row": 8, "column": 12, "head": 4}[kind]
    assert math.prod(small) == units
    marks = gates.spread(torch.arange(float(units)).view(small), shape).expand(shape)
    by_unit: dict[object, set[float]] = {}
    for i in range(shape[0]):
        for j in range(shape[1]):
            by_unit.setdefault(unit_of((i, j), shape, axes, kind), set()).add(marks[i, j].item())
    assert len(by_unit) == units
    assert all(len(found) == 1 for found in by_unit.values())
    assert len(set.union(*by_unit.values())) == units
    hard = uniform(units, seed=2).view(small) < 0.5
    weight = draws(*shape)
    kept = gates.spread(hard, shape).expand(shape)
    assert gates.count_kept(hard, shape) == int(kept.sum())
    dropped = gates.drop(weight, hard)
    assert dropped.tolist() == torch.where(kept, weight, torch.zeros(())).tolist()


def test_drop_keeps_every_bit_and_gives_exact_zero() -> None:
    """Also where multiplying by 0 would not: infinities and NaN; and in any number format."""
    weight = torch.tensor([[1e-38, -3.0, math.inf], [math.nan, -0.0, 2.0]])
    hard = torch.tensor([[True, False, False], [False, True, True]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cast = weight.to(dtype)
        found = gates.drop(cast, hard)
        assert found.dtype == dtype
        assert torch.equal(found[hard], cast[hard])
        assert (found[~hard] == 0).all()


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.parametrize("slope", ["identity", "sigmoid", "sign"])
def test_masked(slope: str, kind: str, axes: tuple[str, str]) -> None:
    """∂L/∂s of a unit is Σ ∂L/∂W·θ over its entries, times the slope at s (chain rule)."""
    shape = (8, 12) if axes == ("out", "in") else (12, 8)
    weight, upstream = draws(*shape), draws(*shape, seed=1)
    small = gates.gate_shape(shape, kind, axes, 4)
    scores = draws(*small, seed=2).requires_grad_(True)
    hard = uniform(*small, seed=3) < 0.5
    found = gates.masked(weight, scores, hard, slope)
    assert torch.equal(found.detach(), gates.drop(weight, hard))
    (gradient,) = torch.autograd.grad(found, scores, upstream)
    sums: dict[object, float] = {}
    for i in range(shape[0]):
        for j in range(shape[1]):
            unit = unit_of((i, j), shape, axes, kind)
            sums[unit] = sums.get(unit, 0.0) + (upstream[i, j] * weight[i, j]).item()
    slopes = {
        "identity": lambda s: 1.0,
        "sigmoid": lambda s: sigmoid(s) * (1 - sigmoid(s)),
        "sign": lambda s: math.copysign(1.0, s),
    }
    expected = [
        total * slopes[slope](s)
        for (_, total), s in zip(sorted(sums.items()), scores.flatten().tolist(), strict=True)
    ]
    torch.testing.assert_close(gradient.flatten(), torch.tensor(expected), rtol=1e-4, atol=1e-5)


# --- mask ----------------------------------------------------------------------------------------

SHARES = [0.0, 0.05, 0.3, 0.5]


def lowest(values: list[float], count: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda i: abs(values[i]))[:count])


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("base_name", ["bert", "gpt2"])
def test_mask_starts_at_magnitude(base_name: str, share: float) -> None:
    """The floor(n·s₀) smallest of every matrix start at -5, all others at +5 (how-fine B3)."""
    base = tiny_base(base_name)
    weights = {path: base.parameter(path).detach() for path in matrices_of(base)}
    with method("mask", initial_sparsity=share).attach(base) as change:
        assert change.trainable.keys() == weights.keys()
        for path, weight in weights.items():
            low = lowest(weight.flatten().tolist(), math.floor(weight.numel() * share))
            expected = [-5.0 if i in low else 5.0 for i in range(weight.numel())]
            assert change.trainable[path].flatten().tolist() == expected, path


@pytest.mark.parametrize("share", SHARES)
def test_mask_starts_at_global_magnitude(share: float) -> None:
    """scope="global": the floor(N·s₀) smallest of all matrices together."""
    base = tiny_base("bert")
    weights = {path: base.parameter(path).detach() for path in matrices_of(base)}
    flat = [value for weight in weights.values() for value in weight.flatten().tolist()]
    low = lowest(flat, math.floor(len(flat) * share))
    with method("mask", initial_sparsity=share, scope="global").attach(base) as change:
        scores = torch.cat([change.trainable[path].detach().flatten() for path in weights])
        assert scores.tolist() == [-5.0 if i in low else 5.0 for i in range(len(flat))]
        shares = [(change.trainable[path] < 0).float().mean() for path in weights]
    assert share == 0 or len({round(s.item(), 3) for s in shares}) > 1


@pytest.mark.parametrize("base_name", ["bert", "gpt2", "t5"])
def test_mask_drops_and_never_changes_a_weight(base_name: str, tmp_path: Path) -> None:
    """A6: after training, W is θ bit for bit where the logit is above 0, exact 0 elsewhere."""
    base = tiny_base(base_name)
    before = {path: p.detach().clone() for path, p in base.towers.named_parameters()}
    matrices = matrices_of(base)
    fitted = fit_a_little(base, method("mask", initial_sparsity=0.25))
    kept = {path: fitted.change.trainable[path].detach() > 0 for path in matrices}
    flips = sum(
        int((~kept[path]).sum()) - math.floor(before[path].numel() * 0.25) for path in matrices
    )
    assert flips != 0
    path_of_file = tmp_path / f"mask{SUFFIX}"
    fitted.delta().save(path_of_file)
    evaluated = {path: weight_at(base, path) for path in before}
    fitted.change.remove()
    with Delta.load(path_of_file).applied(base):
        applied = {path: weight_at(base, path) for path in before}
    for path, theta in before.items():
        for found in (evaluated[path], applied[path]):
            if path in kept:
                assert torch.equal(found[kept[path]], theta[kept[path]])
                assert (found[~kept[path]] == 0).all()
            else:
                assert torch.equal(found, theta)


def flips_after(lr: float) -> int:
    """Logits that change sides in 50 Adam steps."""
    base = tiny_base("bert")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fitted = wire(base, method("mask", initial_sparsity=0.1))
        fitted.wired.train()
        start = {path: p.detach() > 0 for path, p in fitted.change.trainable.items()}
        optimiser = torch.optim.Adam(fitted.change.trainable.values(), lr=lr)
        for step in range(50):
            optimiser.zero_grad()
            loss_of(fitted, step).backward()
            optimiser.step()
    return sum(int(((p > 0) != start[path]).sum()) for path, p in fitted.change.trainable.items())


def test_a_fine_tuning_rate_never_flips_a_mask() -> None:
    """A11: Adam moves a logit by at most lr a step, and 5 have to be covered."""
    assert flips_after(2e-5) == 0
    assert flips_after(0.5) > 0


def train_mode_dense_gradients(fitted: Fitted, paths: list[str]) -> dict[str, Tensor]:
    """∂L/∂W at the weights that `fitted` reads now, on a plain copy of the base."""
    dense = tiny_base(fitted.base.name.removeprefix("tiny-"), **NO_DROPOUT)
    for path in paths:
        dense.parameter(path).data = weight_at(fitted.base, path)
    parameters = [dense.parameter(path).requires_grad_(True) for path in paths]
    wired = Wired(dense, fitted.wired.readout, copy.deepcopy(fitted.head)).eval()
    copied = Fitted(dense, fitted.method, fitted.change, wired.head, wired)
    return dict(zip(paths, torch.autograd.grad(loss_of(copied), parameters), strict=True))


NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
SLOPES = {"bernoulli": "sigmoid", "zhou": "sigmoid", "edge-popup": "sign"}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_gradient_of_a_score(variant: str) -> None:
    """∂L/∂ℓ = ∂L/∂W · θ · slope(ℓ), with ∂L/∂W from a dense copy of the masked model.

    The slope is σ' where the sigmoid stays in the graph (how-fine B3, Zhou et al. 2019), the sign
    where scores are ranked by magnitude (Ramanujan et al. 2020), 1 elsewhere.
    """
    base = tiny_base("bert", **NO_DROPOUT)
    theta = {path: base.parameter(path).detach().clone() for path in matrices_of(base)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fitted = wire(base, method("mask", initial_sparsity=0.3, variant=variant))
        with torch.no_grad():  # away from the start, so that the slope differs by entry
            for score in fitted.change.trainable.values():
                score.add_(0.3 * score.abs().mean() * torch.randn_like(score))
        fitted.wired.train()
        fitted.head.eval()
        with torch.nn.utils.parametrize.cached():  # one draw, read by both
            dense = train_mode_dense_gradients(fitted, list(theta))
            loss_of(fitted).backward()
    for path, score in fitted.change.trainable.items():
        value = score.detach()
        slope = {
            "identity": torch.ones_like(value),
            "sigmoid": torch.sigmoid(value) * (1 - torch.sigmoid(value)),
            "sign": value.sign(),
        }[SLOPES.get(variant, "identity")]
        expected = dense[path] * theta[path] * slope
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(
            score.grad, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
        )


def test_bernoulli_samples_in_training_and_thresholds_in_use() -> None:
    """A kept entry is dropped with σ(-5) a forward pass, and a dropped one kept with it."""
    base = tiny_base("bert", hidden_size=128, intermediate_size=512)
    path = "text.encoder.layer.0.intermediate.dense.weight"
    with (
        torch.random.fork_rng(),
        method("mask", initial_sparsity=0.25, where=("I@0",)).attach(base) as change,
    ):
        torch.manual_seed(0)
        base.towers.train()
        drawn = torch.stack([weight_at(base, path) != 0 for _ in range(10)])
        base.towers.eval()
        kept = change.trainable[path] > 0
        assert torch.equal(weight_at(base, path) != 0, kept)
    count, p = drawn[0].numel(), sigmoid(-5)
    assert len({tuple(draw.flatten()[:5000].tolist()) for draw in drawn}) > 1
    wrong = (drawn != kept).double().mean().item()
    assert abs(wrong - p) < 5 * math.sqrt(p * (1 - p) / (10 * count))


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_sibling_scores_start_as_their_papers_say(share: float) -> None:
    """Table "sibling mask trainers": Piggyback, Zhao's three schemes, edge-popup."""
    base = tiny_base("bert", hidden_size=128, intermediate_size=512)
    path = "text.encoder.layer.0.intermediate.dense.weight"
    theta = base.parameter(path).detach()

    def start(variant: str) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            chosen = method("mask", variant=variant, initial_sparsity=share, where=("I@0",))
            with chosen.attach(base) as change:
                return change.trainable[path].detach().clone()

    assert torch.equal(start("piggyback"), torch.full_like(theta, 1e-2))
    low = gates.smallest(theta, share, torch.Generator())
    expected = torch.where(low, torch.tensor(0.0), torch.tensor(0.02))
    assert torch.equal(start("zhao-magnitude"), expected)
    logit = math.log((1 - share) / share)
    torch.testing.assert_close(start("zhao-bernoulli"), torch.full_like(theta, logit))
    zhao = start("zhao")
    high = 0.03 / share - 0.02
    assert -0.02 <= zhao.min() < -0.02 + 0.001 * high
    assert high * 0.999 < zhao.max() <= high
    spread = 5 * math.sqrt(share * (1 - share) / zhao.numel())
    assert abs((zhao <= 0.01).double().mean().item() - share) < spread
    popup = start("edge-popup")  # Kaiming uniform, a = √5: bound 1/√(fan in)
    assert 0.999 / math.sqrt(128) < popup.abs().max() <= 1 / math.sqrt(128)
    assert abs(popup.mean()) < 0.01 / math.sqrt(128)


@pytest.mark.parametrize("base_name", ["bert", "gpt2"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_variant_trains_and_exports(variant: str, base_name: str, tmp_path: Path) -> None:
    base = tiny_base(base_name)
    chosen = method("mask", variant=variant, initial_sparsity=0.25)
    fitted = fit_a_little(base, chosen)
    scores = fitted.change.trainable
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with chosen.attach(tiny_base(base_name)) as fresh:
            moved = [not torch.equal(scores[path], fresh.trainable[path]) for path in scores]
    assert all(moved)
    trained, read = fitted.logits(), {path: weight_at(base, path) for path in scores}
    path_of_file = tmp_path / f"mask{SUFFIX}"
    fitted.delta().save(path_of_file)
    fitted.change.remove()
    with Delta.load(path_of_file).applied(base) as wired:
        for path in scores:
            assert torch.equal(weight_at(base, path), read[path])
        assert torch.equal(Fitted(base, chosen, fitted.change, wired.head, wired).logits(), trained)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_edge_popup_keeps_its_share(share: float) -> None:
    """floor(n·s₀) of every matrix are dropped, before training and after."""
    base = tiny_base("bert")
    matrices = matrices_of(base)
    fitted = fit_a_little(base, method("mask", variant="edge-popup", initial_sparsity=share))
    for mode in (True, False):
        fitted.wired.train(mode)
        for path in matrices:
            weight = weight_at(base, path)
            assert int((weight == 0).sum()) == math.floor(weight.numel() * share)


def test_edge_popup_keeps_the_strongest_by_magnitude() -> None:
    base = tiny_base("bert")
    fitted = fit_a_little(base, method("mask", variant="edge-popup", initial_sparsity=0.3))
    for path, score in fitted.change.trainable.items():
        kept = weight_at(base, path) != 0
        assert score.abs()[kept].min() >= score.abs()[~kept].max()


def test_mask_has_no_weight_decay() -> None:
    """Decay would pull every probability to 1/2 (how-fine, pitfalls)."""
    with method("mask").attach(tiny_base("bert")) as change:
        assert all(group.get("weight_decay") == 0 for group in method("mask").groups(change))


@pytest.mark.parametrize("base_name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("kind", ["row", "column", "2:4"])
def test_mask_granularity(kind: str, base_name: str, tmp_path: Path) -> None:
    """Whole outputs or inputs are dropped, or 2 of 4 neighbouring inputs of an output.

    Sparse kernels want the N of M along the axis that is summed over: the inputs.
    """
    base = tiny_base(base_name)
    matrices = matrices_of(base)
    rule = {} if kind == "2:4" else {"initial_sparsity": 0.25}
    fitted = fit_a_little(base, method("mask", granularity=kind, **rule))
    trained = fitted.logits()
    zeros = {path: (weight_at(base, path) == 0) for path in matrices}
    path_of_file = tmp_path / f"mask{SUFFIX}"
    fitted.delta().save(path_of_file)
    fitted.change.remove()
    with Delta.load(path_of_file).applied(base) as wired:
        fitted.wired = wired
        assert torch.equal(fitted.logits(), trained)
    for path, zero in zeros.items():
        by_output = zero.T if base.anatomy.linear_axes == ("in", "out") else zero  # (out, in)
        if kind == "2:4":
            assert (by_output.unflatten(1, (-1, 4)).sum(-1) == 2).all(), path
        else:
            units = by_output if kind == "row" else by_output.T
            assert (units.all(1) | ~units.any(1)).all(), path
            assert 0 < units.all(1).sum() < len(units), path


@pytest.mark.parametrize(
    ("base_name", "letter", "count"),
    [("bert", "Q", HEADS), ("bert", "V", HEADS), ("llama", "Q", HEADS), ("llama", "K", 2)],
)
def test_mask_granularity_head(base_name: str, letter: str, count: int) -> None:
    """A unit is a whole head of the matrix: its `head_dim` neighbouring outputs."""
    base = tiny_base(base_name)
    (path,) = base.choose((f"{letter}@0",))
    chosen = method("mask", granularity="head", where=(f"{letter}@0",), initial_sparsity=0.5)
    with chosen.attach(base) as change:
        assert change.trainable[path].numel() == count
        heads = (weight_at(base, path) == 0).unflatten(0, (count, HIDDEN // HEADS)).flatten(1)
    assert (heads.all(1) | ~heads.any(1)).all()
    assert int(heads.all(1).sum()) == count // 2


def test_mask_granularity_head_of_a_fused_matrix() -> None:
    """A head's columns of GPT-2's fused matrix stand in its query, key and value parts.

    One score a head drops all three; one a part and head drops that; else it is refused.
    """
    base = tiny_base("gpt2")
    (path,) = base.choose(("QKV@0",))
    chosen = method("mask", granularity="head", where=("QKV@0",), initial_sparsity=0.5)
    try:
        change = chosen.attach(base)
    except SettingError:
        return
    with change:
        zero = (weight_at(base, path) == 0).unflatten(1, (3, HEADS, HIDDEN // HEADS))
        scores = change.trainable[path].numel()
    by_head = zero.permute(2, 0, 1, 3).flatten(1)
    by_part_and_head = zero.permute(1, 2, 0, 3).flatten(0, 1).flatten(1)
    units = {HEADS: by_head, 3 * HEADS: by_part_and_head}[scores]
    assert (units.all(1) | ~units.any(1)).all()
    assert int(units.all(1).sum()) == scores // 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "edge-popap"}, "edge-popup"),
        ({"granularity": "rows"}, "row"),
        ({"initial_sparsity": 1.0}, "below 1"),
        ({"initial_sparsity": -0.1}, "from 0"),
        ({"granularity": "3:5"}, "3:5.*multiple of 5"),
        ({"granularity": "5:4"}, "5:4"),
        ({"where": ("all",), "granularity": "column"}, "expected a matrix; select matrices only"),
        ({"where": ("bias",), "granularity": "2:4"}, "expected a matrix"),
        ({"where": ("matrces",)}, "Did you mean 'matrices'"),
        ({"where": ("K@7",)}, "7.*2 layers"),
    ],
)
def test_mask_refuses_bad_settings_before_training(settings: dict, message: str) -> None:
    base = tiny_base("bert")
    with pytest.raises(SettingError, match=message):
        method("mask", **settings).attach(base)
    assert base.is_untouched()
    assert not any(p.requires_grad for p in base.towers.parameters())


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
def test_mask_file_is_smaller_than_a_bit_a_weight(share: float, tmp_path: Path) -> None:
    """A12: at most Σ n/8 bytes, the head and 1 KB; it comes back bit for bit."""
    base = tiny_base("bert", hidden_size=128, intermediate_size=512)
    entries = sum(base.parameter(path).numel() for path in matrices_of(base))
    fitted = wire(base, method("mask", initial_sparsity=share))
    path = tmp_path / f"mask{SUFFIX}"
    size = fitted.delta().save(path)
    head = 4 * sum(p.numel() for p in fitted.head.parameters())
    assert size <= entries / 8 + head + 1024
    # And at most 1 % above the entropy n·H₂(s)/8 (how-fine, section d).
    bits = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    assert size <= 1.01 * entries * bits / 8 + head + 1024
    stored = fitted.method.pack(base, fitted.change)
    fitted.change.remove()
    found, head_found = Delta.load(path).tensors(base)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    assert all(torch.equal(head_found[k], v) for k, v in fitted.head.state_dict().items())


# --- select --------------------------------------------------------------------------------------

SELECTIONS: dict[str, tuple[dict, Callable[[str], bool]]] = {
    "everything": ({}, lambda path: True),
    "nothing": ({"train": ("none",)}, lambda path: False),
    "keys": ({"train": ("K",)}, lambda path: "self.key.weight" in path),
    "no keys": ({"freeze": ("K",)}, lambda path: "self.key.weight" not in path),
    "bitfit": ({"train": ("bias",)}, lambda path: path.endswith(".bias")),
    "norms": ({"train": ("norm",)}, lambda path: "LayerNorm" in path),
    "top layer": ({"train": ("all@-1",)}, lambda path: ".layer.1." in path),
    "both layers": ({"train": ("all@0-1",)}, lambda path: ".layer." in path),
    "no embedding": ({"freeze": ("embedding",)}, lambda path: "word_embeddings" not in path),
    "paper's last row": (
        {"freeze": ("K", "embedding", "all@-1")},
        lambda path: not re.search(r"key\.weight|word_embeddings|layer\.1\.", path),
    ),
    "feed-forward of layer 0, not its bias": (
        {"train": ("I@0", "O@0")},
        lambda path: bool(re.search(r"layer\.0\.(intermediate|output)\.dense\.weight", path)),
    ),
    "a glob": ({"train": ("*.value.*",)}, lambda path: ".value." in path),
    "pooler": ({"train": ("pooler",)}, lambda path: path.endswith("pooler.dense.weight")),
}


@pytest.mark.parametrize("selection", sorted(SELECTIONS))
def test_select_trains_what_it_names(selection: str) -> None:
    """The named tensors train; all others are bit for bit the base's, weight decay or not."""
    settings, named = SELECTIONS[selection]
    base = tiny_base("bert")
    before = {path: p.detach().clone() for path, p in base.towers.named_parameters()}
    fitted = fit_a_little(base, method("select", **settings))
    expected = {path for path in before if named(path)}
    assert fitted.change.trainable.keys() == expected
    stored = fitted.method.pack(base, fitted.change)
    assert stored.keys() <= expected
    for path, theta in before.items():
        now = weight_at(base, path)
        assert torch.equal(now, theta) == (path not in stored), path
    reached = {path for path, p in fitted.change.trainable.items() if p.grad is not None}
    assert reached <= stored.keys()


def test_bitfit_stores_about_the_biases() -> None:
    """BitFit (Ben Zaken et al. 2022) of a base without biases names nothing, and says so."""
    with pytest.raises(SettingError, match=r"'bias' names nothing.*2 layers"):
        method("select", train=("bias",)).attach(tiny_base("llama"))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_biases_may_be_named_beside_what_there_is(name: str) -> None:
    """As recipes for many architectures do; alone they are a mistake, and so is any other word."""
    base = tiny_base(name)
    expected = base.choose(("matrices", "norm"))
    for selectors in (("matrices", "bias", "norm"), ("bias", "norm", "matrices")):
        assert base.choose(selectors) == expected
    for wrong in (("matrices", "biases"), ("bias@0", "norm"), ("none", "bias")):
        with pytest.raises(SettingError, match="names nothing in this base"):
            base.choose(wrong)


class Stub:
    """Known gradients: a random level a parameter, times a random tensor."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.start: dict[str, Tensor] = {}
        self.outside: dict[str, Tensor] = {}

    def gradients(
        self, base: Base, paths: list[str], at: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        assert not at, "these gradients are the base's own"
        found = {}
        for path in paths:
            number = self.seed + sum(map(ord, path))
            level = uniform(1, seed=number).item()
            found[path] = level * uniform(*base.parameter(path).shape, seed=number + 1)
        return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("by", ["gradient", "saliency"])
@pytest.mark.parametrize("train", [("matrices",), ("matrices", "bias", "norm")])
@pytest.mark.parametrize("top", [1, 3, 6])
def test_select_takes_the_most_sensitive(
    top: int, train: tuple[str, ...], by: str, seed: int
) -> None:
    """The k modules with the largest mean |gradient| (or |gradient·weight|) per entry train."""
    base = tiny_base("bert")
    candidates = [
        path
        for path in base.paths()
        if path in matrices_of(base)
        or (len(train) > 1 and (path.endswith(".bias") or "LayerNorm" in path))
    ]
    gradients = Stub(seed).gradients(base, candidates)
    means: dict[str, list[float]] = {}
    for path in candidates:
        for gradient, weight in zip(
            gradients[path].flatten().tolist(),
            base.parameter(path).flatten().tolist(),
            strict=True,
        ):
            value = abs(gradient) if by == "gradient" else abs(gradient * weight)
            means.setdefault(path.rpartition(".")[0], []).append(value)
    ranked = sorted(means, key=lambda module: -sum(means[module]) / len(means[module]))
    expected = {path for path in candidates if path.rpartition(".")[0] in ranked[:top]}
    with method("select", train=train, top=top, by=by).attach(base, Stub(seed)) as change:
        assert change.trainable.keys() == expected


def test_select_by_gradient_on_the_task_itself() -> None:
    base = tiny_base("bert")
    chosen = method("select", train=("matrices",), top=2)
    with chosen.attach(base, TinyProbe(READOUT)) as change:
        assert len(change.trainable) == 2
    assert base.is_untouched()
    assert not any(p.requires_grad for p in base.towers.parameters())
    with pytest.raises(SettingError, match="probe"):
        chosen.attach(base)
    with pytest.raises(SettingError, match="gradient"):
        method("select", top=2, by="gradiant").attach(base, TinyProbe(READOUT))


def test_select_l1_holds_what_trains_near_the_base(tmp_path: Path) -> None:
    """λ Σ|θ - θ_base| joins the loss: its subgradient, and how far and wide a training moves."""
    base = tiny_base("bert")
    chosen = method("select", train=("Q", "bias"), l1=0.5)
    with chosen.attach(base) as change:
        assert chosen.penalty(change, 0.0).item() == 0
        moves = {}
        with torch.no_grad():
            for number, (path, value) in enumerate(change.trainable.items()):
                moves[path] = torch.full_like(value, (-1) ** number * 0.25)
                moves[path].view(-1)[0] = 0.0
                value += moves[path]
        found = chosen.penalty(change, 0.0)
        expected = 0.5 * sum(float(move.abs().sum()) for move in moves.values())
        assert found.item() == pytest.approx(expected, rel=1e-4)
        found.backward()
        for path, value in change.trainable.items():
            assert torch.equal(value.grad, 0.5 * moves[path].sign())
    far = []
    for weight in (0.0, 1e-2):
        out = tmp_path / f"{weight}{SUFFIX}"
        recipe = replace(Recipe.load("full"), method=method("select", l1=weight))
        with tune(base, tiny_task(), recipe, out=out, epochs=4).delta.changed(base):
            moved = [(weight_at(base, p) - base.original(p)).abs() for p in base.paths()]
        far.append(sum(float(each.sum()) for each in moved))
    assert far[1] < 0.5 * far[0]
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(SettingError, match="select l1 .*: expected a number from 0"):
            method("select", l1=wrong)


def test_a_loop_of_ones_own_is_told_of_a_penalty_it_leaves_out(recwarn: Any) -> None:
    for weight in (0.0, 0.1):
        model = tiny_base("bert").tower
        with howfine.attach(model, method("select", l1=weight)) as attached:
            attached.tensors()
        told = [
            str(each.message) for each in recwarn.list if "never asked for" in str(each.message)
        ]
        assert len(told) == (weight > 0)
        assert all("call attached.penalty(progress)" in each for each in told)


# --- anatomy -------------------------------------------------------------------------------------

SQUARE, IN, OUT = (HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
HALF = (HIDDEN // 2, HIDDEN)  # two key and value heads for four query heads
SIX = {"Q": SQUARE, "K": SQUARE, "V": SQUARE, "D": SQUARE, "I": IN, "O": OUT}
GATED = {**SIX, "K": HALF, "V": HALF, "G": IN}
# Letter -> stored shape in every block; and how a letter's module is spelled.
EXPECTED = {
    **dict.fromkeys(TINY, SIX),
    **dict.fromkeys(("llama", "qwen3", "gemma2"), GATED),
    "deberta-v2": {**SIX, "QP": SQUARE, "KP": SQUARE},
    "gpt2": {"QKV": (HIDDEN, 3 * HIDDEN), "D": SQUARE, "I": IN[::-1], "O": OUT[::-1]},
}
SPELLED = {
    "Q": r"(?<!pos_)(query|query_proj|q|q_proj|q_lin)$",
    "K": r"(?<!pos_)(key|key_proj|k|k_proj|k_lin)$",
    "V": r"(value|value_proj|v|v_proj|v_lin)$",
    "QKV": r"c_attn$",
    "QP": r"pos_query_proj$",
    "KP": r"pos_key_proj$",
    "D": r"(ttention|ttn).*(output\.dense|\.o|o_proj|out_proj|out_lin|c_proj|dense)$",
    "I": r"(intermediate\.dense|up_proj|lin1|fc1|c_fc|wi|ffn)$",
    "G": r"gate_proj$",
    "O": r"(?<!attention\.)(output\.dense|down_proj|lin2|fc2|mlp\.c_proj|wo|ffn_output)$",
}


@pytest.mark.parametrize("name", sorted(TINY))
def test_anatomy_finds_every_matrix(name: str) -> None:
    """Each block has each letter once, in the right module by shape and name, and no other."""
    base = tiny_base(name)
    shapes = {path: tuple(base.parameter(path).shape) for path in base.paths()}
    layers = 1 if name == "albert" else LAYERS  # ALBERT's layers share one set of weights
    assert base.anatomy.depth([p.removeprefix(base.tower_name + ".") for p in shapes]) == layers
    for layer in range(layers):
        letters = EXPECTED[name]
        for letter, shape in letters.items():
            (path,) = base.choose((f"{letter}@{layer}",))
            assert shapes[path] == shape, path
            assert re.search(SPELLED[letter], path.removesuffix(".weight")), path
            number = re.findall(r"\d+", path)
            assert str(layer) in number[:2], path
            assert base.place(path) == (layer, letter)
        assert len(base.choose((f"matrices@{layer}",))) == len(letters)
    assert base.choose(("matrices",)) == matrices_of(base)


@pytest.mark.parametrize("name", sorted(TINY))
def test_anatomy_outside_the_blocks(name: str) -> None:
    base = tiny_base(name)
    places = {path: base.place(path) for path in base.paths()}
    (embedding,) = base.choose(("embedding",))
    largest = max(
        (p for p in places if base.parameter(p).ndim != 1 and places[p][0] is None),
        key=lambda p: base.parameter(p).numel(),
    )
    assert embedding == largest
    poolers = {path for path in places if "pooler" in path and path.endswith("weight")}
    assert {path for path, (_, part) in places.items() if part == "pooler"} == poolers
    for path, (layer, part) in places.items():
        inner = path.lower()
        assert (part == "norm") == bool(re.search(r"norm|\.ln_", inner)), path
        if part != "norm":
            assert (part == "bias") == path.endswith(".bias"), path
        assert (layer is None) == (not re.search(r"\.\d+\.", path)), path


@pytest.mark.parametrize("name", sorted(set(TINY) - {"vit", "dinov2"}))
def test_base_knows_its_width_and_heads(name: str) -> None:
    base = tiny_base(name)
    assert (base.hidden_size, base.heads, base.tower_name) == (HIDDEN, HEADS, "text")


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_image_base(name: str) -> None:
    base = tiny_base(name)
    assert (base.hidden_size, base.heads, base.tower_name) == (HIDDEN, HEADS, "image")


@pytest.mark.parametrize(
    ("selectors", "count"),
    [
        (("matrices",), 12),
        (("matrices@0",), 6),
        (("matrices@-1",), 6),
        (("matrices@0-1",), 12),
        (("matrices@-2--1",), 12),
        (("matrices@0,-1",), 12),
        (("matrices@0,0",), 6),
        (("matrices@0-0", "Q"), 7),
        (("Q", "K"), 4),
        (("all@0",), 16),
        (("all",), 39),
        (("none",), 0),
        (("none", "Q"), 2),
        (("bias",), 18),
        (("norm@1",), 4),
        (("encoder.layer.1.*",), 16),
        (("*.key.bias",), 2),
        (("pooler.dense.weight",), 1),
        (("*@1",), 16),
        ((), 0),
    ],
)
def test_selectors(selectors: tuple[str, ...], count: int) -> None:
    base = tiny_base("bert")
    chosen = base.choose(selectors)
    assert len(chosen) == count
    assert chosen == [path for path in base.paths() if path in set(chosen)]


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("matrixes", "'matrixes' names nothing in this base .2 layers.. Did you mean 'matrices'"),
        ("embeding", "Did you mean 'embedding'"),
        ("q", "'q' names nothing.*Known: .*Q"),
        ("G", "'G' names nothing"),
        ("", "names nothing"),
        ("K@2", "'2' is outside the base's 2 layers .0 to 1"),
        ("K@-3", "'-3' is outside"),
        ("K@1-0", "'1-0' is outside"),
        ("K@first", "found 'first', expected indices and ranges"),
        ("K@0,", "found ''"),
        ("K@", "layers|names nothing"),
        ("*.keys.*", "names nothing"),
        ("embedding@0", "names nothing"),
    ],
)
def test_selector_errors(selector: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        tiny_base("bert").choose(("Q", selector))


def test_unknown_architecture_names_a_near_one() -> None:
    tower = tiny_tower("bert")
    tower.config.model_type = "robertta"
    with pytest.raises(UnknownArchitecture, match="'robertta' has no anatomy row.*'roberta'"):
        Base("odd", tower)


def test_labels_reach_the_head() -> None:
    """The readout's head has one output a label: what the laws measure is a classifier."""
    head = READOUT.attach(tiny_base("bert"), LABELS)
    shapes = {tuple(p.shape) for p in head.parameters()}
    assert shapes == {(len(LABELS), HIDDEN), (len(LABELS),)}
