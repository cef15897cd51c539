"""subspace: its maps against the papers' formulas as plain loops, and the laws on each of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import howfine
from howfine.base import Base
from howfine.delta import SUFFIX, Delta
from howfine.errors import DamagedDelta, SettingError
from howfine.method import Method, method
from howfine.methods.subspace import codes, cores, directions
from tiny import TINY, fit_a_little, logits_of, loss_of, matrices_of, tiny_base, weight_at, wire

MAPS: dict[str, dict[str, Any]] = {
    "random": {"map": "random", "size": 24, "where": ["all"], "map_seed": 5},
    "lora-xs": {"map": "lora-xs", "rank": 3},
    "tiny-all": {"map": "tiny-lora", "rank": 3, "size": 5},
    "tiny-letter": {"map": "tiny-lora", "rank": 2, "size": 3, "sharing": "letter", "map_seed": 9},
    "tiny-layer": {"map": "tiny-lora", "rank": 2, "size": 3, "sharing": "layer"},
    "tiny-none": {"map": "tiny-lora", "rank": 2, "size": 3, "sharing": "none"},
}
every_map = pytest.mark.parametrize("name", MAPS)


def made(name: str, **settings: Any) -> Method:
    """A method of MAPS, with settings changed."""
    return method("subspace", **{**MAPS[name], **settings})


def chosen_by(base: Base, name: str) -> list[str]:
    """The paths a method of MAPS changes, in the order of its map."""
    return base.choose(tuple(MAPS[name].get("where", ["matrices"])))


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the laws, on every map ----------------------------------------------------------------------


@pytest.mark.parametrize("base_name", ["bert", "gpt2", "t5"])
@every_map
def test_a_map_is_exact_moves_and_leaves_the_base(
    name: str, base_name: str, tmp_path: Path
) -> None:
    """The laws exact, start, moves, untouched and frozen, which EXAMPLE runs on one map alone."""
    base, fresh = tiny_base(base_name), tiny_base(base_name)
    chosen = made(name)
    started = wire(base, chosen)
    started.wired.eval()
    attached = started.logits()
    started.change.remove()
    assert torch.equal(started.logits(), attached)
    fitted = fit_a_little(base, chosen)
    (reached,) = [p for p in fitted.base.towers.parameters() if p.grad is not None]
    assert reached is fitted.change.trainable["v"]
    trained, delta = fitted.logits(), fitted.delta()
    fitted.change.remove()
    assert (fitted.logits() - trained).abs().max() > 1e-4
    assert base.is_untouched()
    delta.save(tmp_path / f"change{SUFFIX}")
    loaded = Delta.load(tmp_path / f"change{SUFFIX}")
    assert [stream.name for stream in loaded.streams if "method" in stream.name] == ["method/v"]
    with loaded.applied(fresh) as wired:
        assert torch.equal(logits_of(wired, fresh), trained)
    assert fresh.is_untouched()


# --- random --------------------------------------------------------------------------------------


def projection(sizes: list[int], size: int, seed: int) -> np.ndarray[Any, Any]:
    """P (entries, size) entry by entry: row i has ±1 at the number of its word, columns of norm 1.

    Of a word, the upper 32 bits give the number, the lowest one the sign.
    """
    rows = []
    for stream, entries in enumerate(sizes):
        generator = np.random.Philox(key=seed + (stream << 64))
        for word in generator.random_raw(entries).tolist():
            row = [0.0] * size
            row[(word // 2**32) * size // 2**32] = -1.0 if word % 2 else 1.0
            rows.append(row)
    dense = np.array(rows)
    return dense / np.sqrt((dense**2).sum(axis=0))


def test_random_against_the_dense_projection() -> None:
    """θ = θ0 + P v (Li et al. 2018, equation 2), and ∂loss/∂v = Pᵀ ∂loss/∂θ."""
    base = tiny_base("gpt2")
    paths = chosen_by(base, "random")
    originals = {path: base.parameter(path).detach().clone() for path in paths}
    dense = torch.from_numpy(projection([p.numel() for p in originals.values()], 24, 5))
    torch.testing.assert_close(dense.T @ dense, torch.eye(24, dtype=torch.float64))
    v = draws(24).double()
    fitted = wire(base, made("random"))
    fitted.change.trainable["v"].data = v.float()
    moved = torch.cat([weight_at(base, path).flatten() for path in paths])
    start = torch.cat([value.flatten() for value in originals.values()])
    torch.testing.assert_close(moved, (start + dense @ v).float())
    fitted.wired.eval()
    loss_of(fitted).backward()
    found = fitted.change.trainable["v"].grad
    fitted.change.remove()

    head = fitted.head
    dense_fit = wire(base, method("select", train=MAPS["random"]["where"]))
    dense_fit.wired.head = head
    for path, value in dense_fit.change.trainable.items():
        here = paths.index(path)
        before = sum(originals[other].numel() for other in paths[:here])
        value.data = moved[before : before + value.numel()].view(value.shape)
    dense_fit.wired.eval()
    loss_of(dense_fit).backward()
    whole = dense_fit.change.trainable
    gradient = torch.cat(
        [
            torch.zeros(whole[p].numel()) if (g := whole[p].grad) is None else g.flatten()
            for p in paths
        ]
    )
    dense_fit.change.remove()
    assert found is not None
    torch.testing.assert_close(found, (dense.T @ gradient.double()).float(), rtol=1e-4, atol=1e-6)


def test_the_hash_is_the_one_that_files_were_written_with() -> None:
    """Another one would make every stored delta of this map another model."""
    # 2 j + s, for number j and the sign (-1)^s
    assert codes(0, 0, 12, 10).tolist() == [1, 4, 3, 10, 11, 5, 19, 18, 5, 2, 14, 2]
    expected = [964, 1449, 100, 633, 1361, 390, 1025, 626, 1173, 536, 1803, 1469]
    assert codes(7, 3, 12, 1000).tolist() == expected
    long = codes(7, 3, 200_000, 1000)  # drawn in several chunks, as if in one
    assert long[:12].tolist() == expected
    raw = np.random.Philox(key=7 + (3 << 64)).random_raw(200_000).tolist()
    assert long[-3:].tolist() == [(w // 2**32) * 1000 // 2**32 * 2 + w % 2 for w in raw[-3:]]


def test_the_hash_is_even() -> None:
    """Of 200 000 entries, each of 100 numbers gets its share, and each sign half of that."""
    counts = torch.bincount(codes(1, 0, 200_000, 100), minlength=200).double()
    assert (counts - 1000).abs().max() < 5 * math.sqrt(1000)
    assert abs(counts[::2].sum() - 100_000) < 5 * math.sqrt(50_000)


def test_a_rate_of_the_random_map_is_by_entry_of_the_weights() -> None:
    """A step of v_j by lr √(n/d) moves each of its n/d entries, scaled 1/√(n/d), by lr."""
    base = tiny_base("bert")
    chosen = made("random", where=["matrices"], size=7)
    with chosen.attach(base) as change:
        (group,) = chosen.groups(change)
        rate = 1e-3 * group["lr_scale"]
        change.trainable["v"].data.fill_(rate)
        paths = base.choose(("matrices",))
        moved = torch.cat([(weight_at(base, p) - base.parameter(p)).flatten() for p in paths])
    assert moved.abs().mean().item() == pytest.approx(1e-3, rel=0.01)
    assert chosen.learning_rate(400) == pytest.approx(chosen.learning_rate(100) / 2)
    for name in ("lora-xs", "tiny-none"):
        with made(name).attach(base) as change:
            assert made(name).groups(change)[0]["lr_scale"] == 1


# --- lora-xs -------------------------------------------------------------------------------------


def svd(weight: Tensor, rank: int) -> list[tuple[Tensor, float, Tensor]]:
    """(u, σ, v) of the strongest directions of a matrix (out, in), u's largest entry positive."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    found = []
    for u, value, v in zip(left.T[:rank], values[:rank], right[:rank], strict=True):
        sign = 1.0 if u[u.abs().argmax()] > 0 else -1.0
        found.append((sign * u, value.item(), sign * v))
    return found


