"""study: which is the smallest change that still does the task?

A ceiling (everything trains), a floor (the readout alone), and every recipe over its size knob,
each with several seeds; each run is a delta file, loaded again and scored. Runs are trials of an
Optuna study, so several workers can share one (start the same command twice) and a killed
worker's run is picked up. Choices are made on dev; test is only reported.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from tqdm.auto import tqdm

from howfine.base import Base
from howfine.container import write_atomically
from howfine.delta import SUFFIX
from howfine.errors import BaseError, DeltaError, SettingError, TaskError, TrainingError
from howfine.evaluate import evaluate
from howfine.ledger import Ledger, Record, pack_predictions
from howfine.plan import Plan, Run, runs_of
from howfine.task import Task
from howfine.tune import tune

HEARTBEAT_SECONDS = 5
GRACE_SECONDS = 20
log = logging.getLogger(__name__)


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

    `out` gets `runs.jsonl` and, with `keep`, `deltas/`. `storage` is an Optuna database URL,
    SQLite in `out` by default. Calling it again, after a kill or beside another worker, repeats
    no finished run. `facts` are what `study.json` says beside the plan: how to load the task
    again, the command.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    base = Base.load(base) if isinstance(base, str) else base
    task = Task.load(task, data=data) if isinstance(task, str) else task
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    runs = runs_of(plan, base, task)
    stated = {"base": base.name, "kind": base.kind, "task": task.name, "margin": plan.margin}
    stated |= {"keys": [run.key for run in runs], **(facts or {})}
    write_atomically(folder / "study.json", (json.dumps(stated, indent=2) + "\n").encode())
    worker = _Worker(base, task, runs, folder, storage, keep)
    worker.join(progress)
    return worker.export()


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
        self.overtaken = False
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # A plan has a queue of its own: several may share a database.
        digest = hashlib.sha256(json.dumps(sorted(self.runs)).encode()).hexdigest()[:12]
        url = storage or f"sqlite:///{(folder / 'study.db').resolve()}"
        self.study = _open(url, f"howfine-{digest}")
        self._adopt()

    def _adopt(self) -> None:
        """Take finished runs of the ledger into a database that does not know them."""
        done = self._by_state(TrialState.COMPLETE)
        for key, record in self.ledger.records().items():
            wanted = key in self.runs and key not in done and "error" not in record
            if wanted and (not self.keep or (self.folder / record["file"]).exists()):
                self.study.add_trial(_finished(record))

    def join(self, progress: bool) -> None:
        """Work until every run of the plan is finished, by this worker or another."""
        with tqdm(total=len(self.runs), desc="study", disable=not progress, unit="run") as bar:
            while True:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Optuna calls its heartbeat experimental
                    optuna.storages.fail_stale_trials(self.study)
                settled = self._settled()
                bar.update(len(settled) - bar.n)
                if len(settled) == len(self.runs):
                    return
                waiting = self._enqueue(settled)
                if waiting:
                    bar.set_postfix_str(waiting[0])
                    self._take_one()
                    self.export()
                else:
                    time.sleep(1)  # others run what is left

    def _take_one(self) -> None:
        """Do a run that waits. One that others gave up for dead meanwhile still counts."""
        self.overtaken = False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.study.optimize(self._objective, n_trials=1)
        except (ValueError, optuna.exceptions.OptunaError):  # its trial can't be told any more
            if not self.overtaken:
                raise

    def _by_state(self, *states: TrialState) -> dict[str, list[FrozenTrial]]:
        found: dict[str, list[FrozenTrial]] = {}
        for trial in self.study.get_trials(deepcopy=False, states=states):
            if "run" in trial.user_attrs:
                found.setdefault(trial.user_attrs["run"], []).append(trial)
        return found

    def _settled(self) -> set[str]:
        """Keys of this plan that are finished, or failed for a reason that would come again."""
        done = set(self._by_state(TrialState.COMPLETE))
        for key, trials in self._by_state(TrialState.PRUNED).items():
            if any("error" in trial.user_attrs for trial in trials):
                done.add(key)
        return done & set(self.runs)

    def _enqueue(self, settled: set[str]) -> list[str]:
        """Put up for taking what is neither settled nor taken; returns what waits."""
        waiting = self._by_state(TrialState.WAITING)
        running = self._by_state(TrialState.RUNNING)
        for key in self.runs:
            if key not in settled and key not in waiting and key not in running:
                self.study.enqueue_trial({}, user_attrs={"run": key})
                waiting[key] = []
        return [key for key in self.runs if key in waiting]

    def _objective(self, trial: optuna.Trial) -> tuple[float, float]:
        key = trial.user_attrs.get("run")
        if key not in self.runs or self._taken(trial, key):
            raise optuna.TrialPruned
        try:
            record = run_once(self.runs[key], self.base, self.task, self.folder, self.keep)
        except (BaseError, DeltaError, SettingError, TaskError, TrainingError) as error:
            log.warning("run %s failed: %s", key, error)
            trial.set_user_attr("error", str(error))
            raise optuna.TrialPruned from error
        try:
            trial.set_user_attr("record", record)
        except optuna.exceptions.UpdateFinishedTrialError:
            # This process stood still (a laptop's lid) for longer than the grace period.
            self.overtaken = True
            if key not in self._by_state(TrialState.COMPLETE):
                self.study.add_trial(_finished(record))
            raise
        return record["dev_score"], record["bytes"]

    def _taken(self, trial: optuna.Trial, key: str) -> bool:
        """Whether another worker put up and took the same run first (two may enqueue at once)."""
        done = self._by_state(TrialState.COMPLETE).get(key, [])
        running = self._by_state(TrialState.RUNNING).get(key, [])
        return bool(done) or any(other.number < trial.number for other in running)

    def export(self) -> list[Record]:
        """Write the ledger: this plan's records as the database has them, then all others."""
        found = self.ledger.records()
        for key, trials in self._by_state(TrialState.PRUNED).items():
            errors = [t.user_attrs["error"] for t in trials if "error" in t.user_attrs]
            if errors and key in self.runs:
                found[key] = {"error": errors[0]}
        for key, trials in self._by_state(TrialState.COMPLETE).items():
            found[key] = min(trials, key=lambda t: t.number).user_attrs["record"]
        # The plan of now says what a run is to it: a candidate of then may be the ceiling.
        mine = [{**found[key], **_identity(run)} for key, run in self.runs.items() if key in found]
        others = [record for key, record in found.items() if key not in self.runs]
        self.ledger.replace([*mine, *others])
        return mine


