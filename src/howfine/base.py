"""Base: a frozen pretrained model with its tokenizer, its anatomy and its fingerprint.

Two of them, an image and a text encoder, are one base as well.
"""

# long: a base of two towers is a base, and `Base.load` makes either

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from howfine import fingerprint as fp
from howfine import pretrained, stated, widths
from howfine.anatomy import Anatomy
from howfine.architectures import anatomy_of
from howfine.errors import BaseNotFound, SettingError, near
from howfine.pretrained import (
    BODY,
    EMBEDDED,
    GENERATOR,
    IMAGE_BODY,
    KINDS,
    LANGUAGE_MODEL,
    SEQ2SEQ,
    TWO_TOWERS,
)

IMAGE, TEXT = "image", "text"
_RESERVED = "_howfine_reserved"
# Matrices whose outputs lie head by head.
_BY_HEAD = ("Q", "K", "V", "CQ", "CK", "CV")

# What a block holds that stands on top of it is called so.
ON_TOP = "howfine_on_top"


class Base:
    """A frozen pretrained model. `towers` names its modules; one tower is called `text` or `image`.

    Parameter paths carry the tower's name: `text.encoder.layer.0.attention.self.query.weight`.
    """

    def __init__(
        self,
        name: str,
        tower: nn.Module,
        tokenizer: Any = None,
        *,
        kind: str = BODY,
        fingerprint: str | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.tokenizer = tokenizer
        self.config: Any = tower.config
        self.anatomy: Anatomy = anatomy_of(self.config, whole=kind == SEQ2SEQ)
        self.tower_name = IMAGE if tower.main_input_name == "pixel_values" else TEXT
        # Of an image tower: what its folder's preprocessor_config.json says.
        self.preprocessing: dict[str, Any] = {}
        self.towers = nn.ModuleDict({self.tower_name: tower})
        self.towers.requires_grad_(False)
        self.towers.eval()
        # The pretrained parameters themselves, by path: whatever a change puts in their places,
        # these are what it is measured against.
        self._parameters = dict(self.towers.named_parameters())
        # A tied one has several names, of which the first is its path.
        first = {id(value): path for path, value in self._parameters.items()}
        every = self.towers.named_parameters(remove_duplicate=False)
        self._named = {name: first[id(value)] for name, value in every}
        # Changes that are written into the parameters' own memory at the moment.
        self.switches: list[Any] = []
        pooler = f"{self.body_prefix}{self.anatomy.pooler}"
        # A language model's body is made without one.
        self.has_pooler = bool(self.anatomy.pooler) and any(
            path.startswith(pooler) for path in self._parameters
        )
        self.pooling = self.default_pooling
        self._fingerprint = fingerprint

    @classmethod
    def load(
        cls,
        name: str | Path = EMBEDDED,
        *,
        kind: str = BODY,
        dtype: str = "float32",
        device: str = "cpu",
        revision: str | None = None,
    ) -> Base:
        """Load the embedded base, a Hugging Face name, or a folder (safetensors, .bin or GGUF).

        Kinds are those of `howfine.pretrained`; "masked_or_causal_lm" and "causal_or_seq2seq_lm"
        stand for the one of two that the architecture has. Of kind "two_towers" are an image and a
        text encoder, whose names have a plus in between.

        Raises BaseNotFound where there is no such model or no network to ask for it,
        UnknownArchitecture where no anatomy row fits, SettingError for an unknown kind or dtype.
        """
        name = str(name)
        if kind not in (known_kinds := (*KINDS, LANGUAGE_MODEL, GENERATOR, TWO_TOWERS)):
            raise SettingError(f"base kind {kind!r} is unknown. {near(kind, known_kinds)}")
        number_format = pretrained.dtype_of(dtype)
        if kind == TWO_TOWERS:
            image, text = pretrained.two_names(name)
            options: Any = {"dtype": dtype, "device": device, "revision": revision}
            return TwoTowers(
                Base.load(image, kind=IMAGE_BODY, **options), Base.load(text, **options)
            )
        if device == "cuda" and "LOCAL_RANK" in os.environ:  # one of several processes: its own
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        pretrained.check_device(device)
        source = pretrained.embedded_path() if name == EMBEDDED else name
        kind = pretrained.kind_of(source, kind, revision)
        tower, tokenizer, missing = pretrained.read(source, kind, revision)
        # Hashed once for each state of a folder; what a hub name stands for may change unseen.
        known = fp.cached(source, kind) if Path(source).is_dir() else None
        own = BODY if kind == IMAGE_BODY else kind
        base = cls(name, tower, tokenizer, kind=own, fingerprint=known).checked()
        # The fingerprint is taken before the cast, so that it names the checkpoint and not the
        # number format it happens to be used in.
        found = base.fingerprint
        if known is None and Path(source).is_dir():
            fp.remember(source, kind, found)
        base.settle_pooling(source, missing)
        if base.tower_name == IMAGE:
            base.preprocessing = stated.preprocessing(source, revision)
        base.towers.to(device=torch.device(device), dtype=number_format)
        return base

    def checked(self) -> Base:
        """Itself. Raises BaseNotFound for a model without blocks, or without heads in them."""
        heads = getattr(self.config, self.anatomy.heads, 1)
        if self.depth < 1 or (isinstance(heads, int) and heads < 1):
            raise BaseNotFound(
                f"base {self.name!r} has {self.depth} blocks, of {heads} attention heads each, "
                "expected at least one of either; mend the numbers in its config.json, or give "
                "another base"
            )
        return self

    def settle_pooling(self, source: str, missing: list[str]) -> None:
        """Pooling as the folder states it; no pooler where the checkpoint has none."""
        self.has_pooler = self.has_pooler and not any(
            name.startswith(self.anatomy.pooler) for name in missing
        )
        self.pooling = stated.pooling(source) or self.default_pooling

    @property
    def default_pooling(self) -> str:
        """How the architecture's own head reads, where nothing else is stated."""
        own = self.anatomy.pooling
        return "cls" if own == "pooler" and not self.has_pooler else own

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the pretrained parameters, taken when first asked for."""
        if self._fingerprint is None:
            originals = {path: self.original(path) for path in self._parameters}
            self._fingerprint = fp.of_tensors(originals)
        return self._fingerprint

    @property
    def tower(self) -> Any:
        """The only tower: a transformers model."""
        return self.towers[self.tower_name]

    @property
    def reserved(self) -> int:
        """Positions that changes take away from texts at the moment, whoever put them on."""
        return int(self.tower.__dict__.get(_RESERVED, 0))

    @reserved.setter
    def reserved(self, count: int) -> None:
        self.tower.__dict__[_RESERVED] = count

    @property
    def body(self) -> Any:
        """The tower without a language model's head; T5's whole, which has none without."""
        return self.towers.get_submodule(self.body_path)

    @property
    def body_path(self) -> str:
        """Path of that module among the towers."""
        return self.body_prefix.rstrip(".")

    @property
    def embedding(self) -> Any:
        """The module that makes vectors of token numbers: of a whole encoder-decoder's input."""
        return self.towers.get_submodule(self.embedding_path)

    @property
    def embedding_path(self) -> str:
        """Path of that module."""
        return f"{self.body_prefix}{self.anatomy.embedding.partition('|')[0]}"

    @property
    def room(self) -> int:
        """Tokens that fit: the tokenizer's word, the position table, less what changes take."""
        positions = getattr(self.config, "max_position_embeddings", None) or 2**31
        positions -= self.first_position
        stated = 2**31 if self.tokenizer is None else self.tokenizer.model_max_length
        return min(positions, stated) - self.reserved

    @property
    def room_said(self) -> str:
        """`room` in words, with what changes take of it."""
        taken = f", less {self.reserved} that the change takes" if self.reserved else ""
        return f"the base holds {self.room + self.reserved}{taken}"

    @functools.cached_property
    def first_position(self) -> int:
        """The number of the first position: RoBERTa and its kin count on from the padding's."""
        for name, table in self.tower.named_modules():
            padding = getattr(table, "padding_idx", None)
            if name.endswith("position_embeddings") and padding is not None:
                return int(padding) + 1
        return 0

    @property
    def hidden_size(self) -> int:
        """Width of the last hidden state."""
        return int(self.config.hidden_size)

    @property
    def depth(self) -> int:
        """Number of blocks; 1 where all layers share one."""
        return self.anatomy.depth(path.removeprefix(self.body_prefix) for path in self.paths())

    @property
    def heads(self) -> int:
        """Attention heads per layer; of a whole encoder-decoder, the encoder's."""
        return int(getattr(self.config, self.anatomy.heads))

    def heads_of(self, path: str) -> int:
        """Attention heads whose outputs are neighbouring rows of the matrix at `path`.

        Raises SettingError for a matrix that is not a query, key or value projection.
        """
        layer, part = self.place(path)
        if layer is None or part not in _BY_HEAD:
            raise SettingError(
                f"{path!r} (part {part}) is not laid out by attention heads; expected a query, key "
                f"or value matrix: select {', '.join(_BY_HEAD[:-1])} or {_BY_HEAD[-1]}"
            )
        heads = int(getattr(self.config, self.anatomy.stack_of(layer).heads))
        if getattr(self.config, widths.KEY, None):
            rows = self.parameter(path).shape[self.anatomy.linear_axes.index("out")]
            return widths.heads_left(self.config, heads, rows)
        if part == "Q":
            return heads
        return int(getattr(self.config, "num_key_value_heads", None) or heads)

    def units_into(self, path: str) -> int:
        """Heads, or neurons, that are neighbouring inputs of the matrix at `path` (D, CD or O)."""
        layer, part = self.place(path)
        inputs = self.parameter(path).shape[self.anatomy.linear_axes.index("in")]
        if part == "O":
            return inputs
        heads = int(getattr(self.config, self.anatomy.stack_of(layer or 0).heads))
        return widths.heads_left(self.config, heads, inputs)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.towers.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the parameters."""
        return next(self.towers.parameters()).dtype

    def check_exact(self, what: str) -> None:
        """Raises SettingError unless the weights are those that the fingerprint names, unrounded.

        `what` would read rounded ones, and be wrong on the base as it was stored.
        """
        cast = [path for path, own in self._parameters.items() if own.dtype != torch.float32]
        if cast:
            raise SettingError(
                f"{what} reads the pretrained weights of {self.name}, and {cast[0]} is in "
                f"{self._parameters[cast[0]].dtype}, expected torch.float32: what is made of "
                "rounded weights is wrong on the base itself. Load the base in float32"
            )

    def paths(self) -> list[str]:
        """Every parameter's path, tower name first; tied parameters once."""
        return list(self._parameters)

    def place(self, path: str) -> tuple[int | None, str]:
        """(layer, part letter) of a path; see `anatomy.Anatomy.place`."""
        return self.anatomy.place(path.removeprefix(self.body_prefix))

    def choose(self, selectors: tuple[str, ...]) -> list[str]:
        """Paths named by selectors such as `matrices@0-3`; see `howfine.anatomy`."""
        whole = {path.removeprefix(self.body_prefix): path for path in self.paths()}
        return [whole[path] for path in self.anatomy.choose(whole, selectors)]

    @property
    def body_prefix(self) -> str:
        """Prefix of the body's paths: the tower's name, then the body's in a model with a head."""
        # T5 with its head has no module without.
        alone = self.kind == BODY or self.tower.base_model is self.tower
        inner = "" if alone else f"{self.tower.base_model_prefix}."
        return f"{self.tower_name}.{inner}"

    def parameter(self, path: str) -> nn.Parameter:
        """The pretrained parameter at a path, or another name of it, also while a change is on.

        Entries of it may be overwritten then: `original` has the values.
        """
        return self._parameters[self._named.get(path, path)]

    def original(self, path: str) -> Tensor:
        """The pretrained values at a path, also while entries of it are overwritten in place."""
        path = self._named.get(path, path)
        value = self._parameters[path].detach()
        entries = [switch.entries[path] for switch in self.switches if path in switch.entries]
        if entries:
            value = value.clone(memory_format=torch.contiguous_format)
        for entry in entries:
            value.view(-1)[entry.index.to(value.device)] = entry.old.to(value)
        return value

    def train(self) -> None:
        """Training mode, but evaluation mode for what lies below the lowest trainable parameter.

        Frozen blocks under every change compute the same whatever trains: dropout in them would
        only blur what the trained part sees, at the price of its random numbers. With a trainable
        parameter outside the blocks (the pooler is above them all), everything is in training mode.
        """
        self.towers.train()
        body = self.body_prefix
        trained = {
            path: self.place(path)
            for path, value in self.towers.named_parameters()
            if value.requires_grad
        }
        # What stands on top of a block is above it.
        layers = [
            layer + (f".{ON_TOP}." in path)
            for path, (layer, _) in trained.items()
            if layer is not None
        ]
        if len(layers) < sum(part != "pooler" for _, part in trained.values()):
            return
        below = [self.anatomy.block_path(n) for n in range(min(layers, default=self.depth))]
        # Modules that hold the blocks stay as they are: transformers reads their mode for other
        # things, such as whether checkpointing forbids a cache.
        owner = self.embedding_path.removeprefix(body).rpartition(".")[0]
        if owner and not self.anatomy.block.startswith(f"{owner}."):
            below.append(owner)
        for module in below:
            own = self.towers.get_submodule(body + module).eval()
            if (on_top := getattr(own, ON_TOP, None)) is not None:
                on_top.train()

    def is_untouched(self) -> bool:
        """Whether the parameters are, bit for bit, those that were loaded (in float32)."""
        return fp.of_parameters(self.towers) == self.fingerprint


class TwoTowers(Base):
    """An image and a text encoder, each a base of its own, that are trained and stored as one.

    What is asked of a single tower is asked of its part: `parts["image"].anatomy`.
    """

    def __init__(self, image: Base, text: Base) -> None:
        self.parts = {IMAGE: image, TEXT: text}
        for tower, part in self.parts.items():
            if part.tower_name != tower:
                raise SettingError(
                    f"a base of two towers is an image and a text encoder, in this order, but "
                    f"{part.name} is an encoder of {part.tower_name}s; give IMAGE+TEXT"
                )
        self.name, self.kind = f"{image.name}+{text.name}", TWO_TOWERS
        self.towers = nn.ModuleDict({name: part.tower for name, part in self.parts.items()})
        self._parameters = image._parameters | text._parameters
        self._named = image._named | text._named
        self._fingerprint = None

    def __getattr__(self, name: str) -> Any:
        # Only asked for what is not there: copying and pickling ask for names of their own.
        if name in ("tower_name", "tower", "config", "anatomy", "tokenizer", "pooling", "switches"):
            raise SettingError(
                f"{self.name} is a base of two towers, and this needs one; use it with the readout "
                "of a recipe that aligns them, or give one of the two"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def tower(self) -> Any:
        """There is not the one: raises SettingError."""
        return self.__getattr__("tower")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over both fingerprints."""
        both = "".join(f"{name}:{part.fingerprint}\n" for name, part in self.parts.items())
        return fp.of_text(both)

    def place(self, path: str) -> tuple[int | None, str]:
        """(layer, part letter) of a path in its tower; see `anatomy.Anatomy.place`."""
        return self.part_of(path).place(path)

    def choose(self, selectors: tuple[str, ...]) -> list[str]:
        """Paths that selectors name in both towers. Raises as `Base.choose` does for each."""
        return [path for part in self.parts.values() for path in part.choose(selectors)]

    def part_of(self, path: str) -> Base:
        """The tower that a path is of."""
        return self.parts[path.partition(".")[0]]

    def original(self, path: str) -> Tensor:
        """The pretrained values at a path; see `Base.original`."""
        return self.part_of(path).original(path)

    def train(self) -> None:
        """Each tower as `Base.train` has it; one that is frozen whole in evaluation mode."""
        for part in self.parts.values():
            part.train()
            if not any(value.requires_grad for value in part.towers.parameters()):
                part.towers.eval()

    def is_untouched(self) -> bool:
        """Whether all parameters are those that were loaded."""
        return all(part.is_untouched() for part in self.parts.values())
