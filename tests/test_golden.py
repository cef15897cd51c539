"""What format version 1 wrote is read for ever: to the bit, and with the outputs of then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from golden.make import HERE, PATTERNS, decoded, golden_base, logits
from hostile.make import FIXTURES, FORMS
from howfine import errors
from howfine.base import Base
from howfine.codec import places
from howfine.codec.coded import PLACES
from howfine.cost import parts
from howfine.delta import SUFFIX, Delta
from howfine.method import Method, methods
from howfine.plugins import name_of

EXPECTED: dict[str, Any] = json.loads((HERE / "expected.json").read_text())
FILES = sorted(HERE.glob(f"*{SUFFIX}"))


@pytest.fixture(scope="module")
def base() -> Base:
    return golden_base()


def stem(path: Path) -> str:
    return path.name.removesuffix(SUFFIX)


def test_every_file_has_its_expectations() -> None:
    assert {stem(path) for path in FILES} == set(EXPECTED["files"])


def test_the_base_has_the_fingerprint_of_then(base: Base) -> None:
    assert base.fingerprint == EXPECTED["fingerprint"]


@pytest.mark.parametrize("path", FILES, ids=stem)
def test_a_golden_file_means_what_it_meant(path: Path, base: Base) -> None:
    expected = EXPECTED["files"][stem(path)]
    delta = Delta.load(path)
    assert delta.header() == expected["header"]
    assert decoded(delta, base) == expected["tensors"]
    # Sums are taken in another order on another processor; nothing else may differ.
    found = logits(delta, base, EXPECTED["tokens"])
    assert torch.allclose(found, torch.tensor(expected["logits"]), rtol=0, atol=1e-5)
    assert base.is_untouched()
    assert sum(part.bytes for part in parts(path)) == path.stat().st_size


def test_no_two_files_give_the_same_outputs() -> None:
    """Expectations that are all alike would be met by a delta that does nothing."""
    outputs = [torch.tensor(expected["logits"]) for expected in EXPECTED["files"].values()]
    for number, one in enumerate(outputs):
        assert all((one - other).abs().max() > 1e-3 for other in outputs[:number])


def test_every_coding_and_method_is_kept() -> None:
    """Who adds one adds a golden file."""
    deltas = [Delta.load(path) for path in FILES]
    kept = {stream.coded.coding for delta in deltas for stream in delta.streams}
    assert kept == {*PATTERNS, "fp32", "fp16", "bf16", "int8", "sign"}
    assert set(places._DECODERS) == set(PLACES) == set(PATTERNS)
    names = {name_of("methods", Method, delta.method) for delta in deltas}
    assert names == set(methods())


def test_a_golden_file_written_again_reads_the_same(base: Base, tmp_path: Path) -> None:
    for path in FILES:
        delta = Delta.load(path)
        delta.save(tmp_path / path.name)
        assert Delta.load(tmp_path / path.name) == delta


# Hostile files, each refused for its own reason and not for another.


def test_hostile_files_are_those_that_are_made() -> None:
    assert {path.stem for path in FIXTURES.glob("*.safetensors")} == set(FORMS)


@pytest.mark.parametrize("name", FORMS)
def test_a_hostile_file_is_refused_for_its_reason(name: str, base: Base) -> None:
    path = FIXTURES / f"{name}.safetensors"
    assert path.stat().st_size < 40_000
    kind, message = FORMS[name]
    with pytest.raises(getattr(errors, kind), match=message), Delta.load(path).applied(base):
        pass


def test_a_refused_file_leaves_the_base() -> None:
    """Its first streams are good: they may not stay on the base when a later one is refused."""
    base = golden_base()
    delta = Delta.load(FIXTURES / "foreign-path.safetensors")
    with pytest.raises(errors.DamagedDelta), delta.applied(base):
        pass
    assert base.is_untouched()
