"""Distances against closed forms and plain loops, and checkpoints read in pieces."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from howfine.align import align
from howfine.architectures import anatomy_of
from howfine.checkpoint import Checkpoint, MemorySource
from howfine.compare import compare
from howfine.distance import Distance, Sums, distance, measure, summary, table
from howfine.errors import BaseError, BaseNotFound, SettingError
from tiny import tiny_base

place = anatomy_of(SimpleNamespace(model_type="bert")).place
LINEARS = {
    "attention.self.query": (8, 8),
    "attention.self.key": (8, 8),
    "attention.output.dense": (8, 8),
    "intermediate.dense": (16, 8),
    "output.dense": (8, 16),
}


def body(seed: int, layers: int = 2) -> dict[str, torch.Tensor]:
    """The state dict of a small BERT body, drawn from N(0, 0.02)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    state = {"embeddings.word_embeddings.weight": draw(30, 8)}
    state["embeddings.LayerNorm.weight"] = torch.ones(8)
    state["embeddings.LayerNorm.bias"] = torch.zeros(8)
    for layer in range(layers):
        for path, shape in LINEARS.items():
            state[f"encoder.layer.{layer}.{path}.weight"] = draw(*shape)
            state[f"encoder.layer.{layer}.{path}.bias"] = draw(shape[0])
    return state


def moved(state: dict[str, torch.Tensor], seed: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: tensor + 1e-4 * torch.randn_like(tensor) for name, tensor in state.items()}


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def pieces(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, array.size, size):
        yield array[start : start + size]


def sums_of(a: np.ndarray, b: np.ndarray) -> Sums:
    return measure([a], [b])


def read(source: Checkpoint | MemorySource, name: str, entries: int = 5) -> np.ndarray:
    return np.concatenate(list(source.chunks(name, entries)))


# The maths


def test_sums_agree_with_plain_loops() -> None:
    rng = random.Random(3)
    a = [rng.gauss(0, 0.02) for _ in range(57)]
    b = [x + rng.gauss(0, 0.01) if rng.random() < 0.6 else x for x in a]
    sums = sums_of(np.array(a), np.array(b))

    d = [y - x for x, y in zip(a, b, strict=True)]
    l1 = math.fsum(abs(x) for x in d)
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    norms = math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    assert sums.count == 57
    assert sums.changed == sum(x != 0 for x in d)
    assert 0 < sums.changed < 57
    assert sums.l1 == pytest.approx(l1, rel=1e-12)
    assert sums.mean_abs == pytest.approx(l1 / 57, rel=1e-12)
    assert sums.relative == pytest.approx(l1 / math.fsum(map(abs, a)), rel=1e-12)
    assert sums.angle == pytest.approx(math.acos(dot / norms) / math.pi, rel=1e-9)


@pytest.mark.parametrize("theta", [1e-12, 1e-9, 1e-6, 1e-3, 0.5, 1.5, 2.0, 3.0, math.pi])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_a_rotation_by_theta_is_an_angle_of_theta(theta: float, scale: float) -> None:
    rng = np.random.default_rng(5)
    u, v = np.linalg.qr(rng.standard_normal((5000, 2)))[0].T
    b = math.cos(theta) * u + math.sin(theta) * v
    # A rescaling costs digits (the error grows with the length of the step), a rotation none.
    tolerance = 1e-7 if scale != 1 or theta > 2.5 else 1e-15
    angle = sums_of(u, scale * b).angle * math.pi
    assert angle == pytest.approx(theta, rel=1e-3 if scale == 1 else 1e-7, abs=tolerance)


def test_a_rotation_of_a_millionth_survives_float32() -> None:
    rng = np.random.default_rng(6)
    a, w = rng.standard_normal((2, 100_000)).astype(np.float32).astype(np.float64)
    w -= a * (w @ a) / (a @ a)
    w *= np.linalg.norm(a) / np.linalg.norm(w)
    b = math.cos(1e-6) * a + math.sin(1e-6) * w
    # Rounding b to float32 alone turns it by about 2e-8, at a right angle to the rotation.
    assert sums_of(a, b.astype(np.float32)).angle * math.pi == pytest.approx(1e-6, rel=1e-3)


