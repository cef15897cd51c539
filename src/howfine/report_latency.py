"""Score against latency: what a study's smaller models gain, each file of all sizes at five.

Latencies are measured where the page is written, and scores of sizes that no run had are; both are
kept in the study's folder (`latency.json`), so that a report made again measures nothing anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from howfine import latency, stored, units, wording
from howfine.base import Base, TwoTowers
from howfine.container import write_atomically
from howfine.delta import Delta
from howfine.errors import HowfineError
from howfine.evaluate import evaluate
from howfine.ledger import Record
from howfine.report_tables import Cell, Table
from howfine.task import Task

# Of the heads, and of the neurons, at which a file of all sizes is shown.
SIZES = (1.0, 0.7, 0.5, 0.3, 0.1)
KEPT = "latency.json"

Row = dict[str, Any]  # recipe, settings, keep, score, interval, milliseconds, parameters, key


def measure(
    folder: Path,
    records: Sequence[Record],
    groups: Sequence[Mapping[str, Any]],
    base: Base,
    task: Task,
) -> list[Row] | None:
    """A row of the ceiling, of every group whose file switches whole units off, and of each size.

    None where there is no such file: then all are as fast as the base.
    """
    if isinstance(base, TwoTowers):
        return None
    files = {r["key"]: folder / r["file"] for r in records if "file" in r}
    kept = {r["key"]: Delta.load(files[r["key"]]) for r in records if _with_units(r, files)}
    if not kept:
        return None
    known = _Known(folder / KEPT, base, task)
    ceiling = next(group for group in groups if group["role"] == "ceiling")
    rows = [_row(ceiling, None) | known.time("base", None, None)]
    for group in groups:
        key = next((key for key in group["keys"] if key in kept), None)
        if key is None:
            continue
        delta = kept[key]
        if delta.method.resizable:
            rows += [_row(group, key) | each for each in known.sizes(key, delta)]
        else:
            rows.append(_row(group, key) | known.time(key, delta, None))
    known.write()
    return rows


def _with_units(record: Record, files: Mapping[str, Path]) -> bool:
    """Whether a run's file is there and says which units are on."""
    if "error" in record or not files[record["key"]].is_file():
        return False
    try:
        streams = Delta.load(files[record["key"]]).streams
    except HowfineError:  # the page is of scores that are measured
        return False
    return any(stream.name.startswith(f"method/{units.KEPT}") for stream in streams)


def _row(group: Mapping[str, Any], key: str | None) -> Row:
    named = {name: group[name] for name in ("recipe", "settings", "score", "interval")}
    return {**named, "keep": None, "key": key}


class _Known:
    """What was measured before, and what is measured now."""

    def __init__(self, path: Path, base: Base, task: Task) -> None:
        self.path, self.base, self.task = path, base, task
        self.found = stored.read_json(path)

    def time(self, name: str, delta: Delta | None, keep: float | None) -> Row:
        """Milliseconds and parameters: of the base, or of it with a delta on at a size."""
        place = f"{latency.machine(self.base)} {name} {keep}"
        if place not in self.found:
            timed = latency.of_delta(delta, self.base) if delta else latency.of_base(self.base)
            self.found[place] = asdict(timed) | {"keep": keep}
        row: Row = self.found[place]
        return row

    def sizes(self, key: str, delta: Delta) -> Iterator[Row]:
        """Of each size that has a unit for each layer: its score on test, and its latency."""
        for keep in SIZES:
            place = f"score {self.task.fingerprint} {key} {keep}"
            resized = delta.resized(keep)
            if place not in self.found:
                try:
                    score = evaluate(resized, self.base, self.task, split="test")
                except HowfineError:  # too small for this base: see units.check_share
                    return
                self.found[place] = {"score": score.value, "interval": list(score.interval)}
            yield self.found[place] | self.time(key, resized, keep)

    def write(self) -> None:
        """Keep it for the next report."""
        write_atomically(self.path, f"{json.dumps(self.found, indent=1)}\n".encode())


def table(rows: Sequence[Row], metric: str) -> Table:
    """One row a model, the fastest first."""
    whole = rows[0]
    lines = []
    for row in sorted(rows, key=lambda row: row["milliseconds"]):
        said = f"{wording.score_said(metric, row['score'])} "
        times = whole["milliseconds"] / row["milliseconds"]
        lines.append(
            [
                Cell(row["recipe"], row["recipe"]),
                Cell(size_said(row), row["keep"] or 0.0),
                Cell(said + wording.interval_said(metric, row["interval"]), row["score"]),
                Cell(f"{row['milliseconds']:.2f}", row["milliseconds"]),
                Cell(f"× {times:.2f}", times),
                Cell(f"{row['parameters']:,}", row["parameters"]),
            ]
        )
    return Table(["recipe", "size", "test score", "ms", "as fast", "parameters"], lines)


def size_said(row: Mapping[str, Any]) -> str:
    """The size of a file of all sizes, or the settings of one."""
    if row["keep"] is not None:
        return f"{100 * row['keep']:.0f} % of the units"
    return wording.settings_said(row["settings"]) or "whole"
