"""Deltas as an algebra: unions, differences, sums and overlaps, against plain loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

import howfine
from console import howfine_here
from disk import base_folder
from howfine import codec, cost, joining, regions, streams
from howfine.base import Base
from howfine.codec import PRECISIONS, decode_values, encode_values
from howfine.compose import compose, difference, negate, overlap, scale, scaled_sum, stored, union
from howfine.delta import SUFFIX, Delta
from howfine.entries import flat_entries, sparse
from howfine.errors import DamagedDelta, DeltaError, SettingError, WrongBase
from howfine.joining import OnOverlap
from howfine.method import Tensors, examples, holding, method, methods
from howfine.operands import operands
from howfine.readout import readout
from howfine.start import weight_at
from tiny import LABELS, READOUT, fit_a_little, logits_of, tiny_base

BASES = {name: tiny_base(name) for name in ("bert", "gpt2")}
# The few matrices that change here: loops over their entries are quick.
WHERE = {name: base.choose(("matrices",))[1:3] for name, base in BASES.items()}
VERBS = ("union", "difference", "sum", "scale", "negate", "overlap")
TIGHT = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> Base:
    return BASES[request.param]


def delta_of(base: Base, tensors: Tensors, store: str = "fp32", seed: int = 0) -> Delta:
    """A delta of these tensors with a head of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settled = READOUT.settled(base)
        head = settled.pack(settled.attach(base, LABELS))
    whole = not any(tensor.is_sparse for tensor in tensors.values())
    found = [
        *streams.encode("method", tensors, store, base),
        *streams.encode("readout", head, store, base),
    ]
    chosen = method("full" if whole else "sparse")
    return Delta(base.name, base.fingerprint, chosen, settled, LABELS, tuple(found))


def where(base: Base) -> list[str]:
    return (
        WHERE[base.name.removeprefix("tiny-")] if base.name.startswith("tiny-") else WHERE["bert"]
    )


def moved(base: Base, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: base.parameter(path).detach()
        + 0.1 * torch.randn(base.parameter(path).shape, generator=generator)
        for path in where(base)
    }


def graft(base: Base, part: int, parts: int = 3, store: str = "fp32", seed: int = 0) -> Delta:
    """New values at the entries whose number is `part` modulo `parts`: disjoint for others."""
    tensors = {}
    for path, value in moved(base, 10 * part + seed).items():
        index = torch.arange(part, value.numel(), parts)
        tensors[path] = sparse(index, value.flatten()[index], tuple(value.shape))
    return delta_of(base, tensors, store, seed=part)


def whole(base: Base, seed: int, store: str = "fp32") -> Delta:
    return delta_of(base, moved(base, seed), store, seed)


def values_of(delta: Delta, base: Base) -> dict[str, list[float]]:
    """The weights while the delta is on, as plain numbers; no other one is in its file."""
    found, tensors = {}, delta.tensors(base)[0]
    assert tensors.keys() <= set(where(base))
    for path in where(base):
        value = base.parameter(path).detach().flatten().clone()
        tensor = tensors.get(path)
        if tensor is not None and tensor.is_sparse:
            index, new = flat_entries(tensor)
            for i, x in zip(index.tolist(), new.tolist(), strict=True):
                value[i] = x
        elif tensor is not None:
            value = tensor.flatten()
        found[path] = value.tolist()
    return found


def same(one: Delta, other: Delta, base: Base) -> bool:
    """Whether two deltas hold the same places and the same values, bit for bit."""
    left, right = one.tensors(base)[0], other.tensors(base)[0]
    if left.keys() != right.keys():
        return False
    for path, tensor in left.items():
        if tensor.is_sparse != right[path].is_sparse:
            return False
        pairs = [(tensor, right[path])]
        if tensor.is_sparse:
            pairs = list(zip(flat_entries(tensor), flat_entries(right[path]), strict=True))
        if not all(torch.equal(a, b) for a, b in pairs):
            return False
    return True


# --- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["fp32", "fp16", "int8", "int3", "sign"])
def test_a_disjoint_union_is_both_switches_on(base: Base, store: str) -> None:
    a, b = graft(base, 0, store=store), graft(base, 1, store=store)
    joined = union([a, b], base)
    with joined.applied(base) as model:
        found = logits_of(model, base)
    with a.applied(base) as model, b.method.unpack(base, b.tensors(base)[0]):
        expected = logits_of(model, base)
    assert torch.equal(found, expected)
    assert base.is_untouched()


