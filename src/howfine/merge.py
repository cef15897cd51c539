"""merge: a base with a delta on, as a plain Hugging Face checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from howfine.base import Base
from howfine.delta import Delta
from howfine.errors import StorageError
from howfine.evaluate import opened

HEAD_FILE = "readout.safetensors"
HEAD_CONFIG = "readout.json"


def merge(delta: Delta | str | Path, out: str | Path, base: Base | None = None) -> Path:
    """Write the changed base, its tokenizer and the readout's head to the folder `out`.

    `AutoModel.from_pretrained(out)` loads the body with no need of howfine. The head lies beside
    it in `readout.safetensors`, with its settings and labels in `readout.json`. Raises
    StorageError where `out` exists or can't be written; a half-written folder is removed.
    """
    delta, base = opened(delta, base)
    out = Path(out)
    if out.exists():
        raise StorageError(f"{out} exists already; choose another folder or remove it first")
    partial = out.with_name(f".{out.name}.partial")
    try:
        with delta.applied(base) as model:
            base.tower.save_pretrained(partial)
            save_file(
                {name: value.contiguous() for name, value in model.head.state_dict().items()},
                partial / HEAD_FILE,
            )
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(partial)
        header = delta.header()
        stated = {"readout": header["readout"], "labels": header["labels"]}
        (partial / HEAD_CONFIG).write_text(json.dumps(stated, indent=2) + "\n")
        partial.rename(out)
    except OSError as error:
        raise StorageError(
            f"{out} can't be written: {error.strerror or error}; nothing was left behind. Free "
            "some space, or choose another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out
