"""What a model's folder states beside its config: pooling, and images' preprocessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from howfine.errors import BaseNotFound

# Keys of a sentence-transformers pooling config, of those that are read here.
_POOLING = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}


def json_object(path: Path) -> dict[str, Any]:
    """What a config's file holds. Raises ValueError, OSError or RecursionError."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"it holds {found!r:.40}")
    return found


def preprocessing(source: str, revision: str | None) -> dict[str, Any]:
    """What an image model's preprocessor_config.json says; {} where there is none.

    Raises BaseNotFound for one that can't be read, or can't be asked for.
    """
    from transformers.utils import IMAGE_PROCESSOR_NAME
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(
            source,
            IMAGE_PROCESSOR_NAME,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )
        found = {} if path is None else json_object(Path(path))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseNotFound(
            f"{IMAGE_PROCESSOR_NAME} of the image base {source!r} can't be read: "
            f"{_reason(error)}; get a fresh copy, or take it out"
        ) from error
    return found


def pooling(source: str) -> str | None:
    """Pooling that a sentence-transformers folder states in its own config, else None.

    Raises BaseNotFound for a config that can't be read.
    """
    path = Path(source) / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    try:
        stated = json_object(path)
    except (OSError, ValueError, RecursionError) as error:
        raise BaseNotFound(
            f"{path} of the base {source!r} can't be read: {_reason(error)}; expected an object of "
            "pooling modes: get a fresh copy, or take it out"
        ) from error
    return next((mode for key, mode in _POOLING.items() if stated.get(key)), None)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def state_pooling(folder: Path, mode: str, width: int) -> None:
    """Write what `pooling` reads, for a pooling that sentence-transformers knows."""
    if mode not in _POOLING.values():
        return
    stated = {"word_embedding_dimension": width}
    stated |= {key: each == mode for key, each in _POOLING.items()}
    path = folder / "1_Pooling"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(stated, indent=2) + "\n")
