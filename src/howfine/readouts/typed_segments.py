"""A language model that writes the answer to an input of typed segments (VLM's).

Lin, Madotto & Fung 2020, "Exploring versatile generative language model via parameter-efficient
transfer learning", §3: a beginning, the segments' markers, their types and an end are vectors of
the task's own, (2 + kinds) · E numbers; a position is read as word + position + type. The loss is
the mean negative log-likelihood of the answer's tokens and its end. The vocabulary is frozen, and
rows of other tasks are no part of the softmax, neither in training nor in use, so that tasks that
share a base write what each writes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from howfine import language, layout, segmented, vectors, writing
from howfine.base import Base
from howfine.batch import Batch
from howfine.errors import SettingError
from howfine.metrics import Metric
from howfine.readout import Asked, Head, Labels, Readout
from howfine.task import Example, Task

# Of the vectors at their start: the original's.
DEVIATION = 0.02


@dataclass(frozen=True)
class TypedSegments(Readout):
    """Which kinds of segments there are, and how answers are written."""

    kind = "causal_lm"
    writes = True

    # Kinds of segments, each with a vector; () for those of the task's training examples.
    kinds: tuple[str, ...] = ()
    # Whether a segment's vector is added at each of its positions, and not at its marker alone.
    typed: bool = True
    # Tokens of an input: segments, markers and answer.
    max_length: int = 256
    # Tokens that may be written, the end's among them; targets are cut to as many.
    max_new_tokens: int = 64
    # Hypotheses of a beam search; 1 takes the likeliest token each time.
    beams: int = 1
    # How many of the kinds, the last ones, are written; 0 for as many as the examples have.
    answers: int = 0

    def __post_init__(self) -> None:
        if min(self.max_length, self.max_new_tokens, self.beams) < 1:
            raise SettingError(
                f"typed_segments: found max_length {self.max_length}, max_new_tokens "
                f"{self.max_new_tokens} and beams {self.beams}, expected 1 at least of each"
            )
        if not 0 <= self.answers <= max(1, len(self.kinds)):
            raise SettingError(
                f"typed_segments answers {self.answers}: expected at most as many as there are "
                f"kinds, {len(self.kinds)}"
            )
        if len(set(self.kinds)) < len(self.kinds) or not all(map(str.strip, self.kinds)):
            raise SettingError(
                f"typed_segments kinds {self.kinds}: expected names that differ, none of them blank"
            )

    @property
    def adds_up(self) -> bool:
        return False  # a mean over tokens

    def of_task(self, task: Task) -> TypedSegments:
        if self.kinds:
            return self
        rows = [row for split in task.splits.values() for row in split if row.segments]
        written = {row.segments[-1][0] for row in rows}
        return replace(self, kinds=task.segment_kinds, answers=len(written))

    def settled(self, base: Base, labels: Labels = ()) -> TypedSegments:
        return replace(self, kinds=self.kinds or segmented.PLAIN, answers=self.answers or 1)

    def attach(self, base: Base, labels: Labels) -> Head:
        language.require(base, "readout typed_segments", (language.CAUSAL,))
        settled = self.settled(base)
        layout.room(base, settled)
        width, out = base.embedding.weight.shape[1], language.decoder(base).weight.shape[1]
        if width != out:
            raise SettingError(
                f"{base.name} reads vectors of {width} numbers and scores words by {out}, and a "
                "task's vectors are used for both; choose the readout language_model"
            )
        return _Writer(base, settled)

    def collate(self, base: Base, examples: Sequence[Example], labelled: bool = True) -> Batch:
        return segmented.batch(base, self.settled(base), examples, labelled)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return writing.loss(outputs, "tokens")

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.long()

    def predictions(self, base: Base, outputs: Tensor) -> np.ndarray:
        return writing.texts(base, self.predict(outputs))

    def progress(self, outputs: Tensor, targets: np.ndarray, metric: Metric) -> float:
        return writing.progress(outputs)


class _Writer(Head):
    """With targets (B, 2): negative log-likelihoods, summed, and numbers of tokens.

    Else (B, T) tokens, written. Its parameter `rows` (2 + kinds, E) are the task's vectors.
    """

    def __init__(self, base: Base, settings: TypedSegments) -> None:
        super().__init__()
        self._base, self._settings = base, settings
        made = torch.randn(vectors.KINDS + len(settings.kinds), base.embedding.weight.shape[1])
        self.rows = nn.Parameter(DEVIATION * made)

    @property
    def asked(self) -> Asked:
        return Asked(self._settings.max_new_tokens, self._settings.beams, own=self.rows)

    def forward(self, towers: nn.ModuleDict, batch: Batch) -> Tensor:
        off = vectors.put_on(self._base, self.rows)
        try:
            if batch.targets is None:
                return writing.written(self._base, batch, self.asked)
            return writing.likelihoods(self._base, batch, batch.targets)
        finally:
            off()


EXAMPLE = TypedSegments(kinds=("source", "target"), max_length=48, max_new_tokens=12)