@pytest.mark.parametrize("shape", [(7, 7), (12, 5), (5, 12)])
def test_directions(shape: tuple[int, int]) -> None:
    weight = draws(*shape)
    left, right = directions(weight, 4)
    for number, (u, value, v) in enumerate(svd(weight, 4)):
        torch.testing.assert_close(left[:, number], value * u)
        torch.testing.assert_close(right[number], v)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_directions_that_a_matrix_has_not_are_zero(shape: tuple[int, int]) -> None:
    weight = draws(shape[0], 2) @ draws(2, shape[1], seed=1)
    left, right = directions(weight, 4)
    assert torch.equal(left[:, 2:], torch.zeros(shape[0], 2).double())
    assert torch.equal(right[2:], torch.zeros(2, shape[1]).double())
    torch.testing.assert_close((left @ right).float(), weight)
    assert not torch.cat([part.flatten() for part in directions(torch.zeros(shape), 2)]).any()


def expected_change(base: Base, path: str, core: Tensor) -> Tensor:
    """Σ_ij core_ij σ_i u_i v_jᵀ, in the layout the base stores it."""
    turned = base.anatomy.linear_axes == ("in", "out")
    weight = base.parameter(path).detach()
    frame = svd(weight.T if turned else weight, len(core))
    change = torch.zeros(weight.T.shape if turned else weight.shape, dtype=torch.float64)
    for i, (u, value, _) in enumerate(frame):
        for j, (_, _, v) in enumerate(frame):
            change += core[i, j].double() * value * torch.outer(u, v)
    return change.T if turned else change


