"""A base and what was tuned from it, tensor by tensor, under the base's paths.

Both are streamed from disk where their names are those of the model; otherwise transformers, which
knows how old checkpoints are renamed, loads them. Of a base that is only streamed there is an
outline: names, shapes and anatomy without weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from howfine import container, lora, pretrained
from howfine import fingerprint as fp
from howfine.base import Base
from howfine.checkpoint import Checkpoint, MemorySource, Source
from howfine.delta import Delta, only_weights
from howfine.errors import BaseError, BaseNotFound
from howfine.head import Answer, answer_of, head_in, left_out, no_answer
from howfine.sources import Named, Patched
from howfine.start import weight_at

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Pair:
    """`before` and `after` have a tensor for every path of `base`, which may be an outline."""

    base: Base
    before: Source
    after: Source
    answer: Answer
    # Float tensors of the tuned model that no part of the delta holds.
    left_out: tuple[str, ...] = ()

    def chunks(self, path: str) -> Iterator[tuple[Array, Array]]:
        """The two tensors at a path, as chunks of equal lengths."""
        before, after = self.before.chunks(path), self.after.chunks(path)
        for old, new in zip(before, after, strict=True):
            yield old.astype(np.float32, copy=False), new.astype(np.float32, copy=False)


def opened(before: str | Base, after: str | Path, *, loaded: bool, kind: str = "body") -> Pair:
    """The pair of a base (by name, folder or as it is) and a tuned checkpoint, adapter or delta.

    With `loaded`, the base has its weights. Raises BaseError for another architecture, vocabulary
    or number format, and for a damaged checkpoint; BaseNotFound; DeltaError and WrongBase;
    SettingError for a base that is in half precision in memory.
    """
    if isinstance(before, Base):
        before.check_exact("extracting a delta")
    path = Path(after)
    if container.is_delta(path):
        return _of_delta(before, Delta.load(path))
    base, source = _base(before, kind, loaded)
    if lora.is_adapter(path):
        return _of_adapter(base, source, path)
    if not path.exists():
        raise BaseNotFound(
            f"{path}: no such file or folder; expected a checkpoint, a folder with a PEFT adapter, "
            "or a delta file. Download a hub model to a folder first"
        )
    return _of_checkpoint(base, source, path)


def _base(before: str | Base, kind: str, loaded: bool) -> tuple[Base, Source]:
    if isinstance(before, str) and not loaded:
        found = _outlined(before, kind)
        if found is not None:
            return found
    base = before if isinstance(before, Base) else Base.load(before, kind=kind)
    return base, _Loaded(base)


class _Loaded(MemorySource):
    """A base in memory, with the number formats that its folder stores it in, where it has one."""

    def __init__(self, base: Base) -> None:
        super().__init__({path: base.original(path) for path in base.paths()})
        self._stored: dict[str, str] = {}
        folder = pretrained.embedded_path() if base.name == pretrained.EMBEDDED else base.name
        if Path(folder).is_dir():
            checkpoint = _checkpoint(folder)
            names = {} if checkpoint is None else _names_in(checkpoint, base)
            self._stored = {p: checkpoint.dtype(n) for p, n in names.items() if checkpoint}

    def stored(self, name: str) -> str:
        """The dtype on disk; "" where that is not known."""
        return self._stored.get(name, "")


def _checkpoint(folder: str) -> Checkpoint | None:
    try:
        return Checkpoint.open(folder)
    except (BaseError, BaseNotFound):  # such as a GGUF file, which transformers alone reads
        return None


def _outlined(name: str, kind: str) -> tuple[Base, Source] | None:
    """A base that is read from its folder as it goes; None where transformers must load it."""
    folder = pretrained.embedded_path() if name == pretrained.EMBEDDED else name
    if not Path(folder).is_dir():
        return None
    try:
        base = Base(name, pretrained.outline(folder, kind), kind=kind).checked()
        checkpoint = Checkpoint.open(folder)
    except MemoryError:
        raise
    except Exception:  # a folder is foreign input; loading it whole tells what is wrong with it
        return None
    names = _names_in(checkpoint, base)
    missing = [path for path in base.paths() if path not in names]
    if not _are_pooler(base, missing):
        return None
    shapes = _checked_shapes(base, checkpoint, names, folder)
    source = Named(checkpoint, names, shapes)
    found = fp.cached(folder, kind)
    if found is None:
        found = fp.of_chunks((p, shapes[p], source.chunks(p)) for p in sorted(shapes))
        fp.remember(folder, kind, found)
    base = Base(name, base.tower, kind=kind, fingerprint=found)
    base.settle_pooling(folder, [_inside(base, path) for path in missing])
    return base, source


def _inside(base: Base, path: str) -> str:
    return path.removeprefix(f"{base.tower_name}.")


def _are_pooler(base: Base, paths: list[str]) -> bool:
    """Whether these are parameters of the pooler, which a checkpoint may lack."""
    pooler = base.anatomy.pooler
    return all(pooler and _inside(base, path).startswith(pooler) for path in paths)


def _prefixes(base: Base) -> tuple[str, ...]:
    """What may stand before a parameter's path in the tower, in a model that the tower is part of.

    The last two are an encoder's in an encoder-decoder, with a head and without.
    """
    return ("", f"{base.tower.base_model_prefix}.", "encoder.", "model.encoder.")


def _names_in(source: Source, base: Base) -> dict[str, str]:
    """Path of the base -> the source's name for it, where it has one."""
    current = {}
    for name in source.names():  # checkpoints converted from TensorFlow say gamma and beta
        plain = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        current[re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", plain)] = name
    found: dict[str, str] = {}
    for prefix in ("", f"{base.tower.base_model_prefix}."):
        named = {path: prefix + _inside(base, path) for path in base.paths()}
        here = {path: current[name] for path, name in named.items() if name in current}
        found = max(found, here, key=len)
    return found


def _checked_shapes(
    base: Base, source: Source, names: Mapping[str, str], where: str | Path
) -> dict[str, tuple[int, ...]]:
    shapes = {path: tuple(base.parameter(path).shape) for path in base.paths()}
    for path, name in names.items():
        if source.shape(name) != shapes[path]:
            raise BaseError(
                f"{where}: {name} has shape {source.shape(name)}, where {base.name} has "
                f"{shapes[path]}: it is another architecture or vocabulary; give a model that was "
                "tuned from this base"
            )
    return shapes


def _of_checkpoint(base: Base, before: Source, path: Path) -> Pair:
    config = _config(path)
    theirs, ours = config.get("model_type"), base.config.model_type
    if theirs not in (None, ours):
        raise BaseError(
            f"{path} is a model of type {theirs}, the base {base.name} of type {ours}; give a "
            "model that was tuned from this base"
        )
    checkpoint = Checkpoint.open(path)
    names = _names_in(checkpoint, base)
    shapes = _checked_shapes(base, checkpoint, names, path)
    missing = [each for each in base.paths() if each not in names]
    if not _are_pooler(base, missing):
        return Pair(base, before, _loaded(base, path, missing), no_answer())
    _check_formats(base, before, checkpoint, names, path)
    after: Source = Named(checkpoint, names, shapes)
    if missing:
        after = Patched(before, after, set(names))
    used = set(names.values())
    outside = {n: n for n in checkpoint.names() if n not in used and _is_float(checkpoint.dtype(n))}
    answer = answer_of(base, config, {n: _whole(checkpoint, n) for n in head_in(outside, config)})
    return Pair(base, before, after, answer, left_out(outside, answer))


def _loaded(base: Base, path: Path, missing: list[str]) -> Source:
    """Weights whose names only transformers knows how to read."""
    if not path.is_dir():
        raise BaseError(
            f"{path} has no {_inside(base, missing[0])}, and {len(missing) - 1} more of the base's "
            f"{len(base.paths())} tensors are missing: it is another architecture, or a part of a "
            "model; give a model that was tuned from this base"
        )
    tower, _, _ = pretrained.read(str(path), base.kind, None)
    found = {f"{base.tower_name}.{name}": value for name, value in tower.named_parameters()}
    source = MemorySource(found)
    lost = [each for each in base.paths() if each not in found]
    if lost:
        raise BaseError(f"{path} has no {lost[0]}, which {base.name} has: another architecture")
    _checked_shapes(base, source, {each: each for each in base.paths()}, path)
    return source


def _check_formats(
    base: Base, before: Source, after: Source, names: Mapping[str, str], where: Path
) -> None:
    """Between two number formats the difference is mostly rounding."""
    for path, name in names.items():
        ours = before.stored(path) if isinstance(before, _Loaded) else before.dtype(path)
        theirs = after.dtype(name)
        if ours and ours != theirs:
            raise BaseError(
                f"{where}: {name} is stored as {theirs}, the base's as {ours}: what differs would "
                "be mostly rounding. Save both models in one number format first"
            )


def _of_adapter(base: Base, before: Source, folder: Path) -> Pair:
    paths = {_inside(base, path): path for path in base.paths()}
    turned = base.anatomy.linear_axes == ("in", "out")
    after = lora.Merged(folder, before, paths, turned, _prefixes(base))
    outside = after.outside
    head = {name: after.full(outside[name]) for name in head_in(outside, after.config)}
    answer = answer_of(base, {}, {name: torch.from_numpy(each) for name, each in head.items()})
    return Pair(base, before, after, answer, left_out(outside, answer))


def _of_delta(before: str | Base, delta: Delta) -> Pair:
    base = before if isinstance(before, Base) else Base.load(before, kind=delta.base_kind)
    with delta.changed(base) as head:  # which weights alone need not have
        only_weights(
            base,
            "and a difference of weights can't say what it does. Extract from a delta or a model "
            "that changes weights",
        )
        after = {path: weight_at(base, path).clone() for path in base.paths()}
    answer = no_answer()
    if head is not None:
        answer = Answer(delta.readout, delta.labels, delta.tensors(base)[1])
    source = MemorySource({path: base.original(path) for path in base.paths()})
    return Pair(base, source, MemorySource(after), answer)


def _config(path: Path) -> dict[str, Any]:
    """The config.json of a checkpoint; empty where there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        return dict(json.loads(file.read_text())) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise BaseError(f"{file} is no config of a model ({error}); save it again") from None


def _whole(source: Source, name: str) -> torch.Tensor:
    flat = np.concatenate([np.empty(0, np.float32), *source.chunks(name)])
    return torch.from_numpy(flat).view(source.shape(name))


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("F", "BF"))
