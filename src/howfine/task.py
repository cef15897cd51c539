"""A task: examples in three splits, labels and a metric. It knows no model and no tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from howfine import checks
from howfine.checks import ALIGNMENT, CLASSIFICATION, GENERATION, REGRESSION
from howfine.errors import BadSplit, SettingError, TaskNotFound, UnknownLabel, near
from howfine.images import Picture
from howfine.tasks import (
    SPLITS,
    Found,
    Row,
    choice,
    few_shot,
    files,
    generation,
    glue,
    image_sets,
    key,
    rotten_tomatoes,
    shots,
    stratified,
    tables,
)
from howfine.tasks.segments import kinds_of, unlearned
from howfine.tasks.values import class_values, score_of
from howfine.tasks.wanted import Wanted, wanted

DEFAULT_METRIC = {
    CLASSIFICATION: "accuracy",
    REGRESSION: "pearson_spearman",
    GENERATION: "bleu",
    ALIGNMENT: "mean_recall",
}
# Those whose tasks have a name in front.
COLLECTIONS = (few_shot, choice, generation, image_sets)
DATA_VARIABLE = "HOWFINE_DATA"


@dataclass(frozen=True)
class Example:
    """One or two texts, and a class index, a score, or texts to write."""

    texts: tuple[str, ...]
    label: int | float = 0
    # What may be answered, where that differs from example to example: the label is its index.
    options: tuple[str, ...] = ()
    # What may be written, where the answer is a text: the first one is learned, all are references.
    targets: tuple[str, ...] = ()
    # (kind, text) in reading order, where the text is made of such; the last is what is to be
    # written: its kind and "".
    segments: tuple[tuple[str, str], ...] = ()
    # What the text is a caption of.
    picture: Picture | None = None
    # What a teacher answers: the logarithm of each class's probability, or a score.
    taught: tuple[float, ...] = ()


@dataclass(frozen=True)
class Task:
    """Examples to learn from, to choose by and to report on.

    Raises, when made, BadSplit for a missing or empty split or a train split with one class,
    UnknownLabel for a class index outside the labels, SettingError for a metric that doesn't fit.
    """

    name: str
    # "train", "dev" and "test".
    splits: Mapping[str, Sequence[Example]] = field(repr=False)
    # Class names by index; () for regression and generation.
    labels: tuple[str, ...]
    # A name in metrics.METRICS.
    metric: str
    # One sentence: the source, and how the splits were made.
    provenance: str
    # Whether `Task.load(name)` gives these examples: not where options chose columns or splits.
    by_name: bool = True

    def __post_init__(self) -> None:
        """Refuse what can't be learned from."""
        checks.learnable(self)
        checks.fits(self)

    @property
    def kind(self) -> str:
        """ "classification", "regression", "generation" or "alignment" (of pictures)."""
        first = self.splits["train"][0]
        if self.labels:
            return CLASSIFICATION
        if first.picture:
            return ALIGNMENT
        return GENERATION if first.targets else REGRESSION

    def targets(self, split: str) -> np.ndarray:
        """(n,) what a metric compares with: classes, scores, tuples of texts, pictures' digests."""
        examples = self.splits[split]
        if self.kind == ALIGNMENT:
            return np.asarray([example.picture.digest for example in examples if example.picture])
        if self.kind != GENERATION:
            return np.asarray([example.label for example in examples])
        found = np.empty(len(examples), dtype=object)
        found[:] = [example.targets for example in examples]
        return found

    @cached_property
    def segment_kinds(self) -> tuple[str, ...]:
        """Kinds of segments as they first appear, those that are written last; () for none.

        Train's come first: dev and test may have kinds that it lacks, as tables do.
        """
        return kinds_of(example.segments for split in SPLITS for example in self.splits[split])

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 over labels and all examples in order."""
        digest = hashlib.sha256(json.dumps(list(self.labels)).encode())
        for split in SPLITS:
            for example in self.splits[split]:
                told: list[Any] = [split, *example.texts, example.label, *example.options]
                told += [*example.targets, *([example.segments] if example.segments else [])]
                told += [example.picture.digest] if example.picture else []
                told += [example.taught] if example.taught else []
                digest.update(json.dumps(told).encode())
        return digest.hexdigest()[:16]

    def subset(
        self,
        *,
        train: int | None = None,
        dev: int | None = None,
        test: int | None = None,
        seed: int = 0,
    ) -> Task:
        """The task with at most so many examples of each split (None: all of them), in order.

        Classes keep their shares, to one example, and none is lost while there is room; scores
        are sampled evenly. The choice is fixed by the seed. Raises SettingError for a size < 1,
        BadSplit where one class is left in train.
        """
        sizes = {"train": train, "dev": dev, "test": test}
        splits = dict(self.splits)
        for number, (split, size) in enumerate(sizes.items()):
            if size is None:
                continue
            if size < 1:
                raise SettingError(f"subset size {split}={size}, expected at least 1")
            rng, whole = np.random.default_rng([seed, number]), self.splits[split]
            strata = [example.label if self.labels else 0 for example in whole]
            splits[split] = [whole[row] for row in stratified(strata, size, rng)]
        if not (asked := ", ".join(f"{s} {n}" for s, n in sizes.items() if n is not None)):
            return self
        provenance = f"{self.provenance}; a sample of {asked} at most, seed {seed}"
        return replace(self, splits=splits, provenance=provenance)

    def shots(self, count: int, seed: int = 0) -> Task:
        """The few-shot task: `count` train rows of each class for train, as many others for dev.

        Of copies of a text one counts; test stays whole. Raises SettingError for a count < 1 and
        for scores, BadSplit where a class has too few rows.
        """
        if count < 1:
            raise SettingError(f"{count} examples of each class of {self.name}: expected 1 or more")
        if not self.labels:
            raise SettingError(f"task {self.name} has no classes to take examples of; use subset")
        rows = self.splits["train"]
        marks = [key(row.texts) for row in rows]
        chosen = shots([row.label for row in rows], marks, count, np.random.default_rng(seed))
        few = {s: [rows[i] for i in part] for s, part in zip(SPLITS, chosen, strict=False)}
        if lost := {row.label for row in rows} - {row.label for row in few["train"]}:
            raise BadSplit(
                f"task {self.name}: class {self.labels[int(min(lost))]!r} has one train example "
                "without copies, expected two at least: one to train and one to choose by"
            )
        made = f"{self.provenance}; {count} of each class for train and for dev, seed {seed}"
        return replace(self, splits={**self.splits, **few}, provenance=made)

    @staticmethod
    def load(
        name_or_path: str | Path,
        *,
        text: str | Sequence[str] | None = None,
        label: str | None = None,
        target: str | None = None,
        form: str | None = None,
        image: str | None = None,
        data: str | Path | None = None,
        metric: str | None = None,
        train: str | None = None,
        dev: str | None = None,
        test: str | None = None,
        seed: int = 0,
    ) -> Task:
        """A task by name, from files, or from the hub; docs/tasks.md shows each.

        `text` names one column or two ("premise,hypothesis"), `label` one of classes or scores, or
        `target` one of texts to be written (a text each, or a list of them); `form` instead says
        what the rows are made of (a name in `howfine.tasks.forms.FORMS`); `image` names a column of
        pictures, of which `text` has the captions. `train`, `dev` and `test` say which part of the
        source is which split: a file's stem in a folder, another file beside a single one, a
        split's name on the hub. `seed` salts the hash that makes missing splits. `data` is the
        folder of GLUE's files, else the variable HOWFINE_DATA. Raises TaskError or a kind of it,
        SettingError for options that don't fit.
        """
        name = str(name_or_path)
        options = {"text": text, "label": label, "target": target, "form": form, "image": image}
        options |= {"train": train, "dev": dev, "test": test}
        given = {option: value for option, value in options.items() if value is not None}
        found = _named(name, data, {**given, **({"seed": seed} if seed else {})})
        found = found or _unnamed(name, wanted(given, seed))
        checks.filled(name, found.splits)
        labels, metric, splits = _encoded(found, metric or found.metric)
        return Task(
            name=name.removeprefix("glue/"),
            splits=splits,
            labels=labels,
            metric=metric,
            provenance=found.provenance + unlearned(found.splits),
            by_name=not given and not seed,
        )


def _named(name: str, data: str | Path | None, options: Mapping[str, Any]) -> Found | None:
    """A task known by name, None where it is none."""
    short = name.removeprefix("glue/")
    collection = next((each for each in COLLECTIONS if each.known(name)), None)
    if name != rotten_tomatoes.NAME and short not in glue.TASKS and collection is None:
        return None
    if options:
        raise SettingError(
            f"task {name!r} has fixed columns and splits, but found {', '.join(options)}; "
            "leave them out, or name a file"
        )
    if name == rotten_tomatoes.NAME:
        return rotten_tomatoes.read()
    source = Path(folder) if (folder := data or os.environ.get(DATA_VARIABLE)) else None
    return collection.read(name, source) if collection else glue.read(short, source)


def _unnamed(name: str, asked: Wanted) -> Found:
    """A folder, a file or a data set of the hub."""
    path = Path(name).expanduser()
    if path.exists() or path.suffix in tables.READERS:
        return files.read(path, asked)
    known = [rotten_tomatoes.NAME, *glue.TASKS, *(n for each in COLLECTIONS for n in each.names())]
    owners = [n.partition("/")[0] + "/" for n in known if "/" in n]  # none of the hub's
    if name.count("/") == 1 and not name.startswith((".", "/", "~", *owners)):
        return files.read_hub(name, asked)
    found = "is no known name, no file or folder, and no owner/name of the hub"
    raise TaskNotFound(f"task {name!r} {found}. {near(name, known)}")


def _encoded(
    found: Found, metric: str | None
) -> tuple[tuple[str, ...], str, dict[str, list[Example]]]:
    """Class names, metric, and examples whose labels are class indices or scores."""
    if found.splits["train"][0].targets:
        texts = {
            split: [Example(r.texts, targets=r.targets, segments=r.segments) for r in rows]
            for split, rows in found.splits.items()
        }
        return (), metric or DEFAULT_METRIC[GENERATION], texts
    if found.splits["train"][0].picture:
        shown = {
            split: [Example(row.texts, picture=row.picture) for row in rows]
            for split, rows in found.splits.items()
        }
        return (), metric or DEFAULT_METRIC[ALIGNMENT], shown
    values: Sequence[Any]
    if found.labels is None:
        values = class_values(found.splits, metric)
        labels = tuple(str(v).lower() if isinstance(v, bool) else str(v) for v in values)
    else:
        labels, values = found.labels, range(len(found.labels))
    index = {value: number for number, value in enumerate(values)}

    def encoded(row: Row) -> Example:
        if not labels:
            return Example(row.texts, score_of(row))
        if row.label not in index:
            raise UnknownLabel(
                f"{row.where}: label {row.label!r} is none of the train split's labels, which are "
                f"{', '.join(map(str, values))}; correct the row, or name another split if this "
                "one has hidden labels"
            )
        return Example(row.texts, index[row.label], row.options)

    splits = {split: [encoded(row) for row in found.splits[split]] for split in SPLITS}
    return labels, metric or DEFAULT_METRIC[CLASSIFICATION if labels else REGRESSION], splits
