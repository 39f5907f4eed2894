"""Several processes on one study, and processes that are killed in one."""

from __future__ import annotations

from collections import Counter

import optuna
from optuna.trial import TrialState

import study_workers
from autosp.search.sampler import PARAMETERS
from autosp.search.space import key_of
from autosp.spec import Trial
from autosp.store import Repository

PROCESSES, CANDIDATES = 8, 200


def stored(storage: str) -> tuple[list[Trial], list[optuna.trial.FrozenTrial]]:
    """The study's trials as we have them, and as Optuna has them."""
    with Repository(storage) as repository:
        study = optuna.load_study(study_name=study_workers.NAME, storage=repository.optuna_storage())
        return repository.trials(study_workers.NAME), study.trials


def test_eight_workers_lose_no_trial_and_repeat_none(shared_storage: str) -> None:
    found = study_workers.work_together(shared_storage, PROCESSES, CANDIDATES)
    expected = [key_of(prediction.candidate) for prediction in study_workers.candidates(CANDIDATES)]
    ran = Counter(key for keys, _ in found for key in keys)
    assert ran == Counter(expected)
    assert sum(bool(keys) for keys, _ in found) > 1, "one worker did everything"
    ours, optunas = stored(shared_storage)
    assert sorted(key_of(trial.prediction.candidate) for trial in ours) == sorted(expected)
    assert [trial.number for trial in ours] == [trial.number for trial in optunas] == list(range(CANDIDATES))
    assert sorted(tuple(trial.params[name] for name in PARAMETERS) for trial in optunas) == sorted(expected)
    assert {trial.state for trial in optunas} == {TrialState.PRUNED}
    assert {verdict.why for _, verdict in found} == {"no validated candidate fits the budget"}
    assert all(verdict.finished for _, verdict in found)
