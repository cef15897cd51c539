"""Places and values come back as they were, in as few bytes as there can be, or not at all."""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from howfine.codec import (
    PRECISIONS,
    Coded,
    combinatorial_bits,
    count_places,
    decode_places,
    decode_values,
    encode_places,
    encode_values,
)
from howfine.codec import ans as ans_module
from howfine.codec import gaps as gaps_module
from howfine.codec import places as places_module
from howfine.errors import DamagedDelta, SettingError

COUNT = 40 * 70


def scattered(count: int, places: int, seed: int = 0) -> torch.Tensor:
    """A uniformly random set of exactly `places` among `count`."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:places]] = True
    return mask


def grid_like(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows and columns whose densities spread log-normally, 4 % overall."""
    rng = np.random.default_rng(seed)
    rates = np.exp(rng.standard_normal((rows, 1)) + rng.standard_normal((1, columns)))
    return torch.from_numpy(rng.random((rows, columns)) < 0.04 * rates / rates.mean())


def bursts(count: int, seed: int = 0) -> torch.Tensor:
    """Runs of 1 to 40 places, far apart."""
    rng, mask, at = np.random.default_rng(seed), torch.zeros(count, dtype=torch.bool), 0
    while at < count:
        at += int(rng.geometric(0.01))
        length = int(rng.integers(1, 40))
        mask[at : at + length] = True
        at += length
    return mask


