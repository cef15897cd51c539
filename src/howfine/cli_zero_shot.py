"""The command zero-shot."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from howfine import options


def zero_shot(
    texts: Annotated[list[str], typer.Argument(help="Texts; '-' reads lines from standard input.")],
    choices: Annotated[
        str, typer.Option("--options", help="What may be answered, with semicolons in between.")
    ],
    base: Annotated[
        str, typer.Option(help="A masked language model, best one trained by the recipe unimc.")
    ],
    question: Annotated[str, typer.Option(help="What is asked of each text.")] = "",
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    as_json: options.AsJson = False,
) -> None:
    """Choose one of several options for each text, with no training at all.

    A pair of texts is one argument with a tab between the two; {pair} in an option stands for the
    second: --options "it follows that {pair};it is denied that {pair}".
    """
    from howfine.base import Base
    from howfine.pretrained import LANGUAGE_MODEL
    from howfine.zero_shot import zero_shot as run

    lines = [line.rstrip("\n") for line in sys.stdin] if texts == ["-"] else texts
    given: list[Any] = [tuple(line.split("\t")) if "\t" in line else line for line in lines]
    wanted = [option.strip() for option in choices.split(";") if option.strip()]
    loaded = Base.load(base, kind=LANGUAGE_MODEL, device=device, dtype=dtype)
    answers = run(loaded, given, wanted, question=question, progress=not as_json)
    said = "\n".join(
        f"{answer['option']}\t{answer['probability']:.3f}\t{line}"
        for answer, line in zip(answers, lines, strict=True)
    )
    options.show(as_json, answers, said)