@pytest.mark.parametrize("base_name", ["bert", "gpt2", "t5"])
def test_lora_xs_against_the_formula(base_name: str) -> None:
    """ΔW = U_r Σ_r R V_rᵀ for each matrix (Bałazy et al. 2024, section 3)."""
    base = tiny_base(base_name)
    paths = matrices_of(base)
    with made("lora-xs").attach(base) as change:
        free = change.trainable["v"]
        assert free.shape == (len(paths), 3, 3)
        free.data = draws(*free.shape)
        found = {path: weight_at(base, path) for path in paths}
        order = chosen_by(base, "lora-xs")
        assert sorted(order) == sorted(paths)
        for number, path in enumerate(order):
            moved = found[path] - base.parameter(path)
            expected = expected_change(base, path, free.data[number]).float()
            torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)


# --- tiny-lora -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base_name", ["bert", "gpt2"])
@pytest.mark.parametrize("name", [name for name in MAPS if name.startswith("tiny")])
def test_tiny_lora_against_the_formula(name: str, base_name: str) -> None:
    """R = Σ_i v_i P_i (Morris et al. 2026), with the v of the matrix's group."""
    base, chosen = tiny_base(base_name), made(name)
    paths = chosen_by(base, name)
    letters = list(dict.fromkeys(base.place(path)[1] for path in paths))
    settings = MAPS[name]
    sharing = settings.get("sharing", "all")
    with chosen.attach(base) as change:
        free = change.trainable["v"]
        assert (
            len(free) == {"all": 1, "letter": len(letters), "layer": 2, "none": len(paths)}[sharing]
        )
        free.data = draws(*free.shape)
        for number, path in enumerate(paths):
            layer, letter = base.place(path)
            row = {"all": 0, "letter": letters.index(letter), "layer": layer, "none": number}[
                sharing
            ]
            basis = cores(settings.get("map_seed", 0), number, settings["size"], settings["rank"])
            core = torch.zeros(settings["rank"], settings["rank"])
            for weight, matrix in zip(free.data[row], basis, strict=True):
                core += weight * matrix
            moved = weight_at(base, path) - base.parameter(path)
            expected = expected_change(base, path, core).float()
            torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)


def test_a_shared_gradient_is_the_sum_over_the_matrices() -> None:
    def gradient(sharing: str) -> Tensor:
        fitted = wire(tiny_base("bert"), made("tiny-all", sharing=sharing))
        fitted.wired.eval()
        loss_of(fitted).backward()
        found = fitted.change.trainable["v"].grad
        assert found is not None
        return found

    with torch.random.fork_rng():
        torch.manual_seed(0)
        alone = gradient("none")
        torch.manual_seed(0)
        together = gradient("all")
    assert alone.abs().min() > 0
    torch.testing.assert_close(together, alone.sum(0, keepdim=True), rtol=1e-4, atol=1e-6)


