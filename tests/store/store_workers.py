"""What the processes of the tests run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import store_samples
from autosp.errors import StoreError, StoreReadOnlyError
from autosp.store import Repository
from processes import forked

T = TypeVar("T")
NOBODY = 65534

_together: Any = None  # the barrier at which the processes of `at_once` wait for each other


def at_once(worker: Callable[..., T], arguments: list[tuple[Any, ...]]) -> list[T]:
    """Run `worker` in one new process per tuple of arguments, all passing `start_together` at the same moment."""
    barrier = forked.Barrier(len(arguments))
    with forked.Pool(len(arguments), initializer=_set_barrier, initargs=(barrier,)) as pool:
        return pool.starmap(worker, arguments, chunksize=1)


def _set_barrier(barrier: Any) -> None:
    global _together
    _together = barrier


def start_together() -> None:
    """Wait for the others."""
    _together.wait(timeout=120)


def write_trials(storage: str | Path, numbers: range) -> None:
    """Make the database and the study if no other process was faster, then write trials."""
    start_together()
    with Repository(storage) as repository:
        repository.create_study("tiny", store_samples.study_key())
        for number in numbers:
            repository.add_trial("tiny", store_samples.trial(number))


def enter_studies(storage: str, budgets: range) -> list[str]:
    """Enter a study without a name under each budget, all processes at once."""
    with Repository(storage) as repository:
        start_together()
        return [repository.enter_study("tiny", store_samples.study_key(budget)) for budget in budgets]


def claim_trials(storage: Path) -> list[int]:
    """Make Optuna's tables if no other process was faster, then run enqueued trials until none is left."""
    import optuna

    from autosp.store.trials import running_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    claimed = []
    with Repository(storage) as repository:
        start_together()
        optuna_storage = repository.optuna_storage()
        start_together()  # the parent's process enqueues in between
        start_together()
        study = optuna.load_study(study_name="tiny", storage=optuna_storage)
        while True:
            with running_trial(study, optuna_storage) as trial:
                if "index" not in trial.user_attrs:  # the queue was empty, so this trial is a new one
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    return claimed
                value = trial.suggest_int("x", 0, 10_000)
                claimed.append(trial.user_attrs["index"])
                study.tell(trial, value)


def enqueue_trials(storage: Path, count: int) -> list[int]:
    """The parent of `claim_trials`: makes the study once all have opened the storage at the same moment."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with Repository(storage) as repository:
        start_together()
        optuna_storage = repository.optuna_storage()
        start_together()
        study = optuna.create_study(study_name="tiny", storage=optuna_storage)
        for index in range(count):
            study.enqueue_trial({"x": 3 * index}, user_attrs={"index": index})
        start_together()
    return []


def claim_or_enqueue(storage: Path, enqueued: int | None) -> list[int]:
    """`enqueue_trials` where a number is given, else `claim_trials`."""
    return claim_trials(storage) if enqueued is None else enqueue_trials(storage, enqueued)


def die_in_a_trial(storage: Path) -> None:
    """Be killed while a trial runs, as a process of a machine that only heartbeats tell of."""
    import optuna

    from autosp.store.trials import WORKER, running_trial

    with Repository(storage) as repository:
        optuna_storage = repository.optuna_storage(heartbeat_interval_s=1, grace_period_s=2)
        study = optuna.create_study(study_name="tiny", storage=optuna_storage)
        with running_trial(study, optuna_storage) as trial:
            trial.set_user_attr(WORKER, "another/1/1")
            os.kill(os.getpid(), signal.SIGKILL)


def take_turns(storage: str, count: int, log: Path) -> None:
    """Note the beginning and the end of each turn."""
    with Repository(storage) as repository:
        start_together()
        for _ in range(count):
            with repository.turn("tiny"):
                for _ in range(2):
                    with log.open("a") as file:
                        file.write(f"{os.getpid()}\n")
                    time.sleep(0.002)


def die_in_a_turn(storage: str) -> None:
    """Be killed within a turn."""
    with Repository(storage) as repository, repository.turn("tiny"):
        os.kill(os.getpid(), signal.SIGKILL)


def as_nobody(folder: Path) -> dict[str, str]:
    """What happens to a user without write permission in `folder`, which holds `there.db`."""
    with Repository(folder / "there.db") as repository:  # loads all modules while they can still be read
        repository.summaries()
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    happened = {}
    for name in ("there.db", "absent.db"):
        try:
            with Repository(folder / name) as repository:
                happened[f"{name} read"] = str(repository.plan("tiny") == store_samples.plan())
                repository.add_trial("tiny", store_samples.trial(99))
        except StoreReadOnlyError as error:
            happened[name] = str(error)
        except StoreError as error:
            happened[name] = f"another error: {error!r}"
    return happened
