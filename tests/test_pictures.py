"""Pictures and captions: what is read, what is left out, how they are found, and the two verbs."""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from console import howfine_here
from disk import base_folder
from howfine import images, retrieval
from howfine.base import Base
from howfine.directions import classify, encoder
from howfine.errors import BadSplit, HowfineError, MissingColumn, SettingError, TaskError
from howfine.images import Picture, fault, pixels
from howfine.metrics import METRICS, bootstrap_interval
from howfine.readouts.contrastive import cut
from howfine.search import search
from howfine.task import Example, Task
from howfine.tasks import captions
from tiny import WORDS, captioned_task, png, tiny_base, tiny_tower


def encoded(image: Image.Image, ending: str, **options: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, ending, **options)
    return held.getvalue()


def moving(ending: str = "GIF") -> bytes:
    first, second = (Image.new("RGB", (9, 9), colour) for colour in ("red", "blue"))
    return encoded(first, ending, save_all=True, append_images=[second])


# --- pictures ------------------------------------------------------------------------------------


def test_a_picture_is_rgb_upright_and_on_white() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    shown = Picture("half", encoded(half, "PNG")).open()
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    grey = Picture("grey", encoded(Image.new("L", (3, 2), 77), "PNG")).open()
    assert grey.mode == "RGB"
    assert grey.getpixel((0, 0)) == (77, 77, 77)
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    assert Picture("turned", encoded(turned, "JPEG", exif=exif)).open().size == (2, 4)


def test_pixels_are_the_whole_picture_resized() -> None:
    ramp = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 12))
    found = pixels([Picture("ramp", encoded(ramp, "PNG"))] * 2, 4)
    assert found.shape == (2, 3, 4, 4)
    assert found.dtype == np.uint8
    resized = ramp.convert("RGB").resize((4, 4), Image.Resampling.BICUBIC)
    assert np.array_equal(found[0].transpose(1, 2, 0), np.asarray(resized))


def test_decoded_pictures_are_kept_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = images._Decoded()
    monkeypatch.setattr(images, "KEPT_BYTES", 3 * 3 * 64)
    pictures = [Picture(str(n), png(n)) for n in range(5)]
    for picture in (*pictures, pictures[3], pictures[2]):
        kept.get(picture, 8)
        assert kept.bytes == sum(each.nbytes for each in kept.held.values()) <= 3 * 3 * 64
    assert [key[0] for key in kept.held] == [pictures[n].digest for n in (4, 3, 2)]