def test_the_cores_are_those_that_files_were_written_with() -> None:
    raw = np.random.Philox(key=1 + (2 << 64)).random_raw(8).tolist()
    assert raw[:2] == [5705853004827290377, 6584680345644299050]
    expected = []
    for word in raw:
        parts = [word // 2**shift % 2**16 for shift in (0, 16, 32, 48)]
        deviation = math.sqrt(4 * (2**32 - 1) / 12)  # of four draws from 0 to 2^16 - 1
        expected.append((sum(parts) - 4 * 65535 / 2) / deviation / 2)
    assert cores(1, 2, 2, 2).flatten().tolist() == torch.tensor(expected).tolist()
    assert expected[0] == pytest.approx(-0.261752795, abs=1e-9)


def test_the_cores_are_nearly_normal() -> None:
    """10 000 matrices of rank 4: entries of mean 0 and variance 1/16, within five deviations."""
    values = 4 * cores(0, 0, 10_000, 4).double()
    assert abs(values.mean()) < 5 / math.sqrt(160_000)
    assert abs(values.square().mean() - 1) < 5 * math.sqrt(2 / 160_000)
    assert values.square().sum((1, 2)).mean().item() == pytest.approx(16, rel=0.02)


# --- seeds, number formats, errors ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["random", "tiny-all", "tiny-none"])
def test_the_seed_alone_makes_the_map(name: str) -> None:
    def moved(seed: int, noise: int) -> Tensor:
        base = tiny_base("bert")
        torch.manual_seed(noise)
        with made(name, map_seed=seed).attach(base) as change:
            change.trainable["v"].data.fill_(0.1)
            return torch.cat([weight_at(base, p).flatten() for p in chosen_by(base, name)])

    with torch.random.fork_rng():
        first = moved(1, noise=1)
        assert torch.equal(first, moved(1, noise=2))
        assert not torch.allclose(first, moved(2, noise=1), atol=1e-3)


@every_map
def test_mixed_precision_keeps_small_changes(name: str) -> None:
    """A change below bfloat16's steps still reaches the weight that a training step reads."""
    base = tiny_base("bert")
    with made(name).attach(base) as change:
        change.trainable["v"].data.fill_(1e-3)
        plain = {path: weight_at(base, path) for path in chosen_by(base, name)}
        with torch.autocast("cpu", torch.bfloat16):
            for path, value in plain.items():
                assert torch.equal(weight_at(base, path), value)
                assert not torch.equal(value, base.parameter(path))


@every_map
def test_on_a_half_precision_base(name: str) -> None:
    """Weights keep their format and, at v = 0, their values; v is float32."""
    base = tiny_base("bert")
    base.towers.to(torch.bfloat16)
    with made(name).attach(base) as change:
        assert change.trainable["v"].dtype == torch.float32
        for path in chosen_by(base, name):
            assert torch.equal(weight_at(base, path), base.parameter(path))
        change.trainable["v"].data.fill_(0.5)
        assert weight_at(base, path).dtype == torch.bfloat16
        assert not torch.equal(weight_at(base, path), base.parameter(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, r"size: found 0, expected a whole number from 1"),
        ({"map": "random", "map_seed": -1}, r"map_seed: found -1"),
        ({"map": "random", "rank": 2}, r"rank 2 has no meaning with map 'random'"),
        ({"map": "random", "sharing": "none"}, r"sharing 'none' has no meaning"),
        ({"size": 3}, r"size 3 has no meaning with map 'lora-xs'"),
        ({"map": "tiny-lora", "rank": 2}, r"size 16: a core of rank 2 has 4 entries"),
        ({"map": "svd"}, r"setting 'map': found 'svd'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        method("subspace", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"where": ["none"]}, "where=none names nothing"),
        ({"where": ["bias"]}, r"has the shape \(32,\), expected a matrix"),
        ({"rank": 33}, r"rank 33: .* has the shape \(32, 32\)"),
        ({"map": "random", "where": ["K@0"], "size": 1025}, "1,024 entries to change"),
    ],
)
def test_settings_that_the_base_does_not_allow(settings: dict[str, Any], message: str) -> None:
    base = tiny_base("bert")
    with pytest.raises(SettingError, match=message):
        method("subspace", **settings).attach(base)
    assert base.is_untouched()


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"v": torch.zeros(12, 3, 2)},
        {"v": torch.zeros(12, 3, 3, dtype=torch.bool)},
        {"w": torch.zeros(12, 3, 3)},
        {"v": torch.zeros(12, 3, 3), "w": torch.zeros(1)},
    ],
)
def test_tensors_that_do_not_fit(tensors: dict[str, Tensor]) -> None:
    base = tiny_base("bert")
    with pytest.raises(DamagedDelta, match=r"expected 'v' of shape \(12, 3, 3\)"):
        made("lora-xs").unpack(base, tensors)
    assert base.is_untouched()


def test_in_a_loop_of_ones_own() -> None:
    """What trains is no parameter of the model's: a head tied to a changed weight is found."""
    prefix, settings = TINY["gpt2"]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    model = transformers.GPT2LMHeadModel(config)
    tied = {"map": "random", "where": ["matrices", "embedding"]}
    with pytest.raises(SettingError, match=r"wte\.weight is shared with the model's head"):
        howfine.attach(model, "subspace", **tied)
    ids = torch.arange(12).view(1, -1)
    before = model.eval()(ids).logits
    with howfine.attach(model, "subspace", map="random") as attached:
        (own,), (group,) = attached.parameters(), attached.parameters(1e-3)
        (scaled,) = attached.method.groups(attached.change)
        assert "lr" not in own
        assert group["lr"] == 1e-3 * scaled["lr_scale"] != 1e-3
        optimiser = torch.optim.AdamW(attached.parameters(), lr=0.1)
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        assert attached.tensors()["v"].abs().min() > 0
        assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    assert torch.equal(model(ids).logits, before)