def test_independent_vectors_are_at_half() -> None:
    d = 200_000
    rng = np.random.default_rng(8)
    sums = sums_of(*rng.standard_normal((2, d)))
    assert abs(sums.angle - 0.5) < 5 / (math.pi * math.sqrt(d))


def test_mean_distance_of_two_normals() -> None:
    x, y = np.random.default_rng(9).normal(0, 0.02, (2, 400_000))
    sums = sums_of(x, y)
    assert sums.mean_abs == pytest.approx(2 * 0.02 / math.sqrt(math.pi), rel=5e-3)
    assert sums.relative == pytest.approx(math.sqrt(2), rel=5e-3)


def test_the_way_a_tensor_is_cut_does_not_matter() -> None:
    a, b = np.random.default_rng(10).standard_normal((2, 70_001)).astype(np.float32)
    whole = sums_of(a, b)
    for size in (1009, 8192, 70_000):
        cut = measure(pieces(a, size), pieces(b, size))
        assert (cut.count, cut.changed) == (whole.count, whole.changed)
        for name in ("l1", "abs_a", "aa", "bb", "dd", "ab", "ad", "angle"):
            assert getattr(cut, name) == pytest.approx(getattr(whole, name), rel=1e-11), name


def test_the_special_vectors() -> None:
    zero, one = np.zeros(3), np.array([0.0, 1.0, -0.0])
    assert sums_of(one, one).angle == 0.0
    assert sums_of(zero, zero).angle == 0.0
    assert sums_of(one, -one).angle == 1.0
    assert sums_of(zero, one).angle == sums_of(one, zero).angle == 0.5
    assert sums_of(zero, one).relative == math.inf
    assert sums_of(zero, zero).relative == 0.0
    assert sums_of(zero, -zero).changed == 0
    nothing = measure([], [])
    assert (nothing.count, nothing.mean_abs, nothing.relative, nothing.angle) == (0, 0, 0, 0)


@pytest.mark.parametrize("b", [[np.ones(4)], [np.ones(2), np.ones(2)], [np.ones(3)], [np.ones(1)]])
def test_unequal_chunks_are_refused(b: list[np.ndarray]) -> None:
    with pytest.raises(SettingError, match="chunks to compare have shapes"):
        measure([np.ones(2), np.ones(1)], b)


# Rows


def test_rows_are_the_tensors_distances() -> None:
    before = body(0, layers=11)
    after = moved(before)
    after["encoder.layer.10.output.dense.weight"] = before["encoder.layer.10.output.dense.weight"]
    rows = distance(MemorySource(before), MemorySource(after), place=place)
    assert {row.path for row in rows} == set(before)
    layers = [row.layer for row in rows if row.layer is not None]
    assert layers == sorted(layers)
    for row in rows:
        a, b = before[row.path].double(), after[row.path].double()
        assert (row.layer, row.part) == place(row.path)
        assert row.l1 == pytest.approx(float((b - a).abs().sum()), rel=1e-12)
        assert row.changed == pytest.approx(float((a != b).double().mean()))
    still = next(row for row in rows if row.path == "encoder.layer.10.output.dense.weight")
    assert (still.l1, still.angle, still.changed) == (0, 0, 0)


def test_references_are_far() -> None:
    """A3: both references sit at a right angle, and at the distance of two normals."""
    name = "encoder.layer.0.intermediate.dense.weight"
    before = {name: torch.from_numpy(np.random.default_rng(1).normal(0, 0.02, (400, 300)))}
    (row,) = distance(MemorySource(before), MemorySource(before), place=place)
    for angle in (row.reference_angle, row.random_angle):
        assert angle is not None
        assert 0 < abs(angle - 0.5) < 0.01
    for mean_abs in (row.reference_mean_abs, row.random_mean_abs):
        assert mean_abs == pytest.approx(0.02257, rel=0.01)
    assert row.reference_angle != row.random_angle
    (wide,) = distance(MemorySource(before), MemorySource(before), place=place, init_std=0.2)
    assert wide.random_mean_abs == pytest.approx(0.2257, rel=0.01)


