"""What a study learns from its trials."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosp.search.correction import PRIOR_ERROR, Correction, learn
from autosp.spec import Candidate, Outcome
from builders import prediction, thorough, trial

CANDIDATE = Candidate(k=2, k_prime=1)


def test_applied_to_a_prediction() -> None:
    correction = Correction(compute_factor=1.5, stall_factor=2.0, relative_error=0.25, extra_bytes=7)
    predicted = prediction(CANDIDATE, latency_s=10.0, stall_s=4.0, peak_bytes=100)
    assert correction.latency_s(predicted) == 1.5 * 6 + 2 * 4
    assert correction.optimistic_s(predicted) == 17 * 0.75
    assert correction.peak_bytes(predicted) == 107


def test_nothing_was_tried() -> None:
    assert learn([]) == Correction(1.0, 1.0, PRIOR_ERROR, 0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_right_model_is_left_alone_and_trusted_more(count: int) -> None:
    trials = [
        trial(prediction(CANDIDATE, latency_s=2.0 + number, stall_s=1.0, peak_bytes=100)) for number in range(count)
    ]
    correction = learn(trials)
    assert correction.compute_factor == pytest.approx(1)
    assert correction.stall_factor == pytest.approx(1)
    assert correction.relative_error == pytest.approx(0.10 / (1 + count))
    assert correction.extra_bytes == 0


def test_slow_compute() -> None:
    # One trial without stalls took twice its prediction. With c the compute factor: minimise (c / 2 - 1)^2 +
    # 0.3 (c - 1)^2, so c / 2 - 1 + 0.6 (c - 1) = 0 and c = 16 / 11. It still predicts 8 / 11 of what was measured.
    correction = learn([trial(prediction(CANDIDATE, latency_s=1.0), latency_s=2.0)])
    assert correction.compute_factor == pytest.approx(16 / 11)
    assert correction.stall_factor == pytest.approx(1)
    assert correction.relative_error == pytest.approx(3 / 11)


def test_slow_transfers() -> None:
    # The same with nothing but a stall.
    correction = learn([trial(prediction(CANDIDATE, latency_s=1.0, stall_s=1.0), latency_s=2.0)])
    assert correction.compute_factor == pytest.approx(1)
    assert correction.stall_factor == pytest.approx(16 / 11)


def test_compute_and_transfers_are_told_apart() -> None:
    # Many trials outweigh the prior: compute took what was predicted, stalls three times as much.
    trials = [
        trial(prediction(CANDIDATE, latency_s=2.0 + stall_s, stall_s=stall_s), latency_s=2.0 + 3 * stall_s)
        for stall_s in (0.0, 1.0, 2.0, 4.0, 8.0) * 20
    ]
    correction = learn(trials)
    assert correction.compute_factor == pytest.approx(1, abs=0.02)
    assert correction.stall_factor == pytest.approx(3, abs=0.15)


def test_error_is_the_largest_residual_seen() -> None:
    # Equal predictions, one right and nine 20 % slow: the right one is off by what was learned from the others.
    trials = [trial(prediction(CANDIDATE), latency_s=latency_s) for latency_s in (1.0, *[1.2] * 9)]
    correction = learn(trials)
    assert correction.relative_error == pytest.approx(correction.compute_factor - 1)
    assert correction.relative_error > 0.15


def test_a_disturbed_trial_is_left_out() -> None:
    # Five right ones, and one that took three times as long: fitted together, it is 65 % off and the others 4 %.
    trials = [trial(prediction(CANDIDATE), latency_s=latency_s) for latency_s in (1.0, 1.0, 3.0, 1.0, 1.0, 1.0)]
    correction = learn(trials)
    assert correction.compute_factor == pytest.approx(1)
    assert correction.relative_error == pytest.approx(0.10 / 6)


def test_trials_that_are_off_alike_are_believed() -> None:
    # Six that took three times as long: c = (6 / 3 + 0.3) / (6 / 9 + 0.3), and none is far from the others.
    correction = learn([trial(prediction(CANDIDATE), latency_s=3.0)] * 6)
    assert correction.compute_factor == pytest.approx(2.3 / (6 / 9 + 0.3))
    assert correction.relative_error == pytest.approx(1 - correction.compute_factor / 3)


def test_a_large_correction_is_doubted() -> None:
    # Two that took twice as long: c = (2 / 2 + 0.3) / (2 / 4 + 0.3) = 1.625. What is left is 1 - 1.625 / 2 = 0.1875, and
    # the correction of 0.625, seen twice, is not trusted to better than 0.625 / 3.
    correction = learn([trial(prediction(CANDIDATE), latency_s=2.0)] * 2)
    assert correction.compute_factor == pytest.approx(1.625)
    assert correction.relative_error == pytest.approx(0.625 / 3)


def test_a_disturbed_trial_still_took_its_memory() -> None:
    disturbed = trial(prediction(CANDIDATE, peak_bytes=100), latency_s=3.0, peak_bytes=170)
    assert learn([trial(prediction(CANDIDATE, peak_bytes=100))] * 5 + [disturbed]).extra_bytes == 70


def test_error_is_half_at_most() -> None:
    assert learn([trial(prediction(CANDIDATE), latency_s=100.0)]).relative_error == 0.5


def test_memory_is_corrected_by_the_largest_excess() -> None:
    predicted = prediction(CANDIDATE, peak_bytes=100)
    assert learn([trial(predicted, peak_bytes=peak) for peak in (104, 130, 90)]).extra_bytes == 30
    assert learn([trial(predicted, peak_bytes=90)]).extra_bytes == 0


def test_failed_trials_teach_nothing() -> None:
    failed = [
        trial(prediction(CANDIDATE, peak_bytes=100), peak_bytes=500, outcome=outcome)
        for outcome in (Outcome.OUT_OF_MEMORY, Outcome.OUTPUT_DIFFERS)
    ]
    assert learn(failed) == learn([])
    right = trial(prediction(CANDIDATE, peak_bytes=100))
    assert learn([right, *failed]) == learn([right])


def test_over_budget_trials_were_timed() -> None:
    over = trial(prediction(CANDIDATE, peak_bytes=100), latency_s=2.0, peak_bytes=150, outcome=Outcome.OVER_BUDGET)
    assert learn([over]).extra_bytes == 50
    assert learn([over]).compute_factor > 1.4


times = st.tuples(st.floats(0.1, 10), st.floats(0, 10), st.floats(0.1, 30))


@thorough
@given(st.lists(times, min_size=1, max_size=6))
def test_error_covers_what_was_seen(seen: list[tuple[float, float, float]]) -> None:
    """Below its cap, the error is no less than that of most trials."""
    trials = [
        trial(prediction(CANDIDATE, latency_s=compute_s + stall_s, stall_s=stall_s), latency_s=measured_s)
        for compute_s, stall_s, measured_s in seen
    ]
    correction = learn(trials)
    errors = [abs(correction.latency_s(one.prediction) / one.measurement.latency_s - 1) for one in trials]
    covered = sum(error <= correction.relative_error + 1e-9 for error in errors)
    assert 0 < correction.relative_error <= 0.5
    assert correction.relative_error == 0.5 or 2 * covered >= len(trials)
