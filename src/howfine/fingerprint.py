"""SHA-256 fingerprints: of files (cached by their state on disk) and of a model's tensors.

What a model computes hangs on its config too, which no fingerprint here holds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn


def of_parameters(model: nn.Module) -> str:
    """Fingerprint of a model's parameters; tied ones count once. See `of_tensors`."""
    return of_tensors(dict(model.named_parameters()))


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over (path, shape, float32 bytes) of every tensor, sorted by path.

    Half-precision values are hashed as the float32 they equal, so a checkpoint has one
    fingerprint in whatever format it is stored.
    """
    return of_chunks(
        (path, tuple(parameter.shape), [_values(parameter)])
        for path, parameter in sorted(tensors.items())
    )


def of_chunks(
    tensors: Iterable[tuple[str, tuple[int, ...], Iterable[npt.NDArray[Any]]]],
) -> str:
    """`of_tensors` of (path, shape, float32 chunks in row-major order), sorted by path."""
    digest = hashlib.sha256()
    for path, shape, chunks in tensors:
        digest.update(f"{path}{shape}".encode())
        for chunk in chunks:
            digest.update(np.ascontiguousarray(chunk, np.float32).data)
    return digest.hexdigest()


def _values(parameter: Tensor) -> npt.NDArray[Any]:
    return parameter.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()


def of_text(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def of_path(path: Path) -> str:
    """SHA-256 of a file, or of the weight files in a folder; "" where there is neither."""
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf"))
        named = "".join(f"{file.name}:{of_file(file)}\n" for file in files)
        return of_text(named)
    return of_file(path) if path.is_file() else ""


def of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, cached under the file's state: see `_state`."""
    key = f"{path.resolve()}|{_state(path)}"
    cache = _cache_file()
    known = _read_cache(cache)
    if key not in known:
        with path.open("rb") as stream:
            known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        _write_cache(cache, known)
    return known[key]


def cached(folder: str, kind: str) -> str | None:
    """A fingerprint remembered for a folder whose files have not changed since."""
    return _read_cache(_cache_file()).get(_folder_key(folder, kind))


def remember(folder: str, kind: str, fingerprint: str) -> None:
    """Keep a folder's fingerprint for `cached`."""
    known = _read_cache(_cache_file())
    _write_cache(_cache_file(), {**known, _folder_key(folder, kind): fingerprint})


def _folder_key(folder: str, kind: str) -> str:
    """Path, kind, and name and state of every file."""
    path = Path(folder).resolve()
    found = (file for file in sorted(path.iterdir()) if file.is_file())
    files = ";".join(f"{file.name}:{_state(file)}" for file in found)
    return f"{path}|{kind}|{hashlib.sha256(files.encode()).hexdigest()[:16]}"


def _state(path: Path) -> str:
    """Size, inode, and times of the last change to a file's bytes and to anything of it.

    The modification time alone can be set to what it was (cp -p, rsync, tar); the other one can't.
    """
    found = path.stat()
    return f"{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}:{found.st_ino}"


def cache_folder() -> Path:
    """Where what can be computed again is kept for this user."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "howfine"


def _cache_file() -> Path:
    return cache_folder() / "sha256.json"


def _read_cache(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # no cache yet, or a torn one: hash again
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _write_cache(path: Path, known: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(known))
        temporary.replace(path)
    except OSError:  # a read-only home costs a second hash, nothing else
        return
