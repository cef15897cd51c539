"""The command `extract`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from howfine import options

if TYPE_CHECKING:
    from howfine.extract import Extracted

_Target = Annotated[int | None, typer.Option("--bytes", help="The largest file that fits.")]


# long: an option takes a line or three
def extract(
    before: Annotated[str, typer.Argument(help="The base: 'minilm', a folder, or a name.")],
    after: Annotated[
        Path,
        typer.Argument(help="Tuned from it: a checkpoint, a PEFT LoRA folder, or a delta file."),
    ],
    out: Annotated[Path, typer.Argument(help="The *.delta.safetensors file to write.")],
    most: _Target = None,
    density: Annotated[
        float | None, typer.Option(help="Keep at most this share of all entries.")
    ] = None,
    loss: Annotated[
        float | None, typer.Option(help="The smallest file with (1 - LOSS) of AFTER's score.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="As for tune: what scores are taken on.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Of --task: train, dev or test; default: dev.")
    ] = None,
    store: Annotated[str, typer.Option(help="steps, sign, bitdelta, fp16 or fp32.")] = "steps",
    weigh: Annotated[
        str, typer.Option(help="none, or fisher: finer steps where the task is sensitive.")
    ] = "none",
    gain: Annotated[
        bool | None,
        typer.Option(
            help="Of --task: scale what is kept so that answers are AFTER's; default: gain."
        ),
    ] = None,
    data: options.DataDir = None,
    text: options.TextColumns = None,
    label: options.LabelColumn = None,
    as_json: options.AsJson = False,
) -> None:
    """Store what AFTER changes of BEFORE in the fewest bytes.

    One target: --bytes, --density, or --loss with a --task. The models are streamed.
    """
    from howfine.errors import SettingError
    from howfine.extract import extract as run

    of_task = {"split": split, "gain": gain, "text": text, "label": label, "data": data}
    idle = [f"--{name}" for name, value in of_task.items() if value is not None]
    if task is None and idle:
        idle = ["--no-gain" if name == "--gain" and not gain else name for name in idle]
        raise SettingError(f"{' and '.join(idle)}: only for --task; give that, too, or neither")
    found = options.load_task(options.stated_task(task, data, text, label)) if task else None
    targets: dict[str, Any] = {"bytes": most, "density": density, "loss": loss}
    chosen: dict[str, Any] = {"store": store, "weigh": weigh, "gain": gain is not False}
    chosen["split"] = "dev" if split is None else split
    made = run(before, after, out, task=found, progress=not as_json, **targets, **chosen)
    options.show(as_json, made.as_dict(), _said(made, task))


def _said(made: Extracted, task: str | None) -> str:
    said = f"{made.path}: {made.bytes:,} bytes, {made.kept:,} of {made.entries:,} entries, "
    said += f"squared error {made.error:.2%}"
    if made.gain != 1:
        said += f", times {made.gain:.2f}"
    if made.score is not None and made.reference is not None:
        said += f"; {options.said(made.score)}; the tuned model {made.reference.value:.4f}"
    elif not made.head:
        said += "; without a head, so it can be merged and not evaluated"
        said += f" (--task {task} was not used)" if task else ""
    if made.left_out:
        said += f"; left out: {', '.join(made.left_out)}"
    return said