# One mask of COUNT entries or more for every coding.
MASKS: dict[str, Callable[[], torch.Tensor]] = {
    "none": lambda: torch.zeros(COUNT, dtype=torch.bool),
    "all": lambda: torch.ones(40, 70, dtype=torch.bool),
    "bits": lambda: scattered(COUNT, COUNT // 2),
    "rank": lambda: scattered(COUNT, 30),
    "gaps": lambda: scattered(COUNT, 400),
    "histogram": lambda: bursts(100_000),
    "grid": lambda: grid_like(200, 300),
    "zlib": lambda: scattered(1000, 300).repeat(30),
}


def round_trip(mask: torch.Tensor) -> Coded:
    coded = encode_places(mask)
    back = decode_places(coded, mask.numel())
    assert back.dtype == torch.bool
    assert torch.equal(back, mask.reshape(-1))
    assert count_places(coded, mask.numel()) == mask.count_nonzero()
    return coded


def bits_of(coded: Coded) -> int:
    return 8 * (len(coded.payload) + 8 * len(coded.params))


@pytest.mark.parametrize("coding", MASKS)
def test_every_coding_wins_somewhere_and_loses_nothing(coding: str) -> None:
    mask = MASKS[coding]()
    assert round_trip(mask).coding == coding


@pytest.mark.parametrize("coding", ["bits", "rank", "gaps", "histogram", "grid"])
def test_a_mask_and_its_opposite_cost_alike(coding: str) -> None:
    mask = MASKS[coding]()
    direct, opposite = round_trip(mask), round_trip(~mask)
    assert opposite.coding == coding
    assert abs(len(direct.payload) - len(opposite.payload)) <= 0.02 * len(direct.payload) + 2


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_any_mask_round_trips(shape: list[int], density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    round_trip(torch.rand(shape, generator=generator) < density)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.lists(st.booleans(), max_size=80))
def test_any_short_mask_round_trips(entries: list[bool]) -> None:
    coded = round_trip(torch.tensor(entries, dtype=torch.bool))
    assert len(coded.payload) <= (len(entries) + 7) // 8


def test_tiny_and_strided_masks() -> None:
    for mask in (torch.tensor(True), torch.tensor([False]), torch.zeros(0, 3, dtype=torch.bool)):
        assert round_trip(mask).payload == b""
    for places in itertools.chain(range(120, 136), (1, 2)):
        round_trip(scattered(3000, places))
        round_trip(~scattered(3000, places))
    round_trip(grid_like(50, 60).t())


def test_gaps_of_more_than_one_raw_symbol_and_more_than_one_chunk() -> None:
    wide = scattered(1 << 24, 140)
    assert encode_places(wide).coding == "gaps"
    round_trip(wide)
    round_trip(scattered(400_000, 3 * (1 << 16) + 1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("density", [0.5, 0.2, 0.05, 0.01, 0.001])
def test_random_masks_cost_no_more_than_the_bound_and_one_percent(
    density: float, seed: int
) -> None:
    count = 500_000
    places = round(count * density)
    coded = round_trip(scattered(count, places, seed))
    assert bits_of(coded) <= 1.01 * combinatorial_bits(count, places)


@pytest.mark.parametrize("count", [24, 500, 768, 3072])
@pytest.mark.parametrize("places", [1, 3, 12])
def test_few_places_cost_the_bound_and_two_bytes(count: int, places: int) -> None:
    coded = round_trip(scattered(count, places))
    assert len(coded.payload) <= math.ceil(math.log2(math.comb(count, places)) / 8) + 1
    assert coded.params == ()


def test_clustered_masks_cost_far_less_than_the_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns, both = (torch.zeros(768, 768, dtype=torch.bool) for _ in range(3))
    rows[[3, 50, 700]] = torch.rand(3, 768, generator=generator) < 0.5
    columns[:, [3, 50, 700]] = torch.rand(768, 3, generator=generator) < 0.5
    both[[3, 50, 700]] = True
    both[:, 9] = True
    limits = {0.3: (rows, columns), 0.05: (both,), 0.85: (grid_like(400, 500), bursts(100_000))}
    for limit, masks in limits.items():
        for mask in masks:
            bound = combinatorial_bits(mask.numel(), int(mask.sum()))
            assert bits_of(round_trip(mask)) < limit * bound
            assert bits_of(round_trip(~mask)) < limit * bound


def test_rank_numbers_all_sets_in_colexicographic_order() -> None:
    ordered = sorted(itertools.combinations(range(9), 3), key=lambda places: places[::-1])
    for number, places in enumerate(ordered):
        mask = torch.zeros(9, dtype=torch.bool)
        mask[list(places)] = True
        coded = Coded("rank", (), bytes([6, number]))
        assert torch.equal(decode_places(coded, 9), mask)
        assert torch.equal(decode_places(replace(coded, payload=bytes([7, number])), 9), ~mask)
        assert places_module._encode_rank(np.array(places), 9, 3) == coded.payload


@pytest.mark.parametrize("kept", [2, 3])
def test_tokens_partition_the_gaps(kept: int) -> None:
    gaps = [*range(300), 2**20 - 1, 2**20, 2**36 + 12345]
    starts, widths = gaps_module.alphabet(max(gaps) + 1, kept)
    for gap in gaps:
        token, width, raw = (int(x[0]) for x in gaps_module._tokens(np.array([gap]), kept))
        assert width == widths[token] == max(gap.bit_length() - kept - 1, 0)
        assert gap == starts[token] + raw
    assert [int(s) for s in starts[1:]] == [
        int(s) + 2 ** int(w) for s, w in zip(starts, widths, strict=True)
    ][:-1]


def congruential(count: int, shares: list[int]) -> torch.Tensor:
    """A mask that any language can make: entry i is True with chance shares[i mod …] / 128."""
    state, entries = 1, []
    for at in range(count):
        state = (1103515245 * state + 12345) % 2**31
        entries.append(state >> 16 < shares[at % len(shares)] << 8)
    return torch.tensor(entries)


# Who changes one of these lines breaks every file that exists.
FILED = [
    ("rank", (), [10], "4c7503cb2410ffaee00507c49b67e8c24f17cbedf5090f3fc3f800"),
    ("gaps", (), [10], "4cbb16e580d887805300b02b681ecf35a6fdee750202f13f6ec43ff69112"),
    (
        "histogram",
        (),
        [10],
        "4c16f5ffffe5ffffff00fffffff5e500f500f500ff0000e5000060434821c98a9a222da0e1ed5ed486f9f98f6d14"
        "f39f57d801",
    ),
    (
        "grid",
        (100,),
        [100, 1, 0, 2, 60, 0],
        "6360a03d606760606203d24c0c7a0c410c000ddd351916cd46c5ff8576d5e5ada6ada9e375b49b97c3aca021",
    ),
]


@pytest.mark.parametrize(("coding", "params", "shares", "payload"), FILED)
def test_filed_masks_are_read_for_ever(
    coding: str, params: tuple[int, ...], shares: list[int], payload: str
) -> None:
    found = decode_places(Coded(coding, params, bytes.fromhex(payload)), 600)
    assert torch.equal(found, congruential(600, shares))


def test_filed_gaps_are_written_alike() -> None:
    mask = congruential(600, [10]).numpy()
    found = gaps_module.encode_gaps(np.flatnonzero(mask), 600, int(mask.sum()))
    assert found.hex() == FILED[1][3]


@pytest.mark.parametrize(("count", "few"), [(2, 1), (600, 38), (10_000, 5000), (2**39, 3)])
def test_geometric_law(count: int, few: int) -> None:
    """Against (1 - p)^start - (1 - p)^end in floats, within 2^-20."""
    weights: list[np.ndarray[Any, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaps_module, "model", weights.append)
        gaps_module._geometric(count, few)
    starts = [float(s) for s in gaps_module.alphabet(count, 3)[0]] + [math.inf]
    tails = [math.exp(start * math.log1p(-few / count)) for start in starts]
    expected = [high - low for high, low in itertools.pairwise(tails)]
    assert (weights[0] / 2**36).tolist() == pytest.approx(expected, abs=2**-20)


@pytest.mark.parametrize("weights", [[1], [0, 5], [3, 0, 10**6, 1], list(range(200))])
def test_the_law_given_to_the_coder_is_all_integers(weights: list[int]) -> None:
    shares: list[np.ndarray[Any, Any]] = []

    class Stream:
        class model:
            @staticmethod
            def Categorical(given: np.ndarray[Any, Any], perfect: bool) -> None:
                shares.append(given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ans_module, "stream", Stream)
        ans_module.model(np.array(weights))
    assert shares[0].tolist() == [float(int(share)) for share in shares[0]]
    assert sum(shares[0].tolist()) == 2**24 - len(shares[0])
    near = [2**24 * w / sum(weights) for w in weights] + [0]
    assert shares[0].tolist() == pytest.approx(near, abs=2 * len(near))


def test_combinatorial_bits() -> None:
    for n, k in ((0, 0), (1, 1), (10, 3), (500, 3), (4000, 2000), (10_000, 77)):
        assert combinatorial_bits(n, k) == pytest.approx(math.log2(math.comb(n, k)), abs=1e-6)
    assert combinatorial_bits(7, 0) == combinatorial_bits(7, 7) == 0
    with pytest.raises(SettingError, match=r"k = 4 places among n = 3"):
        combinatorial_bits(3, 4)


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(deadline=None, derandomize=True)
@given(st.lists(floats, max_size=50))
def test_fp32_is_bit_exact(entries: list[float]) -> None:
    values = torch.tensor(entries, dtype=torch.float32)
    back = decode_values(encode_values(values, "fp32"), len(entries))
    assert torch.equal(back.view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16")])
@settings(deadline=None, derandomize=True)
@given(entries=st.lists(st.floats(-65504, 65504, width=32), max_size=50))
def test_halves_are_rounded_once(precision: str, dtype: str, entries: list[float]) -> None:
    values = torch.tensor(entries, dtype=torch.float32)
    rounded = values.to(getattr(torch, dtype))
    coded = encode_values(values, precision)
    assert len(coded.payload) <= 2 * len(entries)
    assert torch.equal(decode_values(coded, len(entries)), rounded.float())
    assert decode_values(encode_values(rounded, precision), len(entries)).equal(rounded.float())


def test_raw_numbers_are_little_endian() -> None:
    values = torch.tensor([1.0, -2.5])
    assert encode_values(values, "fp32").payload.hex() == "0000803f000020c0"
    assert encode_values(values, "fp16").payload.hex() == "003c00c1"
    assert encode_values(values, "bf16").payload.hex() == "803f20c0"


def test_int8_is_symmetric_absmax() -> None:
    values = torch.randn(301, generator=torch.Generator().manual_seed(0)) * 0.02
    coded = encode_values(values.view(7, 43), "int8")
    (scale,) = coded.params
    assert scale == np.float32(scale) == np.float32(max(abs(x) for x in values.numpy()) / 127)
    expected = [round(float(np.float32(x) / np.float32(scale))) for x in values.numpy()]
    plain = Coded("int8", (scale,), bytes(step % 256 for step in expected))
    assert len(coded.payload) < len(plain.payload)
    assert torch.equal(decode_values(plain, 301), decode_values(coded, 301))
    back = decode_values(coded, 301)
    assert back.dtype == torch.float32
    assert back.tolist() == [float(np.float32(q) * np.float32(scale)) for q in expected]
    assert float((back - values).abs().max()) <= 0.5001 * scale


def test_sign_is_bitdelta() -> None:
    values = torch.randn(301, generator=torch.Generator().manual_seed(1)) * 0.02
    values[17] = 0.0
    coded = encode_values(values, "sign")
    assert len(coded.payload) == 38
    (scale,) = coded.params
    assert scale == np.float32(scale)
    assert scale == pytest.approx(math.fsum(abs(x) for x in values.tolist()) / 301, rel=1e-7)
    back = decode_values(coded, 301)
    assert back.tolist() == [scale if x > 0 else -scale for x in values.tolist()]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_edges_of_values(precision: str) -> None:
    for values in (torch.zeros(0), torch.zeros(5), torch.tensor(3.0), torch.full((2, 2), -0.5)):
        back = decode_values(encode_values(values, precision), values.numel())
        assert back.shape == (values.numel(),)
        assert torch.allclose(back, values.reshape(-1))
    tiny = torch.tensor([1e-45, -1e-45])
    assert decode_values(encode_values(tiny, precision), 2).abs().max() <= 2e-45
    if precision != "fp16":
        huge = torch.tensor([torch.finfo(torch.bfloat16).max, 0.0, -1.0])
        assert decode_values(encode_values(huge, precision), 3).isfinite().all()


def test_int8_at_the_largest_float() -> None:
    largest = torch.finfo(torch.float32).max
    back = decode_values(encode_values(torch.tensor([largest, -largest]), "int8"), 2)
    assert torch.allclose(back, torch.tensor([largest, -largest]))


@pytest.mark.parametrize(
    ("values", "precision", "sentence"),
    [
        (
            torch.tensor([70_000.0, 1.0]),
            "fp16",
            "up to 65504, found 1 larger of 2; use bf16 or fp32",
        ),
        (torch.tensor([-65_505.0]), "fp16", "use bf16 or fp32"),
        (torch.tensor([torch.finfo(torch.float32).max]), "bf16", "use fp32"),
        (torch.tensor([1e300], dtype=torch.float64), "fp32", "fp32 holds magnitudes up to"),
        (torch.tensor([1.0, math.nan]), "int8", "int8 needs finite values"),
        (torch.tensor([-math.inf]), "sign", "sign needs finite values"),
        (torch.tensor([1, 2]), "fp32", "values must be float, found torch.int64"),
        (torch.tensor([1.0]), "int5", "unknown precision 'int5'"),
    ],
)
def test_values_that_cannot_be_stored(values: torch.Tensor, precision: str, sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        encode_values(values, precision)


def test_places_must_be_bool() -> None:
    with pytest.raises(SettingError, match=r"bool mask, found torch\.float32"):
        encode_places(torch.ones(3))


# Hostile input.

PARAMS: list[tuple[Any, ...]] = [
    (),
    (0,),
    (-1,),
    (1,),
    (7,),
    (1.5,),
    (True,),
    (1 << 70,),
    (10**400,),
    (math.nan,),
    (math.inf,),
    (1e300,),
    (0.1,),
    ("3",),
    (None,),
    ([1],),
    (2, 3),
]
VALUES = [
    encode_values(torch.randn(COUNT, generator=torch.Generator().manual_seed(2)), precision)
    for precision in PRECISIONS
]


def mutated(payload: bytes, rng: random.Random) -> bytes:
    """One to three of: a flipped bit, a cut, a lost, doubled or random byte."""
    data = bytearray(payload)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + rng.randint(1, 4)]
            case 3:
                data[at:at] = data[at : at + 1]
            case _:
                data[at : at + 1] = rng.randbytes(rng.randint(1, 4))
    return bytes(data)


def outcome(
    decode: Callable[[Coded, int], torch.Tensor], coded: Coded, count: int
) -> torch.Tensor | None:
    """What `coded` decodes to, None for DamagedDelta; any other error propagates."""
    try:
        found = decode(coded, count)
    except DamagedDelta:
        return None
    assert found.shape == (count,)
    return found


@pytest.mark.parametrize("coding", MASKS)
def test_damaged_places(coding: str) -> None:
    rng, mask = random.Random(coding), MASKS[coding]()
    coded, count = encode_places(mask), mask.numel()
    for _ in range(250):
        payload = mutated(coded.payload, rng) if rng.random() < 0.8 else coded.payload
        params = rng.choice(PARAMS) if rng.random() < 0.3 else coded.params
        name = rng.choice([*MASKS, "fp32"]) if rng.random() < 0.1 else coding
        damaged = Coded(name, params, payload)
        found = outcome(decode_places, damaged, count)
        if found is not None and name in ("gaps", "histogram", "grid"):
            # Raw bits are as good as others; whatever else is wrong must show.
            assert (name, len(payload)) == (coding, len(coded.payload))
        if found is not None:
            assert count_places(damaged, count) == found.count_nonzero()
        other = rng.choice([count, 0, 1, count - 1, count + 1, 2 * count])
        outcome(decode_places, damaged, other)
        with suppress(DamagedDelta):
            assert 0 <= count_places(damaged, other) <= other


@pytest.mark.parametrize("coding", ["bits", "rank", "gaps", "histogram"])
def test_no_flipped_bit_goes_unnoticed(coding: str) -> None:
    mask = MASKS[coding]()
    coded = encode_places(mask)
    step = max(len(coded.payload) * 8 // 200, 1)
    for bit in range(0, 8 * len(coded.payload), step):
        data = bytearray(coded.payload)
        data[bit // 8] ^= 1 << bit % 8
        try:
            found = decode_places(replace(coded, payload=bytes(data)), mask.numel())
        except DamagedDelta:
            continue
        assert not torch.equal(found, mask.reshape(-1))


def test_damaged_values() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        coded = rng.choice(VALUES)
        payload = mutated(coded.payload, rng) if rng.random() < 0.7 else coded.payload
        params = rng.choice(PARAMS) if rng.random() < 0.4 else coded.params
        name = rng.choice([*PRECISIONS, "bits", "gaps"]) if rng.random() < 0.1 else coded.coding
        found = rng.choice([0, 1, COUNT + 1, 1 << 39]) if rng.random() < 0.2 else COUNT
        outcome(decode_values, Coded(name, params, payload), found)


HOSTILE: list[tuple[Coded, Any, str]] = [
    (Coded("lzma", (), b""), 8, "found another coding"),
    (Coded(["bits"], (), b""), 8, "found another coding"),  # type: ignore[arg-type]
    (Coded("bits", (), None), 8, "payload of another type"),  # type: ignore[arg-type]
    (Coded("none", (), b""), -1, "impossible count"),
    (Coded("none", (), b""), 1 << 60, "impossible count"),
    (Coded("none", (), b""), 2.0, "impossible count"),
    (Coded("none", (), b"\0"), 8, "found 1 bytes, expected 0"),
    (Coded("bits", (), b"\1"), 9, "found 1 bytes"),
    (Coded("bits", (), b"\1\2"), 9, "nonzero padding"),
    (Coded("bits", (3,), b"\1"), 8, "found 1 params"),
    (Coded("rank", (), b""), 8, "found 0 places"),
    (Coded("rank", (), b"\x09\0"), 8, "found 4 places"),
    (Coded("rank", (), b"\x80\x80\x80"), 8, "found 0 places"),
    (Coded("rank", (), b"\x82\0\0"), 8, "found 1 places"),
    (Coded("rank", (), b"\x80\x02"), 1000, "found 128 places"),
    (Coded("rank", (), b"\x02\x08"), 8, "a rank beyond the last"),
    (Coded("rank", (), b"\x02\x07\0"), 8, "a rank of 2 bytes, expected 1"),
    (Coded("gaps", (), b"\x0a"), 8, "found 5 places"),
    (Coded("gaps", (), b"\x02"), 1, "found 1 places"),
    (Coded("gaps", (), b"\x02\0\0\0\0\x01"), 8, "more or fewer bytes"),
    (Coded("gaps", (), b"\x02\x01\0"), 8, "zero bytes at the end"),
    (Coded("gaps", (), b"\x02" + b"\xff" * 40), 8, "is damaged"),
    (Coded("histogram", (), b"\x02\0"), 8, "a law that is none"),
    (Coded("histogram", (), b"\x02\x02\x01\0"), 8, "a law that is none"),
    (Coded("histogram", (), b"\x02\xff" + b"\1" * 255), 8, "a law that is none"),
    (Coded("grid", (3,), b""), 8, "a number of rows that does not fit"),
    (Coded("grid", (2,), b""), 8, "without its end"),
    (Coded("grid", (2,), zlib.compress(b"\xff" * 7, 9, -15)), 8, "found 6 classes"),
    (
        Coded("grid", (2,), zlib.compress(bytes(6) + b"\x09", 9, -15)),
        8,
        "found 9 places in a level",
    ),
    (Coded("zlib", (), b"\x07"), 8, "is damaged"),
    (Coded("zlib", (), zlib.compress(bytes(3), 9, -15)), 8, "without its end|3 bytes of bits"),
    (Coded("zlib", (), zlib.compress(b"\1", 9, -15) + b"x"), 8, "1 bytes left over"),
]


@pytest.mark.parametrize(("coded", "count", "sentence"), HOSTILE)
def test_hostile_places(coded: Coded, count: Any, sentence: str) -> None:
    with pytest.raises(DamagedDelta, match=sentence):
        decode_places(coded, count)


def test_more_entries_than_memory_are_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(count: int, entry: bool) -> None:
        raise MemoryError

    monkeypatch.setattr(gaps_module.np, "full", full)
    with pytest.raises(DamagedDelta, match="1000 entries, expected what this machine's memory"):
        decode_places(Coded("none", (), b""), 1000)


def test_hostile_values() -> None:
    for coded, count in (
        (Coded("int8", (1.0,), b"\x80"), 1),
        (Coded("int8", (2.7e36,), b"\x7f"), 1),
        (Coded("sign", (1.0,), b"\x02"), 1),
        (Coded("sign", (-1.0,), b"\x01"), 1),
        (Coded("fp32", (1.0,), bytes(4)), 1),
        (Coded("fp16", (), bytes(3)), 1),
    ):
        with pytest.raises(DamagedDelta):
            decode_values(coded, count)


@pytest.mark.parametrize("coding", ["rank", "gaps", "histogram", "zlib", "grid", "all"])
def test_places_are_counted_without_a_mask(coding: str) -> None:
    """Of 2^31 - 2^16 entries a mask has two billion bytes, and its bits 268 million."""
    rows = (1 << 15) - 1
    count, level = rows << 16, (1 << 16).to_bytes(4, "little")
    payload, params, expected = {
        "rank": (b"\x06" + bytes(12), (), 3),
        "gaps": (b"\x90\x03" + bytes(12), (), 200),
        "histogram": (b"\x91\x03" + bytes(12), (), count - 200),
        "zlib": (zlib.compress(b"\1" + bytes(count // 8 - 1), 1, -15), (), 1),
        "grid": (zlib.compress(bytes(rows + (1 << 16)) + level, 1, -15), (rows,), 1 << 16),
        "all": (b"", (), count),
    }[coding]
    tracemalloc.start()
    assert count_places(Coded(coding, params, payload), count) == expected
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


def peak_of(decode: Callable[[Coded, int], torch.Tensor], coded: Coded, count: int) -> int:
    tracemalloc.start()
    outcome(decode, coded, count)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_no_payload_makes_a_decoder_allocate_without_bound() -> None:
    count, slack = 4_000_000, 12_000_000
    half = (count // 2).to_bytes(3, "little")
    bomb = zlib.compress(bytes(200_000_000), 9, -15)
    classes = bytes(4000) + half
    for coded in (
        Coded("gaps", (), half),
        Coded("gaps", (), half + random.Random(0).randbytes(1_000_000)),
        Coded("histogram", (), half + b"\x01\x01"),
        Coded("zlib", (), bomb),
        Coded("grid", (2000,), bomb),
        Coded("grid", (2000,), zlib.compress(classes, 9, -15)),
    ):
        assert peak_of(decode_places, coded, count) < 4 * count + slack + len(coded.payload)
    for coded in (Coded("fp32", (), bytes(100)), Coded("sign", (1.0,), bytes(10))):
        assert peak_of(decode_values, coded, 1 << 39) < 100_000
