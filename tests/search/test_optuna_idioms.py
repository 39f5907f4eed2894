"""Our studies are Optuna's: its attributes, constraints and pictures work on them as on any other."""

from __future__ import annotations

import itertools
import math

import optuna
import pytest
from optuna import visualization

import study_workers
from autosp.spec import Candidate, Measurement, Outcome
from autosp.store.processes import this_process
from builders import measurement

pytest.importorskip("plotly")

ENDS = {1: Outcome.CRASHED, 5: Outcome.OUT_OF_MEMORY}
"""By the number of the trial. All candidates are predicted to take the same memory: none is tried after the last."""


class Varied(study_workers.Noisy):
    """A device on which some trials end in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count()

    def validate(self, candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
        outcome = ENDS.get(next(self._numbers))
        if outcome is None:
            return super().validate(candidate, hopeless_s)
        starved = outcome is Outcome.OUT_OF_MEMORY
        return measurement(outcome=outcome, peak_bytes=study_workers.BUDGET_BYTES + 1 if starved else 0)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> optuna.Study:
    """A finished study, as Optuna, or its dashboard, loads it by a plain URL."""
    path = tmp_path_factory.mktemp("study") / "varied.db"
    study_workers.work(str(path), study_workers.candidates(12), Varied(), max_trials=9)
    return optuna.load_study(study_name=study_workers.NAME, storage=f"sqlite:///{path}")


def test_attributes_and_constraints(study: optuna.Study) -> None:
    assert set(study.user_attrs) == {"autosp_fingerprint", "autosp_profile_s"}
    assert study.user_attrs["autosp_fingerprint"] == study_workers.KEY.fingerprint
    names = {"predicted_latency_s", "predicted_peak_bytes", "peak_bytes", "outcome", "worker"}
    assert all(set(trial.user_attrs) == names for trial in study.trials)
    assert {trial.user_attrs["worker"] for trial in study.trials} == {this_process()}
    outcomes = [trial.user_attrs["outcome"] for trial in study.trials]
    assert outcomes == [ENDS.get(number, Outcome.FITS).value for number in range(max(ENDS) + 1)]
    infeasible = [any(value > 0 for value in trial.constraints.values()) for trial in study.trials]
    assert infeasible == [number in ENDS for number in range(len(infeasible))]
    fits = [trial for trial in study.trials if trial.user_attrs["outcome"] == Outcome.FITS.value]
    assert study.best_trial.number == min(fits, key=lambda trial: trial.value or 0.0).number


@pytest.mark.parametrize(
    "plot",
    [
        visualization.plot_optimization_history,
        visualization.plot_param_importances,
        visualization.plot_parallel_coordinate,
        visualization.plot_slice,
        visualization.plot_contour,
        visualization.plot_edf,
        visualization.plot_rank,
        visualization.plot_timeline,
    ],
)
def test_pictures(plot: object, study: optuna.Study) -> None:
    figure = plot(study)  # type: ignore[operator]
    assert figure.data
    assert figure.to_json()
