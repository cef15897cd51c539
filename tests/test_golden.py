"""What each format version wrote is read for ever: to the bit, and with the outputs of then."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from golden.make import FLAT, FOLDERS, PATTERNS, base_of, decoded, golden_base, logits
from hostile.make import FIXTURES, FORMS
from howfine import codec, container, errors
from howfine.base import Base
from howfine.codec import places
from howfine.codec.coded import PLACES
from howfine.cost import parts
from howfine.delta import SUFFIX, Delta
from howfine.method import Method, methods
from howfine.plugins import name_of

EXPECTED: dict[Path, dict[str, Any]] = {
    folder: json.loads((folder / "expected.json").read_text()) for folder in FOLDERS
}
FILES = [path for folder in FOLDERS for path in sorted(folder.glob(f"*{SUFFIX}"))]


@pytest.fixture(scope="module")
def base() -> Base:
    return golden_base()


def stem(path: Path) -> str:
    return path.name.removesuffix(SUFFIX)


def name_of_file(path: Path) -> str:
    return f"{path.parent.name}-{stem(path)}"


def test_every_file_has_its_expectations() -> None:
    for folder, expected in EXPECTED.items():
        assert {stem(path) for path in FILES if path.parent == folder} == set(expected["files"])


def test_the_base_has_the_fingerprint_of_then(base: Base) -> None:
    for expected in EXPECTED.values():
        assert base.fingerprint == expected["fingerprint"]


@pytest.mark.parametrize("path", FILES, ids=name_of_file)
def test_a_golden_file_means_what_it_meant(path: Path) -> None:
    expected = EXPECTED[path.parent]["files"][stem(path)]
    delta = Delta.load(path)
    base = base_of(delta)
    assert delta.header() == expected["header"]
    assert decoded(delta, base) == expected["tensors"]
    # Sums are taken in another order on another processor; nothing else may differ.
    found = logits(delta, base, EXPECTED[path.parent]["tokens"])
    assert torch.allclose(found, torch.tensor(expected["logits"]), rtol=0, atol=1e-5)
    assert base.is_untouched()
    assert sum(part.bytes for part in parts(path)) == path.stat().st_size


def test_no_two_files_give_the_same_outputs() -> None:
    """Expectations that are all alike would be met by a delta that does nothing."""
    for folder in FOLDERS:
        files = EXPECTED[folder]["files"].values()
        outputs = [torch.tensor(expected["logits"]) for expected in files]
        for number, one in enumerate(outputs):
            alike = [other for other in outputs[:number] if other.shape == one.shape]
            assert all((one - other).abs().max() > 1e-3 for other in alike)


def test_every_coding_and_method_is_kept() -> None:
    """Who adds one adds a golden file."""
    deltas = [Delta.load(path) for path in FILES]
    found = [stream for delta in deltas for stream in delta.streams]
    kept = {stream.coded.coding for stream in found}
    kept |= {stream.values.coding for stream in found if stream.values}
    assert kept == {*PATTERNS, *codec.VALUES}
    assert set(container.VALUE_GROUPS) == set(codec.VALUES)
    assert set(places._DECODERS) == set(PLACES) == set(PATTERNS)
    names = {name_of("methods", Method, delta.method) for delta in deltas}
    assert names == set(methods())


def test_both_versions_and_both_layouts_are_kept() -> None:
    for path in FILES:
        header, _ = container.read(path)
        folded = len(header["sha256"]) == 32
        assert header["howfine"] == (1 if path.parent == FOLDERS[0] else 2)
        assert folded == (path.parent != FOLDERS[0] and not path.name.endswith(f"{FLAT}{SUFFIX}"))


def test_a_golden_file_written_again_reads_the_same(tmp_path: Path) -> None:
    """But that a small file keeps half of the base's fingerprint."""
    for path in FILES:
        delta = Delta.load(path)
        delta.save(tmp_path / path.name)
        again = Delta.load(tmp_path / path.name)
        assert again == replace(delta, base_fingerprint=base_of(delta).fingerprint[:32])


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
