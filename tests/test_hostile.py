"""Hostile delta files end in one clear error: no crash, no hang, no memory beyond the checks."""

import json
import time
import tracemalloc
import zlib
from pathlib import Path
from unittest import mock

import pytest
import torch

from hostile.make import (
    body_of,
    flattened,
    framed,
    lie_in_index,
    mutants,
    put_together,
    refolded,
    take_apart,
)
from howfine import container, folded, streams
from howfine.cost import parts
from howfine.delta import SCORE, SUFFIX, Delta
from howfine.errors import DamagedDelta, DeltaError, HowfineError, UnsupportedFormat
from howfine.method import method
from howfine.readout import readout
from tiny import tiny_base, tiny_task

FIXTURES = Path(__file__).parent / "hostile"
SLACK = 8 << 20  # bytes: the allocator's own steps, not the file's


@pytest.fixture(scope="module")
def base():
    return tiny_base("bert")


@pytest.fixture(scope="module")
def files(base, tmp_path_factory):
    """Good files of several kinds: masks, whole tensors, many precisions; flat, then folded."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("deltas")
    found = []
    cases = [("mask", {"initial_sparsity": 0.3}, "fp32"), ("mask", {"granularity": "row"}, "fp16")]
    stores = ("fp32", "bf16", "int8", "sign", "int3")
    cases += [("select", {"train": ("bias",)}, store) for store in stores]
    for number, (name, settings, store) in enumerate(cases):
        made, head = (
            method(name, **settings),
            readout("classifier").attach(base, tiny_task().labels),
        )
        with made.attach(base) as change:
            with torch.no_grad():
                for value in change.trainable.values():
                    value.add_(torch.randn_like(value) * 0.1)
            delta = Delta.pack(
                base, made, change, readout("classifier"), head, ("no", "yes"), store
            )
        path = folder / f"{number}{SUFFIX}"
        delta.with_score(
            dict(zip(SCORE, ("accuracy", 0.5, [0.4, 0.6], "tiny/dev", 8), strict=True))
        ).save(path)
        found.append(path.read_bytes())
    return [*map(flattened, found), *found]


def high_water() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def declared(data: bytes) -> int:
    """Bytes that the file says its tensors take, decoded; 0 where even that can't be read."""
    try:
        body = body_of(data)
        if body is None:
            rows = json.loads(zlib.decompress(take_apart(data)[1][container.INDEX]))
        else:
            rows = folded.unfold(bytes(body))[1]
        return sum(4 * int(torch.Size(row[1]).numel()) for row in rows)
    except Exception:  # whatever is wrong with it, it declares nothing
        return 0


