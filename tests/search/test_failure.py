"""What a study without a plan says."""

from __future__ import annotations

from autosp.errors import BudgetTooSmallError, HostMemoryError, IsolationError, OutputMismatchError
from autosp.search.failure import no_plan
from autosp.spec import Candidate, Outcome
from builders import prediction, profile, trial

PROFILE = profile([10, 30, 20])
SOME = prediction(Candidate(k=2, k_prime=1))


def test_trials_that_were_cut_short_say_nothing_of_memory() -> None:
    over = trial(SOME, peak_bytes=2_000, outcome=Outcome.OVER_BUDGET)
    error = no_plan(PROFILE, 1_000, [over, trial(SOME, outcome=Outcome.KILLED)], finished=True)
    assert isinstance(error, BudgetTooSmallError)
    assert (error.least_bytes, error.layer) == (2_000, "blocks.1")
    assert "the least that works is" in str(error) and "max_trials" not in str(error)


def test_a_limit_does_not_say_that_nothing_fits() -> None:
    error = no_plan(PROFILE, 1_000, [trial(SOME, peak_bytes=2_000, outcome=Outcome.OVER_BUDGET)], finished=False)
    assert isinstance(error, BudgetTooSmallError)
    assert "the least that works" not in str(error)
    assert "try a higher max_trials or timeout_s, or max_gpu_gb=" in str(error)


def test_all_trials_cut_short() -> None:
    outcomes = [Outcome.KILLED, Outcome.TIMED_OUT, Outcome.KILLED]
    error = no_plan(PROFILE, 1_000, [trial(SOME, outcome=outcome) for outcome in outcomes], finished=True)
    assert isinstance(error, IsolationError)
    assert "none of 3 validated plans came to its end (2 killed, 1 timed out)" in str(error)


def test_a_full_host() -> None:
    full = trial(SOME, outcome=Outcome.HOST_OUT_OF_MEMORY, peak_bytes=0)
    error = no_plan(PROFILE, 1_000, [full, full], finished=True)
    assert isinstance(error, HostMemoryError)
    assert "no room for any of 2 validated plans: lower max_cpu_gb" in str(error)
    over = trial(SOME, peak_bytes=2_000, outcome=Outcome.OVER_BUDGET)
    assert isinstance(no_plan(PROFILE, 1_000, [full, over], finished=True), BudgetTooSmallError)


def test_another_output_is_named_before_all_else() -> None:
    outcomes = [Outcome.KILLED, Outcome.OUTPUT_DIFFERS]
    error = no_plan(PROFILE, 1_000, [trial(SOME, outcome=outcome) for outcome in outcomes], finished=True)
    assert isinstance(error, OutputMismatchError)
