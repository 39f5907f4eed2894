"""What measured plans teach the cost model: profiles of a known truth are found again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosp.cost_model.calibrate import LEAST_SCALE, MOST_SLOWDOWN, calibrated, fit, observations
from autosp.cost_model.predict import contended_periods, predict, with_rings
from autosp.cost_model.simulate import costs_of, simulate
from autosp.schedule.lowering import lower_for
from autosp.schedule.timeline import SEEN_STALL_S
from autosp.spec import Candidate, Measurement, Profile, Tier, Trial, Usage
from builders import link, measurement, prediction, profile, thorough, trial

SIZES = (40, 10, 30, 20, 10, 40, 20, 30)
TEACHERS = (Candidate(k=1, k_prime=1), Candidate(k=4, k_prime=1), Candidate(k=4, k_prime=2, residents=(1, 5)))
OTHERS = (
    Candidate(k=2, k_prime=1),
    Candidate(k=3, k_prime=1, residents=(0,)),
    Candidate(k=6, k_prime=2, residents=(2, 4)),
    Candidate(k=6, k_prime=3),
)


def measured_as(truth: Profile, candidate: Candidate) -> Trial:
    """What a machine that is just as `truth` says would show of a candidate."""
    periods = contended_periods(truth, with_rings(truth, [candidate]))
    factors = (float(factor[0]) for factor in (periods.compute_factor, periods.link_factor, periods.disk_factor))
    costs = costs_of(truth).contended(*factors)
    schedule = lower_for("inference", candidate, truth.partition)
    timeline = simulate(schedule, costs)
    repeats = truth.partition.repeats
    (predicted,) = predict(truth, [candidate])
    usage = Usage(
        stall_s=predicted.stall_s,
        stalls=sum(seconds > SEEN_STALL_S for seconds in timeline.stalls_s().values()) * repeats,
        link_s=sum(costs.load_s(action.layers) for action in schedule.loads) * repeats,
        loads=len(schedule.loads) * repeats,
        disk_s=sum(costs.read_s(action.layers) for action in schedule.reads) * repeats,
        reads=len(schedule.reads) * repeats,
        read_bytes=predicted.read_bytes,
    )
    found = measurement(latency_s=predicted.latency_s, moved_bytes=predicted.moved_bytes)
    return Trial(number=0, prediction=predicted, measurement=found.model_copy(update={"usage": usage}))


def errors(believed: Profile, truth: Profile, candidates: Sequence[Candidate]) -> list[float]:
    """How far each candidate's prediction is off."""
    pairs = zip(predict(believed, candidates), predict(truth, candidates), strict=True)
    return [abs(mine.latency_s / right.latency_s - 1) for mine, right in pairs]


BELIEVED = profile(SIZES, bytes_per_s=20.0, latency_s=0.1, compute_slowdown=1.03, link_slowdown=1.03)


@pytest.mark.parametrize(
    "truth",
    [
        pytest.param(BELIEVED, id="the same"),
        pytest.param(profile(SIZES, forward_s=1.3, bytes_per_s=20.0, latency_s=0.1), id="slower compute"),
        pytest.param(profile(SIZES, bytes_per_s=15.0, latency_s=0.1), id="slower link"),
        pytest.param(profile(SIZES, bytes_per_s=20.0, latency_s=0.3), id="slower start of a transfer"),
        pytest.param(profile(SIZES, bytes_per_s=20.0, latency_s=0.1, compute_slowdown=1.2), id="loads cost compute"),
        pytest.param(profile(SIZES, bytes_per_s=20.0, latency_s=0.1, link_slowdown=1.2), id="compute costs the link"),
        pytest.param(profile(SIZES, bytes_per_s=20.0, latency_s=0.1, wake_s=0.05), id="waking up costs"),
        pytest.param(profile(SIZES, forward_s=0.5, bytes_per_s=30.0, latency_s=0.05), id="everything faster"),
        pytest.param(profile(SIZES, bytes_per_s=15.0, latency_s=0.1, repeats=3, tail_s=1.0), id="periods"),
    ],
)
def test_finds_the_truth_again(truth: Profile) -> None:
    believed = BELIEVED.model_copy(update={"partition": truth.partition, "tail_s": truth.tail_s})
    taught = calibrated(believed, [measured_as(truth, candidate) for candidate in TEACHERS])
    before, after = errors(believed, truth, OTHERS), errors(taught, truth, OTHERS)
    assert max(after) < 0.02
    assert max(after) <= max(before) + 5e-3


