"""No plan is predicted to beat the floor."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosp.cost_model.floor import floor_s
from autosp.cost_model.predict import predict
from autosp.errors import SettingError
from autosp.search.space import rank
from autosp.spec import Profile, Tier
from builders import candidates, candidates_of, link, profile, profiles, quick, thorough

# Four layers of 100 B at 10 B/s: 40 s of transfers. Compute: 4 * 1 s. 30 B are resident, the workspace takes 20 B.
PROFILE = profile((100,) * 4, bytes_per_s=10.0, resident_bytes=30, workspace_bytes=20)


@pytest.mark.parametrize(
    ("budget_bytes", "expected_s"),
    [
        pytest.param(50, 40, id="nothing resident: 400 B"),
        pytest.param(150, 30, id="100 B resident: 300 B move"),
        pytest.param(155, 29.5, id="bytes, not layers"),
        pytest.param(410, 4, id="360 B resident: 40 B move in 4 s, as compute does"),
        pytest.param(449, 4, id="compute alone"),
        pytest.param(450, 4, id="everything fits"),
        pytest.param(10**9, 4, id="more than everything fits"),
        pytest.param(0, 40, id="a budget below what is resident holds no layer"),
    ],
)
def test_by_hand(budget_bytes: int, expected_s: float) -> None:
    assert floor_s(PROFILE, budget_bytes) == expected_s


def test_periods_of_a_pass() -> None:
    # Three periods of 20 s of transfers; compute 3 * 2 * (1 + 0.5) + 2 = 11 s.
    measured = profile((100, 100), before_s=0.5, tail_s=2.0, repeats=3, bytes_per_s=10.0)
    assert floor_s(measured, 0) == 60
    assert floor_s(measured, 100) == 30
    assert floor_s(measured, 200) == 11


def test_compute_at_its_fastest() -> None:
    # 5 s by the medians; the visits' fastest add up to 3 s.
    measured = profile((100,) * 4, tail_s=1.0, bytes_per_s=10.0, least_compute_s=3.0)
    assert floor_s(measured, 400) == 3
    assert floor_s(measured, 360) == 4


def test_counts_visited_layers_once() -> None:
    # Layer 1 is never visited; both visits of layer 0 may be served by one transfer.
    measured = profile((100, 700, 50), (0, 2, 0), bytes_per_s=10.0)
    assert floor_s(measured, 0) == 15


def test_latency_is_no_part_of_the_bound() -> None:
    assert floor_s(profile((100,), bytes_per_s=10.0, latency_s=3.0), 0) == 10


@quick
@given(profiles(), st.integers(0, 200))
def test_below_every_ranked_prediction(profile: Profile, extra: int) -> None:
    budget = profile.observed.measurement.peak_bytes + extra
    floor = floor_s(profile, budget)
    for prediction in rank(profile, budget):
        assert floor <= prediction.latency_s * (1 + 1e-9)


@thorough
@given(profiles(), st.data())
def test_below_any_plan_at_its_own_peak(profile: Profile, data: st.DataObject) -> None:
    (predicted,) = predict(profile, [data.draw(candidates(profile.partition.visits))])
    assert floor_s(profile, predicted.peak_bytes) <= predicted.latency_s * (1 + 1e-9)


@thorough
@given(profiles(), st.integers(0, 300), st.integers(0, 100))
def test_more_budget_never_raises_it(profile: Profile, budget: int, more: int) -> None:
    assert floor_s(profile, budget + more) <= floor_s(profile, budget)
    assert floor_s(profile, budget) >= profile.least_compute_s


# The same behind a disk of 4 B/s.
THREE_TIERS = profile(
    (100,) * 4, bytes_per_s=10.0, resident_bytes=30, workspace_bytes=20, disk=link(source=Tier.DISK, bytes_per_s=4.0)
)


@pytest.mark.parametrize(
    ("budget_bytes", "host_bytes", "expected_s"),
    [
        pytest.param(50, 0, 100, id="everything is read: 400 B"),
        pytest.param(50, 200, 50, id="200 B rest on the host"),
        pytest.param(150, 200, 30, id="100 B resident: 300 B move, 100 B are read in 25 s"),
        pytest.param(150, 180, 30, id="bytes, not layers: 120 B are read in 30 s"),
        pytest.param(450, 0, 4, id="everything fits the device"),
        pytest.param(50, 400, 40, id="everything fits the host"),
    ],
)
def test_the_disk_bounds_what_neither_holds(budget_bytes: int, host_bytes: int, expected_s: float) -> None:
    assert floor_s(THREE_TIERS, budget_bytes, host_bytes) == expected_s


def test_a_bound_by_an_unknown_disk() -> None:
    assert floor_s(PROFILE, 50, 400) == 40
    with pytest.raises(SettingError, match="no measurement of the disk: make it with max_cpu_gb"):
        floor_s(PROFILE, 50, 399)


@thorough
@given(profiles(disk=True), st.data())
def test_below_any_plan_of_three_tiers(profile: Profile, data: st.DataObject) -> None:
    (predicted,) = predict(profile, [data.draw(candidates_of(profile))])
    floor = floor_s(profile, predicted.peak_bytes, predicted.host_bytes)
    assert floor <= predicted.latency_s * (1 + 1e-9)