def test_references_depend_on_the_seed_and_the_path_only() -> None:
    state = body(0)
    state["encoder.layer.1.attention.self.key.weight"] = state[
        "encoder.layer.0.attention.self.key.weight"
    ]

    def references(source: dict[str, torch.Tensor], seed: int = 0) -> dict[str, Any]:
        rows = distance(MemorySource(source), MemorySource(source), place=place, seed=seed)
        return {row.path: (row.reference_mean_abs, row.random_mean_abs) for row in rows}

    first = references(state)
    assert references(under("bert.", dict(reversed(state.items())))) == first
    assert references(state, seed=1) != first
    keys = [first[f"encoder.layer.{i}.attention.self.key.weight"] for i in range(2)]
    assert keys[0] != keys[1]


def test_references_start_from_before() -> None:
    before, after = body(0), {name: 5 * tensor for name, tensor in body(0).items()}
    still = distance(MemorySource(before), MemorySource(before), place=place)
    for row, same in zip(
        distance(MemorySource(before), MemorySource(after), place=place), still, strict=True
    ):
        assert row.reference_mean_abs == same.reference_mean_abs
        assert row.random_mean_abs == same.random_mean_abs


class SmallChunks(MemorySource):
    def chunks(self, name: str, entries: int = 7) -> Iterator[np.ndarray]:
        return super().chunks(name, 7)


def test_references_do_not_depend_on_the_chunks() -> None:
    state, other = body(0), moved(body(0))
    whole = distance(MemorySource(state), MemorySource(other), place=place)
    cut = distance(SmallChunks(state), SmallChunks(other), place=place)
    for a, b in zip(whole, cut, strict=True):
        assert a.path == b.path
        for name in ("reference_mean_abs", "reference_angle", "random_mean_abs", "random_angle"):
            if getattr(a, name) is None:
                assert getattr(b, name) is None
            else:
                assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-9), name


def test_what_starts_constant_has_no_references() -> None:
    source = MemorySource(body(0) | {"encoder.layer.0.scale": torch.ones(8)})
    rows = distance(source, source, place=place)
    without = {row.part for row in rows if row.reference_angle is None}
    assert without == {"norm", "bias", "other"}
    assert {row.part for row in rows if row.random_mean_abs is not None} == {
        "embedding", "Q", "K", "D", "I", "O",
    }  # fmt: skip
    assert all(
        row.random_angle is None for row in distance(source, source, place=place, references=False)
    )


def test_bfloat16_rounding_is_what_the_docstring_says() -> None:
    name = "encoder.layer.0.intermediate.dense.weight"
    a = torch.randn(400, 300, generator=torch.Generator().manual_seed(2)) * 0.02
    (row,) = distance(
        MemorySource({name: a}), MemorySource({name: a.bfloat16()}), place=place, references=False
    )
    assert row.angle == pytest.approx(5e-4, rel=0.1)
    assert float(((a - a.bfloat16().float()) / a).abs().max()) < 0.004


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["before", "after"])
def test_weights_that_are_no_numbers_are_refused(value: float, side: str) -> None:
    sides = {"before": body(0), "after": body(0)}
    sides[side]["encoder.layer.1.output.dense.weight"][2, 3] = value
    with pytest.raises(BaseError, match=f"layer.1.output.dense.weight: the checkpoint {side}"):
        distance(MemorySource(sides["before"]), MemorySource(sides["after"]), place=place)


@pytest.mark.parametrize("setting", [{"init_std": 0.0}, {"init_std": math.nan}, {"seed": -1}])
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    source = MemorySource(body(0))
    with pytest.raises(SettingError, match="expected a positive standard deviation"):
        distance(source, source, place=place, **setting)


# Pairing


