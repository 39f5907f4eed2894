from __future__ import annotations

import signal
import sqlite3
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

import store_samples
import store_workers
from autosp.errors import StoreError
from autosp.store import Repository
from autosp.store.trials import fail_dead_trials, running_trial
from processes import forked

DEADLINE_S = 60


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.2)


def test_processes_that_open_and_claim_at_once_run_every_enqueued_trial_exactly_once(storage: Path) -> None:
    processes, enqueued = 8, 80
    arguments: list[tuple[Path, int | None]] = [(storage, enqueued)] + [(storage, None)] * processes
    claims = [
        index for claimed in store_workers.at_once(store_workers.claim_or_enqueue, arguments) for index in claimed
    ]
    assert sorted(claims) == list(range(enqueued))
    with Repository(storage) as repository:
        study = optuna.load_study(study_name="tiny", storage=repository.optuna_storage())
        done = {trial.user_attrs["index"]: trial for trial in study.trials if "index" in trial.user_attrs}
    assert len(done) == enqueued
    for index, trial in done.items():
        assert (trial.state, trial.params, trial.value) == (TrialState.COMPLETE, {"x": 3 * index}, 3 * index)


def test_the_trial_of_a_process_killed_elsewhere_is_failed(storage: Path) -> None:
    process = forked.Process(target=store_workers.die_in_a_trial, args=(storage,))
    process.start()
    process.join(DEADLINE_S)
    assert process.exitcode == -signal.SIGKILL
    with Repository(storage) as repository:
        optuna_storage = repository.optuna_storage(heartbeat_interval_s=1, grace_period_s=2)
        study = optuna.load_study(study_name="tiny", storage=optuna_storage)

        def failed_once_its_heartbeats_stopped() -> bool:
            fail_dead_trials(study)
            return study.trials[0].state == TrialState.FAIL

        wait_until(failed_once_its_heartbeats_stopped)


def test_heartbeats_go_on_while_a_trial_runs_and_end_with_it(repository: Repository, storage: Path) -> None:
    def heartbeat() -> object:
        with closing(sqlite3.connect(storage)) as database:
            return database.execute("SELECT heartbeat FROM trial_heartbeats").fetchone()[0]

    optuna_storage = repository.optuna_storage(heartbeat_interval_s=1)
    study = optuna.create_study(storage=optuna_storage)
    with running_trial(study, optuna_storage) as trial:
        first = heartbeat()
        wait_until(lambda: heartbeat() != first)
        study.tell(trial, 0.0)
    assert study.best_trial.number == trial.number


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_trial_whose_block_raises_is_failed(repository: Repository, error: type[BaseException]) -> None:
    optuna_storage = repository.optuna_storage()
    study = optuna.create_study(storage=optuna_storage)
    with pytest.raises(error), running_trial(study, optuna_storage):
        raise error
    with pytest.raises(error), running_trial(study, optuna_storage) as trial:
        study.tell(trial, 1.0)
        raise error
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]


def test_no_warning_reaches_the_user(repository: Repository) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optuna_storage = repository.optuna_storage()
        study = optuna.create_study(storage=optuna_storage)
        with running_trial(study, optuna_storage) as trial:
            study.tell(trial, 0.0)


def test_optunas_own_study_can_be_deleted_with_its_heartbeats(repository: Repository) -> None:
    optuna_storage = repository.optuna_storage()
    study = optuna.create_study(study_name="tiny", storage=optuna_storage)
    with running_trial(study, optuna_storage) as trial:
        study.tell(trial, trial.suggest_int("x", 0, 3))
    optuna.delete_study(study_name="tiny", storage=optuna_storage)
    assert optuna.get_all_study_names(optuna_storage) == []
    assert repository.study_key("tiny") == store_samples.study_key()


def test_tables_of_another_optuna_are_a_store_error_with_optunas_advice(repository: Repository, storage: Path) -> None:
    repository.optuna_storage()
    with closing(sqlite3.connect(storage)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'v99.0.0'")
    with pytest.raises(StoreError, match=r"(?s)autosp\.db.*optuna"):
        repository.optuna_storage()
