"""What a study learns from its trials."""

from __future__ import annotations

import pytest

from autosp.cost_model.calibrate import calibrated, observations
from autosp.cost_model.predict import predict
from autosp.search.learned import MOST_ERROR, PRIOR_ERROR, Learned, Lessons
from autosp.search.space import key_of, rank
from autosp.spec import Candidate, Outcome, Prediction, Trial, Usage
from builders import prediction, profile, trial

PROFILE = profile((20, 10, 30, 10, 20, 30), bytes_per_s=20.0)
BUDGET = 150
RANKED = rank(PROFILE, BUDGET)
LESSONS = Lessons(PROFILE, RANKED)


def tried(index: int, *, slower: float = 1.0, extra_bytes: int = 0, recorded: bool = False) -> Trial:
    """A trial of one of the candidates, slower than predicted; with `recorded`, it is known that this was compute."""
    predicted = RANKED[index]
    found = trial(
        predicted, latency_s=predicted.latency_s * slower, peak_bytes=predicted.peak_bytes + extra_bytes, number=index
    )
    if not recorded:
        return found
    link_s = predicted.moved_bytes / PROFILE.link.bytes_per_s
    usage = Usage(stall_s=predicted.stall_s, stalls=0, link_s=link_s, loads=1)
    return found.model_copy(update={"measurement": found.measurement.model_copy(update={"usage": usage})})


def test_nothing_was_tried() -> None:
    learned = LESSONS.learned([])
    assert (learned.relative_error, learned.extra_bytes) == (PRIOR_ERROR, 0)
    assert {key_of(each.candidate) for each in learned.predictions} == {key_of(each.candidate) for each in RANKED}


def test_the_fastest_comes_first() -> None:
    times = [each.latency_s for each in LESSONS.learned([tried(0)]).predictions]
    assert times == sorted(times)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_right_model_is_trusted_more(count: int) -> None:
    learned = LESSONS.learned([tried(index) for index in range(count)])
    assert learned.relative_error == pytest.approx(PRIOR_ERROR / max(1, count - 1))
    assert learned.extra_bytes == 0


def test_the_error_is_the_most_by_which_one_was_faster_than_predicted() -> None:
    learned = LESSONS.learned([tried(0), tried(1, slower=1.2), tried(2, slower=0.9)])
    assert learned.relative_error == pytest.approx(1 / 0.9 - 1)


def test_slower_than_predicted_is_no_hope_for_others() -> None:
    learned = LESSONS.learned([tried(0), tried(1, slower=1.2), tried(2)])
    assert learned.relative_error == pytest.approx(PRIOR_ERROR / 2)


def test_the_error_has_an_end() -> None:
    assert LESSONS.learned([tried(0, slower=0.1)]).relative_error == MOST_ERROR


def test_a_disturbed_trial_is_left_out() -> None:
    trials = [*(tried(index) for index in range(5)), tried(5, slower=3.0)]
    assert LESSONS.learned(trials).relative_error == pytest.approx(PRIOR_ERROR / 4)


def test_predictions_are_made_anew() -> None:
    trials = [tried(index, slower=1.5, recorded=True) for index in range(3)]
    learned = LESSONS.learned(trials)
    again = calibrated(PROFILE, [*observations(PROFILE), *trials])
    assert again.compute_s > PROFILE.compute_s
    for each in learned.predictions:
        assert predict(again, [each.candidate]) == [each]


def test_memory_is_corrected_by_the_largest_excess() -> None:
    assert LESSONS.learned([tried(0, extra_bytes=4), tried(1, extra_bytes=30), tried(2)]).extra_bytes == 30
    assert LESSONS.learned([tried(0, extra_bytes=-10)]).extra_bytes == 0


def test_a_disturbed_trial_still_took_its_memory() -> None:
    trials = [*(tried(index) for index in range(5)), tried(5, slower=3.0, extra_bytes=70)]
    assert LESSONS.learned(trials).extra_bytes == 70


@pytest.mark.parametrize("outcome", [Outcome.OUT_OF_MEMORY, Outcome.OUTPUT_DIFFERS])
def test_failed_trials_teach_nothing(outcome: Outcome) -> None:
    failed = trial(RANKED[0], peak_bytes=500, outcome=outcome)
    assert LESSONS.learned([failed]) == LESSONS.learned([])
    assert LESSONS.learned([tried(1), failed]) == LESSONS.learned([tried(1)])


def test_over_budget_trials_were_timed() -> None:
    over = trial(RANKED[0], peak_bytes=RANKED[0].peak_bytes + 50, outcome=Outcome.OVER_BUDGET)
    assert LESSONS.learned([over]).extra_bytes == 50


def predicted(k: int, latency_s: float, peak_bytes: int) -> Prediction:
    """All differ in k."""
    return prediction(Candidate(k=k, k_prime=1), latency_s=latency_s, peak_bytes=peak_bytes)


def test_rivals_fit_and_were_not_tried() -> None:
    fast, small, large = predicted(1, 1.0, 100), predicted(2, 2.0, 50), predicted(3, 3.0, 200)
    learned = Learned((fast, small, large), 0.25, 7)
    assert learned.rivals(set(), 107) == [fast, small]
    assert learned.rivals({key_of(fast.candidate)}, 57) == [small]
    assert learned.rivals(set(), 56) == []
    assert learned.optimistic_s(large) == 2.25
    assert learned.peak_bytes(large) == 207
