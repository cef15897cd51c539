"""The distance verb: between checkpoints, bases and deltas given by name or path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from howfine import container, stated
from howfine.align import Place
from howfine.anatomy import Anatomy
from howfine.architectures import anatomy_of
from howfine.checkpoint import Checkpoint, MemorySource, Source
from howfine.distance import Distance, distance
from howfine.errors import BaseError, BaseNotFound

if TYPE_CHECKING:  # torch is imported only where a base is: streaming needs none of it
    from howfine.base import Base
    from howfine.delta import Delta


def compare(
    before: str | Path, after: str | Path, *, references: bool = True, seed: int = 0
) -> list[Distance]:
    """Distances, tensor by tensor, from `before` to `after`.

    `before` is a checkpoint (folder or file), or a base's name. `after` is one of these, or a
    delta file made on `before`. Two checkpoints on disk are streamed, a chunk at a time.
    Raises BaseError where they are of different architectures, DeltaError for a damaged delta.
    """
    if container.is_delta(Path(after)):
        return _compare_delta(str(before), Path(after), references, seed)
    config = _config(before) or _config(after)
    return distance(
        _source(before),
        _source(after),
        place=_place(config),
        init_std=float(getattr(config, "initializer_range", None) or 0.02),
        seed=seed,
        references=references,
    )


def _compare_delta(before: str, file: Path, references: bool, seed: int) -> list[Distance]:
    from howfine.base import Base
    from howfine.delta import Delta

    delta = Delta.load(file)
    return delta_distance(delta, Base.load(before, kind=delta.base_kind), references, seed)


def delta_distance(
    delta: Delta, base: Base, references: bool = True, seed: int = 0
) -> list[Distance]:
    """Distances from a base to the same base with a delta on. Frozen tensors are at 0.

    Of two towers, paths begin with the tower's name. Raises SettingError for a change that is not
    one of weights.
    """
    from howfine.base import TwoTowers
    from howfine.delta import only_weights

    parts = {"": base}
    if isinstance(base, TwoTowers):
        parts = {f"{name}.": part for name, part in base.parts.items()}
    before = {name: dict(part.tower.named_parameters()) for name, part in parts.items()}
    rows: list[Distance] = []
    with delta.changed(base):
        only_weights(base, "which are at no distance from anything; measure changes of weights")
        for name, part in parts.items():
            found = distance(
                MemorySource(before[name]),
                MemorySource(dict(part.tower.named_parameters())),
                place=part.anatomy.place,
                init_std=float(getattr(part.config, "initializer_range", None) or 0.02),
                seed=seed,
                references=references,
            )
            rows += [replace(row, path=name + row.path) for row in found]
    return rows


def _source(name: str | Path) -> Source:
    """A checkpoint on disk, streamed; else a base by name, in memory."""
    if Path(name).exists():
        return Checkpoint.open(name)
    from howfine.base import Base

    return MemorySource(dict(Base.load(str(name)).tower.named_parameters()))


def _config(name: str | Path) -> SimpleNamespace | None:
    """The config.json beside a checkpoint, as attributes; None where there is none."""
    path = Path(name)
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    if path.exists() and file.is_file():
        try:
            found = stated.json_object(file)
        except (OSError, ValueError, RecursionError) as error:
            raise BaseError(
                f"{file} can't be read: {error}; expected a config's object: get a fresh copy"
            ) from error
        width = found.get("initializer_range")
        if not isinstance(width, int | float | None):
            raise BaseError(
                f"{file}: found initializer_range {width!r:.40}, expected a number; get a fresh "
                "copy"
            )
        return SimpleNamespace(**found)
    if path.exists():
        return None
    from howfine.base import Base

    config = Base.load(str(name)).config
    return SimpleNamespace(**config.to_dict())


def _place(config: SimpleNamespace | None) -> Place:
    """The architecture's own naming; without a config, every tensor is just itself."""
    if config is None:
        return lambda path: (None, "other")
    if not hasattr(config, "model_type"):
        raise BaseNotFound("config.json names no model_type; expected a Hugging Face config")
    anatomy: Anatomy = anatomy_of(config)
    return anatomy.place
