"""A linear layer on a pooled hidden state: classification, or regression without labels.

Devlin et al. 2019, section 4.1. Cross-entropy, or mean squared error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from howfine.base import Base
from howfine.batch import Batch
from howfine.encoding import encoded
from howfine.errors import SettingError
from howfine.pooling import pool, reading
from howfine.readout import Head, Labels, Readout, class_answer, class_loss
from howfine.task import Example


@dataclass(frozen=True)
class Classifier(Readout):
    """Pool the last hidden state, drop out, one linear layer."""

    # What is read: cls | mean | last | pooler; "base" for what the base itself states.
    pooling: Literal["base", "cls", "mean", "last", "pooler"] = "base"
    # Tokens kept of an example (both texts together), special tokens counted.
    max_length: int = 128
    # Dropout before the linear layer.
    dropout: float = 0.1
    # Hold the first class's output at 0, as only differences count: a row less to train and store.
    reference: bool = False

    def __post_init__(self) -> None:
        if self.max_length < 1 or not 0 <= self.dropout < 1:
            raise SettingError(
                f"classifier: found max_length {self.max_length} and dropout {self.dropout}, "
                "expected at least 1 token and a share from 0 to below 1"
            )

    def settled(self, base: Base, labels: Labels = ()) -> Classifier:
        """With the pooling that this base states: another copy of it may state another."""
        pooling: Any = base.pooling if self.pooling == "base" else self.pooling
        return replace(self, pooling=pooling)

    def attach(self, base: Base, labels: Labels) -> Head:
        pooling = self.settled(base, labels).pooling
        if pooling == "pooler" and not base.has_pooler:
            raise SettingError(
                f"classifier pooling 'pooler': the base {base.name} has no pooler; "
                "use cls, mean or last"
            )
        if self.reference and len(labels) < 2:
            raise SettingError(
                "classifier reference holds the first class's output at 0, and a regression has no "
                "classes; leave it out"
            )
        rows = len(labels) - 1 if self.reference else max(1, len(labels))
        return _LinearHead(base, pooling, rows, self.dropout, self.reference)

    def collate(self, base: Base, examples: Sequence[Example], labelled: bool = True) -> Batch:
        if base.tokenizer is None:
            raise SettingError(
                f"readout 'classifier' reads texts, but the base {base.name} has no tokenizer; "
                "give a text base"
            )
        columns = list(zip(*(example.texts for example in examples), strict=True))
        targets = torch.tensor([example.label for example in examples]) if labelled else None
        if targets is not None and targets.is_floating_point():
            targets = targets.float()
        return Batch(inputs=encoded(base, columns, self.max_length), targets=targets)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return class_loss(outputs, targets)

    def predict(self, outputs: Tensor) -> Tensor:
        return class_answer(outputs)


class _LinearHead(Head):
    def __init__(
        self, base: Base, pooling: str, outputs: int, dropout: float, reference: bool
    ) -> None:
        super().__init__()
        self.reference = reference
        self.body_path = base.body_path
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(base.hidden_size, outputs)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, towers: nn.ModuleDict, batch: Batch) -> Tensor:
        with reading(self.pooling):
            state = towers.get_submodule(self.body_path)(**batch.inputs)
        pooled = pool(state, batch.inputs.get("attention_mask"), self.pooling)
        outputs = self.linear(self.dropout(pooled.to(self.linear.weight.dtype)))
        return functional.pad(outputs, (1, 0)) if self.reference else outputs


EXAMPLE = Classifier(max_length=32)
