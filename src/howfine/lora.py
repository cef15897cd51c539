"""LoRA adapters in PEFT's folders, read without PEFT: the weights that a merge would have.

Hu et al. 2021, eq. 3: W + (alpha / r) B A; with rank-stabilised scaling (Kalajdzievski 2023)
alpha / √r. A product is computed when its tensor is read, one at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from howfine.checkpoint import CHUNK, Checkpoint, Source
from howfine.errors import BaseError, BaseNotFound

Array = npt.NDArray[Any]

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?$")
# Settings under which an adapter is something else than W + scale · B A, or not of this W.
_OTHER = (
    *("use_dora", "lora_bias", "use_qalora", "target_parameters", "alora_invocation_tokens"),
    *("layer_replication", "trainable_token_indices", "use_bdlora", "arrow_config"),
    *("kasa_config", "monteclora_config"),
)
_OTHER_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva_residual")


class Merged:
    """A base's tensors with a LoRA adapter merged in, as a Source by the base's names.

    `paths` maps a path inside the tower to the name that `before` has for it; `transposed` says
    that linear layers are stored (in, out); `prefixes` are what may stand before a path in the
    adapter, "" for nothing. `outside` are full tensors of modules that the base has
    not, such as a head. Raises BaseError for another kind of adapter, or one made for another
    model; BaseNotFound where its weights are missing.
    """

    def __init__(
        self,
        folder: Path,
        before: Source,
        paths: Mapping[str, str],
        transposed: bool = False,
        prefixes: Sequence[str] = ("",),
    ) -> None:
        self.folder, self._before, self._paths = folder, before, paths
        self._prefixes = prefixes
        self.config = _config(folder)
        self._transposed = transposed or bool(self.config.get("fan_in_fan_out"))
        self._weights = Checkpoint.open(_weights(folder))
        self._factors: dict[str, dict[str, str]] = {}  # name -> its A and B
        self._modules: dict[str, str] = {}  # name -> module as the adapter calls it
        self._full: dict[str, str] = {}
        self.outside: dict[str, str] = {}  # name without the adapter's prefix -> stored name
        for stored in self._weights.names():
            self._take(stored)
        for name, pair in self._factors.items():
            self._check(name, pair)

    def _take(self, stored: str) -> None:
        plain = stored.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if match := _FACTOR.match(plain):
            module, _, side, _ = match.groups()
            name = self._named(f"{module}.weight")
            if name is None:
                raise self._foreign(module)
            self._modules[name] = module
            self._once(self._factors.setdefault(name, {}), side, stored)
        elif ".lora_" in plain:
            raise BaseError(
                f"{self.folder}: the adapter holds {stored!r}, which is no factor of a plain LoRA; "
                "merge it with PEFT's merge_and_unload and extract from the merged model"
            )
        elif (name := self._named(plain)) is not None:
            self._once(self._full, name, stored)
        else:
            self.outside[plain] = stored

    def _named(self, plain: str) -> str | None:
        """The base's name for a parameter that the adapter calls `plain`; None for none.

        A part of another model may have modules of the same names, such as a decoder's.
        """
        inside = (plain.removeprefix(each) for each in self._prefixes if plain.startswith(each))
        return next((self._paths[path] for path in inside if path in self._paths), None)

    def _once(self, kept: dict[str, str], key: str, stored: str) -> None:
        if key in kept:
            raise BaseError(
                f"{self.folder}: the adapter holds both {kept[key]!r} and {stored!r} for one "
                "tensor of the base, so it was made for another model; merge it with PEFT's "
                "merge_and_unload and extract from the merged model"
            )
        kept[key] = stored

    def _check(self, name: str, pair: dict[str, str]) -> None:
        if len(pair) != 2:
            raise BaseError(
                f"{self.folder}: {self._modules[name]} has one factor of two ({', '.join(pair)}); "
                "the adapter is incomplete, fetch it again"
            )
        a, b = (self._weights.shape(pair[side]) for side in "AB")
        if len(a) != 2 or len(b) != 2 or b[1] != a[0]:
            raise BaseError(
                f"{self.folder}: {self._modules[name]} has factors of shapes {a} and {b}, expected "
                "(r, in) and (out, r); merge the adapter with PEFT and extract from the result"
            )
        shape, product = self.shape(name), (b[0], a[1])
        if shape != (product[::-1] if self._turned(name) else product):
            raise BaseError(
                f"{self.folder}: {self._modules[name]} changes a matrix of shape {product}, where "
                f"the base has {shape}: the adapter was made for another model"
            )

    def _turned(self, name: str) -> bool:
        return self._transposed or "lora_embedding_" in self._factors[name]["A"]

    def _foreign(self, module: str) -> BaseError:
        return BaseError(
            f"{self.folder}: the adapter changes {module}, which the base has not: it was made for "
            "another model, or for a part of it that is not loaded"
        )

    def changes(self, name: str) -> bool:
        """Whether the adapter holds anything for a tensor of the base."""
        return name in self._factors or name in self._full

    def full(self, stored: str) -> Array:
        """A whole tensor of the adapter's file, in its shape."""
        flat = np.concatenate([np.empty(0, np.float32), *self._weights.chunks(stored)])
        return flat.reshape(self._weights.shape(stored))

    def names(self) -> list[str]:
        """As Source.names: those of the base."""
        return self._before.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """As Source.shape."""
        return self._before.shape(name)

    def dtype(self, name: str) -> str:
        """As Source.dtype."""
        return self._before.dtype(name)

    def chunks(self, name: str, entries: int = CHUNK) -> Iterator[Array]:
        """As Source.chunks, of the merged tensor."""
        below: Iterator[Array] = self._before.chunks(name, entries)
        if name in self._full:  # what PEFT saves beside factors is the matrix that they add to
            if self._weights.shape(self._full[name]) != self.shape(name):
                raise self._foreign(name)
            below = self._weights.chunks(self._full[name], entries)
        if name not in self._factors:
            yield from below
            return
        product = self._product(name).reshape(-1)
        start = 0
        for chunk in below:
            yield chunk + product[start : start + len(chunk)]
            start += len(chunk)

    def _product(self, name: str) -> Array:
        a, b = (self.full(self._factors[name][side]) for side in "AB")
        rank, alpha = len(a), self._alpha(self._modules[name])
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        product = b @ a
        product *= np.float32(scale)
        return np.ascontiguousarray(product.T) if self._turned(name) else product

    def _alpha(self, module: str) -> float:
        """By PEFT's rule: the first pattern that ends the module's name, else `lora_alpha`."""
        for pattern, alpha in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(alpha)
        return float(self.config.get("lora_alpha") or 0)


def is_adapter(path: Path) -> bool:
    """Whether a path is a folder that PEFT saved an adapter in."""
    return (path / CONFIG).is_file()


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = str(config["peft_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseError(
            f"{folder / CONFIG} is no adapter's config ({error}); save it again"
        ) from None
    if kind != "LORA":
        raise BaseError(
            f"{folder}: an adapter of type {kind}, expected LORA, which adds to weights; merge it "
            "with PEFT's merge_and_unload where it can be, and extract from the merged model"
        )
    odd = [name for name in _OTHER if config.get(name)]
    start = str(config.get("init_lora_weights") or "").lower()
    if start.startswith(_OTHER_STARTS):  # the base that it adds to is not the one given
        odd.append(f"init_lora_weights={start}")
    if odd:
        raise BaseError(
            f"{folder}: the adapter has {', '.join(odd)}, so it is not W + scale · B A on this "
            "base; merge it with PEFT's merge_and_unload and extract from the merged model"
        )
    return dict(config)


def _weights(folder: Path) -> Path:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise BaseNotFound(
        f"{folder}: {CONFIG} without weights; expected {' or '.join(_WEIGHTS)}. Save the adapter "
        "with save_pretrained"
    )
