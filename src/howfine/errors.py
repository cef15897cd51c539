"""Every error howfine raises on purpose, as one tree.

    HowfineError
    ├── SettingError        an unknown name, or a value out of its range
    ├── BaseError           a pretrained model that can't be had or used
    │   ├── BaseNotFound        no such folder, package or hub name (or no network to ask)
    │   ├── WrongBase           a delta meets a model it was not made on
    │   ├── UnknownArchitecture no anatomy row for this model type
    │   └── BaseInUse           tasks are combined on a base, and a pass is none of theirs
    ├── TaskError           examples that can't be learned from
    │   ├── TaskNotFound        no such task, file or hub dataset (or no network to ask)
    │   ├── MissingColumn       a named column is not in the data
    │   ├── UnknownLabel        a label outside the task's labels
    │   └── BadSplit            an empty or missing split, or a train split with one class
    ├── DeltaError          a delta file that can't be used
    │   ├── DamagedDelta        truncated, altered, or lying about its sizes
    │   └── UnsupportedFormat   written by a newer format version
    ├── TrainingError       training that can't go on (NaN loss, nothing to train)
    └── StorageError        a file that can't be written (no space, no permission)

A message is one sentence or two: what is wrong, where, what was found, what was expected,
and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HowfineError(Exception):
    """Root of the tree; the command line prints its message and exits with `exit_code`."""

    exit_code = 1


class SettingError(HowfineError, ValueError):
    """An unknown name, or a value out of its range."""

    exit_code = 2


class BaseError(HowfineError):
    """A pretrained model that can't be had or used."""


class BaseNotFound(BaseError):
    """No such folder, package or hub name."""


class WrongBase(BaseError):
    """A delta meets a model it was not made on."""


class UnknownArchitecture(BaseError):
    """No anatomy row for this model type."""


class BaseInUse(BaseError, RuntimeError):
    """Tasks are combined on a base, and a pass is none of theirs."""


class TaskError(HowfineError):
    """Examples that can't be learned from."""


class TaskNotFound(TaskError):
    """No such task, file or hub dataset."""


class MissingColumn(TaskError):
    """A named column is not in the data."""


class UnknownLabel(TaskError):
    """A label outside the task's labels."""


class BadSplit(TaskError):
    """An empty or missing split, or a train split with one class."""


class DeltaError(HowfineError):
    """A delta file that can't be used."""


class DamagedDelta(DeltaError):
    """A file that is truncated, altered, or lies about its sizes."""


class UnsupportedFormat(DeltaError):
    """A file written by a newer format version."""


class TrainingError(HowfineError):
    """Training that can't go on."""


class StorageError(HowfineError):
    """A file that can't be written."""


def near(name: str, known: Iterable[str]) -> str:
    """A sentence: did you mean 'x', where a known name is close, else all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(names)}."
