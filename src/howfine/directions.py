"""What an aligned base of two towers says of pictures and texts: their directions, compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from howfine import checks
from howfine.base import Base
from howfine.batch import to_device
from howfine.delta import Delta
from howfine.errors import DeltaError, SettingError, TaskError
from howfine.evaluate import opened
from howfine.images import Picture, fault
from howfine.readout import Wired
from howfine.task import Example

Directions = npt.NDArray[np.float32]
# CLIP's plainest prompt (Radford et al. 2021, section 3.1.4).
PROMPT = "a photo of a {}."


class Encoder:
    """An aligned base with its delta on: see `encoder`."""

    def __init__(self, model: Wired, base: Base, batch_size: int, progress: bool) -> None:
        self.model, self.base = model, base
        self.batch_size, self.progress = batch_size, progress

    def texts(self, texts: Sequence[str]) -> Directions:
        """(n, width) directions of length 1. Raises TaskError for an empty text."""
        checks.several("texts", texts)
        for number, text in enumerate(texts, 1):
            if not text.strip():
                raise TaskError(f"text {number} is empty; give one that says something")
        return self._run([Example((text,)) for text in texts])

    def pictures(self, pictures: Sequence[Picture]) -> Directions:
        """The same of pictures. Raises TaskError for one that can't be decoded, or that moves."""
        for picture in pictures:
            if reason := fault(picture):
                raise TaskError(f"picture {picture.name} can't be used: {reason}; leave it out")
        return self._run([Example((), picture=picture) for picture in pictures])

    @torch.inference_mode()
    def _run(self, examples: Sequence[Example]) -> Directions:
        if not examples:
            raise SettingError("found nothing to encode, expected a text or a picture at least")
        starts = range(0, len(examples), self.batch_size)
        found = []
        for start in tqdm(starts, desc="encode", disable=not self.progress):
            rows = examples[start : start + self.batch_size]
            batch = self.model.readout.collate(self.base, rows, labelled=False)
            fields = to_device(batch.as_kwargs(), self.base.device)
            # They come over the root of the temperature.
            outputs = self.model(**fields)["logits"].float()
            found.append(torch.nn.functional.normalize(outputs, dim=-1).cpu().numpy())
        made: Directions = np.concatenate(found)
        if not np.isfinite(made).all():
            raise DeltaError(
                "the delta gives NaN or infinity: its training diverged, or it was scaled too far; "
                "tune again"
            )
        return made


@contextmanager
def encoder(
    delta: Delta | str | Path,
    base: Base | None = None,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Iterator[Encoder]:
    """An aligned base with a delta on, to encode texts and pictures; off again on leaving.

    Raises SettingError for a delta that aligns nothing, and as `Delta.applied`.
    """
    delta, base = opened(delta, base)
    if not delta.readout.aligns:
        raise SettingError(
            "this delta was not trained to align pictures with texts; give one that was, such as "
            "by the recipe lilt"
        )
    with delta.applied(base) as model:
        yield Encoder(model, base, batch_size, progress)


def classify(
    delta: Delta | str | Path,
    pictures: Sequence[Picture],
    names: Sequence[str],
    base: Base | None = None,
    *,
    prompts: Sequence[str] = (PROMPT,),
    batch_size: int = 64,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Zero-shot classification: of each picture the `name`, its `index` and its `similarity`.

    A class's direction is the mean of those of its prompts, in which {} stands for its name
    (Radford et al. 2021). Raises SettingError for fewer than two different names, or a prompt
    without {}.
    """
    checks.several("names", names)
    checks.several("prompts", prompts)
    if len(set(names)) < 2 or len(set(names)) < len(names) or not all(map(str.strip, names)):
        raise SettingError(
            f"class names: found {list(names)!r:.200}, expected two or more, all different, none "
            "of them empty"
        )
    if not prompts or odd(prompts):
        raise SettingError(
            f"prompts: found {odd(prompts) or 'none'!r}, expected {{}} in each, for a class's name"
        )
    if not pictures:
        return []
    with encoder(delta, base, batch_size=batch_size, progress=progress) as encode:
        told = [prompt.replace("{}", name) for name in names for prompt in prompts]
        classes = encode.texts(told).reshape(len(names), len(prompts), -1).mean(axis=1)
        classes /= np.linalg.norm(classes, axis=1, keepdims=True)
        shown = encode.pictures(pictures)
    scores = shown @ classes.T
    best = scores.argmax(axis=1)
    return [
        {"name": names[index], "index": int(index), "similarity": float(row[index])}
        for index, row in zip(best, scores, strict=True)
    ]


def odd(prompts: Sequence[str]) -> str:
    """The first prompt that has no place for a name, "" where all have one."""
    return next((prompt for prompt in prompts if "{}" not in prompt), "")
