"""zero-shot: answers of a base that marks the right one of several options, with no training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from howfine.base import Base
from howfine.errors import SettingError
from howfine.evaluate import examples_of, logits
from howfine.readout import Wired
from howfine.recipe import Recipe

RECIPE = "unimc"


def zero_shot(
    base: Base | str,
    texts: Sequence[str | tuple[str, str]],
    options: Sequence[str],
    *,
    question: str = "",
    batch_size: int = 32,
    progress: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:
    """For each text its most probable option, and the probability of every option.

    Good answers need a base that was trained so (the recipe `unimc`). `settings` are the readout's.
    Raises SettingError for a base without a masked language model and for two equal options,
    TaskError for a text that holds the mask token.
    """
    if isinstance(texts, str):
        raise SettingError("zero_shot takes several texts; put the one in a list")
    known: Any = Recipe.load(RECIPE).readout
    if unknown := set(settings) - {field.name for field in fields(known)}:
        raise SettingError(f"zero_shot has no setting {', '.join(sorted(unknown))}: nothing trains")
    recipe = Recipe.load(RECIPE).override(options=tuple(options), question=question, **settings)
    read = recipe.readout
    base = Base.load(base, kind=read.kind) if isinstance(base, str) else base
    model = Wired(base, read, read.attach(base, tuple(options))).eval()
    examples = examples_of(texts)
    if not examples:
        return []
    outputs = logits(model, base, examples, batch_size=batch_size, progress=progress)
    chosen, shares = read.predict(outputs), read.probabilities(outputs)
    return [
        {
            "option": options[int(index)],
            "probability": float(row[int(index)]),
            "probabilities": dict(zip(options, map(float, row), strict=True)),
        }
        for index, row in zip(chosen, shares, strict=True)
    ]
