"""Pictures with captions by name, from a folder of Parquet files; a new set is a row of SETS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from howfine.errors import TaskNotFound, near
from howfine.tasks import Found, files
from howfine.tasks.wanted import Wanted

COLLECTION = "img"


@dataclass(frozen=True)
class ImageSet:
    """Where a set is read from, and its columns of pictures and of captions."""

    folder: str
    image: str
    captions: str


# Flickr8k (Hodosh, Young & Hockenmaier 2013): of a thousand pictures, by its own splits.
SETS = {"flickr8k": ImageSet("imgtext/flickr8k_1k", "jpeg", "captions")}


def names() -> list[str]:
    """All sets by name."""
    return [f"{COLLECTION}/{name}" for name in SETS]


def known(name: str) -> bool:
    """Whether a name is of this collection."""
    return name.startswith(f"{COLLECTION}/")


def read(name: str, data: Path | None) -> Found:
    """A set by name. Raises TaskNotFound with the near name, or where there is no such folder."""
    short = name.removeprefix(f"{COLLECTION}/")
    if short not in SETS:
        raise TaskNotFound(f"task {name!r} is unknown. {near(name, names())}")
    found = SETS[short]
    folder = files.named(name, data) / found.folder
    if not folder.is_dir():
        raise TaskNotFound(f"task {name!r}: there is no folder {folder}; name another --data")
    return files.read(folder, Wanted(text=(found.captions,), image=found.image))
