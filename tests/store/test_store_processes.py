from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import store_samples
import store_workers
from autosp.store import Repository

OPEN_AND_FIND = """
import sys
from autosp.spec import StudyKey
from autosp.store import Repository

with Repository(sys.argv[1]) as repository:
    assert repository.find_plan(StudyKey.model_validate_json(sys.argv[2])) is not None
loaded = sorted({name.partition(".")[0] for name in sys.modules} & {"alembic", "optuna"})
assert not loaded, loaded
"""


def test_processes_that_make_one_database_and_write_at_once_lose_nothing(storage: Path) -> None:
    processes, each = 6, 20
    arguments = [(storage, range(first * each, (first + 1) * each)) for first in range(processes)]
    store_workers.at_once(store_workers.write_trials, arguments)
    with Repository(storage) as repository:
        assert repository.trials("tiny") == [store_samples.trial(number) for number in range(processes * each)]
        assert len(repository.summaries()) == 1
    assert [path.name for path in storage.parent.iterdir()] == [storage.name]


def test_an_answer_from_the_database_needs_neither_optuna_nor_alembic(repository: Repository) -> None:
    repository.save_plan("tiny", store_samples.plan())
    command = [sys.executable, "-c", OPEN_AND_FIND, repository.url, store_samples.study_key().model_dump_json()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
