"""Pictures: where their bytes are, what they look like as numbers, and which can't be used."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from howfine.errors import SettingError, TaskError

# Endings that a folder of pictures is searched for.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Decoded pictures are kept in memory up to so many bytes, those used last.
KEPT_BYTES = 2**29
# Checked at about this size, which a JPEG decodes at a fraction of the whole's time.
_GLANCE = (32, 32)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """An image file, or its bytes."""

    # For messages, and to show: a path, or a source and a row.
    name: str
    content: Path | bytes = field(repr=False)

    def read(self) -> bytes:
        """The file's bytes. Raises TaskError where there is no file to read."""
        if isinstance(self.content, bytes):
            return self.content
        try:
            return self.content.read_bytes()
        except OSError as error:
            raise TaskError(
                f"picture {self.name} can't be read: {error.strerror}; correct its path"
            ) from error

    @cached_property
    def digest(self) -> int:
        """63 bits of the SHA-256 over the bytes: equal pictures are one, whatever their names."""
        return int.from_bytes(hashlib.sha256(self.read()).digest()[:8], "big") >> 1

    def open(self) -> Any:
        """A Pillow image in RGB, upright, on white where it is transparent.

        Raises TaskError for bytes that Pillow can't decode to the end.
        """
        image, reason = _opened(self.read())
        if image is None:
            raise TaskError(
                f"picture {self.name} can't be used: {reason}; get another copy, or take it out"
            )
        return image


def fault(picture: Picture) -> str:
    """Why a picture can't be used, in two words; "" for one that can.

    A moving picture has several images, and nothing says which of them its caption is about.
    Raises TaskError where there is no file.
    """
    return _opened(picture.read(), _GLANCE)[1]


def _opened(content: bytes, glance: tuple[int, int] | None = None) -> tuple[Any, str]:
    """(the picture, "") or (None, why it can't be used); with `glance` at about that size."""
    pillow = _pillow()
    try:
        with pillow.Image.open(io.BytesIO(content)) as opened:
            # A camera's MPO is one picture, with others of the same scene for other uses.
            if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:
                return None, "animated picture"
            if glance:
                opened.draft("RGB", glance)
            opened.load()
            return _shown(opened), ""
    except MemoryError:
        raise
    except Exception:  # Pillow's readers raise whatever their bytes make them raise
        return None, "corrupt picture"


def _shown(opened: Any) -> Any:
    """In RGB, upright, on white where it is transparent; of 16 bits the higher eight."""
    pillow = _pillow()
    try:
        image = pillow.ImageOps.exif_transpose(opened)
    except Exception:  # what a camera noted is damaged, which says nothing of the picture
        image = opened
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        whole = 65_535.0 if image.mode.startswith("I") else max(1.0, float(values.max()))
        image = pillow.Image.fromarray((255 * values.clip(0, whole) / whole).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = pillow.Image.alpha_composite(pillow.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _pillow() -> Any:
    """The package, with the modules that are used here."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise SettingError(
            "pictures are read with pillow, which is not installed; run "
            "`pip install howfine[images]`"
        ) from error
    return PIL


class _Decoded:
    """Pictures decoded before, by digest and size; the least recently used go first."""

    def __init__(self) -> None:
        self.held: OrderedDict[tuple[int, int], Pixels] = OrderedDict()
        self.bytes = 0

    def get(self, picture: Picture, size: int) -> Pixels:
        key = (picture.digest, size)
        if key in self.held:
            self.held.move_to_end(key)
            return self.held[key]
        made = self.held[key] = _decode(picture, size)
        self.bytes += made.nbytes
        while self.bytes > KEPT_BYTES:
            self.bytes -= self.held.popitem(last=False)[1].nbytes
        return made


_DECODED = _Decoded()


def _decode(picture: Picture, size: int) -> Pixels:
    image = picture.open().resize((size, size), _pillow().Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def pixels(pictures: Sequence[Picture], size: int) -> Pixels:
    """(n, 3, size, size) values from 0 to 255: each picture whole, its sides made equal."""
    return np.stack([_DECODED.get(picture, size) for picture in pictures])
