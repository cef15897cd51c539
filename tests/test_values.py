"""Values in few bits: as near as they can be, in as few bytes as their entropy, or refused."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from howfine.codec import (
    PRECISIONS,
    VALUES,
    Coded,
    decode_values,
    encode_values,
    entropy_bits,
    rounded,
)
from howfine.codec import steps as steps_module
from howfine.codec.coded import bits_packed, bits_unpacked
from howfine.codec.scales import TOPS, scale_of
from howfine.errors import DamagedDelta, SettingError

INTS = ("int8", "int6", "int4", "int3", "int2")
SHAPES = ("gauss", "laplace", "peaked", "uniform", "shifted")
# Values that use all steps alike, so few that no law pays: coded raw.
FLAT = {"int8": 510, "int6": 124, "int4": 45, "int3": 21, "int2": 9, "fp16": 4}


def drawn(shape: str, count: int, seed: int = 0) -> torch.Tensor:
    """Values of some distribution, all of them float32."""
    rng = np.random.default_rng(seed)
    found = {
        "gauss": lambda: rng.standard_normal(count),
        "laplace": lambda: rng.laplace(size=count),
        "peaked": lambda: rng.standard_normal(count) * np.where(rng.random(count) < 0.05, 10, 0.1),
        "uniform": lambda: rng.random(count) - 0.5,
        "shifted": lambda: rng.standard_normal(count) + 2,
    }[shape]()
    return torch.from_numpy(found.astype(np.float32)) * 0.02


def steps_of(coded: Coded, count: int) -> np.ndarray[Any, Any]:
    """The integers behind decoded values of one scale."""
    return np.rint(decode_values(coded, count).double().numpy() / coded.params[0]).astype(int)


def error(values: torch.Tensor, scale: float, top: int) -> float:
    """Squared error of rounding to multiples of a scale, written out."""
    x = values.double()
    steps = (x / scale).round().clamp(-top, top)
    return float(((x - steps * scale) ** 2).sum())


@pytest.mark.parametrize("precision", INTS)
@pytest.mark.parametrize("count", [1000, 20_000, 200_000])
def test_steps_take_little_more_than_their_entropy(precision: str, count: int) -> None:
    for shape in SHAPES:
        coded = encode_values(drawn(shape, count), precision)
        entropy = entropy_bits(steps_of(coded, count)) / 8
        assert coded.coding == "steps" or shape == "uniform"
        assert entropy < len(coded.payload) <= 1.02 * entropy + 40


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", INTS)
def test_few_values_never_cost_more_than_raw_bits(precision: str, shape: str) -> None:
    width = int(precision.removeprefix("int"))
    for count in (0, 1, 2, 3, 20, 60, 150, 500):
        coded = encode_values(drawn(shape, count), precision)
        assert len(coded.payload) <= math.ceil(count * width / 8)


def test_few_peaked_values_pay_no_table() -> None:
    """150 values of a Gaussian or Laplacian: a law of two bytes, and 24 bits to end the stack."""
    for shape in ("gauss", "laplace"):
        for precision in INTS[1:]:
            coded = encode_values(drawn(shape, 150), precision)
            assert coded.coding == "steps"
            most = np.abs(steps_of(coded, 150)).max()
            assert coded.payload[0] == most
            assert coded.payload[1] < steps_module._NORMAL + steps_module._GEOMETRIC
            entropy = entropy_bits(steps_of(coded, 150)) / 8
            assert len(coded.payload) <= 1.05 * entropy + 8


def test_entropy_is_that_of_the_counts() -> None:
    assert entropy_bits(torch.tensor([])) == entropy_bits([7, 7, 7]) == 0
    assert entropy_bits([0, 1, 0, 1]) == 4
    assert entropy_bits([1, 2, 2, 2]) == pytest.approx(2 + 3 * math.log2(4 / 3))


def test_zeros_take_one_byte() -> None:
    for precision in INTS:
        for count in (9, 100_000):
            assert encode_values(torch.zeros(count), precision).payload == b"\0"


@pytest.mark.parametrize("precision", ["int4", "int3", "int2"])
def test_the_scale_is_the_best_one(precision: str) -> None:
    """Against a search ten times as fine that computes every error from the values."""
    top = TOPS[precision]
    for shape in SHAPES:
        values = drawn(shape, 500, seed=3)
        coded = encode_values(values, precision)
        (scale,) = coded.params
        whole = float(values.abs().max()) / top
        best = min(error(values, whole * 2 ** (-j / 160), top) for j in range(1920))
        found = float(((decode_values(coded, 500) - values).double() ** 2).sum())
        assert found == pytest.approx(error(values, scale, top), rel=1e-4)
        assert found <= 1.02 * best
        assert scale < 0.8 * whole or shape not in ("gauss", "laplace")


def test_scales_are_short_where_that_costs_nothing() -> None:
    (scale,) = encode_values(drawn("gauss", 500), "int4").params
    assert np.float32(f"{scale:.2e}") == scale
    (scale,) = encode_values(torch.full((500,), 0.123456789), "int4").params
    assert 7 * scale == pytest.approx(0.123456789, rel=1e-6)


@pytest.mark.parametrize("precision", INTS)
def test_raw_steps_are_packed_bits(precision: str) -> None:
    top, width = TOPS[precision], int(precision.removeprefix("int"))
    steps = [(7 * i) % (2 * top + 1) - top for i in range(19)]
    number = sum((step % 256 if width == 8 else step + top) << width * i
                 for i, step in enumerate(steps))  # fmt: skip
    payload = number.to_bytes((19 * width + 7) // 8, "little")
    found = decode_values(Coded(precision, (0.5,), payload), 19)
    assert found.tolist() == [0.5 * step for step in steps]
    assert encode_values(found, precision) == Coded(precision, (0.5,), payload)


@pytest.mark.parametrize("width", [1, 3, 8, 11, 16])
def test_bits_of_many_numbers(width: int) -> None:
    rng = np.random.default_rng(width)
    for count in (0, 1, 7, (1 << 20) + 5):
        numbers = rng.integers(0, 1 << width, count).astype(np.uint16)
        plain = bits_packed(numbers, width)
        assert len(plain) == (count * width + 7) // 8
        assert (bits_unpacked(Coded("x", (), plain), plain, count, width) == numbers).all()


def test_halves_cost_less_and_stay_the_same() -> None:
    for shape in SHAPES:
        values = drawn(shape, 5000)
        coded = encode_values(values, "fp16")
        assert coded.coding == "fp16h"
        assert len(coded.payload) < 0.9 * 10_000
        assert torch.equal(decode_values(coded, 5000), values.half().float())
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.float16).repeat(2)
    held = every[every.isfinite()]
    assert encode_values(held, "fp16").coding == "fp16"  # nothing to gain
    odd = torch.tensor([0.0, -0.0, 6e-8, -6e-8, 65504.0] * 100, dtype=torch.float16)
    coded = encode_values(odd, "fp16")
    assert coded.coding == "fp16h"
    back = decode_values(coded, 500).half()
    assert torch.equal(back.view(torch.int16), odd.view(torch.int16))


# Rounding without coding.

edges = st.one_of(
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-42, 1e-38, 6e4, -6e4, 0.5]),
)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype == torch.float32 and torch.equal(
        one.contiguous().view(torch.int32), other.contiguous().view(torch.int32)
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    entries=st.lists(edges, max_size=40),
    size=st.sampled_from([1.0, 1e-30, 1e-3]),
    cuts=st.lists(st.integers(0, 40), max_size=3),
)
def test_rounded_is_what_is_decoded(
    precision: str, entries: list[float], size: float, cuts: list[int]
) -> None:
    values = torch.tensor(entries, dtype=torch.float32) * size
    ends = sorted(min(cut, len(entries)) for cut in cuts)
    parts = [b - a for a, b in zip([0, *ends], [*ends, len(entries)], strict=True)]
    for chosen in (None, parts):
        coded = encode_values(values, precision, chosen)
        back = decode_values(coded, len(entries), chosen)
        assert same_bits(back, rounded(values, precision, chosen))
        pieces = values.split(chosen) if chosen else [values]
        alone = [rounded(piece, precision) for piece in pieces]
        assert same_bits(back, torch.cat(alone))
        if coded.params:
            assert list(coded.params) == [float(scale_of(x.numpy(), precision)) for x in pieces]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounded_keeps_shape_and_leaves_its_input(precision: str) -> None:
    largest = torch.finfo(torch.float32 if precision in INTS else torch.float16).max
    for values in (
        drawn("laplace", 3000).view(20, 150).t(),
        torch.full((3, 4), -0.3),
        torch.tensor(0.7),
        torch.tensor([largest, -largest / 3, 1.0]),
        drawn("gauss", 60).double().view(3, 4, 5).requires_grad_(),
        torch.zeros(0, 4),
    ):
        before = values.detach().clone()
        found = rounded(values, precision)
        coded = encode_values(values, precision)
        assert found.shape == values.shape
        assert same_bits(found.reshape(-1), decode_values(coded, values.numel()))
        found.add_(1)
        assert torch.equal(values.detach(), before)


def test_rounding_twice_changes_nothing_more() -> None:
    for precision in ("fp32", "fp16", "bf16", "int8", "int6"):
        once = rounded(drawn("gauss", 999), precision)
        assert torch.allclose(rounded(once, precision), once, rtol=1e-6)


def test_parts_that_do_not_add_up() -> None:
    for parts in ([1, 1], [4, -1], []):
        with pytest.raises(SettingError, match="found 3; give the length of each part"):
            encode_values(torch.ones(3), "int4", parts)
    coded = encode_values(torch.ones(3), "int4", [1, 2])
    for wrong in (None, [3], [1, 1], [4, -1], [1, 1, 1]):
        with pytest.raises(DamagedDelta):
            decode_values(coded, 3, wrong)


def test_a_part_with_its_own_scale_is_nearer() -> None:
    values = torch.cat([drawn("gauss", 400), drawn("gauss", 400, 1) * 100])
    one, two = (rounded(values, "int4", parts) for parts in (None, [400, 400]))
    assert (two - values)[:400].norm() < 0.2 * (one - values)[:400].norm()


# Laws.


@pytest.mark.parametrize("most", [1, 7, 127])
def test_laws_of_one_parameter(most: int) -> None:
    """Against the exponentials in floats."""
    found = steps_module._half_laws(most) / 2**31
    magnitudes = np.arange(most + 1)
    for number in range(136):
        q = 1 / (1 + 1 / ((8 + number % 8) * 2 ** (number // 8) / 128))
        assert np.allclose(found[number], q ** (magnitudes**2.0), atol=1e-5)
    for number in range(112):
        q = 1 / (1 + 1 / ((8 + number % 8) * 2 ** (number // 8) / 2048))
        assert np.allclose(found[136 + number], q**magnitudes, atol=1e-5)


@pytest.mark.parametrize("most", [1, 2, 31, 127])
def test_tables_share_entries_among_neighbours(most: int) -> None:
    for number in range(248, 256):
        buckets = steps_module._buckets(number, most)
        assert set(buckets) == set(range(steps_module._entries(number, most)))
        half = buckets[most:]
        assert (np.diff(half) >= 0).all()
        assert (np.diff(half) <= 1).all()
        mirrored = half if number < 252 else 2 * half[0] - half
        assert (buckets[most::-1] == mirrored).all()
    assert steps_module._entries(251, most) == most + 1
    assert steps_module._entries(255, most) == 2 * most + 1


# Who changes one of these lines breaks every file that exists.
FILED = [
    ("steps", "053c4c0772151c70bb9bf947fae08ba6cdb4b0e60003"),
    ("steps", "05d2d6f9880fc1f8a78614baee137941c34120de0402"),
    ("steps", "05f9fcfff9f6e9d921bbac4edd7f970aab4f1bf16dcbcc750b496a01"),
    ("steps", "05fd00ccecf2ecfff5e5e5e5dc97b5b100e2478d7f434111e9305cc53ef2771c"),
    (
        "fp16h",
        "00000ef30000000000000000000000f5ffe900000800000800000008c000002000010440000000200000000000080000001080000000000000000003104000003080010000000010807ce1a4d8967eca38f4149aad1f",
    ),
]


def congruential(count: int, spread: int) -> list[int]:
    """Integers that any language can make: the sum of four draws from 0..spread, less its mean."""
    state, found = 1, []
    for _ in range(count):
        total = 0
        for _ in range(4):
            state = (1103515245 * state + 12345) % 2**31
            total += (state >> 16) % (spread + 1)
        found.append(total - 2 * spread)
    return found


@pytest.mark.parametrize(("coding", "payload"), FILED)
def test_filed_values_are_read_for_ever(coding: str, payload: str) -> None:
    params = () if coding == "fp16h" else (0.125,)
    found = decode_values(Coded(coding, params, bytes.fromhex(payload)), 40)
    assert found.tolist() == [step / 8 for step in congruential(40, 3)]


# Hostile input.


def good() -> list[tuple[Coded, int]]:
    found = [(encode_values(drawn(shape, 700), p), 700) for shape in SHAPES for p in PRECISIONS]
    for precision, count in FLAT.items():
        top = TOPS.get(precision, 9)
        flat = (torch.arange(count) % (2 * top + 1) - top).float()
        found.append((encode_values(flat, precision), count))
    return found


def test_every_coding_is_among_the_good_ones() -> None:
    assert {coded.coding for coded, _ in good()} == set(VALUES)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_values_are_refused_or_are_values(seed: int) -> None:
    rng = random.Random(seed)
    cases = good()
    for _ in range(400):
        coded, count = rng.choice(cases)
        data = bytearray(coded.payload)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data) + 1)
            match rng.randrange(4):
                case 0 if data:
                    data[at % len(data)] ^= 1 << rng.randrange(8)
                case 1:
                    del data[at:]
                case 2:
                    data[at:at] = rng.randbytes(rng.randint(1, 4))
                case _:
                    data[at : at + 1] = rng.randbytes(1)
        name = rng.choice(VALUES) if rng.random() < 0.1 else coded.coding
        found = rng.choice([0, 1, count + 1, 1 << 39]) if rng.random() < 0.2 else count
        try:
            back = decode_values(Coded(name, coded.params, bytes(data)), found)
        except DamagedDelta:
            continue
        assert back.shape == (found,)


def test_steps_of_any_sparsity_come_back() -> None:
    """With a tenth of them nonzero the law that fits best is number 0, alone: a zero byte."""
    laws = set()
    for nonzero in range(100, 500, 4):
        found = np.zeros(3000, np.int8)
        found[:nonzero:2], found[1:nonzero:2] = 1, -1
        stored = steps_module.encode_steps(found, 3000)
        assert stored is not None
        back = steps_module.decode_steps(Coded("steps", (1.0,), stored), stored, len(found))
        assert (back == found).all()
        laws.add(stored[1])
    assert 0 in laws


HOSTILE = [
    (Coded("steps", (1.0,), b""), 5, "no largest step"),
    (Coded("steps", (1.0,), b"\0"), 0, "found 1 bytes, expected 0"),
    (Coded("steps", (1.0,), b"\x80\0\1"), 5, "no largest step"),
    (Coded("steps", (1.0,), b"\0\0"), 5, "2 bytes for zeros"),
    (Coded("steps", (1.0,), b"\1"), 5, "a law that is none"),
    (Coded("steps", (1.0,), b"\3\xff\1\1"), 5, "a law that is none"),
    (Coded("steps", (1.0,), b"\1\xf8\0\0"), 5, "a law without weight"),
    (Coded("steps", (1.0,), b"\1\1\0"), 5, "zero bytes at the end"),
    (Coded("steps", (1.0,), b"\1\1"), 5, "symbols that end before 5"),
    (Coded("steps", (1.0,), b"\1\1\0\0\0\1" + bytes(6) + b"\1"), 5, "more or fewer bytes"),
    (Coded("steps", (), b"\0"), 5, "0 params, expected 1 scales"),
    (Coded("steps", (-1.0,), b"\0"), 5, "a scale that is none"),
    (Coded("int4", (1.0,), b"\xff"), 2, "a step without its opposite"),
    (Coded("int4", (1.0,), b"\x17"), 1, "nonzero padding"),
    (Coded("int3", (1.0,), b"\x17\1"), 2, "found 2 bytes of bits, expected 1"),
    (Coded("int2", (0.1,), b"\0"), 2, "a scale that is none"),
    (Coded("fp16h", (1.0,), b"\0"), 2, "1 params, expected none"),
    (Coded("fp16h", (), b""), 2, "a law that is none"),
    (Coded("fp16h", (), b"\3\0\0\1"), 2, "a law that is none"),
    (Coded("fp16h", (), b"\0\x20\0\1"), 2, "a law that is none"),
    (Coded("fp16h", (), b"\0\0\0\0"), 2, "a law that is none"),
    (Coded("fp16h", (), b"\0\0\0\1\0"), 2, "found 1 bytes of bits, expected 3"),
    (Coded("fp16h", (), b"\0\0\0\1" + bytes(3)), 2, "symbols that end before 2"),
]


@pytest.mark.parametrize(("coded", "count", "sentence"), HOSTILE)
def test_hostile_values(coded: Coded, count: int, sentence: str) -> None:
    with pytest.raises(DamagedDelta, match=sentence):
        decode_values(coded, count)


def test_steps_beyond_a_float_are_refused() -> None:
    coded = replace(encode_values(drawn("gauss", 500), "int8"), params=(2.0**127,))
    with pytest.raises(DamagedDelta, match="beyond a float32"):
        decode_values(coded, 500)


def test_a_short_stack_for_many_values_is_found_out_early() -> None:
    for payload in (b"\1\1" + b"\xff" * 50, b"\x7f\x50" + random.Random(0).randbytes(50)):
        with pytest.raises(DamagedDelta, match="symbols that end before 274877906944"):
            decode_values(Coded("steps", (1.0,), payload), 1 << 38)
