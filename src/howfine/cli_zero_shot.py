"""The commands zero-shot and meta-train."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from howfine import options


def zero_shot(
    texts: Annotated[list[str], typer.Argument(help="Texts; '-' reads lines from standard input.")],
    choices: Annotated[
        str, typer.Option("--options", help="What may be answered, with semicolons in between.")
    ],
    base: Annotated[
        str, typer.Option(help="A masked language model, best one that meta-train made.")
    ],
    question: Annotated[str, typer.Option(help="What is asked of each text.")] = "",
    answers: Annotated[
        str | None, typer.Option(help="Words for right and wrong: the base's own, or yes,no.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of an input: the base's own, or 256.")
    ] = None,
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
    told: dict[str, Any] = {"answers": answers, "max_length": max_length}
    stated = {name: value for name, value in told.items() if value is not None}
    found = run(loaded, given, wanted, question=question, progress=not as_json, **stated)
    said = "\n".join(
        f"{answer['option']}\t{answer['probability']:.3f}\t{line}"
        for answer, line in zip(found, lines, strict=True)
    )
    options.show(as_json, found, said)


def meta_train(
    context: typer.Context,
    task: Annotated[
        str, typer.Option(help="Multiple-choice sets, such as mc/commonsenseqa+mc/dream.")
    ],
    base: Annotated[str, typer.Option(help="A masked language model.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    seed: int = 0,
    train_size: Annotated[int | None, typer.Option(help="Train on so many examples.")] = None,
    data: options.DataDir = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    as_json: options.AsJson = False,
) -> None:
    """Make a base for zero-shot: train a masked language model on multiple-choice sets.

    Settings of the recipe unimc are flags too, such as --epochs 1 --learning-rate 5e-5.
    """
    from howfine.base import Base
    from howfine.pretrained import LANGUAGE_MODEL
    from howfine.zero_shot import meta_train as run

    found = options.load_task(options.stated_task(task, data, train=train_size))
    loaded = Base.load(base, kind=LANGUAGE_MODEL, device=device, dtype=dtype)
    told = options.settings(context.args)
    score = run(loaded, found, out, seed=seed, progress=not as_json, **told)
    result = {"folder": str(out), "score": score.as_dict()}
    options.show(as_json, result, f"{out}: {options.said(score)}; use it with zero-shot --base")
