"""Turns, processes that are known to be dead, and what workers agree on: on SQLite and on PostgreSQL."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from contextlib import ExitStack
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

import store_samples
import store_workers
from autosp.errors import StoreReadOnlyError, StudyMismatchError
from autosp.files import locked
from autosp.store import Repository
from autosp.store.engine import storage_url
from autosp.store.processes import is_dead, this_process
from autosp.store.trials import WORKER, fail_dead_trials, running_trial
from databases import create_database
from processes import forked


def test_one_process_at_a_time_has_its_turn(shared_storage: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes, turns = 4, 8
    store_workers.at_once(store_workers.take_turns, [(shared_storage, turns, log)] * processes)
    lines = log.read_text().split()
    assert len(lines) == 2 * processes * turns
    assert all(first == second for first, second in zip(lines[::2], lines[1::2], strict=True))


def test_processes_that_enter_studies_without_names_at_once_find_names_for_all(shared_storage: str) -> None:
    processes, each = 4, 6
    found = store_workers.at_once(store_workers.enter_studies, [(shared_storage, range(1, each + 1))] * processes)
    assert all(names == found[0] for names in found), "a key has one study"
    assert sorted(found[0]) == sorted(["tiny", *(f"tiny-{number}" for number in range(2, each + 1))])
    with Repository(shared_storage) as repository:
        for budget, name in enumerate(found[0], start=1):
            assert repository.study_key(name) == store_samples.study_key(budget)


def test_a_turn_ends_with_its_process(shared_storage: str) -> None:
    process = forked.Process(target=store_workers.die_in_a_turn, args=(shared_storage,))
    process.start()
    process.join(60)
    assert process.exitcode == -9
    with Repository(shared_storage) as repository, repository.turn("tiny"):
        assert repository.summaries() == []


def test_studies_and_trials_can_be_written_in_a_turn(shared_storage: str) -> None:
    with Repository(shared_storage) as repository, repository.turn("tiny"):
        repository.create_study("tiny", store_samples.study_key())
        storage = repository.optuna_storage()
        study = optuna.create_study(study_name="tiny", storage=storage)
        with running_trial(study, storage) as trial:
            repository.add_trial("tiny", store_samples.trial())
            study.tell(trial, 1.0)
        assert repository.trials("tiny") == [store_samples.trial()]


def test_a_turn_needs_a_folder_that_can_be_written(storage: Path) -> None:
    with Repository(storage) as repository:
        storage.with_name(f"{storage.name}.lock").mkdir()
        with pytest.raises(StoreReadOnlyError, match=r"autosp\.db\.lock cannot be made"), repository.turn("tiny"):
            pass


def test_processes_that_make_the_tables_of_a_server_at_once_do_not_disturb_each_other(postgres: str) -> None:
    storage = create_database(postgres, "together")
    processes, each = 6, 5
    arguments = [(storage, range(first * each, (first + 1) * each)) for first in range(processes)]
    store_workers.at_once(store_workers.write_trials, arguments)
    with Repository(storage) as repository:
        assert repository.trials("tiny") == [store_samples.trial(number) for number in range(processes * each)]


def test_a_postgresql_url_without_a_driver_takes_ours() -> None:
    assert storage_url("postgresql://a@/b?host=/c").drivername == "postgresql+psycopg"
    assert storage_url("postgresql+psycopg2://a@/b").drivername == "postgresql+psycopg2"


def test_waiting_for_a_lock_is_told(tmp_path: Path) -> None:
    told = threading.Event()
    entered: list[str] = []

    def other() -> None:
        with locked(tmp_path / "lock", told.set):
            entered.append("other")

    thread = threading.Thread(target=other)
    with locked(tmp_path / "lock"):
        thread.start()
        assert told.wait(60)
        entered.append("first")
    thread.join(60)
    assert entered == ["first", "other"]


def test_a_lock_ends_with_its_block_whatever_was_forked_inside(tmp_path: Path) -> None:
    path, (ready, done) = tmp_path / "lock", os.pipe()
    with locked(path):
        child = os.fork()
        if not child:
            os.close(done)
            os.read(ready, 1)  # until the parent ends, or says so
            os._exit(0)
    os.close(ready)
    try:
        assert not is_locked(path)
    finally:
        os.close(done)
        os.waitpid(child, 0)


def test_a_forked_process_that_leaves_the_block_leaves_the_lock_to_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with ExitStack() as held:
        held.enter_context(locked(path))
        child = os.fork()
        if not child:
            held.close()
            os._exit(0)
        assert os.waitpid(child, 0) == (child, 0)
        assert is_locked(path)
    assert not is_locked(path)


def test_a_lock_of_another_user_s_file_can_be_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "lock", os.open
    path.touch(0o644)

    def refuse(path: Path, flags: int, *mode: int, dir_fd: int | None = None) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)
    with locked(path):
        assert is_locked(path)
    with pytest.raises(PermissionError), locked(tmp_path / "another"):
        pass


def is_locked(path: Path) -> bool:
    """Whether somebody would wait for it."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_who_is_dead() -> None:
    mine = this_process()
    machine, pid, started = mine.rsplit("/", 2)
    assert pid == str(os.getpid())
    assert not is_dead(mine)
    assert is_dead(f"{machine}/{pid}/{int(started) - 1}"), "an earlier process of that number"
    assert is_dead(f"{machine}/999999999/{started}")
    assert not is_dead(f"another/{pid}/1"), "of another machine nothing is known"


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_trials_of_dead_processes_fail_at_once(repository: Repository) -> None:
    storage = repository.optuna_storage()
    study = optuna.create_study(study_name="tiny", storage=storage)
    machine, _, started = this_process().rsplit("/", 2)
    unnamed, dead, elsewhere, live = (study.ask() for _ in range(4))
    dead.set_user_attr(WORKER, f"{machine}/999999999/{started}")
    elsewhere.set_user_attr(WORKER, f"another/1/{started}")
    live.set_user_attr(WORKER, this_process())
    fail_dead_trials(study)
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.FAIL, TrialState.FAIL, TrialState.RUNNING, TrialState.RUNNING]
    assert unnamed.number == 0


def test_the_first_worker_s_profile_counts(repository: Repository) -> None:
    first = store_samples.profile()
    later = first.model_copy(update={"tail_s": 9.0})
    wiser = later.model_copy(update={"links": (*first.links, *first.links)})
    assert repository.agree_on_profile("tiny", first) == first
    assert repository.agree_on_profile("tiny", later) == first
    assert repository.agree_on_profile("tiny", wiser) == wiser == repository.profile("tiny")


def test_the_first_worker_s_plan_counts(repository: Repository) -> None:
    first = store_samples.plan()
    later = first.model_copy(update={"created_at": "2026-01-01T00:00:00+00:00"})
    other = later.model_copy(update={"why": "more was tried"})
    assert repository.agree_on_plan("tiny", first) == first
    assert repository.agree_on_plan("tiny", later) == first
    assert repository.agree_on_plan("tiny", other) == other == repository.plan("tiny")


def test_a_study_is_looked_for_with_its_key(repository: Repository) -> None:
    assert repository.has_study("tiny", store_samples.study_key())
    assert not repository.has_study("tinier", store_samples.study_key())
    with pytest.raises(StudyMismatchError, match="budget_bytes: 2000000000 there, 5 here"):
        repository.has_study("tiny", store_samples.study_key(5))