def test_the_disk_behind_the_host_is_learned_too() -> None:
    def three_tiers(disk_bytes_per_s: float) -> Profile:
        disk = link(bytes_per_s=disk_bytes_per_s, latency_s=0.1, source=Tier.DISK)
        return profile(SIZES, bytes_per_s=50.0, latency_s=0.1, disk=disk)

    on_disk = [
        candidate.model_copy(
            update={"on_disk": tuple(sorted(sum(candidate.groups(range(8))[::2], ()))), "read_ahead": 2}
        )
        for candidate in (*TEACHERS, *OTHERS)
    ]
    truth = three_tiers(10.0)
    taught = calibrated(three_tiers(14.0), [measured_as(truth, candidate) for candidate in on_disk[:3]])
    assert max(errors(taught, truth, on_disk[3:])) < 0.03
    assert max(errors(three_tiers(14.0), truth, on_disk[3:])) > 0.1


def test_of_a_slow_machine_everything_is_slower_alike() -> None:
    # Compute twice as long as believed, by two plans without stalls: 1 / 0.03^2 each against the prior's 1 / 0.3^2.
    believed = profile((10,) * 4, forward_s=2.0, tail_s=1.0, before_s=1.0, bytes_per_s=1000.0)
    truth = profile((10,) * 4, forward_s=4.0, tail_s=2.0, before_s=2.0, bytes_per_s=1000.0)
    resident = Candidate(k=4, k_prime=1, residents=(0, 1, 2, 3))
    taught = calibrated(believed, [measured_as(truth, resident)] * 2)
    scale = (2 * 0.5 / 0.03**2 + 1 / 0.3**2) / (2 * 0.25 / 0.03**2 + 1 / 0.3**2)
    assert taught.compute_s == pytest.approx(13 * scale)
    assert [visit.forward_s for visit in taught.visits] == pytest.approx([2 * scale] * 4)
    assert [visit.before_s for visit in taught.visits] == pytest.approx([scale] * 4)
    assert taught.link.bytes_per_s == believed.link.bytes_per_s  # nothing was moved


def test_no_copy_makes_compute_take_more_than_twice_as_long() -> None:
    """One pass in which somebody else computed, beside one without a plan: the difference is not the link's."""
    believed = profile(SIZES, bytes_per_s=6.0, latency_s=0.1)
    known = believed.model_copy(update={"plain_s": believed.compute_s})
    busy = measured_as(profile(SIZES, bytes_per_s=6.0, latency_s=0.1, compute_slowdown=5.0), TEACHERS[1])
    assert calibrated(known, [busy, busy]).link.compute_slowdown == MOST_SLOWDOWN


def test_what_was_not_recorded_teaches_nothing() -> None:
    silent = trial(prediction(TEACHERS[0]), latency_s=99.0)
    assert calibrated(BELIEVED, [silent]) == BELIEVED
    assert calibrated(BELIEVED, []) == BELIEVED


def test_a_failed_plan_teaches_nothing() -> None:
    right = measured_as(BELIEVED, TEACHERS[1])
    failed = Trial(
        number=1,
        prediction=right.prediction,
        measurement=Measurement.model_validate({**right.measurement.model_dump(), "latency_s": 0.0, "samples_s": ()}),
    )
    assert calibrated(BELIEVED, [failed]) == BELIEVED


def test_a_disturbed_plan_teaches_nothing() -> None:
    teachers = [measured_as(BELIEVED, candidate) for candidate in (*TEACHERS, *OTHERS)]
    slow = profile(SIZES, forward_s=5.0, bytes_per_s=20.0, latency_s=0.1)
    disturbed = measured_as(slow, Candidate(k=5, k_prime=1))
    taught = calibrated(BELIEVED, [*teachers, disturbed])
    assert taught.compute_s == pytest.approx(BELIEVED.compute_s, rel=0.01)


def test_transfers_of_nearly_nothing_still_have_a_rate() -> None:
    truth = profile((1,) * 8, bytes_per_s=1e9, latency_s=0.5)
    taught = calibrated(profile((1,) * 8, bytes_per_s=2.0), [measured_as(truth, candidate) for candidate in TEACHERS])
    assert taught.link.bytes_per_s <= 2.0 / LEAST_SCALE + 1e-9
    assert max(errors(taught, truth, OTHERS)) < 0.1


def test_the_plans_that_a_profile_was_made_from() -> None:
    assert observations(BELIEVED) == [BELIEVED.observed]
    second = trial(prediction(TEACHERS[1]))
    assert observations(BELIEVED.model_copy(update={"overlapped": second})) == [BELIEVED.observed, second]


@thorough
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0.2, 5)), min_size=1, max_size=8),
)
def test_no_factor_is_negative(rows: list[tuple[float, float, float]]) -> None:
    table = np.array([[1.0, u, s] for u, s, _ in rows])
    found = np.array([value for _, _, value in rows])
    factors = fit(table, found, np.array([1.0, 0.03, 0.0]), np.array([0.3, 0.1, 0.05]))
    assert factors[0] >= LEAST_SCALE
    assert (factors >= 0).all()
    assert np.isfinite(factors).all()