@pytest.mark.parametrize("theirs", ["", "bert.", "base_model.model.bert."])
@pytest.mark.parametrize("ours", ["", "bert.", "model.tower."])
def test_towers_are_paired_whatever_their_prefix(ours: str, theirs: str) -> None:
    plain = body(0)
    before, after = under(ours, plain), under(theirs, moved(plain))
    before["cls.predictions.bias"] = torch.zeros(30)
    after["classifier.weight"] = torch.zeros(2, 8)
    pairing = align(MemorySource(before), MemorySource(after), place)
    assert {path: names for path, *names in pairing.common} == {
        path: [ours + path, theirs + path] for path in plain
    }
    assert (pairing.only_before, pairing.only_after) == (
        ["cls.predictions.bias"],
        ["classifier.weight"],
    )


def test_prefixes_are_found_without_an_anatomy() -> None:
    plain = body(0)
    pairing = align(
        MemorySource(plain), MemorySource(under("bert.", plain)), lambda path: (None, "other")
    )
    assert {path for path, *_ in pairing.common} == set(plain)


def test_an_encoder_is_the_tower_of_an_encoder_decoder() -> None:
    bart = anatomy_of(SimpleNamespace(model_type="bart")).place
    inner = ["self_attn.q_proj", "self_attn.k_proj", "fc1", "fc2"]
    encoder = [f"model.encoder.layers.{i}.{path}.weight" for i in range(2) for path in inner]
    decoder = [f"model.decoder.layers.{i}.{path}.weight" for i in range(2) for path in inner]
    decoder += [f"model.decoder.layers.{i}.encoder_attn.q_proj.weight" for i in range(2)]
    source = MemorySource({name: torch.ones(2, 2) for name in decoder + encoder})
    rows = distance(source, source, place=bart)
    assert {row.path for row in rows if row.layer is not None} == {
        name.removeprefix("model.encoder.") for name in encoder
    }
    assert {row.path for row in rows if row.layer is None} == set(decoder)


def test_layer_norms_of_tensorflow_are_known() -> None:
    state = body(0)
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for name, tensor in state.items()
    }
    assert set(old) != set(state)
    pairing = align(MemorySource(under("bert.", old)), MemorySource(state), place)
    assert {path for path, *_ in pairing.common} == set(state)
    assert not pairing.only_before
    assert not pairing.only_after


def test_no_tensor_is_lost_to_another_of_like_name() -> None:
    state = under("bert.", body(0)) | {"embeddings.word_embeddings.weight": torch.ones(2, 2)}
    state["bert.embeddings.LayerNorm.gamma"] = torch.ones(8)
    pairing = align(MemorySource(state), MemorySource(state), place)
    assert sorted(name for _, name, _ in pairing.common) == sorted(state)
    pairing = align(MemorySource(state), MemorySource(under("bert.", body(0))), place)
    assert sorted(name for _, name, _ in pairing.common) == sorted(under("bert.", body(0)))
    assert sorted(pairing.only_before) == sorted(set(state) - set(under("bert.", body(0))))


def test_integers_are_no_weights() -> None:
    state = {**body(0), "embeddings.position_ids": torch.arange(5), "mask": torch.ones(2) > 0}
    rows = distance(MemorySource(state), MemorySource(state), place=place)
    assert {row.path for row in rows} == set(body(0))


def test_heads_of_two_sizes_are_left_unpaired() -> None:
    sides = [under("bert.", body(0)) | {"classifier.weight": torch.ones(n, 8)} for n in (2, 3)]
    pairing = align(MemorySource(sides[0]), MemorySource(sides[1]), place)
    assert pairing.only_before == pairing.only_after == ["classifier.weight"]
    assert len(pairing.common) == len(body(0))


def test_another_architecture_is_refused() -> None:
    other = body(0)
    other["encoder.layer.1.intermediate.dense.weight"] = torch.zeros(32, 8)
    with pytest.raises(
        BaseError,
        match=r"layer\.1\.intermediate\.dense\.weight: shape \(16, 8\) before and \(32, 8\)",
    ):
        distance(MemorySource(body(0)), MemorySource(under("bert.", other)), place=place)