def survive(base, files, tmp_path, count):
    path, outcomes = tmp_path / f"hostile{SUFFIX}", {"refused": 0, "harmless": 0}
    slowest = 0.0
    for seed, good in enumerate(files):
        for kind, data in mutants(good, count // len(files) + 1, seed):
            path.write_bytes(data)
            Path("/proc/self/clear_refs").write_text("5")
            before, start = high_water(), time.perf_counter()
            try:
                delta = Delta.load(path)
                with delta.applied(base):
                    outcomes["harmless"] += 1
            except HowfineError:
                outcomes["refused"] += 1
            slowest = max(slowest, time.perf_counter() - start)
            grown = high_water() - before
            assert grown <= SLACK or grown <= 4 * declared(data), (kind, grown)
    assert base.is_untouched()
    assert slowest < 5, f"a mutant took {slowest:.1f} s"
    return outcomes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_six_hundred_mutants_are_survived(base, files, tmp_path):
    outcomes = survive(base, files, tmp_path, 600)
    assert outcomes["refused"] > 0.7 * sum(outcomes.values()), outcomes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_twenty_thousand_mutants_are_survived(base, files, tmp_path):
    outcomes = survive(base, files, tmp_path, 20_000)
    print(outcomes)
    assert sum(outcomes.values()) >= 20_000


@pytest.mark.parametrize("which", [0, -1], ids=["flat", "folded"])
def test_a_bit_flip_anywhere_changes_nothing_unnoticed(which, files, tmp_path):
    """Refused, or the same content: the header's padding and key order carry nothing."""
    path = tmp_path / f"flipped{SUFFIX}"
    good = files[which]
    path.write_bytes(good)
    whole = Delta.load(path)
    refused = 0
    for position in range(0, len(good), max(1, len(good) // 400)):
        data = bytearray(good)
        data[position] ^= 1
        path.write_bytes(data)
        try:
            assert Delta.load(path) == whole
        except HowfineError:
            refused += 1
    assert refused >= 395


def test_a_newer_format_is_refused_with_its_version(files, tmp_path):
    header, groups = take_apart(files[0])
    path = tmp_path / f"new{SUFFIX}"
    path.write_bytes(put_together({**header, "howfine": 9}, groups))
    with pytest.raises(UnsupportedFormat, match="format version 9"):
        Delta.load(path)


def test_a_declared_terabyte_is_not_allocated(base, files, tmp_path):
    header, groups = take_apart(files[0])
    rows = json.loads(zlib.decompress(groups[container.INDEX]))
    rows[0][1] = [2**20, 2**20]
    path = tmp_path / f"huge{SUFFIX}"
    path.write_bytes(put_together(header, {**groups, container.INDEX: container.pack_index(rows)}))
    with pytest.raises(DamagedDelta, match="more than any change"), Delta.load(path).applied(base):
        pass


@pytest.mark.parametrize("streams", [60_000, 500])
def test_declared_places_are_counted_without_masks(streams, files, tmp_path):
    """Each of them would be a mask of two billion bytes, and take seconds."""
    header, groups = take_apart(files[0])
    payload = b"\x02" + bytes(4)  # one place, the first
    rows = [[f"method/{n}", [2**31 - 1], "rank", len(payload), 0] for n in range(streams)]
    groups = {container.INDEX: container.pack_index(rows), "places": payload * streams}
    path = tmp_path / f"many{SUFFIX}"
    path.write_bytes(put_together(header, groups))
    assert path.stat().st_size < 600_000
    start = time.perf_counter()
    if streams > 500:
        with pytest.raises(DamagedDelta, match="declares 128,849,018,820,000 places in 60,000"):
            parts(path)
    else:
        assert sum(part.kept or 0 for part in parts(path)) == streams
    assert time.perf_counter() - start < 10


def test_labels_are_different_texts(files, tmp_path):
    header, groups = take_apart(files[0])
    path = tmp_path / f"labels{SUFFIX}"
    for labels in (["no", "no"], [""] * 150_000, [1, 2], "ny", None, {"no": 1, "yes": 2}):
        path.write_bytes(put_together({**header, "labels": labels}, groups))
        with pytest.raises(DamagedDelta, match="malformed .ValueError: .*labels"):
            Delta.load(path)


@pytest.mark.parametrize("kept", [True, False], ids=["head", "no head"])
def test_no_head_is_made_for_labels_that_have_none(kept, base, files, tmp_path):
    """100,000 labels are 700 kB of header, and would be a head of 13 MB, or of gigabytes."""
    header, groups = take_apart(files[2])
    if not kept:
        rows = [row for row in container.unpack_index(groups) if row[0].startswith("method/")]
        size = sum(row[3] for row in rows)
        groups = {container.INDEX: container.pack_index(rows), "fp32": groups["fp32"][:size]}
    path = tmp_path / f"labels{SUFFIX}"
    labels = [f"{number:x}" for number in range(100_000)]
    path.write_bytes(put_together({**header, "labels": labels}, groups))
    delta = Delta.load(path)
    made = []
    with mock.patch.object(torch.nn.Linear, "reset_parameters", lambda self: made.append(self)):
        if kept:
            with pytest.raises(DamagedDelta, match="readout tensors don't fit"):
                delta.applied(base).__enter__()
        else:
            with pytest.raises(DeltaError, match="has no head"):
                delta.check_head(base)
    assert [linear.weight.device.type for linear in made] == ["meta"]


@pytest.mark.parametrize("head", [b"\0" * 8, (90).to_bytes(8, "little"), b"GGUFGGUF"])
def test_a_large_file_that_is_none_of_ours_is_not_read(head, tmp_path):
    path = tmp_path / f"large{SUFFIX}"
    table = b'{"__metadata__":{}}'.ljust(90)
    with path.open("wb") as stream:
        stream.write(head + table)
        stream.truncate(1 << 32)  # takes no room on the disk
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(DamagedDelta):
        Delta.load(path)
    assert time.perf_counter() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("entry", ["[]", "{}", '"aa"', "[[[[]]]]"])
def test_an_index_of_millions_of_entries_is_not_read(entry, files, tmp_path):
    header, groups = take_apart(files[0])
    text = f"[{','.join([entry] * (15_000_000 // (len(entry) + 1)))}]"
    path = tmp_path / f"entries{SUFFIX}"
    path.write_bytes(put_together(header, {**groups, "index": zlib.compress(text.encode(), 1)}))
    del text
    tracemalloc.start()
    with pytest.raises(DamagedDelta, match="more than 1,048,576 entries"):
        Delta.load(path)
    assert tracemalloc.get_traced_memory()[1] < 60_000_000
    tracemalloc.stop()


def test_a_deflated_bomb_is_not_inflated(files, tmp_path):
    header, groups = take_apart(files[0])
    bomb = zlib.compress(b"[" + b" " * (1 << 28) + b"]", 9)
    path = tmp_path / f"bomb{SUFFIX}"
    path.write_bytes(put_together(header, {**groups, container.INDEX: bomb}))
    with pytest.raises(DamagedDelta, match="bounded size"):
        Delta.load(path)


def test_lies_that_only_a_folded_file_can_tell(files, tmp_path):
    path, body = tmp_path / f"folded{SUFFIX}", bytes(body_of(files[-1]))
    row = '["readout/x",[1],"fp32",4,0]'
    for data, found in (
        (refolded(b"[" + b" " * (1 << 24) + b"]", b""), "one whole deflated text of bounded size"),
        (refolded(b"[" * 100_000, b""), "not a whole delta file"),
        (refolded(b"[{},[]", b""), "not a whole delta file"),
        (refolded(b"[{}]", b""), "its header is none"),
        (refolded(b"[[],[]]", b""), "its header is none"),
        (refolded(b'[{"sha256":"x"},[]]', b""), "its header is none"),
        (refolded(b"[{},[7]]", b""), "a row of its index is none"),
        (refolded(b'[{},[["x",[1],"fp32",true,0]]]', b"4"), "a row of its index is none"),
        (refolded(b'[{},[["x",[1],"fp32",-4,0],["x",[1],"fp32",4,0]]]', b""), "0 bytes of payl"),
        (refolded(f"[{{}},[{row}]]".encode(), b"123"), "3 bytes of payloads, where its index has"),
        (refolded(f"[{{}},[{row}]]".encode(), b"1234"), "malformed .KeyError: 'method'"),
        (framed(body[:-1]), "its checksum does not fit"),
        (framed(b""), "its checksum does not fit"),
        (framed(folded._check(b"\xff" * 20) + b"\xff" * 20), "can't be inflated"),
        (files[-1].replace(b'"2"', b'"3"'), "format version 3"),
        (files[-1].replace(b'"2"', b'"1"'), "its checksum does not fit"),
        (files[-1].replace(b'"delta"', b'"delte"'), "its checksum does not fit"),
    ):
        path.write_bytes(data)
        with pytest.raises((DamagedDelta, UnsupportedFormat), match=found):
            Delta.load(path)


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.safetensors")), ids=lambda p: p.stem)
def test_kept_fixtures_are_refused(base, path):
    with pytest.raises(HowfineError), Delta.load(path).applied(base):
        pass


@pytest.mark.parametrize(
    "shape",
    [[2**47] * 100_000, [1] * 9, [0] * 9, [2**24, 2**24], [0, 2**24, 2**24], 7, "ab", [2, -1]],
    ids=["long", "nine", "zeros", "large", "none of many", "number", "text", "negative"],
)
def test_a_shape_that_no_tensor_has_is_refused(shape, files, tmp_path):
    header, groups = take_apart(files[0])
    rows = json.loads(zlib.decompress(groups[container.INDEX]))
    rows[0][1] = shape
    packed = {**groups, container.INDEX: container.pack_index(rows)}
    with pytest.raises(ValueError, match="shape"):
        list(streams.parse(packed))
    path = tmp_path / f"shape{SUFFIX}"
    path.write_bytes(put_together(header, packed))
    start = time.perf_counter()
    with pytest.raises(DamagedDelta, match="shape"):
        Delta.load(path)
    assert time.perf_counter() - start < 1


def test_the_liar_reaches_every_column():
    import random

    rows = [["method/x", [2], "bits", 1, 0, 3]]
    groups = {container.INDEX: container.pack_index(rows), "places": b"\x01"}
    seen = set()
    for seed in range(300):
        _, lying = lie_in_index({}, groups, random.Random(seed))
        changed = json.loads(zlib.decompress(lying[container.INDEX]))
        seen |= {i for i in range(6) if str(changed[0][i : i + 1]) != str(rows[0][i : i + 1])}
    assert seen == set(range(6))