@pytest.mark.parametrize("store", PRECISIONS)
def test_disjoint_unions_commute_associate_and_are_undone(store: str) -> None:
    base = BASES["gpt2" if store == "int4" else "bert"]
    a, b, c = (graft(base, part, store=store) for part in range(3))
    joined = union([a, b], base)
    assert same(joined, union([b, a], base), base)
    assert same(union([joined, c], base), union([a, union([b, c], base)], base), base)
    assert same(difference([joined, b], base), a, base)
    assert same(difference([joined, a], base), b, base)
    assert same(difference([union([a, b, c], base), b, c], base), a, base)


def test_a_union_of_quantised_deltas_is_as_small_as_its_parts(base: Base, tmp_path: Path) -> None:
    a, b = graft(base, 0, store="int4"), graft(base, 1, 30, store="int8")
    sizes = [each.save(tmp_path / "x") for each in (a, b)]
    assert union([a, b], base).save(tmp_path / "y") < sum(sizes)
    rest = difference([union([a, b], base), b], base)
    assert rest.save(tmp_path / "z") <= sizes[0]


@pytest.mark.parametrize("store", ["fp32", "fp16", "int8", "int2"])
def test_scaling(base: Base, store: str) -> None:
    a = graft(base, 0, store=store)
    assert same(scale([a], base, by=1.0), a, base)
    there = values_of(a, base)
    back = values_of(negate([negate([a], base)], base), base)
    half = values_of(scale([a], base, by=-0.3), base)
    for path, values in there.items():
        original = base.parameter(path).flatten().tolist()
        for x, y, h, o in zip(values, back[path], half[path], original, strict=True):
            assert abs(x - y) <= 2e-7 * (abs(x) + abs(o))
            assert abs(h - (o - 0.3 * (x - o))) <= 2e-7 * (abs(x) + abs(o))


@pytest.mark.parametrize("store", ["fp16", "int8", "int4", "sign"])
def test_the_opposite_of_a_rounded_change_is_as_small(
    base: Base, tmp_path: Path, store: str
) -> None:
    """Steps keep their number of bits; twice the opposite is the change again, bit for bit."""
    a = graft(base, 0, store=store)
    opposite = negate([a], base)
    assert abs(opposite.save(tmp_path / "b") - a.save(tmp_path / "a")) < 40
    assert same(negate([opposite], base), a, base)


@pytest.mark.parametrize("kinds", ["entries", "tensors", "both"])
@pytest.mark.parametrize("store", ["fp32", "int8"])
def test_a_sum_is_the_plain_loop(base: Base, kinds: str, store: str) -> None:
    a = whole(base, 1, store) if kinds != "entries" else graft(base, 0, 2, store)
    b = whole(base, 2, store) if kinds == "tensors" else graft(base, 0, 3, store)
    weights = (0.7, 0.3)
    found = values_of(scaled_sum([a, b], base, weights=weights), base)
    parts = [values_of(a, base), values_of(b, base)]
    for path, values in found.items():
        original = base.parameter(path).flatten().tolist()
        for i, value in enumerate(values):
            expected = original[i]
            for weight, part in zip(weights, parts, strict=True):
                expected += weight * (part[path][i] - original[i])
            assert abs(value - expected) <= 1e-6, (path, i)


def test_weights_that_sum_to_one_interpolate(base: Base) -> None:
    """Between two full models, θ drops out: 0.25 θ_a + 0.75 θ_b."""
    a, b = whole(base, 1), whole(base, 2)
    found, _ = scaled_sum([a, b], base, weights=[0.25, 0.75]).tensors(base)
    one, other = a.tensors(base)[0], b.tensors(base)[0]
    for path, value in found.items():
        torch.testing.assert_close(value, 0.25 * one[path] + 0.75 * other[path], **TIGHT)
    same_again = scaled_sum([a, a], base, weights=[0.5, 0.5])
    assert same(same_again, a, base)


