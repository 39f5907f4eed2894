"""What a plan reserves, and what of its arena is in use over time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosp.cost_model.memory import DeviceMemory, occupancy
from autosp.cost_model.predict import predict
from autosp.cost_model.simulate import costs_of, simulate
from autosp.schedule.streaming import build_ring, lower
from autosp.spec import Candidate, Profile
from builders import candidates, profile, profiles, thorough


def test_peak_is_a_sum() -> None:
    measured = profile((100, 200, 400, 800), resident_bytes=7, workspace_bytes=3000)
    candidate = Candidate(k=3, k_prime=1, residents=(0, 2))
    assert DeviceMemory(measured).peak_bytes(candidate, arena_bytes=50) == 7 + 100 + 400 + 50 + 3000


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        pytest.param(Candidate(k=1, k_prime=1), 800, id="the largest layer"),
        pytest.param(Candidate(k=2, k_prime=1), 400 + 800, id="the largest neighbours"),
        pytest.param(Candidate(k=2, k_prime=2), 400 + 800, id="the largest transfer"),
        pytest.param(
            Candidate(k=3, k_prime=1, residents=(1, 3)), 200 + 800 + 400, id="residents, and the larger other"
        ),
        pytest.param(Candidate(k=4, k_prime=1, residents=(0, 1, 2, 3)), 1500, id="everything resident"),
    ],
)
def test_peak_of_a_prediction(candidate: Candidate, expected: int) -> None:
    measured = profile((100, 200, 400, 800), resident_bytes=7, workspace_bytes=3000)
    (predicted,) = predict(measured, [candidate])
    assert predicted.peak_bytes == 7 + 3000 + expected


def test_occupancy_of_one_layer_at_a_time() -> None:
    # Loads of 1 s, forwards of 2 s: each layer is there from the start of its load to the end of its forward.
    measured = profile((10, 5), forward_s=2.0, bytes_per_s=10.0)
    schedule = lower(Candidate(k=1, k_prime=1), (10, 5), (0, 1))
    timeline = simulate(schedule, costs_of(measured), periods=1)
    assert occupancy(timeline, (10, 5)) == [(0, 10), (3, 0), (3, 5), (5.5, 0)]


def test_occupancy_of_a_window() -> None:
    # The first pass of "bound by compute" in test_simulate: two places of 10 bytes, one of them free now and then.
    measured = profile((10,) * 4, forward_s=2.0, bytes_per_s=10.0)
    timeline = simulate(lower(Candidate(k=2, k_prime=1), (10,) * 4, range(4)), costs_of(measured), periods=1)
    assert occupancy(timeline, (10,) * 4) == [
        (0, 10),
        (1, 20),
        (3, 10),  # 0 out, 2 in
        (3, 20),
        (5, 10),  # 1 out, 3 in
        (5, 20),
        (7, 10),
        (9, 0),
    ]


def test_occupancy_counts_a_transfer_of_several_layers_once() -> None:
    measured = profile((10, 20, 30), bytes_per_s=10.0)
    timeline = simulate(lower(Candidate(k=2, k_prime=2), (10, 20, 30), range(3)), costs_of(measured), periods=1)
    assert occupancy(timeline, (10, 20, 30)) == [(0, 30), (5, 0), (5, 30), (9, 0)]


@thorough
@given(profiles(), st.data())
def test_occupancy_never_exceeds_the_arena(profile: Profile, data: st.DataObject) -> None:
    candidate = data.draw(candidates(profile.partition.visits))
    layer_bytes = [layer.n_bytes for layer in profile.partition.layers]
    schedule = lower(candidate, layer_bytes, profile.partition.visits)
    curve = occupancy(simulate(schedule, costs_of(profile)), layer_bytes)
    assert all(0 <= n_bytes <= schedule.arena_bytes for _, n_bytes in curve)
    assert [when for when, _ in curve] == sorted(when for when, _ in curve)
    assert len(curve) == len(schedule.cold) + 4 * 2 * len(schedule.loads)  # in four periods, each in and out


@thorough
@given(profiles(), st.data())
def test_peak_of_any_prediction(profile: Profile, data: st.DataObject) -> None:
    candidate = data.draw(candidates(profile.partition.visits))
    layers = profile.partition.layers
    ring = build_ring(candidate, [layer.n_bytes for layer in layers], profile.partition.visits)
    (predicted,) = predict(profile, [candidate])
    everything = sum(layers[index].n_bytes for index in candidate.residents) + ring.arena_bytes
    assert predicted.peak_bytes == profile.partition.resident_bytes + profile.planned_workspace_of(1) + everything
