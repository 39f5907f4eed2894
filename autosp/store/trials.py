"""Optuna's storage in our database, and trials that do not stay RUNNING when their process is killed.

[Note: heartbeats under ask/tell]
`Study.optimize` does three things that `ask` and `tell` do not: it fails trials whose heartbeat stopped, before it
asks, as `fail_dead_trials` does; it records heartbeats from a thread while the trial runs and tells FAIL when the
objective raises, as `running_trial` does. Optuna takes a trial without any heartbeat for a live one, so the first is
recorded before the block starts; only a kill between those two transactions, milliseconds apart, still leaves a trial
RUNNING. Where trials are asked for in turns, `fail_dead_trials` knows such a trial too.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from autosp.errors import StoreError
from autosp.store.engine import PLUGIN, nested_reads, shown, store_error, translated
from autosp.store.processes import is_dead, this_process

if TYPE_CHECKING:
    import optuna

WORKER = "worker"
"""The user attribute of a trial that names its process."""

HEARTBEAT_INTERVAL_S = 20
GRACE_PERIOD_S = 60


def open_optuna_storage(
    url: URL, *, heartbeat_interval_s: int = HEARTBEAT_INTERVAL_S, grace_period_s: int = GRACE_PERIOD_S
) -> optuna.storages.RDBStorage:
    """Optuna's storage on the database at `url`, under the rules of [Note: BEGIN IMMEDIATE].

    Not to be pickled: each process opens its own.

    Raises: StoreReadOnlyError if the database cannot be written, StoreError if its Optuna tables are of another
    version (the message is Optuna's and says which command upgrades them) or for the rest.
    """
    import optuna

    # RDBStorage passes its URL through str.format.
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    try:
        with _translated_of_optuna(url), nested_reads(), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.storages.RDBStorage(
                text,
                engine_kwargs={"plugins": [PLUGIN]},
                heartbeat_interval=heartbeat_interval_s,
                grace_period=grace_period_s,
            )
    except RuntimeError as error:
        raise StoreError(f"{shown(url)}: {error}") from error


def delete_optuna_study(storage: optuna.storages.RDBStorage, name: str) -> None:
    """Delete Optuna's study of that name, with its trials.

    Raises: StoreReadOnlyError if the database cannot be written, StoreError for the rest.
    """
    with _translated_of_optuna(storage.engine.url):
        storage.delete_study(storage.get_study_id_from_name(name))


@contextmanager
def _translated_of_optuna(url: URL) -> Iterator[None]:
    """`translated`, also of what Optuna wraps an error of the database in."""
    import optuna

    try:
        with translated(url):
            yield
    except optuna.exceptions.StorageInternalError as error:
        cause = error.__cause__
        raise store_error(cause if isinstance(cause, SQLAlchemyError) else error, url) from error


@contextmanager
def running_trial(study: optuna.Study, storage: optuna.storages.RDBStorage) -> Iterator[optuna.Trial]:
    """Ask `study`, which lives in `storage`, for a trial and record its heartbeats until the block ends.

    The caller tells inside the block; a trial that nobody tells is for `fail_dead_trials` to fail. If the block
    raises, the trial is told FAIL and the exception goes on. Tell with `skip_if_finished=True`: when this process was
    asleep for longer than the grace period, another one may have failed the trial. See [Note: heartbeats under
    ask/tell].
    """
    import optuna

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        trial = study.ask()
    study_id = storage.get_study_id_from_name(study.study_name)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
    storage.record_heartbeat(trial_id)
    trial.set_user_attr(WORKER, this_process())
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(storage, trial_id, stop), name="autosp-heartbeat", daemon=True)
    thread.start()
    try:
        yield trial
    except BaseException:
        study.tell(trial, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
        raise
    finally:
        stop.set()
        thread.join()


def fail_dead_trials(study: optuna.Study) -> None:
    """Tell FAIL for the RUNNING trials of processes that are no more.

    To be called in a turn, if trials are asked for and their numbers suggested in turns: then one that names no
    process is of a process that was killed in its turn. A process of this machine is looked for; of one elsewhere the
    heartbeats must have stopped for the grace period.
    """
    import optuna
    from optuna.trial import TrialState

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get(WORKER)
        if worker is None or is_dead(worker):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _beat(storage: optuna.storages.RDBStorage, trial_id: int, stop: threading.Event) -> None:
    from optuna.exceptions import StorageInternalError

    try:
        while not stop.wait(storage.get_heartbeat_interval()):
            with suppress(StorageInternalError):  # a missed beat; the grace period is several intervals long
                storage.record_heartbeat(trial_id)
    finally:
        storage.remove_session()
