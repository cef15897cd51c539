"""A language model that writes the answer, token by token; nothing of its own is trained.

The loss is the negative log-likelihood of the target's tokens (its end among them), of no other:
their mean, or each example's sum, as in Li & Liang 2021, "Prefix-tuning", §4. A causal model reads
`source, beginning, target, end` in one row, an encoder-decoder the source in its encoder. Answers
are written by transformers' `generate()`, greedily or by beam search, never by chance.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig

from howfine import language, layout, template
from howfine.base import Base
from howfine.batch import Batch
from howfine.errors import SettingError
from howfine.metrics import Metric
from howfine.readout import Head, Labels, Readout
from howfine.task import Example

# What stands behind the end of a written text.
NOTHING = -1
_WRITING = threading.RLock()


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
        total, tokens = outputs.float().sum(0)
        return total / (tokens if self.reduction == "tokens" else len(outputs))

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.long()

    def predictions(self, base: Base, outputs: Tensor) -> np.ndarray:
        found = np.empty(len(outputs), dtype=object)
        found[:] = [self._text(base, row) for row in self.predict(outputs)]
        return found

    def told(self, base: Base, labels: Labels, outputs: Tensor) -> list[dict[str, Any]]:
        return [{"text": text} for text in self.predictions(base, outputs)]

    def progress(self, outputs: Tensor, targets: np.ndarray, metric: Metric) -> float:
        """The log-likelihood of a token: texts are not written while training."""
        total, tokens = outputs.double().sum(0)
        return -float(total / tokens)

    def _text(self, base: Base, row: Tensor) -> str:
        kept = row[row != NOTHING].tolist()
        return str(base.tokenizer.decode(kept, skip_special_tokens=True)).strip()


class _Writer(Head):
    """With targets (B, 2): negative log-likelihoods, summed, and numbers of tokens.

    Else (B, T) tokens, written. It has no parameters: the base's own decoder is read.
    """

    def __init__(self, base: Base, settings: LanguageModel) -> None:
        super().__init__()
        self.tower_name, self.body_path = base.tower_name, base.body_path
        self.scores = language.scores(base) if base.kind == language.CAUSAL else None
        start = None if self.scores else layout.beginning(base)[0]
        self.how = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            num_beams=settings.beams,
            length_penalty=settings.length_penalty if settings.beams > 1 else None,
            do_sample=False,
            eos_token_id=layout.ending(base),
            pad_token_id=base.tokenizer.pad_token_id,
            bos_token_id=base.tokenizer.bos_token_id,
            decoder_start_token_id=start,
        )

    def forward(self, towers: nn.ModuleDict, batch: Batch) -> Tensor:
        if batch.targets is None:
            return self._written(towers[self.tower_name], batch)
        if self.scores is None:
            return self._apart(towers[self.tower_name], batch, batch.targets)
        body: Any = towers.get_submodule(self.body_path)
        state = body(**batch.inputs, use_cache=False).last_hidden_state
        # The scores of a token stand one place before it; no others are computed.
        rows, columns = _places(batch.targets[:, 1:])
        scores = self.scores(towers[self.tower_name], state[rows, columns])
        return _sums(scores, batch.targets[rows, columns + 1], rows, len(state))

    def _apart(self, tower: Any, batch: Batch, targets: Tensor) -> Tensor:
        """An encoder-decoder's, whose decoder has read its beginning before the first token."""
        found = tower(**batch.inputs, use_cache=False).logits
        rows, columns = _places(targets)
        first = found.shape[1] - targets.shape[1]
        return _sums(found[rows, columns + first], targets[rows, columns], rows, len(found))

    def _written(self, tower: Any, batch: Batch) -> Tensor:
        with torch.no_grad(), _neutral(tower):
            found = tower.generate(**batch.inputs, generation_config=self.how)
        before = "input_ids" if self.scores is not None else "decoder_input_ids"
        found = found[:, batch.inputs[before].shape[1] :]
        ended = (found == self.how.eos_token_id).long().cumsum(1)
        # What stands behind the first end is padding; the end itself says nothing.
        found = found.masked_fill(ended > 0, NOTHING)
        return functional.pad(found, (0, self.how.max_new_tokens - found.shape[1]), value=NOTHING)


@contextmanager
def _neutral(tower: Any) -> Iterator[None]:
    """Hide the model's own wishes for writing (penalties, forbidden words, lengths).

    transformers takes each of them where none is stated, and then writes what is not the likeliest.
    The lock is for other threads, which would find the neutral ones.
    """
    with _WRITING:
        own = tower.generation_config
        tower.generation_config = GenerationConfig()
        try:
            yield
        finally:
            tower.generation_config = own


def _places(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is to be learned."""
    rows, columns = torch.nonzero(targets != layout.UNSEEN, as_tuple=True)
    return rows, columns


def _sums(scores: Tensor, ids: Tensor, rows: Tensor, count: int) -> Tensor:
    """(count, 2) sums of negative log-likelihoods and numbers of tokens, by row."""
    losses = functional.cross_entropy(scores.float(), ids, reduction="none")
    made = torch.stack([losses, torch.ones_like(losses)], dim=1)
    return made.new_zeros(count, 2).index_add(0, rows, made)


EXAMPLE = LanguageModel(max_length=48, max_new_tokens=12)
