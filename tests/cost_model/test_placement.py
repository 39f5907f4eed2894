"""Which layers rest on disk where the host is too small: as few as fit, spread over the pass."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosp.cost_model.memory import HostMemory, Resting
from autosp.cost_model.placement import Placing, evenly_spread, exceeds, host_too_small, least_host_bytes
from autosp.cost_model.predict import predict
from autosp.schedule.streaming import build_ring, lower
from autosp.schedule.validate import validate
from autosp.spec import Candidate, Layer, Profile
from builders import candidates, partition, profile, profiles, thorough


def placed(candidate: Candidate, layer_bytes: tuple[int, ...], budget: int, ahead: int = 1) -> Candidate | None:
    found = Placing(candidate, partition(layer_bytes), budget).with_read_ahead(ahead)
    return found and found[0]


@pytest.mark.parametrize(
    ("budget", "on_disk"),
    [
        pytest.param(80, (), id="all of it fits"),
        pytest.param(79, (2, 6), id="one would leave 70 B beside a staging of 10 B"),
        pytest.param(70, (2, 6), id="60 B and 10 B of staging"),
        pytest.param(69, (1, 4, 6), id="evenly"),
        pytest.param(10, tuple(range(8)), id="staging alone"),
    ],
)
def test_as_little_as_fits_is_on_disk(budget: int, on_disk: tuple[int, ...]) -> None:
    found = placed(Candidate(k=1, k_prime=1), (10,) * 8, budget)
    # Of 79 B, 70 B and 10 B of staging are too much by one.
    assert found is not None
    assert (found.on_disk, found.read_ahead) == (on_disk, 1 if on_disk else 0)


def test_what_does_not_fit() -> None:
    assert placed(Candidate(k=1, k_prime=1), (10,) * 8, 9) is None
    assert placed(Candidate(k=2, k_prime=2), (10,) * 8, 19) is None
    assert placed(Candidate(k=1, k_prime=1), (10,) * 8, 19, ahead=2) is None


def test_groups_are_chosen_not_layers() -> None:
    found = placed(Candidate(k=2, k_prime=2), (10,) * 8, 60)
    assert found is not None
    assert found.on_disk == (2, 3, 6, 7)  # 40 B, and 20 B of staging


def test_what_stays_on_the_device_is_first_to_rest_on_disk() -> None:
    # With three places for four layers, 1 and 2 are loaded once and stay.
    found = placed(Candidate(k=3, k_prime=1), (10,) * 4, 30)
    assert found is not None
    assert found.on_disk == (1, 2)
    (predicted,) = predict(profile((10,) * 4), [found])
    assert predicted.read_bytes == 0


def test_what_is_never_visited_is_first_to_rest_on_disk() -> None:
    found = Placing(Candidate(k=1, k_prime=1), partition((10,) * 4, (0, 1, 3)), 40 - 1).with_read_ahead(1)
    assert found is not None
    assert found[0].on_disk == (1, 2)  # 2 alone would leave 30 B beside 10 B of staging
    assert Placing(Candidate(k=1, k_prime=1), partition((10,) * 4, (0, 1, 3)), 40).with_read_ahead(1) is not None


def test_tables_stay_on_the_host() -> None:
    parts = partition((10,) * 4).model_copy(
        update={"lookups": Layer(index=4, name="lookup tables", tensors=("t",), n_bytes=25)}
    )
    assert Resting(parts).n_bytes(Candidate(k=1, k_prime=1, on_disk=(1,), read_ahead=1)) == 55
    assert least_host_bytes(parts) == 35
    assert exceeds(parts, 64) and not exceeds(parts, 65) and not exceeds(parts, None)
    found = Placing(Candidate(k=1, k_prime=1), parts, 35).with_read_ahead(1)
    assert found is not None
    assert found[0].on_disk == (0, 1, 2, 3)


def test_the_rows_of_a_weight_rest_on_one_tier() -> None:
    parts = partition((10,) * 8, head=range(3, 6))
    found = Placing(Candidate(k=1, k_prime=1), parts, 50).with_read_ahead(1)
    assert found is not None
    assert found[0].on_disk == (1, 3, 4, 5, 7)
    groups = Placing(Candidate(k=2, k_prime=2), parts, 79).with_read_ahead(1)
    assert groups is not None
    assert groups[0].on_disk == (2, 3, 4, 5)


def test_resident_rows_rest_with_the_others() -> None:
    parts = partition((10,) * 8, head=range(3, 6))
    one_stays = Candidate(k=2, k_prime=1, residents=(4,))
    assert Resting(parts).n_bytes(one_stays) == 80
    assert Resting(parts).n_bytes(one_stays.model_copy(update={"on_disk": (3, 5), "read_ahead": 1})) == 50
    assert Resting(parts).n_bytes(Candidate(k=4, k_prime=1, residents=(3, 4, 5))) == 50
    assert Resting(parts).n_bytes(Candidate(k=2, k_prime=1, residents=(2,))) == 70


@thorough
@given(st.data(), st.integers(0, 200), st.integers(1, 4))
def test_rows_that_are_placed_fit_and_are_together(data: st.DataObject, budget: int, ahead: int) -> None:
    layer_bytes = tuple(data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=8)))
    begin = data.draw(st.integers(0, len(layer_bytes) - 2))
    parts = partition(layer_bytes, head=range(begin, data.draw(st.integers(begin + 2, len(layer_bytes)))))
    candidate = data.draw(candidates(parts.visits))
    found = Placing(candidate, parts, budget).with_read_ahead(ahead)
    if found is None:
        return
    chosen, ring = found
    assert Resting(parts).n_bytes(chosen) + ring.staging.n_bytes <= budget
    assert parts.whole(chosen.on_disk) <= {*chosen.on_disk, *chosen.residents}
    assert bool(chosen.on_disk) == (Resting(parts).n_bytes(candidate) > budget)


def test_what_is_read_beyond_a_layer_is_no_table() -> None:
    error = host_too_small(partition((2 * 10**9,), read_bytes=(3 * 10**9,)), 10**9)
    assert "3 GB at once, beside 0 GB of lookup tables" in str(error)


def test_host_too_small_names_what_sets_the_least() -> None:
    error = host_too_small(partition((10**9, 3 * 10**9)), 10**9)
    assert (error.budget_bytes, error.least_bytes, error.layer) == (10**9, 3 * 10**9, "blocks.1")
    for part in ("1 GB of host memory", "is 3 GB", "layer 1 (blocks.1)", "try max_cpu_gb=3.15"):
        assert part in str(error)


def test_staging_has_room_for_what_is_read() -> None:
    parts = partition((10,) * 8, read_bytes=(13,) * 8)
    assert least_host_bytes(parts) == 13
    assert Placing(Candidate(k=1, k_prime=1), parts, 12).with_read_ahead(1) is None
    found = Placing(Candidate(k=1, k_prime=1), parts, 79).with_read_ahead(1)
    assert found is not None
    chosen, ring = found
    assert chosen.on_disk == (2, 6)  # one would leave 70 B beside a staging of 13 B; two leave 60 B beside as much
    assert (ring.staging.n_bytes, ring.arena_bytes) == (13, 10)
    (predicted,) = predict(profile((10,) * 8, read_bytes=(13,) * 8), [chosen])
    assert (predicted.moved_bytes, predicted.read_bytes) == (80, 26)


def test_evenly_spread_keeps_the_pool() -> None:
    assert evenly_spread((9, 4, 7), 1) == (4,)


@thorough
@given(profiles(disk=True), st.data(), st.integers(0, 200), st.integers(1, 4))
def test_what_is_placed_fits_and_is_valid(measured: Profile, data: st.DataObject, budget: int, ahead: int) -> None:
    parts = measured.partition
    candidate = data.draw(candidates(parts.visits))
    layer_bytes = tuple(layer.n_bytes for layer in parts.layers)
    read_bytes = tuple(layer.read_bytes for layer in parts.layers)
    found = Placing(candidate, parts, budget).with_read_ahead(ahead)
    if found is None:
        return
    chosen, ring = found
    assert ring == build_ring(chosen, layer_bytes, parts.visits, read_bytes)
    assert HostMemory(measured).n_bytes(chosen, ring.staging.n_bytes) <= budget
    assert bool(chosen.on_disk) == (Resting(parts).n_bytes(candidate) > budget)
    assert chosen.model_copy(update={"on_disk": (), "read_ahead": 0}) == candidate
    validate(lower(chosen, layer_bytes, parts.visits, read_bytes), layer_bytes, read_bytes)


@thorough
@given(profiles(disk=True), st.integers(0, 200))
def test_the_least_plan_fits_whatever_the_least_says(measured: Profile, extra: int) -> None:
    parts = measured.partition
    budget = least_host_bytes(parts) + extra
    assert Placing(Candidate(k=1, k_prime=1), parts, budget).with_read_ahead(1) is not None
