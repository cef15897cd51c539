"""A study as its folder has it: study.json, the records of its runs, its base and its task."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
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
    records = _records(folder, study.get("keys"))
    base = _base(base, study, folder)
    task = _task(task, study, folder)
    _check_made_on(base, task, study.get("made_on", {}), folder)
    _check_measured_on(task, records)
    return study, records, base, task


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise SettingError(
            f"{path} is not JSON ({error}); run the study again, which writes it anew"
        ) from error
    if not isinstance(found, dict):
        raise SettingError(f"{path} holds no JSON object; run the study again")
    return found


def _records(folder: Path, keys: Sequence[str] | None) -> list[Record]:
    found = Ledger(folder / "runs.jsonl").records()
    if not found:
        raise SettingError(
            f"{folder} has no runs to report: expected a study's folder with runs.jsonl; "
            f"make one with `howfine study --out {folder}`"
        )
    return list(found.values()) if keys is None else [found[key] for key in keys if key in found]


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


def _check_measured_on(task: Task, records: Sequence[Record]) -> None:
    """Refuse a task on which the stored predictions don't score what they scored."""
    targets = task.targets("test")
    for record in records:
        if "error" in record:
            continue
        found = unpack_predictions(record["predictions"])
        fits = record["metric"] == task.metric and found.shape == targets.shape
        score = METRICS[task.metric].function(found, targets) if fits else math.nan
        # Predictions of a regression are stored in float32.
        if not math.isclose(score, record["score"], rel_tol=1e-5, abs_tol=1e-6):
            raise SettingError(
                f"run {record['key']} was not measured on the test split of task {task.name!r} "
                f"({record['metric']} {record['score']:.4f} on {len(found)} examples; here "
                f"{task.metric} {score:.4f} on {len(targets)}); give the study's own task"
            )
