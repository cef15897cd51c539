"""Score against latency: what a study's smaller models gain, each file of all sizes at five.

Latencies are measured where the page is written, and scores of sizes that no run had are; both are
kept in the study's folder (`latency.json`), so that a report made again measures nothing anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

from howfine import latency, timing, units, wording
from howfine.base import IMAGE, Base, TwoTowers
from howfine.container import write_atomically
from howfine.delta import Delta
from howfine.errors import HowfineError, SettingError
from howfine.evaluate import evaluate
from howfine.ledger import Record
from howfine.report_tables import Cell, Table
from howfine.task import Task
from howfine.timing import Timed

# Of the heads, and of the neurons, at which a file of all sizes is shown.
SIZES = (1.0, 0.7, 0.5, 0.3, 0.1)
KEPT = "latency.json"

# recipe, settings, keep, score, interval, key; milliseconds, whole (the base's), parameters
Row = dict[str, Any]


class Latency(TypedDict):
    """What the report has of it."""

    tokens: int | None  # of the one input; None for a picture
    rows: list[Row]
    missing: list[str]  # recipes of which a file can't be put on


def measure(
    folder: Path,
    records: Sequence[Record],
    groups: Sequence[Mapping[str, Any]],
    base: Base,
    task: Task,
) -> Latency | None:
    """The ceiling, every group whose file switches whole units off, and each size of a file.

    None where there is no such file: then all are as fast as the base.
    """
    if isinstance(base, TwoTowers):
        return None
    kept = {key: delta for key, delta in _deltas(folder, records).items() if _has_units(delta)}
    if not kept:
        return None
    tokens = min(timing.TOKENS, base.room)
    known = _Known(folder / KEPT, base, task, tokens)
    whole = known.time("base", None)
    ceiling = next(group for group in groups if group["role"] == "ceiling")
    rows = [] if kept.keys() & set(ceiling["keys"]) else [_row(ceiling, None) | whole]
    missing = []
    for group in groups:
        key = next((key for key in group["keys"] if key in kept), None)
        if key is None:
            continue
        try:
            rows += [_row(group, key) | found for found in known.of_file(key, kept[key])]
        except HowfineError:  # the page is of scores that are measured
            missing.append(group["recipe"])
    known.write()
    stated = None if base.tower_name == IMAGE else tokens
    return {
        "tokens": stated,
        "rows": rows,
        "missing": list(dict.fromkeys(missing)),
    }


def _deltas(folder: Path, records: Sequence[Record]) -> dict[str, Delta]:
    """The runs' files that are there and can be read, by key."""
    found = {}
    for record in records:
        path = folder / record["file"] if "file" in record and "error" not in record else None
        try:
            if path is not None and path.is_file():
                found[record["key"]] = Delta.load(path)
        except HowfineError:  # `report_where` says which are gone
            continue
    return found


def _has_units(delta: Delta) -> bool:
    return any(stream.name.startswith(f"method/{units.KEPT}") for stream in delta.streams)


def _row(group: Mapping[str, Any], key: str | None) -> Row:
    named = {name: group[name] for name in ("recipe", "settings", "score", "interval")}
    return {**named, "keep": None, "key": key}


class _Known:
    """What was measured before, and what is measured now."""

    def __init__(self, path: Path, base: Base, task: Task, tokens: int) -> None:
        self.path, self.base, self.task, self.tokens = path, base, task, tokens
        self.found: dict[str, Any] = {}
        try:
            read = json.loads(path.read_text())
        except (OSError, ValueError):  # nothing was measured yet, or the file is torn
            return
        self.found = read if isinstance(read, dict) else {}

    def time(self, name: str, delta: Delta | None, keep: float | None = None) -> Row:
        """Milliseconds and parameters: of the base, or of it with a delta on at a size."""
        own = f"{self.base.fingerprint} {self.base.dtype}, {self.tokens} tokens"
        place = f"{timing.machine(self.base)}, {own}: {name} {keep}"
        try:
            return asdict(Timed(**self.found[place])) | {"keep": keep}
        except (KeyError, TypeError):  # not measured yet
            shape = {"rows": 1, "tokens": self.tokens}
            of = latency.of_base(self.base, **shape) if delta is None else None
            timed = of or latency.of_delta(delta, self.base, **shape)  # type: ignore[arg-type]
        self.found[place] = asdict(timed)
        return asdict(timed) | {"keep": keep}

    def of_file(self, key: str, delta: Delta) -> list[Row]:
        """Of a file of one size its latency; of all sizes the score at each, too."""
        if not delta.method.resizable:
            return [self.time(key, delta)]
        rows = []
        for keep in SIZES:
            try:
                resized = delta.resized(keep)
            except SettingError:  # not trained so small
                break
            rows.append(self._score(key, resized, keep) | self.time(key, resized, keep))
        return rows

    def _score(self, key: str, delta: Delta, keep: float) -> Row:
        place = f"score {self.task.fingerprint} {key} {keep}"
        known = self.found.get(place)
        if not isinstance(known, dict) or known.keys() != {"score", "interval"}:
            score = evaluate(delta, self.base, self.task, split="test")
            known = {"score": score.value, "interval": list(score.interval)}
            self.found[place] = known
        return known

    def write(self) -> None:
        """Keep it for the next report."""
        write_atomically(self.path, f"{json.dumps(self.found, indent=1)}\n".encode())


def table(found: Latency, metric: str) -> Table:
    """One row a model, the fastest first."""
    lines = []
    for row in sorted(found["rows"], key=lambda row: row["milliseconds"]):
        said = f"{wording.score_said(metric, row['score'])} "
        times = row["whole"] / row["milliseconds"]
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


def input_said(found: Latency) -> str:
    """The one input that it is measured for."""
    tokens = found["tokens"]
    return "one picture" if tokens is None else f"one input of {tokens} tokens"


def size_said(row: Mapping[str, Any]) -> str:
    """The size of a file of all sizes, or the settings of one."""
    if row["keep"] is not None:
        return f"{100 * row['keep']:.0f} % of the units"
    return wording.settings_said(row["settings"]) or "whole"
