"""A language model that writes the answer, token by token; nothing of its own is trained.

The loss is the negative log-likelihood of the target's tokens (its end among them), of no other:
their mean, or each example's sum, as in Li & Liang 2021, "Prefix-tuning", §4. A causal model reads
`source, beginning, target, end` in one row, an encoder-decoder the source in its encoder. Answers
are written by transformers' `generate()`, greedily or by beam search, never by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor, nn

from howfine import language, layout, template, writing
from howfine.base import Base
from howfine.batch import Batch
from howfine.errors import SettingError
from howfine.metrics import Metric
from howfine.readout import Asked, Head, Labels, Readout
from howfine.task import Example


@dataclass(frozen=True)
class LanguageModel(Readout):
    """What an input looks like, and how answers are written."""

    kind = "causal_or_seq2seq_lm"
    writes = True

    # Layout of what is read before writing begins: see `howfine.template`. "": the text, and after
    # it, where the model is causal, its token for a beginning.
    template: str = ""
    # Tokens of an input: source and target in a causal model, the source in an encoder-decoder.
    max_length: int = 256
    # Tokens that may be written, the end's among them; targets are cut to as many.
    max_new_tokens: int = 64
    # Hypotheses of a beam search; 1 takes the likeliest token each time.
    beams: int = 1
    # Power of the length that a hypothesis' log-likelihood is divided by.
    length_penalty: float = 1.0
    # The loss: mean over a batch's target tokens, or over its examples of each one's sum.
    reduction: Literal["tokens", "examples"] = "tokens"

    def __post_init__(self) -> None:
        if self.template and template.parse(self.template).masks:
            raise SettingError(
                f"language_model template {self.template!r} has a {{mask}}, which only a masked "
                "language model answers at; leave it out"
            )
        if min(self.max_length, self.max_new_tokens, self.beams) < 1:
            raise SettingError(
                f"language_model: found max_length {self.max_length}, max_new_tokens "
                f"{self.max_new_tokens} and beams {self.beams}, expected 1 at least of each"
            )
        if not math.isfinite(self.length_penalty):
            raise SettingError(
                f"language_model length_penalty {self.length_penalty}: expected a finite number"
            )

    @property
    def adds_up(self) -> bool:
        return self.reduction == "examples"

    @property
    def slots(self) -> tuple[str, ...]:
        return template.parse(self.template).slots if self.template else ()

    def attach(self, base: Base, labels: Labels) -> Head:
        language.require(base, "readout language_model", (language.CAUSAL, language.SEQ2SEQ))
        settled = self.settled(base)
        layout.room(base, settled)
        layout.ending(base)
        return _Writer(base, settled)

    def settled(self, base: Base, labels: Labels = ()) -> LanguageModel:
        """With the template written out."""
        plain = "{text}" if base.kind == language.SEQ2SEQ else "{text} {bos}"
        return replace(self, template=self.template or plain)

    def collate(self, base: Base, examples: Sequence[Example], labelled: bool = True) -> Batch:
        return layout.batch(base, self.settled(base), examples, labelled)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return writing.loss(outputs, self.reduction)

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.long()

    def predictions(self, base: Base, outputs: Tensor) -> np.ndarray:
        return writing.texts(base, self.predict(outputs))

    def progress(self, outputs: Tensor, targets: np.ndarray, metric: Metric) -> float:
        return writing.progress(outputs)


class _Writer(Head):
    """With targets (B, 2): negative log-likelihoods, summed, and numbers of tokens.

    Else (B, T) tokens, written. It has no parameters: the base's own decoder is read.
    """

    def __init__(self, base: Base, settings: LanguageModel) -> None:
        super().__init__()
        self._base = base
        self._asked = Asked(settings.max_new_tokens, settings.beams, settings.length_penalty)

    @property
    def asked(self) -> Asked:
        return self._asked

    def forward(self, towers: nn.ModuleDict, batch: Batch) -> Tensor:
        if batch.targets is None:
            return writing.written(self._base, batch, self.asked)
        return writing.likelihoods(self._base, batch, batch.targets)


EXAMPLE = LanguageModel(max_length=48, max_new_tokens=12)
