"""The delta file's outside: what is folded, what is laid out flat, and that both say the same."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

from howfine import container, folded, streams
from howfine.codec import encode_places, encode_values
from howfine.delta import Delta
from howfine.errors import WrongBase
from howfine.streams import Stream
from test_laws import SUFFIX, examples, fit_a_little
from tiny import tiny_base

FINGERPRINT = hashlib.sha256(b"some base").hexdigest()
ENTRIES = 10_645_632  # of the six blocks' matrices of a small model


def header(**more: Any) -> dict[str, Any]:
    """A typical header."""
    return {
        "base": "minilm",
        "sha256": FINGERPRINT,
        "method": {"sparse": {"density": 0.0001, "by": "gradient"}},
        "readout": {"classifier": {"pooling": "mean", "max_length": 64}},
        "labels": ["negative", "positive"],
        "score": ["accuracy", 0.757974, [0.73171, 0.783302], "rotten_tomatoes/dev", 1066],
        **more,
    }


def joined(places: int, precision: str = "int4") -> list[Stream]:
    """Changed entries of a model as one stream, and a head."""
    torch.manual_seed(0)
    mask = torch.zeros(ENTRIES, dtype=torch.bool)
    mask[torch.randperm(ENTRIES)[:places]] = True
    values = encode_values(torch.randn(places) * 1e-3, precision)
    changed = Stream("method/*54a2e8452a154a", (ENTRIES,), encode_places(mask), True, values)
    weight, bias = encode_values(torch.randn(2, 384), "fp16"), encode_values(torch.randn(2), "fp16")
    head = [Stream("readout/linear.weight", (2, 384), weight)]
    return [changed, *head, Stream("readout/linear.bias", (2,), bias)]


def layout(path: Path) -> str:
    return "folded" if container.overhead(path).get("checksum, base") else "flat"


def test_a_small_delta_pays_two_hundred_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for found in (joined(500)[:1], joined(500), joined(2000, "sign")):
        written = container.write(path, header(), streams.groups(tuple(found)))
        payloads = sum(stream.size for stream in found)
        assert written == path.stat().st_size == payloads + sum(container.overhead(path).values())
        print(f"{written - payloads} bytes beside {payloads} of payloads")
        assert written - payloads < 220


def test_any_safetensors_reader_opens_a_folded_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    container.write(path, header(), streams.groups(tuple(joined(50))))
    with safetensors.safe_open(path, "np") as opened:
        assert opened.metadata() == {"howfine": "2"}
        assert list(opened.keys()) == ["delta"]
        data = opened.get_tensor("delta").tobytes()
    assert data[:8] == hashlib.sha256(data[8:]).digest()[:8]
    assert data[8:24].hex() == FINGERPRINT[:32]
    assert container.is_delta(path)


@pytest.mark.parametrize("seed", range(20))
def test_both_layouts_say_the_same(seed: int, tmp_path: Path) -> None:
    rng, path = random.Random(seed), tmp_path / "x"
    found = []
    for number in range(rng.randrange(1, 6)):
        values = torch.from_numpy(np.random.default_rng(seed + number).standard_normal(60))
        precision = rng.choice(("fp32", "fp16", "int8", "int3", "sign"))
        parts = rng.choice((None, [20, 0, 40]))
        scale = 10 ** rng.uniform(-9, 3)
        found.append(
            Stream(
                f"method/päth.{number}", (6, 10), encode_values(values * scale, precision, parts)
            )
        )
        found.append(Stream(f"method/mask.{number}", (60,), encode_places(values > rng.random())))
    groups = streams.groups(tuple(found))
    stated = header(labels=["é", '"', ""], kind="seq2seq")
    container.write(path, stated, groups)
    assert layout(path) == "folded"
    read, again = container.read(path)
    assert read == {"howfine": 2, **stated, "sha256": FINGERPRINT[:32]}
    assert list(streams.parse(again)) == list(streams.parse(groups)) == found
    flat = {"howfine": 2, **stated}
    flat["check"] = container.checksum(flat, groups)
    path.write_bytes(container.assemble(flat, groups))
    assert layout(path) == "flat"
    assert container.read(path) == ({"howfine": 2, **stated}, groups)


def test_a_file_is_folded_below_64_kib(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for count, expected in ((16_300, "folded"), (16_400, "flat"), (200_000, "flat")):
        stream = Stream("method/x", (count,), encode_values(torch.randn(count), "fp32"))
        written = container.write(path, header(), streams.groups((stream,)))
        assert layout(path) == expected
        assert (written < 1 << 16) == (expected == "folded")


def test_large_files_are_as_version_1_wrote_them(tmp_path: Path) -> None:
    path = tmp_path / "x"
    whole = Stream("method/x", (20_000,), encode_values(torch.randn(20_000), "fp32"))
    groups = streams.groups((whole,))
    container.write(path, header(), groups)
    first = {"howfine": 1, **header()}
    first["check"] = container.checksum(first, groups)
    assert path.read_bytes() == container.assemble(first, groups)
    # What version 1 cannot read says that it is of version 2.
    steps = Stream("method/y", (4000,), encode_values(torch.randn(4000), "int4"))
    half = header(sha256=FINGERPRINT[:32])
    for stated, more in ((header(), [steps]), (header(), joined(99, "fp32")), (half, [])):
        container.write(path, stated, streams.groups((whole, *more)))
        assert layout(path) == "flat"
        assert container.read(path)[0]["howfine"] == 2


def test_what_cannot_be_folded_is_laid_out_flat(tmp_path: Path) -> None:
    path, groups = tmp_path / "x", streams.groups(tuple(joined(9)))
    for stated in (header(sha256="x" * 64), header(labels=["x" * (1 << 20)])):
        container.write(path, stated, groups)
        assert layout(path) == "flat"


def test_a_link_stays_one_and_a_file_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    file, link = tmp_path / "far" / "file", tmp_path / "link"
    link.symlink_to(Path("far") / "file")
    before = os.umask(0o027)
    try:
        container.write_atomically(link, b"one")
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (b"one", 0o640)
    file.chmod(0o600)
    container.write_atomically(link, b"two")
    assert link.is_symlink()
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (b"two", 0o600)
    assert {path.name for path in tmp_path.rglob("*")} == {"far", "file", "link"}


@pytest.mark.parametrize("seed", range(3))
def test_params_take_the_fewest_digits_that_say_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for bits in rng.integers(0, 0x7F800000, 2000, dtype=np.int32):
        exact = float(bits.view(np.float32))
        short = folded._shortest(exact)
        assert folded._widened(short) == exact
        assert short == float(str(bits.view(np.float32)))
    assert json.dumps([folded._shortest(float(np.float32(x))) for x in (0.1, 2.5e-7, 3.0)]) == (
        "[0.1, 2.5e-07, 3.0]"
    )
    assert [folded._shortest(x) for x in (7, "x", None, 1e300)] == [7, "x", None, 1e300]


def test_the_dictionary_is_for_ever() -> None:
    """Who changes it makes every folded file unreadable."""
    digest = hashlib.sha256(folded.DICTIONARY).hexdigest()
    page = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
    assert f"begins `{digest[:16]}`" in page
    assert digest.startswith("e44d85e59055cf1680ee2ed711719466")


def test_half_a_fingerprint_tells_bases_apart(tmp_path: Path) -> None:
    base, other = tiny_base("bert"), tiny_base("bert", seed=1)
    made = fit_a_little(base, examples()["select"]).delta()
    made.save(tmp_path / f"x{SUFFIX}")
    loaded = Delta.load(tmp_path / f"x{SUFFIX}")
    assert loaded.base_fingerprint == base.fingerprint[:32]
    for delta in (made, loaded):
        delta.check_base(tiny_base("bert"))
        with pytest.raises(WrongBase):
            delta.check_base(other)
    for length in (0, 1, 31, 33, 63):
        with pytest.raises(WrongBase):
            replace(made, base_fingerprint=base.fingerprint[:length]).check_base(base)
