"""The runs of a study as a queue in a database, which several workers may share.

A run is a trial of an Optuna study: put up, taken by one worker, finished or failed. A worker shows
by its heartbeat that it lives; what a dead one had taken is put up again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from howfine.errors import (
    BaseError,
    BaseNotFound,
    DeltaError,
    SettingError,
    TaskError,
    TaskNotFound,
    TrainingError,
)
from howfine.ledger import Record

HEARTBEAT_SECONDS = 5
GRACE_SECONDS = 20
log = logging.getLogger(__name__)

# What would come again if the run were repeated; but of these what a network or a folder that is
# back may mend, which the next call tries once more.
_LASTING = (BaseError, DeltaError, SettingError, TaskError, TrainingError)
_PASSING = (BaseNotFound, TaskNotFound)


class Queue:
    """The runs with these keys, in the database at `url`, as the worker at `place` sees them.

    `has_file` says whether the delta of a record is in this worker's hands: a finished run whose
    file is lost is put up again, by a worker of the place it was lost from.
    """

    def __init__(
        self, url: str, keys: Iterable[str], place: str, has_file: Callable[[Record], bool]
    ) -> None:
        self.keys, self.place, self.has_file = list(keys), place, has_file
        self.call = uuid.uuid4().hex
        self._unbegun: dict[int, float] = {}  # trial -> when it was first seen taken and not begun
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # A plan has a queue of its own: several may share a database.
        digest = hashlib.sha256(json.dumps(sorted(self.keys)).encode()).hexdigest()[:12]
        self.study, self._storage = _open(url, f"howfine-{digest}")

    def finished(self) -> dict[str, Record]:
        """The newest record of each finished run, but of those whose file is lost."""
        return {
            key: trial.user_attrs["record"]
            for key, trials in self._by_state(TrialState.COMPLETE).items()
            for trial in sorted(trials, key=lambda trial: trial.number)
            if trial.user_attrs.get("place", self.place) != self.place
            or self.has_file(trial.user_attrs["record"])
        }

    def failed(self) -> dict[str, str]:
        """The error of each run that failed for a reason that would come again.

        Of what may pass, such as a network that is down, those of this call alone.
        """
        return {
            key: trial.user_attrs["error"]
            for key, trials in self._by_state(TrialState.PRUNED).items()
            for trial in trials
            if "error" in trial.user_attrs
            and trial.user_attrs.get("failed_in", self.call) == self.call
        }

    def settled(self) -> set[str]:
        """Keys of runs that nobody need take any more."""
        return {*self.finished(), *self.failed()}

    def add(self, record: Record) -> None:
        """A run that was finished outside of this database."""
        trial = optuna.trial.create_trial(
            state=TrialState.COMPLETE,
            values=[record["dev_score"], record["bytes"]],
            user_attrs={"run": record["key"], "record": record, "place": self.place},
        )
        self.study.add_trial(trial)

    def free_the_dead(self) -> None:
        """Fail what dead workers had taken, so that it is put up again."""
        with _hushed():
            optuna.storages.fail_stale_trials(self.study)
        # Who was killed before the first heartbeat is not among the stale ones. How long ago is
        # measured here: clocks of two machines differ.
        now = time.monotonic()
        running = itertools.chain.from_iterable(self._by_state(TrialState.RUNNING).values())
        ids = [trial._trial_id for trial in running if "begun" not in trial.user_attrs]
        self._unbegun = {number: self._unbegun.get(number, now) for number in ids}
        for number, seen in self._unbegun.items():
            if now - seen > GRACE_SECONDS:
                # Another worker may fail it at the same time.
                with suppress(optuna.exceptions.UpdateFinishedTrialError):
                    self._storage.set_trial_state_values(number, TrialState.FAIL)

    def waiting(self) -> list[str]:
        """Keys of runs to take; puts up what is neither settled nor taken."""
        settled, running = self.settled(), self._by_state(TrialState.RUNNING)
        waiting = self._by_state(TrialState.WAITING)
        for key in self.keys:
            if key not in settled and key not in waiting and key not in running:
                self.study.enqueue_trial({}, user_attrs={"run": key})
                waiting[key] = []
        return [key for key in self.keys if key in waiting]

    def take(self, work: Callable[[str], Record]) -> None:
        """Do a run that waits. One that others gave up for dead meanwhile still counts."""
        attempt = _Attempt(self, work)
        try:
            with _hushed():
                self.study.optimize(attempt, n_trials=1)
        except (ValueError, optuna.exceptions.OptunaError):
            # Its trial can't be told any more: this process stood still (a laptop's lid) for
            # longer than the grace period. Whatever the work itself raised goes on its way.
            told = attempt.number >= 0 and not attempt.working
            if not told or not self.study.get_trials()[attempt.number].state.is_finished():
                raise
            if attempt.record and attempt.record["key"] not in self.finished():
                self.add(attempt.record)

    def begin(self, trial: optuna.Trial) -> str:
        """The trial's key; from now on its heartbeat speaks for it. Raises TrialPruned if taken."""
        self._storage.record_heartbeat(trial._trial_id)
        trial.set_user_attr("begun", True)
        key = trial.user_attrs.get("run")
        # Two workers may put up and take the same run at once: the first goes on.
        running = self._by_state(TrialState.RUNNING).get(key, [])
        if (
            key not in self.keys
            or key in self.settled()
            or any(other.number < trial.number for other in running)
        ):
            raise optuna.TrialPruned
        return str(key)

    def _by_state(self, state: TrialState) -> dict[Any, list[FrozenTrial]]:
        found: dict[Any, list[FrozenTrial]] = {}
        for trial in self.study.get_trials(deepcopy=False, states=[state]):
            if "run" in trial.user_attrs:
                found.setdefault(trial.user_attrs["run"], []).append(trial)
        return found


