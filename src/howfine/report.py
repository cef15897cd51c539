"""report: a study's results as an answer, in report.json, report.md and report.html.

Everything is computed again from the stored runs, so a report can be made at any time, also of a
study that is still running. `runs.jsonl` holds the runs (`howfine.ledger`); `study.json` what they
were made with, for a report asked for without a base and a task:

    base        name of the base, as Base.load takes it; kind its kind, if that isn't "body"
    task        name, or the arguments of Task.load, with those of Task.subset as "subset"
    made_on     fingerprints of base and task
    margin      share of the ceiling's score that may be lost
    command     the command that made the study
    keys        keys of the plan's runs; runs of other plans in the same folder are left out
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch

from howfine import (
    answer,
    report_latency,
    report_page,
    report_pictures,
    report_where,
    stored,
    timing,
    wording,
)
from howfine.base import Base, TwoTowers
from howfine.compare import delta_distance
from howfine.container import write_atomically
from howfine.delta import SUFFIX, Delta, only_weights
from howfine.distance import Distance, table
from howfine.errors import HowfineError, SettingError, StorageError
from howfine.ledger import Record
from howfine.task import Task

MARGIN = 0.01
_RUN = (
    *("key", "recipe", "settings", "seed", "role", "score", "interval", "dev_score", "bytes"),
    *("seconds", "steps", "peak_bytes", "trainable", "file", "ece", "error"),
)


class Report(TypedDict):
    """The content of report.json."""

    sentence: str
    caveats: list[str]
    base: dict[str, Any]  # name, sha256, parameters
    task: dict[str, Any]  # name, metric, provenance, labels, sizes, texts an example
    margin: float
    full: dict[str, Any]  # the ceiling's group
    floor: dict[str, Any] | None  # None where no floor run finished
    # answer.recommend; file is None where it was not kept; merges: `report` has found that a plain
    # checkpoint can hold the change
    recommended: dict[str, Any]
    groups: list[dict[str, Any]]  # answer.groups, with the method's record
    runs: list[dict[str, Any]]
    distance: list[dict[str, Any]] | None  # the blocks' matrices, from base to ceiling
    where: dict[str, list[dict[str, Any]]]  # recipe: layer, part, changed, entries, share
    where_runs: dict[str, str]  # recipe: key of the run whose file was counted in
    pictures: list[dict[str, Any]] | None  # what the recommended run found for test captions
    latency: report_latency.Latency | None  # None where all are as fast as the base
    machine: dict[str, Any]  # cpu, cores, torch, howfine
    date: str
    command: str


def report(
    folder: str | Path,
    *,
    base: Base | str | None = None,
    task: Task | str | None = None,
    margin: float | None = None,
    command: str = "",
) -> Report:
    """Write report.json, report.md and report.html into a study's folder, and the recommended file.

    What is not given is taken from the folder's study.json. The recommended delta is copied to
    `<recipe>.delta.safetensors`; that of an earlier report is removed. Raises SettingError where
    there is no finished ceiling run or the runs were measured on another task, and what loading
    the base and the task raises.
    """
    folder = Path(folder)
    study, records, base, task = stored.read(folder, base, task)
    facts = {
        "name": base.name,
        "sha256": base.fingerprint,
        "parameters": sum(p.numel() for p in base.towers.parameters()),
    }
    result = summarise(
        records,
        facts,
        task,
        study.get("margin", MARGIN) if margin is None else margin,
        distances=_ceiling_distances(folder, records, base),
        command=command or study.get("command", ""),
        folder=folder,
    )
    result["where"], result["where_runs"] = report_where.measure(
        folder, records, result["groups"], result["recommended"], base
    )
    result["latency"] = report_latency.measure(folder, records, result["groups"], base, task)
    _hand_over(folder, records, result)
    result["recommended"]["merges"] = _merges(folder, result["recommended"]["file"], base)
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "report.md", report_page.markdown(result).encode())
    thumbnails = report_pictures.thumbnails(task, result["pictures"])
    write_atomically(folder / "report.html", report_page.html(result, thumbnails).encode())
    # Last, because it is what the next report learns the file to remove from.
    write_atomically(folder / "report.json", f"{text}\n".encode())
    return result


def summarise(
    records: Sequence[Record],
    base_facts: dict[str, Any],
    task: Task,
    margin: float,
    *,
    distances: Sequence[Distance] | None,
    command: str,
    folder: Path | None = None,
) -> Report:
    """The content of report.json, from a study's records.

    `base_facts` has name, sha256 and parameters. With a `folder`, the recommended file is named as
    `report` copies it, and None where it is gone; without one, as the study stored it. Raises
    SettingError where no ceiling run finished. `where` is empty: `report` counts in the files.
    """
    targets = task.targets("test")
    groups = _with_method(answer.groups(records, targets, margin), records)
    recommended = {**answer.recommend(groups, records, margin), "merges": False}
    if folder is not None:
        kept = (folder / recommended["file"]).is_file()
        recommended["file"] = f"{recommended['recipe']}{SUFFIX}" if kept else None
    result = Report(
        sentence="",
        caveats=[],
        base=base_facts,
        task=_task_facts(task),
        margin=margin,
        full=next(group for group in groups if group["role"] == "ceiling"),
        floor=next((group for group in groups if group["role"] == "floor"), None),
        recommended=recommended,
        groups=groups,
        runs=[{name: record[name] for name in _RUN if name in record} for record in records],
        distance=_matrices(distances) if distances else None,
        where={},
        where_runs={},
        pictures=report_pictures.found(task, records, recommended["key"]),
        latency=None,
        machine=_machine(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        command=command,
    )
    result["sentence"] = wording.sentence(result)
    result["caveats"] = wording.caveats(result)
    return result


def _with_method(groups: list[dict[str, Any]], records: Sequence[Record]) -> list[dict[str, Any]]:
    by_key = {record["key"]: record for record in records}
    return [{**group, "method": by_key[group["keys"][0]]["record"]["method"]} for group in groups]


def _task_facts(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "metric": task.metric,
        "provenance": task.provenance,
        "labels": list(task.labels),
        "sizes": {split: len(task.splits[split]) for split in ("train", "dev", "test")},
        "texts": len(task.splits["test"][0].texts),
        "options": bool(task.splits["test"][0].options),
        "by_name": task.by_name,
    }


def _matrices(distances: Sequence[Distance]) -> list[dict[str, Any]]:
    """Rows of the blocks' matrices, in the order data takes through them, as JSON types.

    A matrix of zeros that moved has moved infinitely far, relatively: None.
    """
    parts = table(distances).parts
    rows = [asdict(row) for row in distances if row.layer is not None and row.part in parts]
    rows.sort(key=lambda row: (row["layer"], parts.index(row["part"])))
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        for row in rows
    ]


def _machine() -> dict[str, Any]:
    return {
        "cpu": timing.cpu(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "howfine": version("howfine"),
    }


def _ceiling_distances(
    folder: Path, records: Sequence[Record], base: Base
) -> list[Distance] | None:
    """How far the ceiling's best seed on dev moved the base; None where no file was kept.

    None, too, of a file that can't be read, of a change that is not one of weights, and of two
    towers: the page's map has one matrix for a layer and a part.
    """
    if isinstance(base, TwoTowers):
        return None
    kept = [
        record
        for record in records
        if record["role"] == "ceiling" and "error" not in record
        if (folder / record["file"]).is_file()
    ]
    if not kept:
        return None
    best = max(kept, key=lambda record: record["dev_score"])
    try:
        return delta_distance(Delta.load(folder / best["file"]), base)
    except HowfineError:  # a damaged file, or what stands beside the base: a report is of scores
        return None


def _merges(folder: Path, file: str | None, base: Base) -> bool:
    """Whether a plain checkpoint can hold the change of a file; not of one that is not there."""
    if file is None or isinstance(base, TwoTowers):
        return False
    try:
        with Delta.load(folder / file).changed(base):
            only_weights(base, "")
    except HowfineError:
        return False
    return True


def _earlier(path: Path) -> tuple[str | None, str | None]:
    """(file, key) that an earlier report recommended; none of one that can't be read.

    It is written anew.
    """
    try:
        found = stored.read_json(path).get("recommended")
    except SettingError:
        return None, None
    told = found if isinstance(found, dict) else {}
    file, key = told.get("file"), told.get("key")
    own = isinstance(file, str) and file == Path(file).name and file.endswith(SUFFIX)
    return file if own else None, key if isinstance(key, str) else None


def _hand_over(folder: Path, records: Sequence[Record], result: Report) -> None:
    """Copy the recommended delta to the top of the folder, in place of an earlier report's.

    Where the study's own copy is gone, the earlier report's is the last one: it stays.
    """
    name, key = result["recommended"]["file"], result["recommended"]["key"]
    earlier, its_key = _earlier(folder / "report.json")
    if name is None:
        if earlier and its_key == key and (folder / earlier).is_file():
            result["recommended"]["file"] = earlier
        return
    (source,) = (folder / record["file"] for record in records if record["key"] == key)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise StorageError(f"{source} can't be read: {error.strerror or error}") from error
    write_atomically(folder / name, data)
    if earlier and earlier != name:
        (folder / earlier).unlink(missing_ok=True)