@pytest.mark.parametrize("rule", ["first", "last", "mean", "sum"])
@pytest.mark.parametrize("kinds", ["entries", "tensors", "both"])
def test_what_holds_where_changes_overlap(base: Base, rule: str, kinds: str) -> None:
    """Three operands; places with one, two and three changes, and with none."""
    given = [graft(base, 0, parts, seed=parts) for parts in (2, 3, 5)]
    if kinds != "entries":
        dense = values_of(given[0], base)
        paths = where(base)
        tensors = {p: torch.tensor(dense[p]).view(base.parameter(p).shape) for p in paths}
        given[0] = delta_of(base, tensors)
    if kinds == "tensors":
        given = given[:1] + [
            delta_of(
                base,
                {
                    path: torch.tensor(value).view(base.parameter(path).shape)
                    for path, value in values_of(each, base).items()
                },
            )
            for each in given[1:]
        ]
    found = values_of(union(given, base, on_overlap=rule), base)
    parts = [values_of(each, base) for each in given]
    for path, values in found.items():
        original = base.parameter(path).flatten().tolist()
        for i, value in enumerate(values):
            news = [part[path][i] for part in parts if part[path][i] != original[i]]
            moves = [new - original[i] for new in news]
            if len(news) < 2:
                assert value == (news[0] if news else original[i])
            elif rule in ("first", "last"):
                assert value == news[0 if rule == "first" else -1]
            else:
                expected = sum(moves) / (len(moves) if rule == "mean" else 1)
                assert abs(value - original[i] - expected) <= 1e-6


def test_disjoint_parts_of_one_tensor_are_copied_into_it(base: Base) -> None:
    """Whole tensors, but each changes a half of each: the union has no arithmetic either."""
    halves = []
    for part in (0, 1):
        tensors = {}
        for path, value in moved(base, part).items():
            flat = base.parameter(path).detach().flatten().clone()
            flat[part::2] = value.flatten()[part::2]
            tensors[path] = flat.view(value.shape)
        halves.append(delta_of(base, tensors))
    joined = union(halves, base)
    assert same(difference([joined, halves[1]], base), halves[0], base)
    assert same(union(halves[::-1], base), joined, base)