class _Attempt:
    """One trial: Optuna's objective, which remembers what came of the work."""

    def __init__(self, queue: Queue, work: Callable[[str], Record]) -> None:
        self.queue, self.work = queue, work
        self.number, self.working = -1, False
        self.record: Record | None = None

    def __call__(self, trial: optuna.Trial) -> tuple[float, float]:
        self.number = trial.number
        key = self.queue.begin(trial)
        self.working = True
        try:
            self.record = self.work(key)
        except _LASTING as error:
            self.working = False
            log.warning("run %s failed: %s", key, error)
            trial.set_user_attr("error", str(error))
            if isinstance(error, _PASSING):
                trial.set_user_attr("failed_in", self.queue.call)
            raise optuna.TrialPruned from error
        self.working = False
        trial.set_user_attr("place", self.queue.place)
        trial.set_user_attr("record", self.record)
        return self.record["dev_score"], self.record["bytes"]


@contextmanager
def _hushed() -> Iterator[None]:
    """Optuna calls its heartbeat experimental, each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(url: str, name: str) -> tuple[optuna.Study, optuna.storages.RDBStorage]:
    """The study in a database, made if it is not there; dead workers' trials expire.

    Workers that start together make the tables together, and all but one of them fail at it: they
    find the tables made when they try again.
    """
    tries = 5
    while True:
        tries -= 1
        try:
            with _hushed():
                return _create(url, name)
        except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, ValueError) as error:
            if tries and isinstance(error, (DBAPIError, optuna.exceptions.StorageInternalError)):
                time.sleep(1)
                continue
            raise SettingError(
                f"study storage {url!r} can't be opened: {str(error).splitlines()[0]}. Expected a "
                "database URL such as sqlite:///study.db or postgresql://user@host/name"
            ) from error


def _create(url: str, name: str) -> tuple[optuna.Study, optuna.storages.RDBStorage]:
    options: dict[str, Any] = {}
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": 100}
    storage = optuna.storages.RDBStorage(
        url,
        engine_kwargs=options,
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
    )
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        directions=["maximize", "minimize"],
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    return study, storage
