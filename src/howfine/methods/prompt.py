"""Vectors in place of input words, and in front of them; nothing else changes.

Hambardzumyan, Khachatrian & May 2021, "WARP": a free vector P_j stands at each slot of a template,
where the embedding table's row would (before positions and LayerNorm are added). With `length`
vectors that no template names are put in front of every input, as in Lester, Al-Rfou & Constant
2021, "The power of scale for parameter-efficient prompt tuning".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from howfine import language, tokens
from howfine import slots as slots_of
from howfine.base import Base
from howfine.change import Change, all_or_nothing
from howfine.codec import rounded
from howfine.errors import DamagedDelta, SettingError
from howfine.method import Method, Probe, Tensors
from howfine.worn import fill, prepend


@dataclass(frozen=True)
class Prompt(Method):
    """How many vectors stand in front, and what all of them begin as."""

    starts_at_base: ClassVar[bool] = False
    start: ClassVar[Any] = "own"
    meaning: ClassVar[tuple[str, ...]] = ("length",)

    # Vectors in front of every input (that of an encoder-decoder's encoder), beside those at a
    # template's slots.
    length: int = 0
    # What a vector begins as, where the template names no word: the row of the mask or the padding
    # token, rows of `init_text` in turn, N(mean, std) of the whole table, or N(0, 1).
    init: Literal["mask_token", "pad_token", "text", "table", "normal"] = "mask_token"
    # Words for init="text".
    init_text: str = ""

    def __post_init__(self) -> None:
        if self.length < 0:
            raise SettingError(f"prompt length {self.length}: expected 0 or more")
        if (self.init == "text") != bool(self.init_text):
            raise SettingError(
                f"prompt init {self.init!r} with init_text {self.init_text!r}: that is for "
                "init='text', which needs it"
            )

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        words = probe.slots if probe is not None else ()
        if not len(words) + self.length:
            raise SettingError(
                "prompt: the readout's inputs have no free slots and length is 0, so nothing "
                "would train; give a template with {slot}, or a length"
            )
        if base.tower_name != "text":
            raise SettingError(f"prompt: {base.name} reads no tokens; give a text base")
        if probe is not None and probe.begun:
            return self._put_on(base, nn.Parameter(self._earlier(probe, words)))
        started = torch.stack([self._begun(base, number, word) for number, word in
                               enumerate((*words, *[""] * self.length))])  # fmt: skip
        return self._put_on(base, nn.Parameter(started))

    def _earlier(self, probe: Probe, words: tuple[str, ...]) -> Tensor:
        """The vectors of an earlier delta, which has as many."""
        found = probe.begun["vectors"]
        if len(found) != len(words) + self.length:
            raise SettingError(
                f"prompt: the delta to start from has {len(found)} vectors, and this fit has "
                f"{len(words)} slots and length {self.length}; use the same template and length"
            )
        return found.clone()

    def _begun(self, base: Base, number: int, word: str) -> Tensor:
        """The vector that one slot begins as, (E,)."""
        table = base.original(f"{base.embedding_path}.weight")
        # Gemma's embeddings multiply what they look up.
        scale = getattr(base.embedding, "embed_scale", 1.0)
        if word:
            return table[language.single_token(base, word, "slot word")].float() * scale
        if self.init == "normal":
            return torch.randn(table.shape[1]).to(table.device)
        if self.init == "table":
            noise = torch.randn(table.shape[1]).to(table.device)
            whole = table.float()
            return (whole.mean() + whole.std() * noise) * scale
        ids = language.pieces(base, self.init_text) if self.init == "text" else [self._token(base)]
        if not ids:
            raise SettingError(f"prompt init_text {self.init_text!r} has no tokens; give words")
        return table[ids[number % len(ids)]].float() * scale

    def _token(self, base: Base) -> int:
        found = getattr(base.tokenizer, f"{self.init}_id", None)
        if found is None:
            raise SettingError(
                f"prompt init {self.init!r}: {base.name} has no such token; use text, table or "
                "normal"
            )
        return int(found)

    def _put_on(self, base: Base, vectors: nn.Parameter) -> Change:
        slots = len(vectors) - self.length
        with all_or_nothing() as undo:
            if self.length:
                undo.append(tokens.prepend(base, vectors, slots))
            undo.append(slots_of.fill(base, vectors, slots))
        return Change({"vectors": vectors}, undo)

    def pack(self, base: Base, change: Change) -> Tensors:
        return {"vectors": change.trainable["vectors"].detach().clone()}

    def stored(self, change: Change, store: str) -> Tensors:
        return {"vectors": rounded(change.trainable["vectors"].detach(), store)}

    def groups(self, change: Change) -> list[dict[str, Any]]:
        return [{"params": list(change.trainable.values()), "weight_decay": 0.0}]

    def learning_rate(self, steps: int) -> float:
        return 1e-3

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        found = tensors.get("vectors")
        width = base.embedding.weight.shape[1]
        if (
            found is None
            or len(tensors) > 1
            or found.is_sparse
            or not found.is_floating_point()
            or found.ndim != 2
            or found.shape[1] != width
            or len(found) < max(1, self.length)
        ):
            shapes = {name: tuple(value.shape) for name, value in tensors.items()}
            raise DamagedDelta(
                f"prompt: found {shapes}, expected vectors of {width} numbers, {self.length} at "
                "least; the file is damaged, or made for another model"
            )
        return self._put_on(base, nn.Parameter(found.to(base.device), requires_grad=False))

    def takes(self, base: Base, tensors: Tensors) -> int:
        return self.length

    @classmethod
    def wear(
        cls, base: Base, worn: Mapping[int, tuple[Prompt, Tensors]], count: int
    ) -> Change | None:
        slots, fronts = {}, {}
        for row, (method, tensors) in worn.items():
            vectors = tensors["vectors"]
            first = len(vectors) - method.length
            slots[row], fronts[row] = vectors[:first], vectors[first:]
        if any(map(len, fronts.values())) and (tokens.numbers_itself(base) or tokens.window(base)):
            # The text of a row with fewer vectors would have another place, or stand out of sight.
            return None
        with all_or_nothing() as undo:
            undo.append(prepend(base, fronts, count))
            undo.append(fill(base, slots, count))
            return Change({}, undo)


EXAMPLE = Prompt(length=3)
