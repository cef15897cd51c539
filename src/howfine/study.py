"""study: which is the smallest change that still does the task?

A ceiling (everything trains), a floor (the readout alone), and a plan's recipes over their size
knobs, each with several seeds; each run is a delta file, loaded again and scored. Rounds of
bisection (`howfine.refine`) may follow. Runs are trials of an
Optuna study, so several workers can share one (start the same command twice) and a killed
worker's run is picked up. Choices are made on dev; test is only reported.
"""

from __future__ import annotations

import json
import time
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from howfine import refine, stored
from howfine.base import Base
from howfine.container import write_atomically
from howfine.delta import SUFFIX
from howfine.errors import StorageError
from howfine.evaluate import evaluate
from howfine.ledger import Ledger, Record, pack_predictions
from howfine.plan import Plan, Run, runs_of
from howfine.queue import Queue
from howfine.task import Task
from howfine.tune import tune


def study(
    base: Base | str = "minilm",
    task: Task | str = "rotten-tomatoes",
    plan: Plan | str | Path = "default",
    *,
    out: str | Path = "runs/study",
    storage: str | None = None,
    keep: bool = True,
    progress: bool = False,
    data: str | Path | None = None,
    facts: dict[str, Any] | None = None,
) -> list[Record]:
    """Run what a plan still lacks and return all its records, in the plan's order.

    `out` gets `study.json`, `runs.jsonl`, `place` (a name for the folder, whatever its path) and,
    with `keep`, `deltas/`. `storage` is an Optuna database URL, SQLite in `out` by default. Calling
    it again, after a kill or beside another worker, repeats no finished run. `facts` are what
    `study.json` says beside the plan: how to load the task again ("task"), the command.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    base = Base.load(base, kind=plan.kind) if isinstance(base, str) else base
    # How to load the task again, as far as a name tells.
    named = task.name if isinstance(task, Task) else {"name_or_path": task}
    if data and isinstance(named, dict):
        named["data"] = str(data)
    task = Task.load(task, data=data) if isinstance(task, str) else task
    folder = Path(out)
    _make(folder)
    if plan.refine and (names := refine.unrefined(plan)):
        warnings.warn(
            f"plan refine: {', '.join(names)} run at the values that are given alone, for they "
            "vary several settings, or one whose values are no numbers above 0",
            stacklevel=2,
        )
    stated: dict[str, Any] = {"base": base.name, "kind": base.kind, "task": named}
    stated |= {"made_on": {"base": base.fingerprint, "task": task.fingerprint}}
    for left in reversed(range(plan.refine + 1)):
        runs = runs_of(plan, base, task)
        stated |= {"margin": plan.margin, "keys": [run.key for run in runs], **(facts or {})}
        write_atomically(folder / "study.json", (json.dumps(stated, indent=2) + "\n").encode())
        worker = _Worker(base, task, runs, folder, storage, keep)
        worker.join(progress)
        records = worker.export()
        before, plan = plan, refine.finer(plan, runs, records) if left else plan
        if plan == before:
            break
    return records


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder} can't be made: {error.strerror or error}; expected a study's folder, or "
            "none yet: choose another place"
        ) from error


class _Worker:
    """One process of a study: takes runs that nobody has taken, until none is left."""

    def __init__(
        self,
        base: Base,
        task: Task,
        runs: Sequence[Run],
        folder: Path,
        storage: str | None,
        keep: bool,
    ) -> None:
        self.base, self.task, self.folder, self.keep = base, task, folder, keep
        self.runs = {run.key: run for run in runs}
        self.ledger = Ledger(folder / "runs.jsonl")
        url = storage or f"sqlite:///{(folder / 'study.db').resolve()}"
        self.queue = Queue(url, self.runs, _place(folder), self._has_file)
        done = self.queue.settled()
        for key, record in self.ledger.records().items():  # the database may be a new one
            fits = key in self.runs and key not in done and "error" not in record
            if fits:
                stored.check_record(record, self.ledger.path)
            if fits and self._has_file(record):
                self.queue.add(record)

    def _has_file(self, record: Record) -> bool:
        return not self.keep or (self.folder / record["file"]).is_file()

    def join(self, progress: bool) -> None:
        """Work until every run of the plan is finished, by this worker or another."""
        with tqdm(total=len(self.runs), desc="study", disable=not progress, unit="run") as bar:
            while True:
                self.queue.free_the_dead()
                settled = self.queue.settled()
                bar.update(len(settled) - bar.n)
                if len(settled) == len(self.runs):
                    return
                waiting = self.queue.waiting()
                if waiting:
                    bar.set_postfix_str(waiting[0])
                    self.queue.take(self._run)
                    self.export()
                else:
                    time.sleep(1)  # others run what is left

    def _run(self, key: str) -> Record:
        return run_once(self.runs[key], self.base, self.task, self.folder, self.keep)

    def export(self) -> list[Record]:
        """Write the ledger: this plan's records as the database has them, then all others."""
        found = self.ledger.records()
        found |= {key: {"error": error} for key, error in self.queue.failed().items()}
        found |= self.queue.finished()
        # The plan of now says what a run is to it: a candidate of then may be the ceiling.
        mine = [{**found[key], **_identity(run)} for key, run in self.runs.items() if key in found]
        others = [record for key, record in found.items() if key not in self.runs]
        self.ledger.replace([*mine, *others])
        return mine


def _place(folder: Path) -> str:
    """An identity of the folder that it keeps when it is moved, also to another machine."""
    path = folder / "place"
    if not path.is_file():  # a folder in its place is told by whoever writes
        write_atomically(path, uuid.uuid4().hex.encode())
    return path.read_text(encoding="utf-8", errors="replace")


def run_once(run: Run, base: Base, task: Task, folder: Path, keep: bool) -> Record:
    """One run: fit, store, load again, score on dev and test."""
    path = folder / "deltas" / f"{run.key}{SUFFIX}"
    starts = folder / "starts"  # a phase that several runs begin with is fitted once
    tuned = tune(base, task, run.recipe, out=path, seed=run.seed, starts=starts)
    test = evaluate(tuned.delta, base, task, split="test")
    record = {
        **_identity(run),
        "metric": test.metric,
        "score": test.value,
        "interval": list(test.interval),
        "dev_score": tuned.score.value,
        "bytes": tuned.bytes,
        "seconds": round(tuned.seconds, 3),
        "steps": tuned.steps,
        "peak_bytes": tuned.peak_bytes,
        "trainable": tuned.trainable,
        "file": str(path.relative_to(folder)),
        "predictions": pack_predictions(test.predictions),
        **({} if test.calibration is None else _calibration(test.calibration)),
    }
    if not keep:
        path.unlink(missing_ok=True)
    return record


def _calibration(found: dict[str, Any]) -> Record:
    """What a record keeps of a score's calibration; the bins are enough for any other figure."""
    return {"ece": found["ece"], "reliability": found["reliability"]}


def _identity(run: Run) -> Record:
    record = run.recipe.as_dict()
    return {
        "key": run.key,
        "recipe": run.recipe.name,
        "role": run.role,
        "settings": dict(run.settings),
        "seed": run.seed,
        "record": {name: value for name, value in record.items() if name != "recipe"},
    }
