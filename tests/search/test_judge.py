"""When a study may stop: cases by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from autosp.search.learned import Learned
from autosp.search.study import Verdict, judge
from autosp.spec import Candidate, Outcome, Prediction, Trial
from builders import prediction, trial

BUDGET = 1000


def judged(
    trials: Sequence[Trial], candidates: Sequence[Prediction], *, error: float = 0.05, extra_bytes: int = 0
) -> Verdict:
    """The verdict where all of a budget of 1000 bytes may be used."""
    return judge(trials, learned(candidates, error, extra_bytes), BUDGET, BUDGET)


def learned(candidates: Sequence[Prediction], error: float = 0.05, extra_bytes: int = 0) -> Learned:
    """Predictions that may be off so far."""
    return Learned(tuple(sorted(candidates, key=lambda each: each.latency_s)), error, extra_bytes)


def predicted(k: int, latency_s: float, peak_bytes: int = 500) -> Prediction:
    """The setting with that k; all differ in it."""
    return prediction(Candidate(k=k, k_prime=1), latency_s=latency_s, peak_bytes=peak_bytes)


# A rival is worth a trial if its prediction times 0.95 is below the best measurement times 0.99: here, below 0.99 / 0.95 = 1.0421.
@pytest.mark.parametrize(
    ("rival_s", "finished"), [(0.5, False), (1.0, False), (1.042, False), (1.0422, True), (2.0, True)]
)
def test_stops_when_no_rival_can_win(rival_s: float, finished: bool) -> None:
    best = predicted(1, 1.0)
    verdict = judged([trial(best)], [best, predicted(2, rival_s)])
    assert verdict.best == trial(best)
    assert verdict.finished is finished


def test_says_why_it_stops() -> None:
    best = predicted(1, 1.0)
    verdict = judged([trial(best)], [best, predicted(2, 2.0), predicted(3, 3.0)])
    assert verdict.why == (
        "k=1 k'=1 residents=0 was the fastest of 1 validated; the best of 2 others (k=2 k'=1 residents=0) can take no "
        "less than 1.9 s, given the cost model's error of 5.0%, against 1 s measured"
    )


def test_says_why_it_goes_on() -> None:
    best = predicted(1, 2.0)
    verdict = judged([trial(best)], [best, predicted(2, 3.0), predicted(3, 1.0)])
    assert not verdict.finished
    assert verdict.why == (
        "k=1 k'=1 residents=0 was the fastest of 1 validated; k=3 k'=1 residents=0 was not tried and may take 0.95 s "
        "(model error 5.0%)"
    )


def test_a_surer_model_makes_it_stop_earlier() -> None:
    # At an error of 5 % the rival at 1.03 can take 0.9785 s, at 3 % 0.9991 s: only the first is below 0.99 s.
    best, rival = predicted(1, 1.0), predicted(2, 1.03)
    assert not judged([trial(best)], [best, rival], error=0.05).finished
    assert judged([trial(best)], [best, rival], error=0.03).finished


def test_everything_was_tried() -> None:
    first, second = predicted(1, 1.0), predicted(2, 0.5)
    verdict = judged([trial(first), trial(second)], [second, first])
    assert verdict.best == trial(second)
    assert verdict.finished
    assert (
        verdict.why == "k=2 k'=1 residents=0 was the fastest of 2 validated; every candidate under the budget was tried"
    )


def test_a_tried_setting_is_no_rival_of_itself() -> None:
    # It was predicted to take half of what it took.
    only = predicted(1, 1.0)
    assert judged([trial(only, latency_s=2.0)], [only]).finished


def test_measured_not_predicted() -> None:
    first, second = predicted(1, 1.0), predicted(2, 2.0)
    verdict = judged([trial(first, latency_s=2.0), trial(second, latency_s=1.5)], [first, second])
    assert verdict.best is not None
    assert verdict.best.prediction == second


@pytest.mark.parametrize("outcome", [Outcome.OVER_BUDGET, Outcome.OUT_OF_MEMORY, Outcome.OUTPUT_DIFFERS])
def test_only_what_fits_wins(outcome: Outcome) -> None:
    fits, failed = predicted(1, 1.0), predicted(2, 0.1)
    trials = [trial(fits), trial(failed, peak_bytes=BUDGET + 1, outcome=outcome)]
    verdict = judged(trials, [failed, fits])
    assert verdict.best == trial(fits)
    assert "the fastest of 1 validated" in verdict.why


@pytest.mark.parametrize("outcome", [Outcome.OVER_BUDGET, Outcome.OUT_OF_MEMORY, Outcome.OUTPUT_DIFFERS])
def test_nothing_fits(outcome: Outcome) -> None:
    failed, untried = predicted(1, 1.0), predicted(2, 9.0)
    trials = [trial(failed, outcome=outcome)]
    assert judged(trials, [failed]).best is None
    assert judged(trials, [failed]).finished
    assert not judged(trials, [failed, untried]).finished  # slow, and better than nothing


def test_nothing_was_tried() -> None:
    verdict = judged([], [predicted(1, 1.0)])
    assert (verdict.best, verdict.finished) == (None, False)


@pytest.mark.parametrize("order", [1, -1])
def test_of_equally_fast_trials_the_smaller_one_wins(order: int) -> None:
    large, small = predicted(1, 1.0, peak_bytes=900), predicted(2, 1.0, peak_bytes=300)
    verdict = judged([trial(large), trial(small)][::order], [large, small])
    assert verdict.best is not None
    assert verdict.best.prediction == small


def test_a_rival_that_would_not_fit_is_none() -> None:
    # Plans took 100 bytes more than predicted: so will the rival, and 950 + 100 is over the budget.
    best, rival = predicted(1, 1.0, peak_bytes=500), predicted(2, 0.1, peak_bytes=950)
    assert not judged([trial(best)], [best, rival]).finished
    verdict = judged([trial(best, peak_bytes=600)], [best, rival], extra_bytes=100)
    assert verdict.finished
    assert "every candidate under the budget was tried" in verdict.why
    assert not judged([trial(best, peak_bytes=550)], [best, rival], extra_bytes=50).finished  # just fits


def test_nothing_left_but_what_would_not_fit() -> None:
    failed, rival = predicted(1, 1.0, peak_bytes=900), predicted(2, 1.0, peak_bytes=950)
    trials = [trial(failed, peak_bytes=1001, outcome=Outcome.OVER_BUDGET)]
    verdict = judged(trials, [failed, rival], extra_bytes=101)
    assert (verdict.best, verdict.finished) == (None, True)


def test_a_winner_must_leave_room_for_noise() -> None:
    # Both were measured to be within the budget of 1000; of that, 950 are accepted.
    close, safe = predicted(1, 1.0, peak_bytes=960), predicted(2, 2.0, peak_bytes=950)
    assert judge([trial(close), trial(safe)], learned([close, safe]), BUDGET, 950).best == trial(safe)
    assert judge([trial(close)], learned([close]), BUDGET, 950).best is None


def test_rivals_are_bounded_by_what_is_usable() -> None:
    best, rival = predicted(1, 1.0, peak_bytes=500), predicted(2, 0.1, peak_bytes=901)
    assert judge([trial(best)], learned([best, rival]), 900, BUDGET).finished
    assert not judge([trial(best)], learned([best, rival]), 901, BUDGET).finished