@pytest.mark.parametrize("other", ["", "weight", "conv.weight", "vit.layers.0.mlp.fc1.weight"])
def test_checkpoints_with_nothing_in_common_are_refused(other: str) -> None:
    state = {other: torch.ones(8)} if other else {}
    with pytest.raises(BaseError, match=r"0 tensors in common, of 23 .* and 21 more\) before"):
        distance(MemorySource(body(0)), MemorySource(state), place=place)


def test_a_few_like_names_make_no_pair_of_checkpoints() -> None:
    other = {f"vision.stage.{i}.{path}.weight": torch.ones(8) for i in range(9) for path in "ab"}
    other["vision.patches.LayerNorm.weight"] = torch.ones(8)
    with pytest.raises(BaseError, match=r"have 1 tensors in common, of 23 .* and 19 .* after"):
        distance(MemorySource(body(0)), MemorySource(other), place=place)


# Tables


def row(layer: int | None, part: str, relative: float, **more: Any) -> Distance:
    defaults: dict[str, Any] = {
        "path": f"{layer}.{part}",
        "count": 10,
        "l1": 1.0,
        "mean_abs": 0.1,
        "angle": 0.01,
    }
    defaults |= {"changed": 1.0 if relative else 0.0}
    return Distance(layer=layer, part=part, relative=relative, **(defaults | more))


def test_a_table_is_layers_by_parts_in_the_papers_order() -> None:
    rows = [row(10, "I", 4), row(2, "K", 3), row(2, "Q", 1), row(10, "Q", 2), row(2, "bias", 9)]
    rows += [row(None, "embedding", 9), row(2, "other", 9), row(2, "Z", 5)]
    layers, parts, values = table(rows)
    assert layers == [2, 10]
    assert parts == ["Q", "K", "I", "Z"]
    assert values == [[1, 3, None, 5], [2, None, 4, None]]
    assert table(rows, "count").values[0] == [10, 10, None, 10]
    assert table(rows, "random_angle").values[0] == [None] * 4


def test_tables_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SettingError, match=r"no column 'angel'.*Did you mean 'angle'"):
        table([row(0, "Q", 1)], "angel")
    with pytest.raises(SettingError, match="a and b are both placed at layer 0, part Q"):
        table([row(0, "Q", 1, path="a"), row(0, "Q", 1, path="b")])
    with pytest.raises(SettingError, match="no row is a matrix of a block"):
        summary([row(0, "bias", 1), row(None, "embedding", 1)])


def test_summary_names_the_largest_and_the_smallest_mover() -> None:
    far = {"reference_mean_abs": 1.0, "reference_angle": 0.5}
    rows = [row(0, "Q", 0.02, **far), row(1, "Q", 0.05, angle=0.02, **far)]
    rows += [row(1, "bias", 7.0), row(None, "embedding", 0, count=30)]
    found = summary(rows)
    assert (found.matrices, found.unmoved) == (2, 0)
    assert (found.largest, found.smallest) == (rows[1], rows[0])
    assert found.spread == pytest.approx(2.5)
    assert found.mean_abs_to_reference == pytest.approx(0.1)
    assert found.angle_to_reference == pytest.approx(0.04)
    assert found.changed == pytest.approx(0.5)
    frozen = summary([*rows, row(0, "K", 0.0)])
    assert (frozen.unmoved, frozen.spread) == (1, math.inf)
    assert summary([row(0, "K", 0.0)]).spread == 1.0
    assert summary([row(0, "K", 0.1)]).angle_to_reference is None


