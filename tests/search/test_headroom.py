"""What of a budget is left free, and what a study makes of plans that turned out to take too much."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosp.search.headroom import acceptable_bytes, usable_after, usable_bytes
from autosp.search.learned import Learned
from autosp.search.limits import Limits
from autosp.search.space import rank
from autosp.search.study import run_study
from autosp.spec import Candidate, Measurement, Outcome, Prediction
from autosp.store import Repository
from builders import measurement, prediction, profile, study_key, trial

MB = 10**6
BUDGET_BYTES = 1_200 * MB
SCATTERED = profile([100 * MB] * 10, kind="cpu", workspace_bytes=300 * MB).model_copy(
    update={"heap_scatter_bytes": 150 * MB}
)
"""Of a heap that scatters by more than what is left free for that, in what is measured."""


def taking(peak_bytes: int) -> Prediction:
    return prediction(Candidate(k=1, k_prime=1), peak_bytes=peak_bytes)


@pytest.mark.parametrize("outcome", [Outcome.FITS, Outcome.OVER_BUDGET, Outcome.OUT_OF_MEMORY])
def test_what_took_too_much_bounds_its_rivals(outcome: Outcome) -> None:
    over = trial(taking(950), peak_bytes=930, outcome=outcome)
    assert usable_after([over], 0, 1000, 900) == 920  # a rival would take 900, if it is off by as much
    assert usable_after([over], 0, 910, 900) == 910
    assert usable_after([over, trial(taking(800), peak_bytes=980, outcome=outcome)], 0, 1000, 900) == 720


def test_what_predictions_are_corrected_by_counts_once() -> None:
    over = trial(taking(850), peak_bytes=930)
    usable = usable_after([over], 80, 1000, 900)
    rivals = Learned((taking(820), taking(821)), 0.0, extra_bytes=80).rivals(set(), usable)
    assert rivals == [taking(820)]  # which would take 900, if it is off by 80 as well


@pytest.mark.parametrize("outcome", [Outcome.OUTPUT_DIFFERS, Outcome.HOST_OUT_OF_MEMORY, Outcome.KILLED])
def test_what_says_nothing_of_memory_bounds_nothing(outcome: Outcome) -> None:
    assert usable_after([trial(taking(950), peak_bytes=930, outcome=outcome)], 0, 1000, 900) == 1000


def test_what_was_acceptable_bounds_nothing() -> None:
    assert usable_after([trial(taking(700), peak_bytes=900)], 0, 1000, 900) == 1000
    assert usable_after([], 0, 1000, 900) == 1000


def test_a_study_turns_to_less_memory_where_plans_take_all_that_was_predicted(tmp_path: Path) -> None:
    ranked = rank(SCATTERED, usable_bytes(SCATTERED, BUDGET_BYTES))
    acceptable = acceptable_bytes(SCATTERED, BUDGET_BYTES)
    assert sum(one.peak_bytes > acceptable for one in ranked) > 3
    ran: list[Prediction] = []

    def validate(candidate: Candidate, hopeless_s: float = float("inf")) -> Measurement:
        (found,) = (one for one in ranked if one.candidate == candidate)
        ran.append(found)
        return measurement(latency_s=found.latency_s, peak_bytes=found.peak_bytes)

    with Repository(tmp_path / "studies.db") as repository:
        repository.create_study("scattered", study_key(budget_bytes=BUDGET_BYTES))
        verdict = run_study(
            repository,
            "scattered",
            SCATTERED,
            ranked,
            BUDGET_BYTES,
            validate,
            limits=Limits(max_trials=len(ranked)),
            progress=lambda text: None,
        )
    assert verdict.best is not None and verdict.finished
    assert verdict.best.measurement.peak_bytes <= acceptable
    favourite, window, *others = ran
    assert favourite.peak_bytes > acceptable and window.candidate.residents == ()
    assert others and max(one.peak_bytes for one in others) <= acceptable, "no other plan of too much memory was tried"