def run_once(run: Run, base: Base, task: Task, folder: Path, keep: bool) -> Record:
    """One run: fit, store, load again, score on dev and test."""
    path = folder / "deltas" / f"{run.key}{SUFFIX}"
    tuned = tune(base, task, run.recipe, out=path, seed=run.seed)
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
    }
    if not keep:
        path.unlink(missing_ok=True)
    return record


def _identity(run: Run) -> Record:
    record = run.recipe.as_dict()
    return {
        "key": run.key,
        "recipe": run.recipe.name,
        "role": run.role,
        "settings": dict(run.settings),
        "seed": run.seed,
        "record": {name: record[name] for name in ("method", "readout", "training", "store")},
    }


def _finished(record: Record) -> FrozenTrial:
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE,
        values=[record["dev_score"], record["bytes"]],
        user_attrs={"run": record["key"], "record": record},
    )


def _open(url: str, name: str) -> optuna.Study:
    """The study in a database, made if it is not there; dead workers' trials expire.

    Workers that start together make the tables together, and all but one of them fail at it: they
    find the tables made when they try again.
    """
    tries = 5
    while True:
        tries -= 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna calls its heartbeat experimental
                return _create(url, name)
        except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, ValueError) as error:
            if tries and isinstance(error, (DBAPIError, optuna.exceptions.StorageInternalError)):
                time.sleep(1)
                continue
            raise SettingError(
                f"study storage {url!r} can't be opened: {str(error).splitlines()[0]}. Expected a "
                "database URL such as sqlite:///study.db or postgresql://user@host/name"
            ) from error


def _create(url: str, name: str) -> optuna.Study:
    options: dict[str, Any] = {}
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": 100}
    storage = optuna.storages.RDBStorage(
        url,
        engine_kwargs=options,
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
    )
    return optuna.create_study(
        storage=storage,
        study_name=name,
        directions=["maximize", "minimize"],
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
