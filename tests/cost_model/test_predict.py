"""The array form of the cost model against the simulator, and against a pencil."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosp.cost_model.predict import contended_periods, predict, with_rings
from autosp.cost_model.simulate import costs_of, simulate
from autosp.schedule.lowering import lower_for
from autosp.schedule.streaming import build_ring, lower
from autosp.spec import Candidate, Profile
from builders import any_profiles, candidates_of, profile, profiles, thorough


def close(left: float, right: float) -> bool:
    """Equal but for the order of additions."""
    return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-9)


@thorough
@given(any_profiles, st.data())
def test_predict_is_simulate_on_the_lowered_list(profile: Profile, data: st.DataObject) -> None:
    candidate = data.draw(candidates_of(profile))
    layer_bytes = [layer.n_bytes for layer in profile.partition.layers]
    read_bytes = [layer.read_bytes for layer in profile.partition.layers]
    visits = profile.partition.visits
    repeats = profile.partition.repeats
    (predicted,) = predict(profile, [candidate])
    periods = contended_periods(profile, [(candidate, build_ring(candidate, layer_bytes, visits, read_bytes))])
    schedule = lower(candidate, layer_bytes, visits, read_bytes)
    factors = (float(factor[0]) for factor in (periods.compute_factor, periods.link_factor, periods.disk_factor))
    timeline = simulate(schedule, costs_of(profile).contended(*factors))
    last_two = (len(timeline.period_ends_s) - 2, len(timeline.period_ends_s) - 1)
    stall_s = sum(span.stall_s for span in timeline.spans if span.period in last_two) / 2
    moved = sum(layer_bytes[layer] for action in schedule.loads for layer in action.layers)
    read = sum(read_bytes[layer] for action in schedule.reads for layer in action.layers)
    assert predicted.candidate == candidate
    assert close(predicted.latency_s, timeline.steady_s * repeats)
    assert close(predicted.stall_s, stall_s * repeats)
    assert predicted.moved_bytes == moved * repeats
    assert predicted.read_bytes == read * repeats


@thorough
@given(any_profiles, st.data())
def test_many_at_once_are_each_by_itself(profile: Profile, data: st.DataObject) -> None:
    some = data.draw(st.lists(candidates_of(profile), min_size=2, max_size=5))
    together = predict(profile, some)
    alone = [predict(profile, [candidate])[0] for candidate in some]
    assert [prediction.candidate for prediction in together] == some
    for one, other in zip(together, alone, strict=True):
        assert close(one.latency_s, other.latency_s)
        assert close(one.stall_s, other.stall_s)
        assert (one.moved_bytes, one.peak_bytes) == (other.moved_bytes, other.peak_bytes)


@thorough
@given(st.booleans().flatmap(lambda disk: profiles(disk=disk)), st.data())
def test_the_periods_are_enough(profile: Profile, data: st.DataObject) -> None:
    """Steady means steady: a hundred periods later it takes no more and no less."""
    candidate = data.draw(candidates_of(profile))
    schedule = lower_for("inference", candidate, profile.partition)
    costs = costs_of(profile)
    assert close(simulate(schedule, costs).steady_s, simulate(schedule, costs, periods=100).steady_s)


@thorough
@given(any_profiles, st.data())
def test_a_pass_is_compute_and_stall(profile: Profile, data: st.DataObject) -> None:
    candidate = data.draw(candidates_of(profile))
    (predicted,) = predict(profile, [candidate])
    compute_factor = float(contended_periods(profile, with_rings(profile, [candidate])).compute_factor[0])
    asleep = predicted.latency_s - profile.compute_s * compute_factor - predicted.stall_s
    visits = len(profile.visits) * profile.partition.repeats
    assert -1e-9 <= asleep <= profile.wake_s * visits + 1e-9
    if not profile.wake_s:
        assert close(asleep, 0.0)


def test_nothing_to_predict() -> None:
    assert predict(profile((10,)), []) == []


# Layers of 10 B, a link of 10 B/s unless said: the timelines of test_simulate, where the arithmetic is.
@pytest.mark.parametrize(
    ("measured", "candidate", "latency_s", "stall_s", "moved_bytes"),
    [
        pytest.param(
            profile((10,) * 3, forward_s=2.0, bytes_per_s=10.0), Candidate(k=1, k_prime=1), 9, 3, 30, id="no overlap"
        ),
        pytest.param(
            profile((10,) * 4, forward_s=2.0, bytes_per_s=10.0), Candidate(k=2, k_prime=1), 8, 0, 40, id="compute-bound"
        ),
        pytest.param(profile((30,) * 4, bytes_per_s=10.0), Candidate(k=2, k_prime=1), 12, 8, 120, id="transfer-bound"),
        pytest.param(
            profile((10,) * 8, bytes_per_s=10.0, latency_s=1.0), Candidate(k=4, k_prime=2), 12, 4, 80, id="k'=2"
        ),
        pytest.param(
            profile((20,) * 4, forward_s=3.0, bytes_per_s=10.0),
            Candidate(k=2, k_prime=1, residents=(1,)),
            16,
            4,
            60,
            id="a resident",
        ),
        pytest.param(
            profile((20, 20), before_s=[0.5, 3.0], tail_s=4.0, bytes_per_s=10.0),
            Candidate(k=1, k_prime=1),
            9.5,
            0,
            40,
            id="before and tail",
        ),
        pytest.param(
            # Two periods of a pass, 3 s of its tail in each: 2 * (2 * (1 + 1) + 3 - 1). The first load hides in the tail.
            profile((10, 10), tail_s=6.0, repeats=2, bytes_per_s=10.0),
            Candidate(k=1, k_prime=1),
            12,
            2,
            40,
            id="periods",
        ),
        pytest.param(
            profile((10, 10), before_s=0.5, tail_s=1.0, repeats=3, bytes_per_s=10.0),
            Candidate(k=2, k_prime=1, residents=(0, 1)),
            10,  # 3 * (2 * 1.5) + 1
            0,
            0,
            id="everything resident",
        ),
    ],
)
def test_by_hand(measured: Profile, candidate: Candidate, latency_s: float, stall_s: float, moved_bytes: int) -> None:
    (predicted,) = predict(measured, [candidate])
    assert predicted.latency_s == pytest.approx(latency_s, rel=1e-12)
    assert predicted.stall_s == pytest.approx(stall_s, rel=1e-12, abs=1e-12)
    assert predicted.moved_bytes == moved_bytes


def test_compute_beside_a_link_that_never_rests() -> None:
    # Transfer-bound, 12 s a pass: all compute is slowed, 4 * 1 s to 4 * 2 s, which only takes from the stalls.
    measured = profile((30,) * 4, bytes_per_s=10.0, compute_slowdown=2.0)
    (predicted,) = predict(measured, [Candidate(k=2, k_prime=1)])
    assert (predicted.latency_s, predicted.stall_s) == (12, 4)


def test_link_beside_compute_that_never_rests() -> None:
    # Compute-bound, 8 s a pass: all transfers are slowed, 1 s to 1.5 s, and still hidden behind 2 s of compute.
    measured = profile((10,) * 4, forward_s=2.0, bytes_per_s=10.0, link_slowdown=1.5)
    candidate = Candidate(k=2, k_prime=1)
    (predicted,) = predict(measured, [candidate])
    assert (predicted.latency_s, predicted.stall_s) == (8, 0)
    ring = build_ring(candidate, (10,) * 4, range(4))
    periods = contended_periods(measured, [(candidate, ring)])
    assert (float(periods.compute_factor[0]), float(periods.link_factor[0])) == (1, 1.5)


def test_slowdown_in_proportion_to_overlap() -> None:
    # Compute-bound: four loads of 1 s beside four forwards of 2 s. With c the compute, c = 8 * (1 + 0.5 * 4 / c), so
    # c^2 - 8 c - 16 = 0.
    measured = profile((10,) * 4, forward_s=2.0, bytes_per_s=10.0, compute_slowdown=1.5)
    (predicted,) = predict(measured, [Candidate(k=2, k_prime=1)])
    assert predicted.stall_s == 0
    assert predicted.latency_s == pytest.approx(4 + math.sqrt(32), rel=1e-3)


def test_no_slowdown_one_after_the_other() -> None:
    measured = profile((10, 10), bytes_per_s=10.0, compute_slowdown=1.5, link_slowdown=1.5)
    (predicted,) = predict(measured, [Candidate(k=1, k_prime=1)])
    assert (predicted.latency_s, predicted.stall_s) == (4, 2)


def test_waking_up_costs_what_waited() -> None:
    # Each of three forwards waits: 3 * (1 + 2 + 0.5). Beside a load of 3 s the half second only takes from the stall.
    assert predict(profile((10,) * 3, forward_s=2.0, bytes_per_s=10.0, wake_s=0.5), [Candidate(k=1, k_prime=1)])[
        0
    ].latency_s == pytest.approx(10.5)
    (hidden,) = predict(profile((30,) * 4, bytes_per_s=10.0, wake_s=0.5), [Candidate(k=2, k_prime=1)])
    assert (hidden.latency_s, hidden.stall_s) == (12, 6)
    (calm,) = predict(profile((10,) * 4, forward_s=2.0, bytes_per_s=10.0, wake_s=0.5), [Candidate(k=2, k_prime=1)])
    assert calm.latency_s == 8


def test_slowdown_needs_something_to_disturb() -> None:
    measured = profile((10, 10), bytes_per_s=10.0, compute_slowdown=2.0, link_slowdown=2.0)
    (predicted,) = predict(measured, [Candidate(k=2, k_prime=1, residents=(0, 1))])
    assert predicted.latency_s == 2
