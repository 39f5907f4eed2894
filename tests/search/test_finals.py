"""The fastest plans measured again, and which of them wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import pytest

from autosp.search.finals import fastest, median_error_s, pooled, ties, undecided
from autosp.search.limits import Limits
from autosp.search.space import rank
from autosp.search.study import HOPELESS, run_study
from autosp.spec import Candidate, Measurement, Outcome, Trial
from autosp.store import Repository
from builders import measurement, prediction, profile, study_key, trial


def measured(samples_s: Sequence[float], *, rounds: int = 2, peak_bytes: int = 100) -> Measurement:
    """With these samples."""
    middle = sorted(samples_s)[len(samples_s) // 2]
    found = measurement(latency_s=middle, peak_bytes=peak_bytes)
    return found.model_copy(update={"samples_s": tuple(samples_s), "rounds": rounds})


def tried(k: int, latency_s: float, *, rounds: int = 1, peak_bytes: int = 100, spread_s: float = 0.0) -> Trial:
    """All differ in k. Five samples, half of them further off than `spread_s`."""
    samples_s = [latency_s + step * spread_s for step in (-2, -1, 0, 1, 2)]
    found = trial(prediction(Candidate(k=k, k_prime=1)), number=k)
    update = {"measurement": measured(samples_s, rounds=rounds, peak_bytes=peak_bytes)}
    return found.model_copy(update=update)


def test_close_plans_are_measured_again_the_slowest_first() -> None:
    first, second, third, fourth = (tried(k, 1.0 + k / 200) for k in range(4))
    assert undecided([second, first]) == [second, first]
    assert undecided([first, second, third, fourth]) == [third, second, first]  # three at most
    assert undecided([first, tried(9, 1.021)]) == []
    assert undecided([first]) == []
    assert undecided([]) == []


def test_who_was_measured_in_both_rounds_is_not_again() -> None:
    first, second = tried(0, 1.0, rounds=2), tried(1, 1.01)
    assert undecided([first, second]) == [second]
    assert undecided([first, tried(1, 1.01, rounds=2)]) == []


def test_the_error_of_a_median() -> None:
    # Deviations from 1.0: 0.2, 0.1, 0, 0.1, 0.2; their median is 0.1.
    assert median_error_s(measured([0.8, 0.9, 1.0, 1.1, 1.2])) == pytest.approx(1.2533 * 0.14826 / 5**0.5)
    assert median_error_s(measured([1.0] * 4)) == 0


def test_a_tie_goes_to_less_memory() -> None:
    # Errors of 1.2533 * 1.4826 * 0.01 / sqrt(5) = 0.0083 each: up to 2 * sqrt(2) * 0.0083 = 0.0235 apart is a tie.
    quick = tried(0, 1.0, rounds=2, spread_s=0.01, peak_bytes=200)
    small = tried(1, 1.02, rounds=2, spread_s=0.01, peak_bytes=100)
    smaller = tried(2, 1.03, rounds=2, spread_s=0.01, peak_bytes=50)
    assert ties(quick.measurement, small.measurement)
    assert not ties(quick.measurement, smaller.measurement)
    assert fastest([quick, small, smaller]) == small
    assert fastest([smaller, quick]) == quick


def test_what_is_not_close_is_no_tie_however_noisy() -> None:
    quick = tried(0, 1.0, rounds=2, spread_s=0.1, peak_bytes=200)
    small, smaller = (tried(k, 1.0 + k / 100, rounds=2, spread_s=0.1, peak_bytes=100 // k) for k in (2, 3))
    assert ties(quick.measurement, small.measurement)
    assert not ties(quick.measurement, smaller.measurement)
    assert fastest([smaller, small, quick]) == small


def test_one_round_decides_no_tie() -> None:
    quick = tried(0, 1.0, rounds=2, spread_s=0.01, peak_bytes=200)
    once = tried(1, 1.001, rounds=1, spread_s=0.01, peak_bytes=100)
    assert fastest([quick, once]) == quick
    assert fastest([quick, tried(1, 1.0, rounds=1, peak_bytes=100)]).measurement.peak_bytes == 100  # equal is equal


def test_two_rounds_as_one() -> None:
    together = pooled(measured([1.0, 1.1, 1.2], rounds=1), measured([1.3, 1.4], rounds=1, peak_bytes=120))
    assert together.samples_s == (1.0, 1.1, 1.2, 1.3, 1.4)
    assert (together.latency_s, together.peak_bytes, together.rounds) == (1.2, 120, 2)
    assert together.outcome is Outcome.FITS


@pytest.mark.parametrize("outcome", [Outcome.OUT_OF_MEMORY, Outcome.OUTPUT_DIFFERS, Outcome.OVER_BUDGET])
def test_a_round_that_failed_counts(outcome: Outcome) -> None:
    failed = measurement(outcome=outcome, peak_bytes=500)
    assert pooled(measured([1.0], rounds=1), failed).outcome is outcome


def test_a_study_ends_with_its_finals() -> None:
    """What was slower at first by 1 % is faster by 1 % the second time, by more than the noise."""
    known = profile((10,) * 4, forward_s=0.25, bytes_per_s=1000.0)
    ranked = rank(known, 10**6)
    asked: list[Candidate] = []
    repeated: list[Candidate] = []

    def validate(candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
        asked.append(candidate)
        return measured([1.0 + 0.01 * (len(asked) - 1)] * 3, rounds=1)

    def repeat(candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
        repeated.append(candidate)
        return measured([0.99 - 0.02 * asked.index(candidate)] * 9, rounds=1)

    with Repository() as repository:
        repository.create_study("finals", study_key(budget_bytes=10**6))
        limits = Limits(max_trials=2)
        first = run_study(repository, "finals", known, ranked[:2], 10**6, validate, limits=limits, progress=str)
        assert first.best is not None and first.best.prediction.candidate == asked[0]
        again = run_study(
            repository, "finals", known, ranked[:2], 10**6, validate, limits=limits, progress=str, repeat=repeat
        )
        assert again.best is not None and again.best.prediction.candidate == asked[1]
        assert (again.best.measurement.rounds, len(again.best.measurement.samples_s)) == (2, 12)
        assert len(asked) == 2
        assert repeated == [asked[1], asked[0]]
        run_study(repository, "finals", known, ranked[:2], 10**6, validate, limits=limits, progress=str, repeat=repeat)
        assert len(repeated) == 2


@pytest.mark.parametrize(
    ("limits", "profile_s", "trial_s", "trials", "finals"),
    [
        (Limits(), 0.0, 4.0, 4, 3),  # with a fifth one the finals of three would end at 32 s
        (Limits(), 4.0, 4.0, 3, 3),  # the profile took some of it
        (Limits(), 0.0, 5.9, 5, 0),  # the finals of three would end at 35 s, two more trials at 30 s
        (Limits(), 0.0, 11.0, 2, 0),  # a third one would end at 33 s
        (Limits(), 40.0, 1.0, 2, 0),  # everything resident and the plain window are tried in any case
        (Limits(max_trials=3), 0.0, 1.0, 3, 0),  # nothing is decided where a user's limit cuts a study short
    ],
)
def test_the_effort_is_what_a_study_takes_with_its_profile_and_its_finals(
    monkeypatch: pytest.MonkeyPatch, limits: Limits, profile_s: float, trial_s: float, trials: int, finals: int
) -> None:
    """30 s by the clock, for the best plan's pass takes 1 s, while others may still be faster."""
    monkeypatch.setattr("autosp.search.study.time", SimpleNamespace(perf_counter=lambda: 0.0))
    known = profile((10,) * 4, forward_s=0.1, bytes_per_s=1000.0)
    ranked = rank(known, 10**6)
    asked: list[Candidate] = []
    repeated: list[Candidate] = []

    def answer(told: list[Candidate], candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
        told.append(candidate)
        return measured([1.0] * 3, rounds=1).model_copy(update={"taken_s": trial_s})

    with Repository() as repository:
        repository.create_study("effort", study_key(budget_bytes=10**6))
        verdict = run_study(
            repository,
            "effort",
            known,
            ranked,
            10**6,
            partial(answer, asked),
            limits=limits,
            progress=str,
            repeat=partial(answer, repeated),
            profile_s=profile_s,
        )
    assert not verdict.finished and "was not tried" in verdict.why
    assert (len(asked), len(repeated)) == (trials, finals)


def test_what_is_predicted_to_lose_is_hopeless_once_it_does() -> None:
    """The favourite is timed in full; the plain window, which loads all weights again, for as long as it may win."""
    known = profile((10,) * 8, forward_s=0.01, bytes_per_s=10.0)
    ranked = rank(known, 60)
    limits_s: dict[Candidate, float] = {}
    expected_s = {one.candidate: one.latency_s for one in ranked}

    def validate(candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
        limits_s[candidate] = hopeless_s
        return measured([expected_s[candidate]] * 3, rounds=1, peak_bytes=10)

    with Repository() as repository:
        repository.create_study("hopeless", study_key(budget_bytes=60))
        run_study(repository, "hopeless", known, ranked, 60, validate, limits=Limits(), progress=str)
    (favourite, first_s), (window, second_s) = list(limits_s.items())[:2]
    assert favourite.residents and not window.residents
    assert first_s == math.inf and second_s == pytest.approx(expected_s[favourite] * (1 + HOPELESS))
    rivals_s = [limit_s for one, limit_s in limits_s.items() if expected_s[one] < second_s]
    assert set(rivals_s) == {math.inf}
