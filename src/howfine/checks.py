"""What a task must be to be learned from and scored, each with its error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from howfine.errors import BadSplit, DeltaError, SettingError, TaskError, UnknownLabel, near
from howfine.metrics import METRICS, Metric
from howfine.tasks import SPLITS

# What a task asks for.
CLASSIFICATION, REGRESSION, GENERATION = "classification", "regression", "generation"
ALIGNMENT = "alignment"


class Asked(Protocol):
    """What is asked of a task: see `howfine.task.Task`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def metric(self) -> str: ...
    @property
    def splits(self) -> Mapping[str, Sequence[Any]]: ...


def known(metric: str) -> Metric:
    """A metric by name. Raises SettingError with the near one."""
    if metric not in METRICS:
        raise SettingError(f"metric {metric!r} is unknown. {near(metric, METRICS)}")
    return METRICS[metric]


def finite(odd: int, of: int, base: str) -> None:
    """Raises DeltaError where `odd` of so many examples had outputs of NaN or infinity."""
    if odd:
        raise DeltaError(
            f"the delta gives NaN or infinity for {odd} of {of} examples: its training diverged, "
            f"or it was scaled too far, or {base} overflows in its number format; tune with a "
            "lower learning_rate, or use dtype float32"
        )


def fits(task: Asked) -> None:
    """Raises SettingError for a metric that does not fit the task's labels."""
    metric = known(task.metric)
    if metric.kind != task.kind:
        fit = [name for name, other in METRICS.items() if other.kind == task.kind]
        raise SettingError(
            f"metric {metric.name!r} is for {metric.kind}, but task {task.name!r} is "
            f"{task.kind}; choose of {', '.join(fit)}"
        )
    if metric.name == "f1" and len(task.labels) != 2:
        raise SettingError(
            f"metric 'f1' scores the second of two classes, but task {task.name!r} has "
            f"{len(task.labels)}; choose macro_f1"
        )


def filled(name: str, splits: Mapping[str, Sequence[Any]]) -> None:
    """Raises BadSplit for a split without examples."""
    for split in SPLITS:
        if not splits.get(split):
            raise BadSplit(
                f"split {split!r} of task {name!r} has no examples, expected some in each of "
                f"{', '.join(SPLITS)}; give more rows, or a file for each split"
            )


# What is asked for, in words.
_ASKED = {
    CLASSIFICATION: "classes or scores",
    REGRESSION: "classes or scores",
    GENERATION: "texts to be written",
    ALIGNMENT: "pictures with captions to be aligned",
}


def answerable(task: Asked, answers: str, who: str) -> None:
    """Raises TaskError where a task asks for other answers than a readout gives.

    `answers` is "classification" for classes or scores, "generation" or "alignment".
    """
    asks, gives = _ASKED[task.kind], _ASKED[answers]
    if asks != gives:
        raise TaskError(
            f"task {task.name!r} has {asks}, and {who} answers with {gives}; give a task or a "
            "readout of the same kind (the column of texts to be written is named with target, "
            "that of pictures with image)"
        )


def pictured(task: Asked) -> None:
    """Raises TaskError for pictures in some examples only, or a single one to choose from."""
    for split in SPLITS:
        counts = {bool(example.picture) for example in task.splits[split]}
        if counts == {False, True} or (task.kind == ALIGNMENT) not in counts:
            raise TaskError(
                f"split {split!r} of task {task.name!r} has examples without a picture, and other "
                "examples have one; give all of them a picture, or none"
            )
        if task.kind == ALIGNMENT and len({e.picture.digest for e in task.splits[split]}) < 2:
            raise BadSplit(
                f"split {split!r} of task {task.name!r} has one picture, expected two at least: "
                "a caption is to find its own among others; give more rows"
            )


