"""Class vectors that read a language model's answer at one position of a template.

Hambardzumyan, Khachatrian & May 2021, "WARP: Word-level Adversarial ReProgramming": the vector at
the mask goes through the masked language model's head without its decoder, and class scores are
V·z + c. With words for the classes V and c begin as the decoder's own rows, so that scores are the
frozen model's logits of those words. A causal language model is read at its last position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from howfine import language, template
from howfine.base import Base
from howfine.batch import Batch
from howfine.errors import SettingError
from howfine.readout import Head, Labels, Readout, class_answer, class_loss
from howfine.task import Example


@dataclass(frozen=True)
class Verbalizer(Readout):
    """A template, and a vector for each class."""

    kind = "masked_or_causal_lm"

    # Layout of an input: see `howfine.template`.
    template: str = "{text} {mask} {pair}"
    # A word for each class in the labels' order; class vectors begin as theirs. None: at random.
    words: tuple[str, ...] = ()
    # Tokens kept of an input; texts are cut, never the rest.
    max_length: int = 128
    # What class vectors read: the language model's head up to its decoder, or the hidden state.
    read: Literal["head", "hidden"] = "head"
    # Whether class vectors train; their biases do in any case.
    train_vectors: bool = True

    def __post_init__(self) -> None:
        found = template.parse(self.template)
        if found.masks > 1:
            raise SettingError(
                f"verbalizer template {self.template!r} has {found.masks} masks, expected one"
            )
        if self.max_length < 1:
            raise SettingError(f"verbalizer max_length {self.max_length}: expected at least 1")

    @property
    def slots(self) -> tuple[str, ...]:
        return template.parse(self.template).slots

    def attach(self, base: Base, labels: Labels) -> Head:
        language.require(base, "readout verbalizer")
        self._check_mask(base)
        if self.words and len(self.words) != max(1, len(labels)):
            raise SettingError(
                f"verbalizer words: found {len(self.words)}, expected {max(1, len(labels))}: one "
                f"for each of {list(labels)}"
            )
        return _ClassVectors(base, self, labels)

    def _check_mask(self, base: Base) -> None:
        masks = template.parse(self.template).masks
        if base.kind == language.MASKED and not masks:
            raise SettingError(
                f"verbalizer template {self.template!r} has no {{mask}}, which is where a masked "
                "language model answers; write one"
            )
        if base.kind == language.CAUSAL and masks:
            raise SettingError(
                f"verbalizer template {self.template!r} has a {{mask}}, and {base.name} is a "
                "causal language model, which answers at the last position; leave it out"
            )

    def collate(self, base: Base, examples: Sequence[Example], labelled: bool = True) -> Batch:
        batch = template.parse(self.template).fill(base, examples, self.max_length)
        if labelled:
            targets = torch.tensor([example.label for example in examples])
            batch.targets = targets.float() if targets.is_floating_point() else targets
        return batch

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return class_loss(outputs, targets)

    def predict(self, outputs: Tensor) -> Tensor:
        return class_answer(outputs)


class _ClassVectors(Head):
    """V (K, H') and c (K) on what the decoder would read."""

    def __init__(self, base: Base, settings: Verbalizer, labels: Labels) -> None:
        super().__init__()
        self.tower_name = base.tower_name
        self.body_path = base.body_path
        self.reading = language.before_decoder(base)
        self.hidden = settings.read == "hidden"
        # Bounds are for the model's logits; a score has its own scale.
        self.cap = language.capped(base) if labels and not self.hidden else None
        decoder = language.decoder(base)
        width = base.hidden_size if self.hidden else decoder.weight.shape[1]
        self.classes = nn.Linear(width, max(1, len(labels)))  # U(±1/√H'), as the authors leave it
        if settings.words:
            self._begin_as(base, settings.words)
        self.classes.weight.requires_grad_(settings.train_vectors)

    def _begin_as(self, base: Base, words: tuple[str, ...]) -> None:
        """The decoder's own rows and biases for these words."""
        decoder = language.decoder(base)
        if self.hidden and decoder.weight.shape[1] != base.hidden_size:
            raise SettingError(
                f"verbalizer words are vectors of {decoder.weight.shape[1]} numbers and hidden "
                f"states of {base.name} have {base.hidden_size}; set read='head'"
            )
        ids = [language.single_token(base, word, "verbalizer word") for word in words]
        with torch.no_grad():
            self.classes.weight.copy_(decoder.weight[ids])
            bias = decoder.bias
            self.classes.bias.copy_(torch.zeros(len(ids)) if bias is None else bias[ids])

    def forward(self, towers: nn.ModuleDict, batch: Batch) -> Tensor:
        state = towers.get_submodule(self.body_path)(**batch.inputs).last_hidden_state
        assert batch.reads is not None
        read = state[torch.arange(state.shape[0], device=state.device), batch.reads[:, 0]]
        if not self.hidden:
            read = self.reading(towers[self.tower_name], read)
        found: Tensor = self.classes(read.to(self.classes.weight.dtype))
        return found if self.cap is None else self.cap(found)


EXAMPLE = Verbalizer(template="{slot} {text} {slot*2} {mask} {pair}", max_length=32)
