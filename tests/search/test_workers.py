"""Several processes on one study, and processes that are killed in one."""

from __future__ import annotations

import math
import random
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

import study_workers
from autosp.search.sampler import PARAMETERS
from autosp.search.space import key_of
from autosp.spec import Candidate, Measurement, Trial
from autosp.store import Repository
from autosp.store.trials import running_trial
from databases import memory_folder
from processes import forked

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


def test_a_trial_that_another_worker_ends_while_the_results_are_read_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in neither what was read before it ended, nor in what runs afterwards: the study waits, and reads again."""
    storage, ranked = str(tmp_path / "shared.db"), study_workers.candidates(2)
    study_workers.work(storage, ranked, study_workers.Noisy(), max_trials=1)
    with Repository(storage) as repository, ExitStack() as other, monkeypatch.context() as patch:
        optunas = repository.optuna_storage()
        study = optuna.load_study(study_name=study_workers.NAME, storage=optunas)
        study.enqueue_trial(dict(zip(PARAMETERS, key_of(ranked[1].candidate), strict=True)))
        running = other.enter_context(running_trial(study, optunas))
        for name in PARAMETERS:
            running.suggest_int(name, 0, 10)
        read = Repository.trials

        def read_and_end(asked: Repository, name: str) -> list[Trial]:
            patch.undo()
            found = read(asked, name)
            done = study_workers.Noisy().validate(ranked[1].candidate)
            repository.add_trial(name, Trial(number=running.number, prediction=ranked[1], measurement=done))
            study.tell(running, done.latency_s)
            return found

        patch.setattr(Repository, "trials", read_and_end)
        verdict = study_workers.work(storage, ranked, study_workers.Noisy())
    assert verdict.finished, verdict.why
    assert "every candidate under the budget was tried" in verdict.why


def test_a_trial_that_another_worker_took_for_dead_counts_as_measured(tmp_path: Path) -> None:
    """As after a suspend of some minutes: the heartbeats had stopped, and the process goes on."""
    storage, ranked = str(tmp_path / "shared.db"), study_workers.candidates(2)

    class Slept(study_workers.Noisy):
        def validate(self, candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
            with Repository(storage) as other:
                study = optuna.load_study(study_name=study_workers.NAME, storage=other.optuna_storage())
                for running in study.get_trials(states=(TrialState.RUNNING,)):
                    study.tell(running.number, state=TrialState.FAIL)
            return super().validate(candidate, hopeless_s)

    verdict = study_workers.work(storage, ranked, Slept())
    ours, optunas = stored(storage)
    assert verdict.finished and verdict.best in ours
    assert {trial.prediction.candidate for trial in ours} == {one.candidate for one in ranked}
    assert {trial.state for trial in optunas} == {TrialState.FAIL}


def test_processes_killed_at_any_moment_lose_their_running_trial_at_most(shared_storage: str, tmp_path: Path) -> None:
    """Nothing that finished is repeated, and the study ends as it does when nobody is killed."""
    count, kills, moments = 25, 6, random.Random(5)
    log = tmp_path / "begun"
    finished: list[Trial] = []
    for _ in range(kills):
        ready = forked.Event()
        process = forked.Process(target=study_workers.noisy_worker, args=(shared_storage, count, log, ready))
        process.start()
        assert ready.wait(60)
        process.join(moments.uniform(0.0, 1.5))
        process.kill()
        process.join()
        with Repository(shared_storage) as repository:
            known = repository.trials(study_workers.NAME) if repository.summaries() else []
        assert known[: len(finished)] == finished
        finished = known
    ranked = study_workers.candidates(count)
    verdict = study_workers.work(shared_storage, ranked, study_workers.Noisy(log))
    with memory_folder() as folder:
        undisturbed = study_workers.work(str(folder / "undisturbed.db"), ranked, study_workers.Noisy())
    assert verdict.finished and verdict.best is not None and undisturbed.best is not None
    assert (verdict.best.measurement, verdict.why) == (undisturbed.best.measurement, undisturbed.why)
    ours, optunas = stored(shared_storage)
    validated = [trial.prediction.candidate.k for trial in ours]
    assert len(validated) == len(set(validated))
    begun = begun_in(log)
    assert set(begun) == set(validated)
    assert len(begun) - len(validated) <= kills
    assert {trial.state for trial in optunas} <= {TrialState.COMPLETE, TrialState.FAIL}


def begun_in(log: Path) -> list[int]:
    """k of every trial that began."""
    return [int(line) for line in log.read_text().split()] if log.exists() else []
