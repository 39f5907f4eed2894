"""Makes `revision_0001.db`, a user's database as autosp 0.1.0 wrote it. Run once, at that revision; never again.

python tests/store/assets/make_revision_0001.py
"""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

ASSETS = Path(__file__).parent
sys.path[:0] = [str(ASSETS.parents[2]), str(ASSETS.parent)]

import optuna  # noqa: E402

import store_samples  # noqa: E402
from autosp.spec import Outcome  # noqa: E402
from autosp.store import Repository  # noqa: E402
from autosp.store.migrate import HEAD_REVISION  # noqa: E402


def main() -> None:
    """Write the file, refusing to replace one."""
    path = ASSETS / "revision_0001.db"
    if path.exists() or HEAD_REVISION != "0001":
        raise SystemExit(f"{path} is history: it exists, or this is revision {HEAD_REVISION}")
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA page_size = 512")  # Optuna's many small tables and indexes take a page each
        database.execute("VACUUM")
    with Repository(path) as repository:
        repository.create_study("finished", store_samples.study_key())
        repository.save_profile("finished", store_samples.profile())
        repository.add_trial("finished", store_samples.trial(0, latency_s=0.25))
        repository.add_trial("finished", store_samples.trial(1, latency_s=0.125, outcome=Outcome.OVER_BUDGET))
        repository.save_plan("finished", store_samples.plan("written by revision 0001"))
        repository.create_study("unfinished", store_samples.study_key(budget_bytes=1_000_000_000))
        study = optuna.create_study(study_name="finished", storage=repository.optuna_storage())
        study.enqueue_trial({"x": 1})
        trial = study.ask()
        study.tell(trial, trial.suggest_int("x", 0, 3))


if __name__ == "__main__":
    main()