def segmented(task: Asked) -> None:
    """Raises TaskError for segments in some examples only, or that can't be read."""
    examples = [(split, n, e) for split in SPLITS for n, e in enumerate(task.splits[split], 1)]
    whole = bool(examples[0][2].segments)
    for split, number, example in examples:
        where, segments = f"split {split!r} of task {task.name!r}, row {number}", example.segments
        if bool(segments) != whole:
            raise TaskError(
                f"{where} has {'segments' if segments else 'no segments'}, and the first train "
                f"row has {'some' if whole else 'none'}; give all examples segments, or none"
            )
        if segments and not example.targets:
            raise TaskError(f"{where} has segments, and no text to be written; give it targets")
        if segments and (len(segments) < 2 or segments[-1][1] != ""):
            raise TaskError(
                f"{where} has the segments {segments!r:.200}, expected at least one to read, and "
                "at the end the kind of what is to be written with '' as its text"
            )
        for kind, text in segments[:-1]:
            if not text.strip():
                raise TaskError(
                    f"{where} has nothing for {kind!r}, expected a text; leave the segment out"
                )


def learnable(task: Asked) -> None:
    """Raises TaskError's children for splits that can't be learned from or compared."""
    filled(task.name, task.splits)
    for split in SPLITS:
        examples = task.splits[split]
        counts = {len(example.texts) for example in examples}
        if counts not in ({1}, {2}):
            raise TaskError(
                f"split {split!r} of task {task.name!r} has examples of {sorted(counts)} texts, "
                "expected one text in each, or two in each"
            )
        encodable(f"split {split!r} of task {task.name!r}", examples)
        for example in examples:
            if example.options and not 0 <= example.label < len(example.options):
                raise UnknownLabel(
                    f"split {split!r} of task {task.name!r}: {example.texts[0][:60]!r} has the "
                    f"label {example.label} and {len(example.options)} options; expected an index"
                )
        loose = [e.targets for e in examples if not isinstance(e.targets, tuple)]
        if loose:
            raise TaskError(
                f"split {split!r} of task {task.name!r} has the targets {loose[0]!r}, expected a "
                "tuple of texts"
            )
        if len({bool(example.targets) for example in examples}) > 1:
            raise TaskError(
                f"split {split!r} of task {task.name!r} has examples with texts to be written and "
                "examples without, expected one in each, or in none"
            )
        bad = {e.label for e in examples} - set(range(len(task.labels))) if task.labels else set()
        if bad:
            raise UnknownLabel(
                f"split {split!r} of task {task.name!r} has class indices {sorted(bad)}, expected "
                f"0 to {len(task.labels) - 1}"
            )
    segmented(task)
    pictured(task)
    _varied(task)


def several(what: str, given: Any) -> None:
    """Raises SettingError for one text where a list of them belongs: it has letters, no items."""
    if isinstance(given, str):
        raise SettingError(f"found one text, {given!a:.80}, expected several {what} in a list")


def encodable(where: str, examples: Sequence[Any]) -> None:
    """Raises TaskError for half a character, which no tokenizer takes and no file holds."""
    for number, example in enumerate(examples, 1):
        read = (text for _, text in example.segments)
        for text in (*example.texts, *example.options, *example.targets, *read):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise TaskError(
                    f"{where}, row {number}, holds {text!a:.200} with half a character (a lone "
                    f"surrogate) at place {error.start + 1}, expected whole ones; correct the row "
                    "or take it out"
                ) from error


def _varied(task: Asked) -> None:
    if len(set(task.labels)) < len(task.labels):
        twice = next(label for label in task.labels if task.labels.count(label) > 1)
        raise TaskError(
            f"task {task.name!r} has {task.labels.count(twice)} classes of the name {twice!r}, "
            "expected a name of its own for each; rename them, or make them one class"
        )
    classes = {example.label for example in task.splits["train"]}
    if task.labels and len(classes) == 1:
        raise BadSplit(
            f"every train example of task {task.name!r} has the label "
            f"{task.labels[int(classes.pop())]!r}, expected two classes at least; check the labels"
        )