# Checkpoints


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8", "int64"])
def test_a_file_gives_what_torch_wrote(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    tensor = (torch.randn(7, 9, generator=torch.Generator().manual_seed(4)) * 40).to(kind)
    if kind.is_floating_point:  # the corners: smallest numbers, largest ones, no numbers
        tensor[0, :5] = torch.tensor([6e-8, -0.0, math.inf, -math.inf, math.nan]).to(kind)
        tensor[1, :2] = torch.tensor([torch.finfo(kind).max, torch.finfo(kind).tiny], dtype=kind)
    save_file({"a": torch.zeros(3), "w": tensor}, tmp_path / "model.safetensors")
    for source in (Checkpoint.open(tmp_path), MemorySource({"w": tensor})):
        assert source.shape("w") == (7, 9)
        chunks = list(source.chunks("w", 10))
        assert [chunk.size for chunk in chunks] == [10] * 6 + [3]
        exact = torch.float64 if dtype in ("float64", "int64") else torch.float32
        np.testing.assert_array_equal(np.concatenate(chunks), tensor.to(exact).flatten().numpy())
        assert {str(chunk.dtype) for chunk in chunks} == {str(exact).removeprefix("torch.")}
    assert MemorySource({"w": tensor}).dtype("w") == Checkpoint.open(tmp_path).dtype("w")


def test_scalars_empty_and_strided_tensors() -> None:
    square = torch.arange(6.0).reshape(2, 3)
    source = MemorySource({"s": torch.tensor(2.5), "e": torch.ones(0, 4), "t": square.T})
    assert read(source, "s").tolist() == [2.5]
    assert list(source.chunks("e")) == []
    assert read(source, "t", 4).tolist() == [0, 3, 1, 4, 2, 5]


def single_file(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file(state, folder / "any.safetensors", metadata={"format": "pt"})
    return folder / "any.safetensors"


def shards(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    names = list(state)
    where = {name: f"model-{1 + i % 3:05}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: state[n] for n in names if where[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def pickled(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("write", [single_file, shards, pickled])
def test_every_layout_reads_the_same(
    tmp_path: Path, write: Callable[[Path, dict[str, torch.Tensor]], Path]
) -> None:
    state = body(0)
    opened = Checkpoint.open(write(tmp_path, state))
    assert sorted(opened.names()) == sorted(state)
    for name, tensor in state.items():
        assert (opened.shape(name), opened.numel(name)) == (tuple(tensor.shape), tensor.numel())
        np.testing.assert_array_equal(read(opened, name), tensor.flatten().numpy())
    in_memory = distance(MemorySource(state), MemorySource(moved(state)), place=place)
    assert distance(opened, MemorySource(moved(state)), place=place) == in_memory


def test_safetensors_are_read_without_torch(tmp_path: Path) -> None:
    """Importing torch alone would cost more memory than the whole measurement may."""
    file = single_file(tmp_path, body(0))
    code = (
        "import sys; from howfine.checkpoint import Checkpoint; "
        "from howfine.distance import distance; "
        f"c = Checkpoint.open({str(file)!r}); "
        "rows = distance(c, c, place=lambda path: (None, 'other')); "
        "print(len(rows), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(len(body(0))), "False"], done.stderr


def test_an_unknown_tensor_gets_a_suggestion(tmp_path: Path) -> None:
    opened = Checkpoint.open(single_file(tmp_path, {"pooler.weight": torch.ones(2)}))
    with pytest.raises(BaseError, match=r"no tensor 'poler.weight'. Did you mean 'pooler.weight'"):
        opened.shape("poler.weight")


def test_a_missing_checkpoint_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound, match="no such file or folder"):
        Checkpoint.open(tmp_path / "bert-base-uncased")
    with pytest.raises(BaseNotFound, match="no weights in this folder"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BaseError, match=r"expected \.safetensors, \.bin or a shard index"):
        Checkpoint.open(tmp_path / "model.gguf")


def header(**entry: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry
    text = json.dumps({"w": entry}).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 8


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "claims a header of 0 bytes in a file of 0"),
        (b"\1\0\0", "claims a header of 1 bytes in a file of 3"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "claims a header of 9223372036854775808 bytes"),
        ((3).to_bytes(8, "little") + b"{}", "claims a header of 3 bytes in a file of 10"),
        ((2).to_bytes(8, "little") + b"{]", "not a table of tensors"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "not a table of tensors"),
        ((2).to_bytes(8, "little") + b"[]", "not a table of tensors"),
        ((99_999).to_bytes(8, "little") + b"[" * 99_999, "not a table of tensors"),
        (header()[:-1], "lies at bytes 0 to 8 of 7 data bytes"),
        (header(data_offsets=[8, 16]), "lies at bytes 8 to 16 of 8"),
        (header(data_offsets=[8, 0]), "lies at bytes 8 to 0"),
        (header(data_offsets=[-8, 0]), "no sizes"),
        (header(data_offsets=[0]), "not a table of tensors"),
        (header(shape=[True, 2]), "no sizes"),
        (header(shape=[-1, -2]), "no sizes"),
        (header(shape=[1.0, 2]), "no sizes"),
        (header(shape=[1] * 65), "no sizes"),
        (header(shape=2), "not a table of tensors"),
        (header(shape=[3]), r"shape \[3\] and type F32 has 8 bytes"),
        (header(shape=[1 << 62, 1 << 62]), "and type F32 has 8 bytes"),
        (header(dtype="F64"), "and type F64 has 8 bytes"),
        (header(dtype=["F32"]), "not a table of tensors"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BaseError, match=f"damaged: .*{what}"):
        Checkpoint.open(tmp_path)


def test_a_sound_header_is_not_refused(tmp_path: Path) -> None:
    """The counterpart of the damaged ones: they are refused for the one thing they change."""
    (tmp_path / "model.safetensors").write_bytes(header())
    assert read(Checkpoint.open(tmp_path), "w").tolist() == [0, 0]


def test_types_without_plain_numbers_are_refused_when_read(tmp_path: Path) -> None:
    tensor = torch.ones(8).to(torch.float8_e4m3fn)
    for source in (
        Checkpoint.open(single_file(tmp_path, {"w": tensor})),
        MemorySource({"w": tensor}),
    ):
        with pytest.raises(BaseError, match="type F8_E4M3"):
            list(source.chunks("w"))


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    file = single_file(tmp_path, {"w": torch.ones(100)})
    opened = Checkpoint.open(file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(BaseError, match="ended inside tensor 'w'"):
        list(opened.chunks("w", 60))


@pytest.mark.parametrize(
    ("index", "kind", "what"),
    [
        ("{", BaseError, "not a shard index"),
        ("[" * 99_999, BaseError, "not a shard index"),
        ("{}", BaseError, "not a shard index"),
        ('{"weight_map": []}', BaseError, "not a shard index"),
        ('{"weight_map": {"w": 3}}', BaseError, "not a shard index"),
        ('{"weight_map": {"w": "../any.safetensors"}}', BaseError, "outside the folder"),
        ('{"weight_map": {"w": "gone.safetensors"}}', BaseNotFound, "shard gone.* is missing"),
        ('{"weight_map": {"v": "any.safetensors"}}', BaseError, "says tensor 'v' is in any"),
    ],
)
def test_a_damaged_index_is_refused(
    tmp_path: Path, index: str, kind: type[BaseError], what: str
) -> None:
    single_file(tmp_path, {"w": torch.ones(2)})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(kind, match=what):
        Checkpoint.open(tmp_path)


class Payload:
    """Unpickled without care, it would leave a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_a_pickle_that_is_no_weights_is_refused_and_not_run(tmp_path: Path) -> None:
    file, trace = tmp_path / "pytorch_model.bin", tmp_path / "trace"
    torch.save({"w": Payload(trace)}, file)
    with pytest.raises(BaseError, match="can't read it as plain weights"):
        Checkpoint.open(tmp_path)
    assert not trace.exists()
    torch.save([torch.ones(2)], file)
    with pytest.raises(BaseError, match="holds a list, expected a state dict"):
        Checkpoint.open(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BaseError, match="can't read it as plain weights"):
        Checkpoint.open(file)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "bert", "initializer_range": "x"}'])
def test_a_config_that_cannot_be_read_is_one_sentence(content: str, tmp_path: Path) -> None:
    for name in ("before", "after"):
        tiny_base("bert").tower.save_pretrained(tmp_path / name)
    (tmp_path / "before" / "config.json").write_text(content)
    with pytest.raises(BaseError, match=r"config\.json.*get a fresh copy"):
        compare(tmp_path / "before", tmp_path / "after")
