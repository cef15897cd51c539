"""Writing: texts token by token, through transformers' `generate()`, and their likelihoods.

One engine for a task alone and for a batch of several: each row has its own cache, ends by itself,
and may end by a vector of its own (`howfine.vectors`). Answers are the likeliest, greedily or by
beam search, never drawn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from howfine import checks, language, layout, vectors
from howfine.base import Base
from howfine.batch import Batch
from howfine.readout import Asked

# What stands behind the end of a written text.
NOTHING = -1
_WRITING = threading.RLock()


def written(base: Base, batch: Batch, asked: Asked) -> Tensor:
    """(B, most) tokens that follow a batch's sources, NOTHING behind the end of each.

    Vectors of the readout's own must be on the base (`howfine.vectors`). Raises DeltaError where
    scores were NaN or infinite in a step.
    """
    ends = ends_of(base, asked)
    apart = base.kind == language.SEQ2SEQ
    beams, penalty, _ = asked.search
    how = GenerationConfig(
        max_new_tokens=asked.most,
        num_beams=beams,
        length_penalty=penalty if beams > 1 else None,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=base.tokenizer.pad_token_id or 0,
        bos_token_id=base.tokenizer.bos_token_id,
        decoder_start_token_id=layout.beginning(base)[0] if apart else None,
    )
    watch = _WATCH.get()
    more: dict[str, Any] = (
        {} if watch is None else {"streamer": watch, "stopping_criteria": watch.stops}
    )
    odd = _Odd()
    more["logits_processor"] = LogitsProcessorList([odd])
    with torch.no_grad(), _neutral(base.tower):
        found = base.tower.generate(**batch.inputs, generation_config=how, **more)
    checks.finite(odd.count(len(found)), len(found), base.name)
    before = "decoder_input_ids" if apart else "input_ids"
    return cut(found[:, batch.inputs[before].shape[1] :], ends, asked.most)


def ends_of(base: Base, asked: Asked) -> list[int]:
    """Tokens that end a text: the tokenizer's, and one more than it has for a vector's."""
    own = None if asked.own is None else vectors.ending(base)
    return [end for end in (base.tokenizer.eos_token_id, own) if end is not None]


def cut(found: Tensor, ends: Sequence[int], most: int) -> Tensor:
    """(B, most) of written tokens: those before the first end, and NOTHING behind."""
    ended = torch.isin(found, torch.tensor(ends, device=found.device)).long().cumsum(1)
    found = found.masked_fill(ended > 0, NOTHING)[:, :most]
    return functional.pad(found, (0, most - found.shape[1]), value=NOTHING)


class _Odd(LogitsProcessor):
    """Sees whose scores were no numbers in some step, which a written text does not show."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        odd = (scores.isnan() | scores.isposinf()).any(1)
        self._rows = odd if self._rows is None else self._rows | odd
        return scores

    def count(self, examples: int) -> int:
        """Of so many examples, each of which may have several beams."""
        return 0 if self._rows is None else int(self._rows.view(examples, -1).any(1).sum())


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


class Watch(BaseStreamer):
    """Sees each step's tokens while texts are written, and can have the writing stopped."""

    def __init__(self, see: Callable[[Tensor], bool]) -> None:
        """`see` gets the tokens (B,) of a step and says whether to go on."""
        self._see, self._begun, self._goes_on = see, False, True
        self.stops = StoppingCriteriaList([self._stopped])

    def put(self, value: Tensor) -> None:
        """The sources first, which nobody wrote; then each step's tokens."""
        if self._begun:
            self._goes_on = self._goes_on and self._see(value)
        self._begun = True

    def end(self) -> None:
        """Nothing is held back."""

    def _stopped(self, ids: Tensor, _: Any, **__: Any) -> Tensor:
        return torch.full((len(ids),), not self._goes_on, device=ids.device)


_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(see: Callable[[Tensor], bool]) -> Iterator[None]:
    """Let a function see the tokens of what is written inside, in this thread: see `Watch`."""
    token = _WATCH.set(Watch(see))
    try:
        yield
    finally:
        _WATCH.reset(token)


def likelihoods(base: Base, batch: Batch, targets: Tensor) -> Tensor:
    """(B, 2) negative log-likelihoods of a batch's targets, summed, and their numbers of tokens."""
    if base.kind == language.SEQ2SEQ:
        return _apart(base, batch, targets)
    state = base.body(**batch.inputs, use_cache=False).last_hidden_state
    # The scores of a token stand one place before it; no others are computed.
    rows, columns = _places(targets[:, 1:])
    scores = language.scores(base)(base.tower, state[rows, columns])
    return _sums(scores, targets[rows, columns + 1], rows, len(state))


def _apart(base: Base, batch: Batch, targets: Tensor) -> Tensor:
    """An encoder-decoder's, whose decoder has read its beginning before the first token."""
    found = base.tower(**batch.inputs, use_cache=False).logits
    rows, columns = _places(targets)
    first = found.shape[1] - targets.shape[1]
    return _sums(found[rows, columns + first], targets[rows, columns], rows, len(found))


def _places(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is to be learned."""
    rows, columns = torch.nonzero(targets != layout.UNSEEN, as_tuple=True)
    return rows, columns


def _sums(scores: Tensor, ids: Tensor, rows: Tensor, count: int) -> Tensor:
    """(count, 2) sums of negative log-likelihoods and numbers of tokens, by row."""
    losses = functional.cross_entropy(scores.float(), ids, reduction="none")
    made = torch.stack([losses, torch.ones_like(losses)], dim=1)
    return made.new_zeros(count, 2).index_add(0, rows, made)


def loss(outputs: Tensor, reduction: str) -> Tensor:
    """Of (B, 2) likelihoods as above: the mean over tokens, or over `examples`; a scalar."""
    total, tokens = (outputs if outputs.dtype == torch.float64 else outputs.float()).sum(0)
    return total / (len(outputs) if reduction == "examples" else tokens)


def progress(outputs: Tensor) -> float:
    """The log-likelihood of a token: texts are not written while training."""
    return -float(loss(outputs.double(), "tokens"))


def text(base: Base, tokens: Sequence[int] | Tensor) -> str:
    """The text of written tokens."""
    ids = torch.as_tensor(tokens)
    kept = ids[ids != NOTHING].tolist()
    return str(base.tokenizer.decode(kept, skip_special_tokens=True)).strip()


def texts(base: Base, rows: Tensor) -> np.ndarray:
    """(B,) texts of written rows (B, T)."""
    found = np.empty(len(rows), dtype=object)
    found[:] = [text(base, row) for row in rows]
    return found
