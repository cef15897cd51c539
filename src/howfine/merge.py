"""merge: a base with a delta on, as a plain Hugging Face checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import IMAGE_PROCESSOR_NAME

from howfine import fingerprint, pretrained, stated, surgery
from howfine.base import Base
from howfine.delta import Delta, only_weights
from howfine.errors import BaseNotFound, StorageError, WrongBase
from howfine.evaluate import opened
from howfine.readout import Head

HEAD_FILE = "readout.safetensors"
HEAD_CONFIG = "readout.json"


def merge(
    delta: Delta | str | Path,
    out: str | Path,
    base: Base | None = None,
    *,
    dtype: str | torch.dtype | None = None,
) -> Path:
    """Write the changed base, its tokenizer and the readout's head to the folder `out`.

    `AutoModel.from_pretrained(out)` loads the body with no need of howfine. The head, if there is
    one, lies beside it in `readout.safetensors`, with its settings and labels in `readout.json`.
    `dtype` is the number format of what is written, the sum of base and change; the base's own by
    default.
    Raises StorageError where `out` exists or can't be written; a half-written folder is removed.
    Raises SettingError for a change that is not one of weights, and for an unknown dtype.
    Raises BaseNotFound, WrongBase where the base is an encoder and the encoder-decoder that it was
    taken from is not to be had.
    """
    delta, base = opened(delta, base)
    number_format = None if dtype is None else pretrained.dtype_of(dtype)

    def write(folder: Path) -> None:
        with delta.changed(base) as head:
            only_weights(base, "which no plain checkpoint holds; keep the delta beside its base")
            model = _whole(base)
            with surgery.converted(model, number_format):
                save(base, model, folder)
            if head is not None:
                _save_head(delta, head, folder)

    return in_folder(Path(out), write)


def in_folder(out: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a new folder, which is at `out` when it is whole.

    It is filled in a place of its own beside `out`, which nobody else has or guesses. Raises
    StorageError where `out` exists or can't be written; nothing is left behind.
    """
    if out.exists():
        raise StorageError(f"{out} exists already; choose another folder or remove it first")
    missing = [parent for parent in out.parents if not parent.exists()]
    place = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        partial = place / out.name  # mkdtemp lets nobody else in; a plain folder may be shared
        partial.mkdir()
        with pretrained.quiet_transformers():
            write(partial)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"{out} can't be written: {reason}; nothing was left behind. Free some space, or "
            "choose another place"
        ) from error
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        for parent in missing:  # the innermost first
            with suppress(OSError):  # it holds `out`, or what somebody else put in
                parent.rmdir()
    return out


def save(base: Base, model: Any, folder: Path, tokenizer: Any = None) -> None:
    """A model of the base's kind as a checkpoint, with how it is pooled.

    With the tokenizer given, or else the base's own.
    """
    model.save_pretrained(folder, state_dict=_own_tensors(base, model))
    tokenizer = base.tokenizer if tokenizer is None else tokenizer
    if tokenizer is not None:
        _as_loaded(tokenizer).save_pretrained(folder)
    if base.preprocessing:
        (folder / IMAGE_PROCESSOR_NAME).write_text(json.dumps(base.preprocessing, indent=2) + "\n")
    if base.pooling != base.default_pooling:
        stated.state_pooling(folder, base.pooling, base.hidden_size)


def _save_head(delta: Delta, head: Head, folder: Path) -> None:
    tensors = {name: value.contiguous() for name, value in head.state_dict().items()}
    save_file(tensors, folder / HEAD_FILE)
    header = delta.header()
    stated = {"readout": header["readout"], "labels": header["labels"]}
    (folder / HEAD_CONFIG).write_text(json.dumps(stated, indent=2) + "\n")


def _whole(base: Base) -> Any:
    """What is saved: the tower, or the encoder-decoder it is the encoder of, with this encoder in.

    Written alone, an encoder has names that `AutoModel` does not look for.
    """
    if stands_alone(base):
        return base.tower
    try:
        model, info = transformers.AutoModel.from_pretrained(
            base.name, dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"]:  # the encoder is all there is
            kind: Any = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING[type(base.config)]
            model = kind.from_pretrained(base.name, dtype=torch.float32)
    except MemoryError:
        raise
    except Exception as error:  # a folder is foreign input: what it makes fail is not foreseen
        raise BaseNotFound(
            f"the base {base.name} is an encoder, and the decoder that belongs to it can't be "
            f"loaded: {pretrained.reason_of(error)}. Load the base by a name that can be had"
        ) from error
    encoder = model.get_encoder()
    if fingerprint.of_parameters(nn.ModuleDict({base.tower_name: encoder})) != base.fingerprint:
        raise WrongBase(
            f"what {base.name} names now is another model than the base; load the base again"
        )
    model.to(base.dtype)
    encoder.load_state_dict(base.tower.state_dict())
    return model


def stands_alone(base: Base) -> bool:
    """Whether the tower is all of a checkpoint, and no encoder-decoder's encoder."""
    whole: Any = transformers.MODEL_MAPPING[type(base.config)]
    return base.kind != "body" or isinstance(base.tower, whole)


def _own_tensors(base: Base, whole: Any) -> dict[str, Tensor]:
    """What is saved, but for a pooler of zeros that stands in for one the base never had."""
    pooler = "" if base.has_pooler else base.anatomy.pooler
    return {
        path: value
        for path, value in whole.state_dict().items()
        if not pooler or not path.startswith(pooler)
    }


def _as_loaded(tokenizer: Any) -> Any:
    """A copy without the padding and truncation of the last batch, which fast tokenizers keep."""
    tokenizer = copy.deepcopy(tokenizer)
    if fast := getattr(tokenizer, "backend_tokenizer", None):
        fast.no_padding()
        fast.no_truncation()
    return tokenizer
