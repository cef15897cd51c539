"""Checkpoints read a chunk at a time, so that a measurement never holds a whole model.

Safetensors files are read with plain file reads rather than a memory map: mapped pages count as
resident memory until the system takes them back. Importing this module needs numpy only; torch is
imported for torch tensors and `.bin` files.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from howfine.errors import BaseError, BaseNotFound, near

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
CHUNK = 4_000_000  # entries: 16 MB of float32

# safetensors dtype code -> how its entries lie in the file; BF16 is the upper half of a float32.
_KINDS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8", "BOOL": "?"}
_KINDS |= {f"{kind.upper()}{8 * size}": f"<{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}
_WIDE = ("F64", "I32", "U32", "I64", "U64")  # what float32 can't hold exactly
# The order in which transformers itself looks for weights in a folder.
_IN_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HEADER_LIMIT = 100_000_000  # bytes, the format's own limit


class Source(Protocol):
    """Named tensors that can be read a chunk at a time."""

    def names(self) -> list[str]:
        """Names of all tensors, in the source's own order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor; () for a scalar."""

    def dtype(self, name: str) -> str:
        """Stored type, as a safetensors code: "F32", "BF16", "I64" …"""

    def chunks(self, name: str, entries: int = CHUNK) -> Iterator[Array]:
        """The entries in row-major order: 1-D arrays of `entries` entries, the last one shorter.

        float32, and float64 where float32 would round (F64 and integers of 32 bits or more).
        """


class _SafetensorsFile:
    """One safetensors file, its header checked against its size.

    Raises BaseNotFound where there is no such file and BaseError for one whose header is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _read_header(path)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1]

    def dtype(self, name: str) -> str:
        return self._tensors[name][0]

    def chunks(self, name: str, entries: int = CHUNK) -> Iterator[Array]:
        code, shape, offset = self._tensors[name]
        if code not in _KINDS:
            raise BaseError(
                f"{self.path}: tensor {name!r} has type {code}, expected one of "
                f"{', '.join(_KINDS)}. Save the model in float32 or bfloat16 first."
            )
        left = math.prod(shape)
        while left:
            raw = np.fromfile(self.path, _KINDS[code], min(entries, left), offset=offset)
            if raw.size < min(entries, left):
                raise BaseError(
                    f"{self.path}: ended inside tensor {name!r}: the file became shorter while "
                    "it was read. Let the writer finish, or fetch the file again."
                )
            offset += raw.nbytes
            left -= raw.size
            if code == "BF16":
                yield (raw.astype("u4") << 16).view("f4")
            else:
                yield raw.astype("f8" if code in _WIDE else "f4", copy=False)


class MemorySource:
    """A mapping of torch tensors (a state dict) as a Source. A strided tensor is copied whole."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        """Keys of the mapping."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor; () for a scalar."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        """As Source.dtype, by the tensor's own type."""
        kind = str(self._tensors[name].dtype).removeprefix("torch.").replace("float", "f")
        return kind.replace("int", "i").replace("ui", "u").upper()  # "bfloat16" -> "BF16"

    def chunks(self, name: str, entries: int = CHUNK) -> Iterator[Array]:
        """As Source.chunks. Raises BaseError for a type that holds no plain numbers."""
        import torch

        code = self.dtype(name)
        if code not in _KINDS:
            raise BaseError(
                f"tensor {name!r} has type {code}, expected one of {', '.join(_KINDS)}. "
                "Convert the model to float32 or bfloat16 first."
            )
        kind = torch.float64 if code in _WIDE else torch.float32
        flat = self._tensors[name].detach().reshape(-1)
        for start in range(0, flat.numel(), entries):
            yield flat[start : start + entries].to("cpu", kind).numpy()