def test_whole_tensors_that_change_nearly_all_are_not_coded_as_entries(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those take the more bytes in any case, and ten times the time."""
    monkeypatch.setattr(joining, "_of_entries", lambda *_: pytest.fail("coded as entries"))
    made = scaled_sum([graft(base, 0), whole(base, 1)], base, weights=(1, 1))
    assert made.method == holding("tensors")


@pytest.mark.parametrize("operation", ["union", "sum"])
def test_entries_and_tensors_take_the_fewer_bytes(operation: str, tmp_path: Path) -> None:
    """Some entries of matrices and a whole vector are as small together as both files are."""
    base = tiny_base("bert", hidden_size=64, intermediate_size=256)
    paths = base.choose(("matrices",))
    some = {
        path: sparse(torch.tensor([3, 40]), torch.ones(2), tuple(base.parameter(path).shape))
        for path in paths
    }
    bias = base.choose(("bias",))[0]
    one = {bias: base.parameter(bias).detach() + 0.25}
    deltas = [delta_of(base, some), delta_of(base, one)]
    sizes = [delta.save(tmp_path / f"{n}{SUFFIX}") for n, delta in enumerate(deltas)]
    before = {path: base.parameter(path).detach().clone().flatten() for path in paths}
    made = compose(operation, deltas, base)
    assert made.save(tmp_path / f"made{SUFFIX}") < sum(sizes)
    with made.changed(base):
        for path in paths:
            now = weight_at(base, path).flatten()
            assert now[[3, 40]].tolist() == [1, 1]
            assert int((now != before[path]).sum()) == 2
        assert torch.equal(weight_at(base, bias), one[bias])
    # Where most entries change, whole tensors are smaller: they have no places.
    dense = {path: torch.full_like(base.parameter(path), 0.5) for path in paths}
    made = compose("sum", [delta_of(base, some), delta_of(base, dense)], base)
    assert made.method == holding("tensors")
    made.check_base(base)


@pytest.mark.parametrize("operation", ["negate", "scale"])
def test_places_in_rows_and_columns_stay_short(operation: str, tmp_path: Path) -> None:
    """Of one matrix, whole rows cost no more in a scaled file than in the first one."""
    base = tiny_base("bert", hidden_size=64, intermediate_size=256)
    path = base.choose(("I",))[0]
    shape = tuple(base.parameter(path).shape)
    rows = torch.zeros(shape, dtype=torch.bool)
    rows[torch.randperm(shape[0], generator=torch.Generator().manual_seed(0))[:60]] = True
    index = rows.flatten().nonzero().flatten()
    values = base.parameter(path).detach().flatten()[index] + 0.5
    delta = delta_of(base, {path: sparse(index, values, shape)}, "int8")
    asked = {"by": 0.5} if operation == "scale" else {}
    made = compose(operation, [delta], base, **asked)
    places = [s.coded for one in (delta, made) for s in one.streams if s.values is not None]
    assert [each.coding for each in places] == ["grid", "grid"]
    assert made.save(tmp_path / f"b{SUFFIX}") <= 1.02 * delta.save(tmp_path / f"a{SUFFIX}")


def test_changes_of_one_step_have_a_mean(base: Base) -> None:
    """Several times the same smallest change of a float32 is that change."""
    tensors = {
        path: torch.nextafter(base.parameter(path).detach(), torch.tensor(9.0))
        for path in where(base)
    }
    same_ones = [delta_of(base, tensors, seed=seed) for seed in range(4)]
    joined = union(same_ones, base, on_overlap="mean", head=0)
    assert same(joined, same_ones[0], base)


@pytest.mark.parametrize("kinds", ["entries", "tensors"])
def test_a_difference_is_the_plain_loop(base: Base, kinds: str) -> None:
    a = graft(base, 0, 2, "int4") if kinds == "entries" else whole(base, 3)
    b = graft(base, 0, 3)
    found = values_of(difference([a, b], base), base)
    there, other = values_of(a, base), values_of(b, base)
    for path, values in found.items():
        original = base.parameter(path).flatten().tolist()
        for i, value in enumerate(values):
            kept = other[path][i] == original[i]
            assert value == (there[path][i] if kept else original[i])


def test_overlaps_are_counted_one_by_one(base: Base) -> None:
    given = [graft(base, 0, 2), graft(base, 0, 3), whole(base, 1)]
    changed = []
    for each in given:
        now = values_of(each, base)
        changed.append(
            {
                (path, i)
                for path in now
                for i, old in enumerate(base.parameter(path).flatten().tolist())
                if now[path][i] != old
            }
        )
    among = sum(base.parameter(path).numel() for path in where(base))
    found = {(row.by, row.of): row for row in overlap(given, base)}
    assert len(found) == 6
    for i, a in enumerate(changed):
        for j, b in enumerate(changed):
            if i != j:
                row = found[f"delta {i + 1}", f"delta {j + 1}"]
                assert (row.shared, row.count) == (len(a & b), len(b))
                assert row.share == len(a & b) / len(b)
                assert row.chance == len(a) / among


def listed(base: Base, moves: dict[int, float], path_at: int = 0) -> Delta:
    """New values at some entries of one matrix; a move of 0 lists the base's own value."""
    path = where(base)[path_at]
    original = base.parameter(path).detach().flatten()
    index = torch.tensor(sorted(moves))
    new = original[index] + torch.tensor([moves[i] for i in sorted(moves)])
    return delta_of(base, {path: sparse(index, new, tuple(base.parameter(path).shape))})


def test_an_entry_listed_with_the_bases_own_value_is_none(base: Base) -> None:
    a, b = listed(base, {1: 0.5, 2: 0.0, 7: 0.0}), listed(base, {2: 0.25, 7: 0.0, 9: 0.5})
    path = where(base)[0]
    for delta, expected in ((a, {1}), (b, {2, 9})):
        region = regions.support(delta, base)
        assert set(region) == {path}
        assert set(region[path].flatten().nonzero().flatten().tolist()) == expected
        ((_, operand),) = [(n, o) for n, o in enumerate(operands([delta], base)[1])]
        assert torch.equal(operand.region(base)[path], region[path].flatten())
    row = overlap([a, b], base)[0]
    assert (row.shared, row.count, row.chance) == (0, 2, 1 / base.parameter(path).numel())
    for rule in ("refuse", "first", "last", "mean", "sum"):
        for given in ([a, b], [b, a]):
            found = values_of(union(given, base, on_overlap=rule), base)[path]
            expected = base.parameter(path).detach().flatten().clone()
            expected[torch.tensor([1, 2, 9])] += torch.tensor([0.5, 0.25, 0.5])
            assert found == expected.tolist()
    dense = delta_of(base, {path: moved(base, 3)[path]})
    nothing = listed(base, {3: 0.0, 4: 0.0})
    assert values_of(union([dense, nothing], base), base) == values_of(dense, base)


def test_chance_counts_the_tensors_of_the_two(base: Base) -> None:
    given = [listed(base, {1: 0.5, 3: 1.0}), listed(base, {3: 0.5}), listed(base, {4: 1.0}, 1)]
    sizes = [base.parameter(path).numel() for path in where(base)]
    found = {(row.by, row.of): row.chance for row in overlap(given, base)}
    assert found["delta 1", "delta 2"] == 2 / sizes[0]
    assert found["delta 2", "delta 3"] == 1 / sum(sizes)


# --- masks ---------------------------------------------------------------------------------------


def mask(base: Base, seed: int, **settings: object) -> Delta:
    fitted = fit_a_little(base, method("mask", initial_sparsity=0.3, **settings), seed=seed)
    delta = fitted.delta()
    fitted.change.remove()
    return delta


def test_masks_join_in_what_they_drop(base: Base) -> None:
    a, b = mask(base, 0), mask(base, 1)
    kept, others = a.tensors(base)[0], b.tensors(base)[0]
    joined, left = union([a, b], base).tensors(base)[0], difference([a, b], base).tensors(base)[0]
    assert any((kept[path] != others[path]).any() for path in kept)
    for path, dropped in ((path, ~kept[path]) for path in kept):
        gone, theirs = dropped.flatten().tolist(), (~others[path]).flatten().tolist()
        either = [one or other for one, other in zip(gone, theirs, strict=True)]
        alone = [one and not other for one, other in zip(gone, theirs, strict=True)]
        assert (~joined[path]).flatten().tolist() == either
        # A mask that drops nothing is left out.
        assert any(alone) == (path in left)
        assert path not in left or (~left[path]).flatten().tolist() == alone
    assert same(union([a, a], base), a, base)
    row = overlap([a, b], base)[0]
    assert row.shared == sum(int((~kept[p] & ~others[p]).sum()) for p in kept)


def test_masks_have_no_sums() -> None:
    base = BASES["bert"]
    a = mask(base, 0)
    for refused in (
        lambda: scale([a], base, by=0.5),
        lambda: negate([a], base),
        lambda: scaled_sum([a, a], base),
    ):
        with pytest.raises(DeltaError, match="a share of a dropped weight is no mask"):
            refused()
    with pytest.raises(DeltaError, match="what both mean together is undefined"):
        union([a, graft(base, 0)], base)
    for rule in get_args(OnOverlap):
        with pytest.raises(SettingError, match="is a mask, which has none: what either mask drops"):
            union([a, a], base, on_overlap=rule)
    rows = mask(base, 0, granularity="row")
    with pytest.raises(DeltaError, match="units of shape"):
        union([a, rows], base)


def test_masks_of_other_tensors_need_settings_that_name_both() -> None:
    base = BASES["bert"]
    q, k = mask(base, 0, where=("Q",)), mask(base, 1, where=("K",))
    with pytest.raises(DeltaError, match="none of their settings names all"):
        union([q, k], base)
    both = mask(base, 2, where=("Q", "K"))
    assert union([q, both], base).method == both.method
    assert base.is_untouched()


# --- refusals ------------------------------------------------------------------------------------


def test_overlapping_changes_are_refused_with_counts(base: Base) -> None:
    a, b = graft(base, 0, 2), graft(base, 0, 3)
    first = where(base)[0]
    count = len(range(0, base.parameter(first).numel(), 6))
    with pytest.raises(SettingError, match=rf"{count:,} of {first}, .*on_overlap"):
        union([a, b], base)
    with pytest.raises(SettingError, match="on_overlap 'frist' is unknown. Did you mean 'first'"):
        union([a, b], base, on_overlap="frist")


def test_other_bases_and_methods_without_entries_are_refused() -> None:
    base, other = BASES["bert"], tiny_base("bert", seed=1)
    a = graft(base, 0)
    with pytest.raises(WrongBase, match="only changes of one base can be composed"):
        union([a, graft(other, 1)], base)
    with pytest.raises(WrongBase, match="the base given is"):
        union([a], other)
    fitted = fit_a_little(base, examples()["subspace"])
    odd = fitted.delta()
    fitted.change.remove()
    with pytest.raises(DeltaError, match="'subspace', whose file does not hold new values"):
        union([a, odd], base)


def test_a_base_in_half_precision_is_refused() -> None:
    """Its fingerprint is the base's, its weights are rounded."""
    a, cast = whole(BASES["bert"], 1), tiny_base("bert")
    assert cast.fingerprint == a.base_fingerprint
    cast.towers.to(torch.bfloat16)
    said = r"composing deltas .*bfloat16, expected torch\.float32.*Load the base in float32"
    for refused in (
        lambda: scaled_sum([a, a], cast, weights=[0.7, 0.7]),
        lambda: union([a], cast),
        lambda: overlap([a, a], cast),
    ):
        with pytest.raises(SettingError, match=said):
            refused()


def test_a_result_names_the_neutral_method(base: Base) -> None:
    given = [replace(graft(base, part), method=method("graft")) for part in (0, 1)]
    assert union(given, base).method == method("sparse")
    assert union([*given, whole(base, 1)], base, on_overlap="sum").method == method("full")


def test_what_diff_pruning_packs_is_composed(base: Base) -> None:
    fitted = fit_a_little(base, examples()["diff"])
    made = fitted.delta()
    fitted.change.remove()
    assert methods()["diff"].holds == "entries"
    assert scale([made], base, by=2.0).method == method("sparse")


def test_a_folded_and_a_flat_delta_of_one_base(base: Base) -> None:
    """A folded file holds 32 of 64 digits of the base's fingerprint."""
    a, b = graft(base, 0), graft(base, 1)
    folded = replace(a, base_fingerprint=a.base_fingerprint[:32])
    for given in ([folded, b], [b, folded]):
        found = union(given, base)
        assert found.base_fingerprint == base.fingerprint
        assert same(found, union([a, b], base), base)
    assert (
        union([folded, folded], base, on_overlap="first").base_fingerprint
        == (base.fingerprint[:32])
    )
    for odd in (a.base_fingerprint[:12], "", a.base_fingerprint[:31] + "x"):
        with pytest.raises(WrongBase):
            union([b, replace(a, base_fingerprint=odd)], base)


@pytest.mark.parametrize("store", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("make", [graft, whole])
def test_a_change_and_its_opposite_leave_nothing(
    base: Base, make: Callable[..., Delta], store: str
) -> None:
    """Not what both were rounded by, either; another change beside them stays as it is."""
    a, b = make(base, 1, store=store), graft(base, 2, 9)
    opposite = negate([a], base)
    with pytest.raises(SettingError, match="nothing is left"):
        union([a, opposite], base, on_overlap="sum")
    there = values_of(scaled_sum([a, opposite, b], base), base)
    own, passing = values_of(b, base), values_of(a, base)
    for path, values in there.items():
        original = base.parameter(path).flatten().tolist()
        for x, y, o, z in zip(values, own[path], original, passing[path], strict=True):
            assert x == o if y == o else abs(x - y) <= 2e-7 * (abs(x) + abs(o) + abs(z)), path


def test_nothing_left_is_refused(base: Base) -> None:
    a = graft(base, 0)
    for refused in (
        lambda: difference([a, a], base),
        lambda: scaled_sum([a, a], base, weights=[1, -1]),
        lambda: scaled_sum([a], base, weights=[0]),
        lambda: scale([a], base, by=1e-30),
    ):
        with pytest.raises(SettingError, match="nothing is left of delta 1"):
            refused()
    with pytest.raises(SettingError, match="scaled by 0 a change is none"):
        scale([a], base, by=0)
    with pytest.raises(SettingError, match="no delta was given"):
        union([], base)
    with pytest.raises(SettingError, match="1 of the two or more deltas"):
        overlap([a], base)
    with pytest.raises(SettingError, match="changes nothing"):
        overlap([a, replace(a, streams=a.streams[-2:])], base)


def test_what_is_not_finite_is_refused() -> None:
    base = BASES["bert"]
    a = graft(base, 0)
    path = where(base)[0]
    broken = sparse(torch.tensor([1, 2]), torch.tensor([0.5, float("nan")]), (32, 32))
    with pytest.raises(DeltaError, match="holds NaN or infinity"):
        union([a, delta_of(base, {path: broken})], base)
    for weights in ([float("nan")], [float("inf")], [1.0, 2.0]):
        with pytest.raises(SettingError, match="expected one finite number each"):
            scaled_sum([a], base, weights=weights)
    with pytest.raises(SettingError, match="beyond a float32"):
        scale([a], base, by=1e39)


def test_a_head_is_one_operands(base: Base) -> None:
    a, b = graft(base, 0), graft(base, 1)
    for head, expected in ((None, a), (0, a), (np.int64(1), b), (1, b)):
        joined = union([a, b], base, head=head)
        found = joined.tensors(base)[1]
        assert all(torch.equal(found[k], v) for k, v in expected.tensors(base)[1].items())
    named = replace(b, labels=("neg", "pos"))
    with pytest.raises(SettingError, match=r"\['no', 'yes'\].*\['neg', 'pos'\].*say whose"):
        union([a, named], base)
    assert union([a, named], base, head=1).labels == ("neg", "pos")
    bare = union([a, named], base, head="none")
    assert values_of(bare, base) == values_of(joined, base)
    with pytest.raises(DeltaError, match="has no head"):
        bare.check_head(base)
    for wrong in (2, -1, "foo", 1.0, True):
        with pytest.raises(SettingError, match=rf"head {wrong!r}: expected the index .*0 to 1, or"):
            union([a, b], base, head=wrong)


def test_a_delta_of_a_head_alone_gives_a_head(base: Base) -> None:
    a = graft(base, 0)
    alone = replace(graft(base, 1), streams=graft(base, 1).streams[-2:])
    joined = union([a, alone], base, head=1)
    assert same(joined, a, base)
    found, expected = joined.tensors(base)[1], alone.tensors(base)[1]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# --- files ---------------------------------------------------------------------------------------


def test_a_score_does_not_carry_over() -> None:
    base = BASES["bert"]
    score = {"metric": "accuracy", "value": 1.0, "interval": [1, 1], "on": "t/test", "n": 3}
    assert union([graft(base, 0).with_score(score), graft(base, 1)], base).score == {}


def test_many_quantised_deltas_become_one_stream() -> None:
    """A reader refuses a file of more entries than four times the base's (docs/format.md)."""
    base = BASES["bert"]
    path = max(base.paths(), key=lambda path: base.parameter(path).numel())
    shape = tuple(base.parameter(path).shape)
    entries = sum(base.parameter(path).numel() for path in base.paths())
    most = 4 * entries // base.parameter(path).numel()
    given = []
    for part in range(most + 1):
        index = torch.arange(part, 2000, most + 1)
        new = base.parameter(path).detach().flatten()[index] + torch.randn(len(index))
        given.append(delta_of(base, {path: sparse(index, new, shape)}, "int8"))
    few, many = union(given[:-1], base), union(given, base)
    assert sum(stream.values is not None for stream in few.streams) == most
    assert sum(stream.values is not None for stream in many.streams) == 1
    assert same(difference([many, given[-1]], base), few, base)


def test_entries_changed_twice_in_a_file_are_damage() -> None:
    base = BASES["bert"]
    a = graft(base, 0)
    with pytest.raises(DamagedDelta, match="twice"):
        replace(a, streams=(a.streams[0], *a.streams)).tensors(base)
    dense = [s for s in whole(base, 1).streams if s.name.startswith("method/")]
    for given in ((*a.streams, *dense), (*dense, *a.streams), (dense[0], *dense)):
        with pytest.raises(DamagedDelta, match="twice"):
            replace(a, streams=given).tensors(base)


def test_a_result_in_another_precision_says_its_error(base: Base) -> None:
    a = graft(base, 0)
    rounded, error = stored(a, base, "int8")
    before, after = values_of(a, base), values_of(rounded, base)
    errors = [abs(x - y) for p in before for x, y in zip(before[p], after[p], strict=True)]
    assert error == pytest.approx(max(errors), rel=1e-6)
    assert error > 0
    assert stored(rounded, base, "fp32")[1] == 0
    with pytest.raises(SettingError, match="store 'fp23' is unknown"):
        stored(a, base, "fp23")


@pytest.mark.parametrize("precision", ["int8", "int4", "int2", "sign"])
def test_values_keep_their_steps_under_a_given_scale(precision: str) -> None:
    drawn = torch.linspace(-1, 1.1, 500)
    first = encode_values(drawn, precision)
    some = decode_values(first, 500)[220:260]
    assert precision == "sign" or encode_values(some, precision).params != first.params
    made = encode_values(some, precision, None, first.params)
    assert made.params == first.params
    assert torch.equal(decode_values(made, len(some)), some)
    with pytest.raises(SettingError, match="2 scales, expected 1"):
        encode_values(some, precision, None, [0.1, 0.1])


def test_by_the_name_of_the_operation() -> None:
    base = BASES["bert"]
    a, b = graft(base, 0), graft(base, 1)
    assert same(howfine.compose("union", [a, b], base), union([a, b], base), base)
    assert same(compose("scale", [a], base, by=2), scaled_sum([a, a], base), base)
    with pytest.raises(SettingError, match="'unoin' is unknown. Did you mean 'union'"):
        compose("unoin", [a], base)


def test_the_command_line(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base")
    base = Base.load(str(folder))
    a, b = tmp_path / f"a{SUFFIX}", tmp_path / f"b{SUFFIX}"
    graft(base, 0).save(a)
    graft(base, 1).save(b)
    out = tmp_path / "out" / f"c{SUFFIX}"
    on = ("--base", folder, "--json")
    said = howfine_here("compose", "union", a, b, "-o", out, "--head", b, *on).json
    assert said["bytes"] == out.stat().st_size
    assert sum(part.bytes for part in cost.parts(out)) == said["bytes"]
    assert same(Delta.load(out), union([a, b], base), base)
    bare = howfine_here("compose", "union", a, "-o", out.with_name(f"f{SUFFIX}"), "--head", "none")
    assert "Without a head: start from it" in bare.out, bare.err
    assert howfine_here("evaluate", out.with_name(f"f{SUFFIX}")).code == 1
    back = howfine_here("compose", "difference", out, b, "-o", tmp_path / f"d{SUFFIX}", *on)
    assert back.code == 0, back.err
    assert same(Delta.load(tmp_path / f"d{SUFFIX}"), Delta.load(a), base)
    for arguments in (
        ("sum", a, b, "--weights", "-0.5,0.7", "--store", "fp16"),
        ("scale", a, "-0.5"),
        ("negate", a),
    ):
        said = howfine_here("compose", *arguments, "-o", tmp_path / f"e{SUFFIX}", *on).json
        assert (said["rounding"] > 0) == ("--store" in arguments)
    rows = howfine_here("compose", "overlap", a, out, *on).json
    assert all("--json" in howfine_here("compose", verb, "--help").out for verb in VERBS)
    assert [row["share"] for row in rows] == [pytest.approx(0.5, abs=0.01), 1.0]


def test_the_command_line_refuses_and_writes_nothing(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base")
    base = Base.load(str(folder))
    a = tmp_path / f"a{SUFFIX}"
    graft(base, 0).save(a)
    out = tmp_path / f"none{SUFFIX}"
    for arguments, said in (
        (("union", a, a), "overlap where disjoint"),
        (
            ("union", a, "--head", "2"),
            "--head 2: expected one of the files, its number from 1 to 1",
        ),
        (("sum", a, "--weights", "half"), "'half' is no number"),
        (("scale", a, "0"), "scaled by 0"),
        (("scale", a, "nan"), "one finite number"),
        (("negate", a, "--store", "int9"), "store 'int9' is unknown"),
        (("union", a, a, "--on-overlap", "frist"), "Did you mean 'first'"),
    ):
        refused = howfine_here("compose", *arguments, "-o", out, "--base", folder)
        assert said in refused.sentence
        assert not out.exists()
    alone = howfine_here("compose", "overlap", a, "--base", folder)
    assert (alone.code, alone.out) == (2, "")
    assert "give another one" in alone.sentence


def test_another_readout_goes_with_its_head(base: Base) -> None:
    """Settings of a readout belong to its head."""
    a = graft(base, 0)
    b = replace(graft(base, 1), readout=readout("classifier", max_length=7).settled(base))
    assert union([a, b], base, head=1).readout == b.readout


@pytest.mark.parametrize("store", ["fp16", "int8", "int4", "int2"])
def test_what_is_rounded_to_nothing_takes_no_place(base: Base, tmp_path: Path, store: str) -> None:
    """An entry whose step is 0 is the base's: the others have the same steps without it."""
    paths = where(base)
    tensors = {}
    for number, path in enumerate(paths):
        original = base.parameter(path).detach()
        drawn = torch.rand(original.numel(), generator=torch.manual_seed(number))
        index = (drawn < 0.1).nonzero().flatten()
        step = torch.randn(len(index), generator=torch.manual_seed(number))
        step[::2] *= 1e-9  # far below a step, and below the smallest half
        tensors[path] = sparse(index, original.flatten()[index] + step, tuple(original.shape))
    coarse = delta_of(base, tensors, store)
    (stream,) = (each for each in coarse.streams if each.values is not None)
    given = codec.decode_values(stream.values, stream.kept() or 0)
    assert (given != 0).all()
    listed = sum(len(flat_entries(tensor)[0]) for tensor in tensors.values())
    assert 0 < len(given) <= 0.6 * listed
    coarse.save(tmp_path / f"x{SUFFIX}")
    there, before = values_of(Delta.load(tmp_path / f"x{SUFFIX}"), base), base.original
    exact = values_of(delta_of(base, tensors, "fp32"), base)
    for path in paths:
        moved = (torch.tensor(exact[path]) - before(path).flatten()).abs()
        assert torch.equal(
            torch.tensor(there[path])[moved < 1e-8], before(path).flatten()[moved < 1e-8]
        )
