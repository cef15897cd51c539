"""The head of a tuned model, where one of our readouts says the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from howfine.base import Base
from howfine.errors import SettingError
from howfine.method import Tensors
from howfine.readout import Labels, Readout
from howfine.recipe import default_readout

# Parameters of a linear head, as transformers' models for classification call them.
_HEADS = ({"classifier.weight", "classifier.bias"}, {"score.weight"})
_SENTENCE = "ForSequenceClassification"


@dataclass(frozen=True)
class Answer:
    """How a tuned model answers: a readout, its classes and its head's tensors (none: no head)."""

    readout: Readout
    labels: Labels
    head: Tensors

    def given(self, base: Base) -> bool:
        """Whether there are answers: a head, or a readout that has no parameters."""
        return bool(self.head) or not self.readout.packed_shapes(base, self.labels)


def head_in(outside: Mapping[str, str], config: Mapping[str, Any]) -> list[str]:
    """Names of a linear head of one sentence, if that is all that a model has outside the base.

    `config` is the model's or an adapter's. Heads that answer for each token have the same names.
    """
    return sorted(outside) if set(outside) in _HEADS and _one_of_classes(config) else []


def _one_of_classes(config: Mapping[str, Any]) -> bool:
    """Whether a config says that its model gives a sentence one class, or a number."""
    stated = config.get("architectures")
    names = stated if isinstance(stated, list) else []
    sentence = bool(names) and all(str(name).endswith(_SENTENCE) for name in names)
    adapter = config.get("task_type") == "SEQ_CLS"
    return (sentence or adapter) and config.get("problem_type") != "multi_label_classification"


def left_out(outside: Mapping[str, str], answer: Answer) -> tuple[str, ...]:
    """Names of what the tuned model has outside the base and no head holds."""
    return () if answer.head else tuple(outside)


def answer_of(base: Base, config: Mapping[str, Any], head: Tensors) -> Answer:
    """The tuned model's own head, where our readout says the same; else none."""
    if not head:
        return no_answer()
    weight = next(each for each in head.values() if each.ndim == 2)
    bias = next((each for each in head.values() if each.ndim == 1), torch.zeros(len(weight)))
    classes = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(len(weight))}
    labels = tuple(str(classes.get(str(i), f"LABEL_{i}")) for i in range(len(weight)))
    if len(set(labels)) < len(labels):  # an answer would not say which class is meant
        labels = tuple(f"LABEL_{i}" for i in range(len(weight)))
    labels = () if len(weight) == 1 else labels
    readout: Any = default_readout()
    try:
        readout = replace(readout, pooling=base.anatomy.pooling).settled(base, labels)
        state = readout.attach(base, labels).state_dict()
    except SettingError:  # such as a pooler that the base never had
        return no_answer()
    found = {name: weight if value.ndim == 2 else bias for name, value in state.items()}
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in state.items()}:
        return no_answer()
    return Answer(readout, labels, found)


def no_answer() -> Answer:
    """Of a model without a head."""
    return Answer(default_readout(), (), {})