class Checkpoint:
    """A model's weights on disk, in one file or in shards."""

    def __init__(self, path: Path, files: Mapping[str, Source]) -> None:
        self.path = path
        self._files = files  # tensor name -> the file that holds it

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """A Hugging Face folder, a `.safetensors` or `.bin` file, or a shard index (`.json`).

        Raises BaseNotFound where there is nothing to read, BaseError for a damaged file.
        """
        path = Path(path)
        file = _weights_in(path) if path.is_dir() else path
        if not file.is_file():
            raise BaseNotFound(
                f"{file}: no such file or folder. Expected a folder with one of "
                f"{', '.join(_IN_FOLDER)}, or such a file; download a hub model to a folder first."
            )
        if file.suffix == ".json":
            return cls(path, _read_index(file))
        source = _read_file(file)
        return cls(path, dict.fromkeys(source.names(), source))

    def names(self) -> list[str]:
        """Names of all tensors, in file order."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor; raises BaseError for an unknown name, as all lookups do."""
        return self._file(name).shape(name)

    def dtype(self, name: str) -> str:
        """Stored type, as a safetensors code: "F32", "BF16", "I64" …"""
        return self._file(name).dtype(name)

    def numel(self, name: str) -> int:
        """Number of entries of one tensor."""
        return math.prod(self.shape(name))

    def chunks(self, name: str, entries: int = CHUNK) -> Iterator[Array]:
        """As Source.chunks; one chunk is held at a time (torch maps a `.bin` file instead)."""
        return self._file(name).chunks(name, entries)

    def _file(self, name: str) -> Source:
        if name not in self._files:
            raise BaseError(f"{self.path}: no tensor {name!r}. {near(name, self._files)}")
        return self._files[name]


def _weights_in(folder: Path) -> Path:
    for name in _IN_FOLDER:
        if (folder / name).is_file():
            return folder / name
    raise BaseNotFound(
        f"{folder}: no weights in this folder; expected one of {', '.join(_IN_FOLDER)}. "
        "Save the model there with save_pretrained."
    )


def _read_file(file: Path) -> Source:
    if file.suffix == ".safetensors":
        return _SafetensorsFile(file)
    if file.suffix == ".bin":
        return _read_bin(file)
    raise BaseError(
        f"{file}: expected .safetensors, .bin or a shard index (.json). "
        "Save the model with save_pretrained."
    )


def _read_bin(file: Path) -> Source:
    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise BaseError(
            f"{file}: torch can't read it as plain weights ({str(error).partition(chr(10))[0]}). "
            "Fetch the file again, or save the model as safetensors."
        ) from error
    if not isinstance(state, dict):
        raise BaseError(
            f"{file}: holds a {type(state).__name__}, expected a state dict. "
            "Save the model with save_pretrained."
        )
    return MemorySource({k: v for k, v in state.items() if isinstance(v, torch.Tensor)})


def _read_index(file: Path) -> dict[str, Source]:
    """Tensor name -> its shard's Source, from a Hugging Face shard index."""
    try:
        shard_of = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(shard_of.values()))
        plain = all(Path(shard).name == shard for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"not a shard index with a weight_map ({error})") from error
    if not plain:  # an index must not reach outside its own folder
        raise _damaged(file, "its weight_map names files outside the folder")
    missing = [shard for shard in shards if not (file.parent / shard).is_file()]
    if missing:
        raise BaseNotFound(
            f"{file.parent}: shard {missing[0]} is missing ({len(missing)} of {len(shards)} "
            "shards). Fetch the checkpoint again."
        )
    sources = {shard: _read_file(file.parent / shard) for shard in shards}
    held = {shard: set(source.names()) for shard, source in sources.items()}
    for name, shard in shard_of.items():
        if name not in held[shard]:
            raise _damaged(file, f"says tensor {name!r} is in {shard}, but it is not")
    return {name: sources[shard] for name, shard in shard_of.items()}


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name -> (dtype code, shape, offset in the file), every claim checked against the size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise _damaged(path, f"claims a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        return {
            name: _checked(path, name, entry, start=8 + length, size=size)
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header is not a table of tensors ({error})") from error


def _checked(
    path: Path, name: str, entry: dict[str, Any], *, start: int, size: int
) -> tuple[str, tuple[int, ...], int]:
    code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    sizes = (*shape, begin, end)
    # bool is an int to Python, but not to the format; 64 is the most axes an array can have.
    if len(shape) > 64 or not all(type(number) is int and number >= 0 for number in sizes):
        raise _damaged(path, f"tensor {name!r} has a shape or offsets that are no sizes")
    if not begin <= end <= size - start:
        raise _damaged(
            path, f"tensor {name!r} lies at bytes {begin} to {end} of {size - start} data bytes"
        )
    if code in _KINDS and math.prod(shape) * np.dtype(_KINDS[code]).itemsize != end - begin:
        raise _damaged(
            path, f"tensor {name!r} of shape {list(shape)} and type {code} has {end - begin} bytes"
        )
    return str(code), shape, start + begin


def _damaged(file: Path, what: str) -> BaseError:
    return BaseError(f"{file}: damaged: {what}. Fetch or save the file again.")
