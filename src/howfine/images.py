"""Pictures: where their bytes are, what they look like as numbers, and which can't be used."""

from __future__ import annotations

import hashlib
import io
import threading
import warnings
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
# More than any camera's picture of today (about 100 million), at 4 bytes each in memory and in
# each copy. It is read off the file's first bytes, before the rest is decoded.
MOST_PIXELS = 2**27
_OVERSIZED = "oversized picture"
# Numbers of wide pixels are computed with so many at a time.
_BLOCK = 2**20
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

        Raises TaskError for bytes that Pillow can't decode to the end, and for too many pixels.
        """
        image, reason = _opened(self.read())
        if image is None:
            how = "get another copy"
            if reason == _OVERSIZED:
                how = f"make it one of at most {MOST_PIXELS:,} pixels"
            raise TaskError(f"picture {self.name} can't be used: {reason}; {how}, or take it out")
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
        with _unread(content) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                return None, _OVERSIZED
            # A camera's MPO is one picture, with others of the same scene for other uses.
            if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:
                return None, "animated picture"
            if glance:
                opened.draft("RGB", glance)
            opened.load()
            return _shown(opened), ""
    except MemoryError:
        raise
    except pillow.Image.DecompressionBombError:  # of still more pixels
        return None, _OVERSIZED
    except Exception:  # Pillow's readers raise whatever their bytes make them raise
        return None, "corrupt picture"


def _unread(content: bytes) -> Any:
    """A picture of which the first bytes alone are read.

    Pillow warns of some of the pictures that are taken here.
    """
    pillow = _pillow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pillow.Image.DecompressionBombWarning)
        return pillow.Image.open(io.BytesIO(content))


def _shown(opened: Any) -> Any:
    """In RGB, upright, on white where it is transparent; of 16 bits the higher eight."""
    pillow = _pillow()
    try:
        image = pillow.ImageOps.exif_transpose(opened)
    except Exception:  # what a camera noted is damaged, which says nothing of the picture
        image = opened
    if image.mode.startswith(("I", "F")):
        image = pillow.Image.fromarray(_eight_bits(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = pillow.Image.alpha_composite(pillow.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Any) -> npt.NDArray[np.uint8]:
    """(height, width) of a grey picture of 16 or 32 bits, which is never held wider than it is."""
    width, height = image.size
    made = np.empty((height, width), np.uint8)
    rows = max(1, _BLOCK // width)
    whole = max(1.0, image.getextrema()[1]) if image.mode.startswith("F") else None
    for top in range(0, height, rows):
        values = np.asarray(image.crop((0, top, width, min(top + rows, height))))
        if whole is None:
            made[top : top + rows] = values.clip(0, 65_535) // 257
        else:
            made[top : top + rows] = 255 * values.astype(np.float64).clip(0, whole) / whole
    return made


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
    """Pictures decoded before, by digest and size; the least recently used go first.

    Threads share it: it is looked into and changed by one at a time, and any number decode.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.held: OrderedDict[tuple[int, int], Pixels] = OrderedDict()
        self.bytes = 0

    def get(self, picture: Picture, size: int) -> Pixels:
        key = (picture.digest, size)
        with self._lock:
            if key in self.held:
                self.held.move_to_end(key)
                return self.held[key]
        made = _decode(picture, size)
        with self._lock:
            if key not in self.held:  # another thread may have been as slow
                self.held[key] = made
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
