"""A study as its folder has it: study.json, the records of its runs, its base and its task."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from howfine.base import Base
from howfine.errors import SettingError
from howfine.ledger import Ledger, Record, unpack_predictions
from howfine.metrics import METRICS
from howfine.task import Task


def read(
    folder: Path, base: Base | str | None, task: Task | str | None
) -> tuple[dict[str, Any], list[Record], Base, Task]:
    """study.json, the records of its runs, and base and task, loaded by it where not given.

    Raises SettingError for a folder without runs, and for another base or task than the study's.
    """
    study = read_json(folder / "study.json")
    _check_stated(study, folder / "study.json")
    records = _records(folder, study.get("keys"))
    base = _base(base, study, folder)
    task = _task(task, study, folder)
    _check_made_on(base, task, study.get("made_on", {}), folder)
    _check_measured_on(task, records, folder / "runs.jsonl")
    return study, records, base, task


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingError(
            f"{path} is not JSON ({error}); run the study again, which writes it anew"
        ) from error
    if not isinstance(found, dict):
        raise SettingError(f"{path} holds no JSON object; run the study again")
    return found


def _are_texts(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# What study.json may state, and what a record of a finished run holds: whether a value will do.
_STATED: dict[str, Callable[[Any], bool]] = {
    "base": lambda value: isinstance(value, str),
    "kind": lambda value: isinstance(value, str),
    "task": lambda value: isinstance(value, str) or _are_arguments(value),
    "made_on": lambda value: isinstance(value, dict) and _are_texts(value.values()),
    "margin": _is_number,
    "command": lambda value: isinstance(value, str),
    "keys": lambda value: isinstance(value, list) and _are_texts(value),
}
_OF_ALL: dict[str, Callable[[Any], bool]] = {
    "recipe": lambda value: isinstance(value, str),
    "role": lambda value: isinstance(value, str),
    "settings": lambda value: isinstance(value, dict),
    "seed": lambda value: type(value) is int,
    "record": lambda value: isinstance(value, dict) and "method" in value,
}
_OF_FINISHED: dict[str, Callable[[Any], bool]] = {
    **_OF_ALL,
    "metric": lambda value: isinstance(value, str) and value in METRICS,
    "interval": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    **dict.fromkeys(("score", "dev_score", "bytes", "seconds"), _is_number),
    **dict.fromkeys(("peak_bytes", "trainable"), _is_number),
    "steps": lambda value: type(value) is int and value > 0,
    **dict.fromkeys(("file", "predictions"), lambda value: isinstance(value, str)),
}


def _are_arguments(value: Any) -> bool:
    """Whether they are those of `Task.load`, with those of `Task.subset` among them."""
    if not isinstance(value, dict) or not isinstance(value.get("subset", {}), dict):
        return False
    own = {name: each for name, each in value.items() if name != "subset"}
    for name, each in own.items():
        columns = isinstance(each, list) and _are_texts(each)
        if not (type(each) is int if name == "seed" else columns or isinstance(each, str | None)):
            return False
    if not all(each is None or type(each) is int for each in value.get("subset", {}).values()):
        return False
    try:
        inspect.signature(Task.load).bind(**own)
        inspect.signature(Task.subset).bind(None, **value.get("subset", {}))
    except TypeError:
        return False
    return True


def _check_stated(study: dict[str, Any], path: Path) -> None:
    for name, fits in _STATED.items():
        if name in study and not fits(study[name]):
            raise SettingError(
                f"{path} states {name} {study[name]!r:.60}, which no study writes; run the study "
                "again, which writes it anew"
            )


def check_record(record: Record, path: Path) -> None:
    """Raises SettingError for a record of a run that lacks what every such record has."""
    for name, fits in (_OF_ALL if "error" in record else _OF_FINISHED).items():
        if name not in record or not fits(record[name]):
            raise _damaged(record, path, f"{name} {record.get(name)!r:.40}")


def _damaged(record: Record, path: Path, found: str) -> SettingError:
    return SettingError(
        f"{path}: the record of run {record['key']} is damaged: found {found}; take its line out, "
        "and run the study again"
    )


def _records(folder: Path, keys: Sequence[str] | None) -> list[Record]:
    found = Ledger(folder / "runs.jsonl").records()
    if not found:
        raise SettingError(
            f"{folder} has no runs to report: expected a study's folder with runs.jsonl; "
            f"make one with `howfine study --out {folder}`"
        )
    mine = list(found.values()) if keys is None else [found[key] for key in keys if key in found]
    for record in mine:
        check_record(record, folder / "runs.jsonl")
    return mine


def _base(base: Base | str | None, study: dict[str, Any], folder: Path) -> Base:
    if isinstance(base, Base):
        return base
    if base is None and "base" not in study:
        raise SettingError(f"{folder / 'study.json'} names no base; give one: report(…, base=…)")
    return Base.load(base or study["base"], kind=study.get("kind", "body"))


def _task(task: Task | str | None, study: dict[str, Any], folder: Path) -> Task:
    if isinstance(task, Task):
        return task
    if task is None and "task" not in study:
        raise SettingError(f"{folder / 'study.json'} names no task; give one: report(…, task=…)")
    stated: Any = study["task"] if task is None else task
    options: dict[str, Any] = {"name_or_path": stated} if isinstance(stated, str) else {**stated}
    subset = options.pop("subset", {})
    return Task.load(**options).subset(**subset)


def _check_made_on(base: Base, task: Task, made_on: dict[str, str], folder: Path) -> None:
    """Refuse a base or a task that is not the study's, a whole task for its subset say."""
    for noun, found in (("base", base), ("task", task)):
        expected = made_on.get(noun, found.fingerprint)
        if found.fingerprint != expected:
            sizes = [f"{len(task.splits[split]):,} in {split}" for split in task.splits]
            more = f" ({', '.join(sizes)})" if noun == "task" else ""
            raise SettingError(
                f"{folder} was not made on this {noun}: {found.name}{more} has the fingerprint "
                f"{found.fingerprint[:12]}, expected {expected[:12]}; give the study's own: "
                f"howfine.report({str(folder)!r}, {noun}=…)"
            )


def _check_measured_on(task: Task, records: Sequence[Record], path: Path) -> None:
    """Refuse a task on which the stored predictions don't score what they scored."""
    targets = task.targets("test")
    for record in records:
        if "error" in record:
            continue
        try:
            found = unpack_predictions(record["predictions"])
        except ValueError as error:
            raise _damaged(record, path, f"predictions that are none ({error})") from error
        fits = record["metric"] == task.metric and found.shape == targets.shape
        score = METRICS[task.metric].function(found, targets) if fits else math.nan
        # Predictions of a regression are stored in float32.
        if not math.isclose(score, record["score"], rel_tol=1e-5, abs_tol=1e-6):
            raise SettingError(
                f"run {record['key']} was not measured on the test split of task {task.name!r} "
                f"({record['metric']} {record['score']:.4f} on {len(found)} examples; here "
                f"{task.metric} {score:.4f} on {len(targets)}); give the study's own task"
            )
