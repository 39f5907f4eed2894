"""Several budgets, one profile: what a second `tune` costs, less memory for some time, and the whole front."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import equal
from autosp.errors import IsolationError, SettingError
from autosp.pareto import bends
from autosp.settings import settings
from autosp.spec import Candidate, Outcome, Trial
from autosp.store import Repository
from builders import prediction
from models import EarlyExit, vectors

WIDTH = 256
LARGE_GB, SMALL_GB = 0.030, 0.014
"""Both below the 8 blocks of 2.1 MB and the heap's noise, or above."""


class Counted(EarlyExit):
    """Counts its passes."""

    passes = 0

    def forward(self, x: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
        Counted.passes += 1
        return super().forward(x, order)


def counted() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    Counted.passes = 0
    return Counted(blocks=8, width=WIDTH).eval(), vectors(4, WIDTH)


def tune(model: nn.Module, batch: torch.Tensor, budget: float, **options: Any) -> autosp.Plan:
    return autosp.tune(model, batch, budget, device="cpu", progress=False, **options)


def test_a_second_budget_shares_the_profile() -> None:
    model, batch = counted()
    first = tune(model, batch, LARGE_GB, max_trials=2)
    second = tune(model, batch, SMALL_GB, max_trials=2)
    assert second.study_name != first.study_name
    with Repository() as repository:
        names = [first.study_name or "", second.study_name or ""]
        profiles = [repository.profile(name) for name in names]
        trials = [repository.trials(name) for name in names]
    assert profiles[0] == profiles[1]
    measured = {trial.prediction.candidate: trial.measurement for trial in trials[0]}
    for trial in trials[1]:
        if measured.get(trial.prediction.candidate, trial.measurement).peak_bytes <= SMALL_GB * 1e9:
            assert measured.get(trial.prediction.candidate, trial.measurement) == trial.measurement


def test_a_larger_budget_measures_nothing_again() -> None:
    model, batch = counted()
    with Repository() as repository:
        small = tune(model, batch, LARGE_GB, max_trials=1)
        measured = repository.trials(small.study_name or "")
    assert measured[0].measurement.outcome is Outcome.FITS
    Counted.passes = 0
    again = tune(model, batch, 2 * LARGE_GB, max_trials=1)
    assert again.candidate == small.candidate
    assert small.measurement is not None and again.measurement is not None
    assert again.measurement == small.measurement.model_copy(update={"taken_s": 0.0})
    assert Counted.passes == 1  # the one that shows the layers, and the output to compare with


def test_another_batch_has_a_profile_of_its_own() -> None:
    model, batch = counted()
    plans = [tune(model, rows, LARGE_GB, max_trials=1) for rows in (batch, vectors(6, WIDTH))]
    with Repository() as repository:
        one, other = (repository.profile(plan.study_name or "") for plan in plans)
    assert one is not None and other is not None
    assert one.batch_signature != other.batch_signature


def test_slack_is_an_ordinary_study_that_answers_again() -> None:
    model, batch = counted()
    plan = tune(model, batch, LARGE_GB, max_trials=2, slack=1.0, study_name="lean")
    fastest = tune(model, batch, LARGE_GB)
    assert plan.study_name == "lean"
    assert plan.measurement is not None and fastest.measurement is not None
    assert plan.measurement.peak_bytes <= fastest.measurement.peak_bytes
    assert plan.measurement.latency_s <= 2 * fastest.measurement.latency_s
    Counted.passes = 0
    assert tune(model, batch, LARGE_GB, slack=1.0) == plan
    assert autosp.resume("lean", model, batch, device="cpu", progress=False) == plan
    assert Counted.passes == 0
    with torch.no_grad():
        expected = model(batch)
    with autosp.apply(model, plan):
        assert equal(model(batch), expected)


def test_a_slack_study_goes_on_to_new_limits() -> None:
    model, batch = counted()
    tune(model, batch, LARGE_GB, max_trials=1, slack=1.0, study_name="lean")
    first = trials_of("lean-0.03GB")
    assert len(first) == 1
    Counted.passes = 0
    autosp.resume("lean", model, batch, device="cpu", progress=False, max_trials=4)
    assert Counted.passes > 0, "the fastest plan's study was looked at again"
    assert {one.prediction.candidate for one in first} <= {one.prediction.candidate for one in trials_of("lean-0.03GB")}
    candidates = [one.prediction.candidate for one in trials_of("lean")]
    assert len(candidates) == len(set(candidates)) >= len(trials_of("lean-0.03GB"))


def trials_of(study_name: str) -> list[Trial]:
    with Repository() as repository:
        return repository.trials(study_name)


def test_without_a_budget_the_device_is_the_budget() -> None:
    model, batch = counted()
    plan = autosp.tune(model, batch, device="cpu", progress=False, max_trials=1)
    assert plan.budget_bytes is not None
    assert plan.budget_bytes <= plan.device.memory_bytes
    assert plan.candidate.k == 16


def test_pareto_goes_from_the_least_memory_to_the_fastest() -> None:
    model, batch = counted()
    front = autosp.pareto(model, batch, LARGE_GB, device="cpu", points=3, max_trials=2, progress=False)
    assert len(front.plans) >= 2
    measured = [plan.measurement for plan in front.plans if plan.measurement is not None]
    assert [one.peak_bytes for one in measured] == sorted({one.peak_bytes for one in measured})
    assert [one.latency_s for one in measured] == sorted({one.latency_s for one in measured}, reverse=True)
    assert all(one.outcome is Outcome.FITS for one in measured)
    with Repository() as repository:
        studies = {summary.name for summary in repository.summaries()}
        assert {plan.study_name for plan in front.plans} <= studies
        assert len({repository.profile(name) for name in studies}) == 1
    with torch.no_grad():
        expected = model(batch)
    for plan in front.plans:
        with autosp.apply(model, plan):
            assert equal(model(batch), expected)
    Counted.passes = 0
    assert autosp.pareto(model, batch, LARGE_GB, device="cpu", points=3, max_trials=2, progress=False) == front
    assert Counted.passes == 0
    assert autosp.Front.model_validate_json(front.model_dump_json()) == front


def test_a_budget_without_a_plan_leaves_the_front_its_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = counted()
    asked: list[Any] = []

    def tune_once(model: nn.Module, batch: Any, budget: Any, **options: Any) -> autosp.Plan:
        asked.append(budget)
        if len(asked) > 1:
            raise IsolationError("none of 2 validated plans came to its end")
        return autosp.tune(model, batch, budget, **options)

    monkeypatch.setattr(sys.modules["autosp.pareto"], "tune", tune_once)
    front = autosp.pareto(model, batch, LARGE_GB, device="cpu", points=3, max_trials=2, progress=False)
    assert len(asked) == 3
    assert {plan.study_name for plan in front.plans} == {"Counted-inference"}


def test_studies_of_another_version_are_not_in_the_front() -> None:
    model, batch = counted()
    options: dict[str, Any] = {"device": "cpu", "points": 2, "max_trials": 1, "progress": False}
    tune(model, batch, SMALL_GB, max_trials=1, study_name="newer")
    with closing(sqlite3.connect(settings().storage)) as database, database:
        database.execute("UPDATE autosp_plan SET plan = json_set(plan, '$.from_the_future', 1)")
    front = autosp.pareto(model, batch, LARGE_GB, **options)
    assert front.plans
    assert "newer" not in {plan.study_name for plan in front.plans}


@pytest.mark.parametrize("points", [1, 2.5, True])
def test_points_that_are_none(points: Any) -> None:
    model, batch = counted()
    with pytest.raises(SettingError, match="points="):
        autosp.pareto(model, batch, LARGE_GB, device="cpu", points=points)


def test_a_front_is_validated_at_its_ends_and_where_it_bends() -> None:
    # Falls steeply from 10 s to 2 s in the first tenth of its memory, then slowly to 1 s.
    line = [
        prediction(Candidate(k=k, k_prime=1), peak_bytes=peak, latency_s=latency_s)
        for k, (peak, latency_s) in enumerate(
            [(0, 10.0), (50, 6.0), (100, 2.0), (400, 1.7), (700, 1.3), (1000, 1.0)], start=1
        )
    ]
    assert bends(line, 2) == [line[0], line[-1]]
    assert bends(line, 3) == [line[0], line[2], line[-1]]
    assert bends(line, 9) == line
    assert bends(line[:1], 3) == line[:1]
