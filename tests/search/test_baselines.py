"""The trivial plans beside which a study's winner is seen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from autosp.search.limits import Limits
from autosp.search.space import rank
from autosp.search.study import run_study
from autosp.spec import Candidate, Measurement, Prediction, Profile, Trial
from autosp.store import Repository
from builders import measurement, prediction, profile, study_key, trial

PLENTY_BYTES = 10**6
LAYER_BYTES = 100


@dataclass
class Right:
    """A device that is as predicted, and what was tried on it."""

    ranked: list[Prediction]
    tried: list[Candidate] = field(default_factory=list)

    def validate(self, candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
        self.tried.append(candidate)
        found = next(one for one in self.ranked if one.candidate == candidate)
        return measurement(latency_s=found.latency_s, peak_bytes=found.peak_bytes)


def tried_in(known: Profile, ranked: list[Prediction], budget_bytes: int = PLENTY_BYTES) -> list[Candidate]:
    """By a whole study."""
    device = Right(ranked)
    with Repository() as repository:
        repository.create_study("baselines", study_key(budget_bytes=budget_bytes))
        limits = Limits(max_trials=50)
        run_study(repository, "baselines", known, ranked, budget_bytes, device.validate, limits=limits, progress=str)
    return device.tried


def timed_under_a_ring(known: Profile) -> Profile:
    ring: Trial = trial(prediction(Candidate(k=2, k_prime=1), latency_s=9.0))
    return known.model_copy(update={"overlapped": ring})


def bound_by_the_link() -> tuple[Profile, list[Prediction]]:
    """Half of the layers fit, and plans that keep some of them are far ahead of plain windows."""
    known = profile((LAYER_BYTES,) * 8, forward_s=0.001, bytes_per_s=100.0)
    ranked = rank(known, 4 * LAYER_BYTES + 2 * 10)
    window_s = min(one.latency_s for one in ranked if not one.candidate.residents)
    assert window_s > 1.5 * ranked[0].latency_s
    return known, ranked


def test_everything_resident_is_tried_where_it_fits() -> None:
    known = timed_under_a_ring(profile((10,) * 4, forward_s=0.25, bytes_per_s=1000.0))
    assert any(not candidate.ring for candidate in tried_in(known, rank(known, PLENTY_BYTES)))


@pytest.mark.parametrize("profiled", [False, True])
def test_a_hopeless_window_is_tried_unless_profiling_timed_another(profiled: bool) -> None:
    known, ranked = bound_by_the_link()
    tried = tried_in(timed_under_a_ring(known) if profiled else known, ranked)
    assert any(not candidate.residents for candidate in tried) is not profiled


def test_a_window_that_may_win_is_tried() -> None:
    known = timed_under_a_ring(profile((LAYER_BYTES,) * 8, forward_s=2.0, bytes_per_s=100.0))
    ranked = rank(known, 4 * LAYER_BYTES + 2 * 10)
    assert any(not candidate.residents for candidate in tried_in(known, ranked))


def test_a_ring_of_one_microbatch_tells_nothing_of_a_group() -> None:
    known, ranked = bound_by_the_link()
    grouped = [one.model_copy(update={"candidate": one.candidate.model_copy(update={"group": 2})}) for one in ranked]
    known = timed_under_a_ring(known).model_copy(update={"waiting_bytes": 0})
    assert any(not candidate.residents for candidate in tried_in(known, grouped))