def test_threads_share_decoded_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = images._Decoded()
    monkeypatch.setattr(images, "KEPT_BYTES", 2 * 3 * 64)
    pictures = [Picture(str(n), png(n)) for n in range(5)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            asked = [threads.submit(kept.get, pictures[n * n % 5], 8) for n in range(2000)]
            assert all(each.result().shape == (3, 8, 8) for each in asked)
    finally:
        sys.setswitchinterval(before)
    assert kept.bytes == sum(each.nbytes for each in kept.held.values())


@pytest.mark.parametrize("ending", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_what_can_be_decoded_has_no_fault(ending: str) -> None:
    whole = png(0, 64, ending)
    assert fault(Picture("whole", whole)) == ""
    torn = Picture("torn.x", whole[: len(whole) // 2])
    if ending != "GIF" or fault(torn):
        assert fault(torn) == "corrupt picture"
        with pytest.raises(TaskError, match=r"torn\.x can't be used: corrupt"):
            torn.open()


def test_a_cameras_picture_of_several_is_one() -> None:
    first, second = (Image.new("RGB", (9, 9), colour) for colour in ("red", "blue"))
    both = encoded(first, "MPO", save_all=True, append_images=[second])
    assert fault(Picture("x", both)) == ""
    assert Picture("x", both).open().getpixel((4, 4))[0] > 200


@pytest.mark.parametrize("ending", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(ending: str) -> None:
    ramp = Image.fromarray(np.linspace(0, 65_535, 16).reshape(4, 4).astype(np.uint16))
    shown = np.asarray(Picture("x", encoded(ramp, ending)).open())[..., 0]
    assert np.array_equal(shown.ravel(), np.linspace(0, 255, 16).astype(np.uint8))


def wide(mode: str) -> Image.Image:
    """All that a picture of 16 or 32 bits may hold, and what it may not."""
    rng = np.random.default_rng(0)
    if mode == "F":
        return Image.fromarray(rng.normal(200, 200, (300, 41)).astype(np.float32))
    if mode == "I":
        return Image.fromarray(rng.integers(-9_000, 90_000, (300, 41), dtype=np.int32))
    values = np.arange(65_536, dtype=np.uint16).reshape(512, 128)
    size = values.shape[::-1]
    return Image.frombytes(mode, size, values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_wide_pixels_are_scaled_as_one_formula_says(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks, whose last one is shorter."""
    monkeypatch.setattr(images, "_BLOCK", 41 * 64)
    image = wide(mode)
    assert image.mode == mode
    values = np.asarray(image, dtype=np.float64)
    whole = values.max() if mode == "F" else 65_535.0
    expected = (255 * values.clip(0, whole) / whole).astype(np.uint8)
    shown = np.asarray(images._shown(image))
    assert shown.shape == (*expected.shape, 3)
    assert np.array_equal(shown[..., 1], expected)


def test_wide_pixels_take_little_memory() -> None:
    """numpy's, which made five copies of eight bytes a pixel."""
    values = np.zeros((2_000, 3_000), np.uint16)
    picture = Picture("x", encoded(Image.fromarray(values), "PNG"))
    tracemalloc.start()
    picture.open()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * values.size


def png_of(width: int, height: int) -> bytes:
    """The beginning of a PNG of so many pixels, and no pixels."""
    whole = bytearray(png(0))
    whole[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
    return bytes(whole)


@pytest.mark.parametrize("size", [(2**14, 2**13 + 1), (10**5, 10**5)])
def test_too_many_pixels_are_told_before_they_are_read(size: tuple[int, int]) -> None:
    picture = Picture("map.png", png_of(*size))
    assert fault(picture) == "oversized picture"
    with pytest.raises(TaskError, match=r"map\.png can't be used: oversized.* 134,217,728 pixels"):
        picture.open()


def test_a_large_cameras_picture_is_read() -> None:
    """Of 102 million pixels, of which Pillow warns; a JPEG is glanced at as a small one."""
    large = encoded(Image.new("L", (11_648, 8_736), 77), "JPEG")
    assert fault(Picture("x", large)) == ""


def test_damaged_notes_of_a_camera_are_passed_over() -> None:
    turned = Image.new("RGB", (4, 2), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    whole = encoded(turned, "WEBP", exif=exif)
    torn = Picture("x", whole.replace(b"II*", b"xx*").replace(b"MM\0*", b"xxxx"))
    assert fault(torn) == ""
    assert torn.open().size in ((4, 2), (2, 4))


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_corrupt(content: bytes) -> None:
    assert fault(Picture("x", content)) == "corrupt picture"


@pytest.mark.parametrize("ending", ["GIF", "WEBP", "PNG"])
def test_a_moving_picture_is_told(ending: str) -> None:
    assert fault(Picture("x", moving(ending))) == "animated picture"


def test_a_missing_file_is_no_corrupt_picture(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"gone\.jpg can't be read"):
        fault(Picture("gone.jpg", tmp_path / "gone.jpg"))


def test_cuts_are_parts_of_their_own_pictures() -> None:
    torch.manual_seed(0)
    flat = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    assert torch.allclose(cut(flat), flat, atol=1e-5)
    ramp = torch.linspace(0, 1, 32).expand(64, 3, 32, 32)
    made = cut(ramp)
    rises = made[:, 0, 16, -5] - made[:, 0, 16, 4]
    assert made.min() > -0.2
    assert made.max() < 1.2
    assert 0 < (rises < 0).sum() < 64  # some are mirrored
    assert rises.abs().max() < 0.85  # of 24 pixels' rise, 0.77
    assert rises.abs().min() < 0.6  # and smaller parts are seen


# --- captions ------------------------------------------------------------------------------------


def table(folder: Path, rows: list[tuple[str, str]], name: str = "pairs.csv") -> Path:
    path = folder / name
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("file", "caption"), *rows])
    return path


def noise(folder: Path, count: int = 30) -> list[str]:
    (folder / "pictures").mkdir()
    names = [f"pictures/{n}.png" for n in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(png(number))
    return names


def load(path: Path, **options: Any) -> Task:
    return Task.load(path, **{"image": "file", "text": "caption", **options})


def test_a_table_of_paths_is_read(tmp_path: Path) -> None:
    names = noise(tmp_path)
    rows = [(name, f"{word} caption of {name}") for name in names for word in ("one", "another")]
    task = load(table(tmp_path, rows))
    assert task.kind == "alignment"
    assert task.metric == "mean_recall"
    assert task.labels == ()
    assert sum(map(len, task.splits.values())) == 60
    sides = [{e.picture.digest for e in rows if e.picture} for rows in task.splits.values()]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 30  # a picture is on one side
    assert [len(task.splits[s]) for s in ("dev", "test")] == [6, 6]
    targets = task.targets("test")
    assert targets.shape == (6,)
    assert len(set(targets.tolist())) == 3
    assert load(table(tmp_path, rows[::-1])).splits["test"] != []
    fewer = task.subset(train=10)
    assert len(fewer.splits["train"]) == 10
    assert fewer.fingerprint != task.fingerprint


def test_bytes_lists_and_the_hubs_dicts_are_read(tmp_path: Path) -> None:
    cells: dict[str, list[Any]] = {
        "bytes": [png(n) for n in range(30)],
        "hub": [{"bytes": png(n), "path": None} for n in range(30)],
    }
    found = []
    for name, column in cells.items():
        path = tmp_path / f"{name}.parquet"
        told = [[f"a {n}", f"b {n}"] for n in range(30)]
        pq.write_table(pa.table({"image": column, "captions": told}), path)
        found.append(Task.load(path, image="image", text="captions"))
    assert found[0].fingerprint == found[1].fingerprint
    assert sum(map(len, found[0].splits.values())) == 60


def test_a_tar_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(30):
            for name, content in (
                (f"set/{number:03}.png", png(number)),
                (f"set/{number:03}.txt", f"caption {number}\n".encode()),
                (f"set/{number:03}.json", b"{}"),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    task = Task.load(path, image="image", text="text")
    told = sorted(e.texts[0] for rows in task.splits.values() for e in rows)
    assert told == sorted(f"caption {n}" for n in range(30))
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("set/x.png"), io.BytesIO())
    with pytest.raises(TaskError, match=r"set/x has no caption"):
        Task.load(path, image="image", text="text")
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("large.png")
        member.size = 2**33
        path_header = member.tobuf()
    path.write_bytes(path_header + bytes(2048))
    with pytest.raises(TaskError, match=r"large\.png says that it has 8,589,934,592 bytes"):
        Task.load(path, image="image", text="text")
    path.write_bytes(b"no tar file")
    with pytest.raises(TaskError, match="can't be read as tar"):
        Task.load(path, image="image", text="text")


@pytest.mark.parametrize(("ending", "what"), [("JPG", "image"), ("caption", "text")])
def test_a_tar_file_with_two_of_one_name(tmp_path: Path, ending: str, what: str) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name, content in (("1.png", png(1)), ("1.txt", b"a"), (f"1.{ending}", png(2))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(TaskError, match=rf"1\.{ending} is a second {what} of 1, expected one"):
        Task.load(tmp_path / "shard.tar", image="image", text="text")


def test_what_is_left_out_is_counted_and_said(tmp_path: Path) -> None:
    names = noise(tmp_path)
    (tmp_path / names[0]).write_bytes(b"torn")
    (tmp_path / names[1]).write_bytes(moving())
    rows = [(name, "" if n in (2, 3) else f"caption {n}") for n, name in enumerate(names)]
    said = "1 for animated picture, 1 for corrupt picture, 2 for empty caption"
    with pytest.warns(UserWarning, match=said):
        task = load(table(tmp_path, rows))
    assert task.provenance.endswith(f"left out {said}")
    assert sum(map(len, task.splits.values())) == 26


@pytest.mark.parametrize(
    ("rows", "options", "kind", "message"),
    [
        ([("gone.png", "a")], {}, TaskError, "gone.png .* can't be read"),
        ([("", "a")], {}, TaskError, "row 1: column 'file' holds ''"),
        ([("pictures/0.png", "a")], {"image": "fil"}, MissingColumn, "no column 'fil'"),
        ([("pictures/0.png", "a")], {"label": "x"}, SettingError, "image='file' and label='x'"),
        ([("pictures/0.png", "a")], {"text": "caption,other"}, SettingError, "two columns beside"),
        ([("pictures/0.png", "a")], {"form": "summary"}, SettingError, "names its columns itself"),
        ([(f"pictures/{n}.png", "a") for n in range(4)], {}, BadSplit, "one picture"),
        ([], {}, BadSplit, "has no examples"),
    ],
)
def test_bad_tables_are_refused(
    tmp_path: Path,
    rows: list[tuple[str, str]],
    options: dict[str, Any],
    kind: type[HowfineError],
    message: str,
) -> None:
    noise(tmp_path)
    with pytest.raises(kind, match=message):
        load(table(tmp_path, rows), **options)


def test_pictures_stand_in_all_examples_or_in_none() -> None:
    some = captioned_task().splits["train"]
    splits = {s: [*some, Example(("w1",))] for s in ("train", "dev", "test")}
    with pytest.raises(TaskError, match="without a picture"):
        Task("x", splits, (), "mean_recall", "")


def test_an_empty_cell_of_a_table_is_an_empty_caption() -> None:
    tables = {"train": {"i": [png(n) for n in range(30)], "t": [None, *map(str, range(29))]}}
    with pytest.warns(UserWarning, match="1 for empty caption"):
        found = captions.found(tables, {"train": "x"}, ("i", "t"), "x", "", 0)
    assert sum(map(len, found.splits.values())) == 29


def test_unknown_sets_of_pictures(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="Did you mean 'img/flickr8k'"):
        Task.load("img/flickr8", data=tmp_path)
    with pytest.raises(TaskError, match="there is no folder"):
        Task.load("img/flickr8k", data=tmp_path)


# --- retrieval -----------------------------------------------------------------------------------


def by_loops(images_: np.ndarray, texts: np.ndarray, owner: list[int]) -> dict[str, float]:
    """Recall both ways, one pair after the other."""
    found = {}
    for k in (1, 5, 10):
        hits = 0
        for text, own in zip(texts, owner, strict=True):
            mine = images_[own] @ text
            rivals = sum(i != own and image @ text >= mine for i, image in enumerate(images_))
            hits += rivals < k
        found[f"text_to_image_r{k}"] = hits / len(texts)
        hits = 0
        for number, image in enumerate(images_):
            best = max(image @ t for t, own in zip(texts, owner, strict=True) if own == number)
            rivals = sum(
                own != number and image @ t >= best for t, own in zip(texts, owner, strict=True)
            )
            hits += rivals < k
        found[f"image_to_text_r{k}"] = hits / len(images_)
    return found


@pytest.mark.parametrize("block", [2**24, 50])
def test_recall_is_that_of_plain_loops(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_BLOCK", block)
    rng = np.random.default_rng(0)
    owner = [0, 0, 0, 1, 2, 2, 3, *range(4, 20), 19, 7]
    images_ = rng.integers(-2, 3, (20, 6)).astype(np.float32)  # whole numbers: ties are ties
    texts = images_[owner] + rng.integers(-2, 3, (len(owner), 6)).astype(np.float32)
    vectors = np.concatenate([images_[owner], texts], axis=1)
    order = rng.permutation(len(owner))
    predictions = retrieval.as_objects(vectors[order])
    targets = np.asarray(owner)[order] * 1000 + 7
    expected = by_loops(images_, texts, owner)
    for name, value in expected.items():
        assert METRICS[name].function(predictions, targets) == pytest.approx(value), name
    mean = METRICS["mean_recall"].function(predictions, targets)
    assert mean == pytest.approx(np.mean(list(expected.values())))
    found = METRICS["mean_recall"].statistics
    assert found is not None
    whole = found(predictions, targets)
    assert METRICS["mean_recall"].resampled(whole[None])[0] == pytest.approx(mean)


def test_captions_of_one_picture_are_drawn_together() -> None:
    """Each caption five times says nothing more: no interval may be narrower for it."""
    rng = np.random.default_rng(1)
    shown = rng.normal(size=(60, 8)).astype(np.float32)
    texts = shown + 1.2 * rng.normal(size=shown.shape).astype(np.float32)
    once, owner = np.concatenate([shown, texts], axis=1), np.arange(60)
    for name in ("text_to_image_r1", "text_to_image_r5", "image_to_text_r1"):
        found = [
            bootstrap_interval(
                METRICS[name], [retrieval.as_objects(np.repeat(once, n, 0))], np.repeat(owner, n)
            )
            for n in (1, 5)
        ]
        assert found[0] == pytest.approx(found[1]), name
        assert found[0][1] - found[0][0] > 0.1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("width", "count"), [(64, 1000), (256, 200), (8, 12)])
def test_one_point_for_all_finds_nothing(width: int, count: int, seed: int) -> None:
    """Whatever the rounding of its sums."""
    point = np.random.default_rng(seed).normal(size=2 * width).astype(np.float32)
    same = retrieval.as_objects(np.tile(point / 0.07**0.5, (count, 1)))
    assert METRICS["text_to_image_r10"].function(same, np.arange(count)) == 0.0
    assert METRICS["mean_recall"].function(same, np.arange(count)) == 0.0


# --- an aligned pair in use ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two towers, captions of pictures of noise, and a delta that aligns them."""
    folder = tmp_path_factory.mktemp("aligned")
    base_folder(folder)
    tiny_tower("vit").save_pretrained(folder / "vit")
    names = noise(folder, 12)
    rows = [(name, " ".join(WORDS[5 * n : 5 * n + 4])) for n, name in enumerate(names)]
    for split in ("train", "dev", "test"):
        (folder / "task").mkdir(exist_ok=True)
        table(folder / "task", [(f"../{name}", text) for name, text in rows], f"{split}.csv")
    done = howfine_here(
        "align", *made(folder), "--max-steps", 120, "--learning-rate", 3e-3, "--json"
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["score"]["value"] > 0.9
    return folder


def made(folder: Path) -> list[object]:
    towers = ["--image-base", folder / "vit", "--text-base", folder / "bert"]
    columns = ["--task", folder / "task", "--image", "file", "--text", "caption"]
    small = ["--width", 16, "--max-length", 16, "--batch-size", 12, "--recipe", "align-full"]
    quiet = ["--augment", "false", "--out", folder / "x.delta.safetensors"]
    return [*towers, *columns, *small, *quiet]


def test_search_finds_the_picture_and_keeps_an_index(aligned: Path, tmp_path: Path) -> None:
    delta, folder = aligned / "x.delta.safetensors", aligned / "pictures"
    asked = [" ".join(WORDS[5 * n : 5 * n + 4]) for n in range(12)]
    first = search(delta, asked, folder, cache=tmp_path, top=3)
    best = [Path(hits[0]["path"]).name for hits in first.hits]
    assert sum(name == f"{n}.png" for n, name in enumerate(best)) >= 10
    assert (first.pictures, first.encoded, first.left_out) == (12, 12, {})
    scores = [hit["similarity"] for hit in first.hits[0]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert scores[0] <= 1.0001
    again = search(delta, asked, folder, cache=tmp_path, top=3)
    assert again.encoded == 0
    assert again.hits == first.hits
    assert len(list(tmp_path.iterdir())) == 2


def test_an_index_follows_its_folder(aligned: Path, tmp_path: Path) -> None:
    delta, folder = aligned / "x.delta.safetensors", tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for number in range(4):
        (folder / "deeper" / f"{number}.PNG").write_bytes(png(number))
    (folder / "note.txt").write_text("no picture")
    (folder / "bad.jpg").write_bytes(b"torn")
    (folder / "moves.gif").write_bytes(moving())

    def run() -> Any:
        return search(delta, ["w1"], folder, cache=tmp_path / "cache", top=9)

    found = run()
    assert (found.pictures, found.encoded) == (4, 4)
    assert found.left_out == {"corrupt picture": 1, "animated picture": 1}
    (folder / "deeper" / "0.PNG").unlink()
    (folder / "deeper" / "1.PNG").write_bytes(png(9, 10))
    (folder / "bad.jpg").write_bytes(png(8))
    found = run()
    assert (found.pictures, found.encoded) == (4, 2)
    assert found.left_out == {"animated picture": 1}
    assert run().encoded == 0
    for path in (tmp_path / "cache").iterdir():  # a torn index is made anew
        path.write_bytes(path.read_bytes()[:-3])
    assert run().encoded == 4
    (table,) = (tmp_path / "cache").glob("*.json")
    told = json.loads(table.read_text())
    for other in (5, [], {"paths": 5}, {**told, "faults": 1}, {**told, "states": {"x": 1}}):
        table.write_text(json.dumps(other))
        assert run().encoded == 4
        assert json.loads(table.read_text())["states"] == told["states"]
    whole = {hit["path"]: hit["similarity"] for hit in run().hits[0]}
    fresh = search(delta, ["w1"], folder, cache=tmp_path / "other", top=9)
    assert {hit["path"]: hit["similarity"] for hit in fresh.hits[0]} == pytest.approx(whole)


def test_search_from_the_command_line(aligned: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    page = tmp_path / "grid.html"
    given = ["--delta", aligned / "x.delta.safetensors", "--images", aligned / "pictures"]
    found = howfine_here("search", "w1 w2 <b>", "w5 w6", *given, "--top", 2, "--page", page)
    assert found.code == 0, found.err
    assert found.out.splitlines()[0] == "w1 w2 <b>"
    assert "12 pictures, 12 of them encoded now" in found.out
    html = page.read_text()
    assert html.count("data:image/jpeg;base64,") == 4
    assert "w1 w2 &lt;b&gt;" in html
    assert "http" not in html
    told = json.loads(howfine_here("search", "w1", *given, "--json").out)
    assert told["encoded"] == 0
    assert len(told["hits"][0]) == 10


def test_zero_shot_classes(aligned: Path) -> None:
    delta = aligned / "x.delta.safetensors"
    names = [" ".join(WORDS[5 * n : 5 * n + 4]) for n in range(12)]
    shown = [Picture(str(n), png(n)) for n in range(12)]
    found = classify(delta, shown, names, prompts=("{}", "{} {}"))
    assert sum(each["index"] == n for n, each in enumerate(found)) >= 10
    assert all(names[each["index"]] == each["name"] for each in found)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda d, p: search(d, ["a"], p / "nowhere"), "no folder"),
        (lambda d, p: search(d, ["a"], p), "has no pictures"),
        (lambda d, p: search(d, [" "], d.parent / "pictures", cache=p / "c"), "text 1 is empty"),
        (lambda d, p: search(d, ["a"], d.parent / "pictures", top=0), "top is 0"),
        (lambda d, p: search(d, "a", d.parent / "pictures"), "several queries"),
        (lambda d, p: classify(d, [], "cat"), "several names"),
        (lambda d, p: search(d, [], d.parent / "pictures", cache=p / "c"), "nothing to encode"),
        (lambda d, p: classify(d, [], ["cat"]), "expected two or more"),
        (lambda d, p: classify(d, [], ["cat", "cat"]), "all different"),
        (lambda d, p: classify(d, [], ["cat", ""]), "none of them empty"),
        (lambda d, p: classify(d, [], ["cat", "dog"], prompts=("a",)), "expected {} in each"),
        (
            lambda d, p: classify(d, [Picture("m", moving())], ["cat", "dog"]),
            "m can't be used: animated picture",
        ),
    ],
)
def test_bad_questions(
    aligned: Path, tmp_path: Path, run: Callable[[Path, Path], object], message: str
) -> None:
    with pytest.raises(HowfineError, match=message):
        run(aligned / "x.delta.safetensors", tmp_path)


def test_only_what_aligns_can_be_asked(tmp_path: Path, aligned: Path) -> None:
    from howfine.delta import Delta
    from howfine.method import method
    from tiny import fit_a_little

    base = tiny_base("bert")
    fitted = fit_a_little(base, method("full"))
    delta = fitted.delta()
    fitted.change.remove()
    with pytest.raises(SettingError, match="not trained to align"), encoder(delta, base):
        pass
    names = Delta.load(aligned / "x.delta.safetensors").base_name
    assert names == f"{aligned / 'vit'}+{aligned / 'bert'}"
    assert Base.load(names, kind="two_towers").parts["image"].preprocessing == {}
    done = howfine_here("align", *made(aligned)[:3], aligned / "vit", *made(aligned)[4:])
    assert done.code == 2
    assert "encoder of images" in done.err


# --- image towers of models of two ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_the_image_tower_of_a_model_of_two(name: str, tmp_path: Path) -> None:
    import transformers

    stack = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    wide = {**stack, "hidden_size": 8}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(
        text_config={**wide, "vocab_size": 20, **ids},
        vision_config={**wide, "image_size": 8, "patch_size": 4},
    )
    torch.manual_seed(0)
    whole = getattr(transformers, f"{name}Model")(config).eval()
    whole.save_pretrained(tmp_path)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 8, "width": 8}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    base = Base.load(str(tmp_path), kind="image_body")
    assert base.tower_name == "image"
    assert base.depth == 2
    assert base.pooling == "pooler"
    assert base.preprocessing["image_std"] == [0.25] * 3
    assert len(base.choose(("matrices",))) == 12
    values = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = whole.vision_model(values).pooler_output
        assert torch.allclose(base.tower(values).pooler_output, expected, atol=1e-6)
    assert base.is_untouched()
