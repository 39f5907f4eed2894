"""Which settings a budget allows."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosp.cost_model.placement import evenly_spread, least_host_bytes
from autosp.errors import BudgetError, BudgetTooSmallError, SettingError
from autosp.schedule.streaming import lower
from autosp.search.headroom import acceptable_bytes, usable_bytes
from autosp.search.space import READ_AHEAD, all_resident, grid, key_of, least_bytes, rank, sliding_windows
from autosp.spec import Candidate, Prediction, Profile, Tier
from builders import link, profile, profiles, quick

budgets = st.integers(0, 250)
"""Bytes of budget beyond the least that works."""


def ranked(profile: Profile, extra: int) -> tuple[int, list[Prediction]]:
    """A budget and what it allows."""
    budget = least_bytes(profile) + extra
    return budget, rank(profile, budget)


@quick
@given(profiles(contention=True), budgets)
def test_ranked_is_under_the_budget_and_in_order(profile: Profile, extra: int) -> None:
    budget, predictions = ranked(profile, extra)
    assert predictions
    assert all(prediction.peak_bytes <= budget for prediction in predictions)
    order = [(round(prediction.latency_s, 6), prediction.peak_bytes) for prediction in predictions]
    assert order == sorted(order)


@quick
@given(profiles(), budgets)
def test_a_setting_has_one_set_of_residents(profile: Profile, extra: int) -> None:
    _, predictions = ranked(profile, extra)
    assert max(Counter(key_of(prediction.candidate) for prediction in predictions).values()) == 1


@quick
@given(profiles(), budgets)
def test_residents_are_visited_layers(profile: Profile, extra: int) -> None:
    for prediction in ranked(profile, extra)[1]:
        residents = prediction.candidate.residents
        assert set(residents) <= set(profile.partition.visits)
        assert len(set(residents)) == len(residents)


@quick
@given(profiles(), budgets)
def test_everything_resident_if_and_only_if_it_fits(profile: Profile, extra: int) -> None:
    budget, predictions = ranked(profile, extra)
    partition = profile.partition
    sizes = [layer.n_bytes for layer in partition.layers]
    visited = set(partition.visits)
    never = [n_bytes for index, n_bytes in enumerate(sizes) if index not in visited]  # has room, should it be called
    needed = sum(sizes[index] for index in visited) + max(never, default=0)
    needed += partition.resident_bytes + profile.workspace_bytes
    candidate = all_resident(profile)
    assert candidate == Candidate(k=len(visited), k_prime=1, residents=tuple(sorted(visited)))
    assert (candidate in [prediction.candidate for prediction in predictions]) == (needed <= budget)


@quick
@given(profiles(), budgets)
def test_sliding_windows_are_ranked_where_they_fit(profile: Profile, extra: int) -> None:
    keys = {key_of(prediction.candidate) for prediction in ranked(profile, extra)[1]}
    assert (1, 1, 0, 0, 0, 0, 0) in keys  # the least-memory plan fits in any case
    everything = {key_of(prediction.candidate) for prediction in rank(profile, 10**6)}
    assert {key_of(candidate) for candidate in sliding_windows(profile)} <= everything
    assert {key_of(candidate) for candidate in grid(profile)} <= everything


@quick
@given(st.integers(1, 6), st.integers(1, 40), st.data())
def test_more_budget_is_never_slower(count: int, n_bytes: int, data: st.DataObject) -> None:
    """For layers of one size."""
    forwards = st.lists(st.integers(1, 9).map(float), min_size=count, max_size=count)
    measured = profile(
        (n_bytes,) * count, forward_s=data.draw(forwards), bytes_per_s=data.draw(st.sampled_from([1.0, 9.0]))
    )
    best = [rank(measured, budget)[0].latency_s for budget in range(n_bytes, n_bytes * (count + 2), n_bytes)]
    assert all(more <= less * (1 + 1e-9) for less, more in pairwise(best))


def test_k_is_no_more_than_the_layers() -> None:
    assert max(prediction.candidate.k for prediction in rank(profile((10,) * 4), 40)) == 4


def test_no_plan_is_ranked_twice() -> None:
    schedules = [str(lower(prediction.candidate, (10,) * 4, range(4))) for prediction in rank(profile((10,) * 4), 40)]
    assert max(Counter(schedules).values()) == 1


def test_grid_covers_every_k_and_k_prime() -> None:
    candidates = grid(profile((10,) * 5))
    assert [(candidate.k, candidate.k_prime) for candidate in candidates] == [
        (k, k_prime) for k in range(1, 6) for k_prime in range(1, k + 1)
    ]
    for candidate in candidates:
        two_groups = candidate.k >= 2 * candidate.k_prime
        assert candidate.ring == (2 if two_groups else 1) * candidate.k_prime


def test_grid_spreads_its_residents() -> None:
    by_key = {(candidate.k, candidate.k_prime): candidate.residents for candidate in grid(profile((10,) * 9))}
    assert by_key[5, 1] == (1, 4, 7)
    assert by_key[2, 1] == ()
    assert by_key[3, 2] == (4,)  # no room for two groups of two


def test_sliding_windows_are_the_papers() -> None:
    windows = sliding_windows(profile((10,) * 4))
    assert all(candidate.residents == () for candidate in windows)
    assert sorted((candidate.k, candidate.k_prime) for candidate in windows) == [
        (1, 1),
        (2, 1),
        (2, 2),
        (3, 1),
        (3, 3),
        (4, 1),
        (4, 2),
        (4, 4),
    ]


def test_settings_are_about_visited_layers() -> None:
    measured = profile((10,) * 5, (3, 1, 3))
    assert all_resident(measured) == Candidate(k=2, k_prime=1, residents=(1, 3))
    assert max(candidate.k for candidate in [*grid(measured), *sliding_windows(measured)]) == 2


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, ()), (1, (5,)), (2, (2, 7)), (3, (1, 5, 8)), (5, (1, 3, 5, 7, 9)), (10, tuple(range(10)))],
)
def test_evenly_spread(count: int, expected: tuple[int, ...]) -> None:
    assert evenly_spread(range(10), count) == expected


def test_budget_is_filled_with_residents() -> None:
    # A ring of two and one resident in 30 B; in 39 B no more; in 40 B one more.
    measured = profile((10,) * 6, forward_s=0.1, bytes_per_s=10.0)
    filled = [max(len(p.candidate.residents) for p in rank(measured, budget)) for budget in (10, 20, 30, 39, 40, 60)]
    assert filled == [0, 1, 2, 2, 3, 6]  # with one layer's place kept for the others, until all fit
    assert rank(measured, 40)[0].moved_bytes == 30


def test_largest_layer_may_be_resident_first() -> None:
    # In 120 B the ring would be 110 B with the large layer in it, and move 150 B. Beside it there is room for two small
    # places, of which one may be resident: 5 of 6 small layers move.
    best = rank(profile((100,) + (10,) * 6, forward_s=0.1, bytes_per_s=10.0), 120)[0]
    assert 0 in best.candidate.residents
    assert best.moved_bytes == 50


def test_layers_visited_more_often_are_resident_first() -> None:
    # 0 is visited three times: resident, it saves three transfers; 1, 2 and 3 come once each.
    best = rank(profile((10,) * 4, (0, 1, 0, 2, 0, 3), forward_s=0.1, bytes_per_s=10.0), 20)[0]
    assert best.candidate.residents == (0,)
    assert best.moved_bytes == 30


def test_of_equally_fast_plans_the_smaller_one_comes_first() -> None:
    # Compute of 1 s hides every transfer of 1 s from two layers on: nothing is gained by more memory.
    predictions = rank(profile((10,) * 4, bytes_per_s=10.0), 39)
    fastest = [prediction.peak_bytes for prediction in predictions if prediction.latency_s == 4]
    assert len(fastest) > 1
    assert fastest == sorted(fastest)
    assert (predictions[0].candidate, predictions[0].peak_bytes) == (Candidate(k=2, k_prime=1), 20)


def test_heap_noise_is_left_free_on_a_cpu() -> None:
    # 0.45 of the workspace, a hundredth of the budget, 0.25 MB, and 0.02 MB for the layer.
    mb = 10**6
    on_cpu = profile((870 * mb,), workspace_bytes=80 * mb, kind="cpu")
    usable = 1000 * mb - 36 * mb - 10 * mb - 270_000
    assert usable_bytes(on_cpu, 1000 * mb) == usable
    assert acceptable_bytes(on_cpu, 1000 * mb) == usable + 12 * mb
    assert [p.peak_bytes for p in rank(on_cpu, 1000 * mb)] == [950 * mb, 950 * mb]
    with pytest.raises(BudgetTooSmallError):
        rank(on_cpu, 996 * mb)


def test_scatter_that_is_predicted_is_not_left_free_once_more() -> None:
    mb = 10**6
    without = profile((870 * mb,), workspace_bytes=80 * mb, kind="cpu")
    least = without.observed.prediction
    known = without.observed.model_copy(
        update={"prediction": least.model_copy(update={"peak_bytes": least.peak_bytes + 20 * mb})}
    )
    scattering = without.model_copy(update={"heap_scatter_bytes": 20 * mb, "observed": known})
    assert [p.peak_bytes for p in rank(scattering, 1000 * mb)] == [970 * mb, 970 * mb]
    assert acceptable_bytes(scattering, 1000 * mb) == acceptable_bytes(without, 1000 * mb)
    refused = []
    for one in (scattering, without):
        with pytest.raises(BudgetTooSmallError) as refusal:
            rank(one, 996 * mb)
        refused.append(refusal.value.least_bytes)
        assert rank(one, refusal.value.least_bytes)
    assert refused[0] == refused[1]


def test_nothing_is_left_free_on_an_accelerator() -> None:
    on_gpu = profile((8900,), workspace_bytes=800, kind="cuda")
    assert usable_bytes(on_gpu, 10_000) == acceptable_bytes(on_gpu, 10_000) == 10_000
    assert rank(on_gpu, 9_700)


GB = 10**9
TOO_LARGE = profile((GB, 3 * GB, 2 * GB), resident_bytes=GB, workspace_bytes=GB // 2)


def test_budget_too_small() -> None:
    with pytest.raises(BudgetTooSmallError) as caught:
        rank(TOO_LARGE, 4 * GB)
    error = caught.value
    assert (error.budget_bytes, error.least_bytes, error.layer) == (4 * GB, 4_500_000_000, "blocks.1")
    for part in ("no setting fits 4 GB", "is 4.5 GB", "layer 1 (blocks.1), 3 GB", "1 GB that must be", "0.5 GB of"):
        assert part in str(error)
    assert isinstance(error, BudgetError)
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("extra", [-1, 0])
def test_the_least_that_works(extra: int) -> None:
    budget = least_bytes(TOO_LARGE) + extra
    if extra < 0:
        with pytest.raises(BudgetTooSmallError):
            rank(TOO_LARGE, budget)
    else:
        assert [p.candidate for p in rank(TOO_LARGE, budget)][-1] == Candidate(k=1, k_prime=1)


def suggested_bytes(profile: Profile) -> int:
    """The budget that the error of a hopeless one suggests."""
    with pytest.raises(BudgetTooSmallError) as caught:
        rank(profile, 1)
    found = re.search(r"try max_gpu_gb=(\S+)$", str(caught.value))
    assert found
    return int(float(found[1]) * 1e9)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_suggested_budget_works(kind: str) -> None:
    measured = profile((GB, 3 * GB), resident_bytes=GB, workspace_bytes=GB, kind=kind)
    assert rank(measured, suggested_bytes(measured))


@pytest.mark.parametrize("n_bytes", [1_300_000, 100_000])
def test_the_suggested_budget_works_for_a_small_model(n_bytes: int) -> None:
    measured = profile((n_bytes, n_bytes))
    assert rank(measured, suggested_bytes(measured))


def test_the_least_that_works_on_a_cpu() -> None:
    measured = profile((1000, 1000), kind="cpu")
    with pytest.raises(BudgetTooSmallError) as caught:
        rank(measured, 1)
    assert rank(measured, caught.value.least_bytes)


@quick
@given(profiles(contention=True, disk=True), budgets, budgets)
def test_ranked_is_under_both_budgets(profile: Profile, extra: int, host_extra: int) -> None:
    budget, host_budget = least_bytes(profile) + extra, least_host_bytes(profile.partition) + host_extra
    predictions = rank(profile, budget, host_budget)
    assert predictions
    assert all(one.peak_bytes <= budget and one.host_bytes <= host_budget for one in predictions)
    assert max(Counter(key_of(one.candidate) for one in predictions).values()) == 1
    order = [(round(one.latency_s, 6), one.peak_bytes, one.host_bytes) for one in predictions]
    assert order == sorted(order)


@quick
@given(profiles(disk=True), budgets)
def test_a_host_with_room_for_all_changes_nothing(profile: Profile, extra: int) -> None:
    budget = least_bytes(profile) + extra
    everything = sum(layer.n_bytes for layer in profile.partition.layers)
    assert rank(profile, budget, everything) == rank(profile, budget)


DISK = link(source=Tier.DISK, bytes_per_s=5.0)


def test_layers_rest_on_disk_where_the_host_is_too_small() -> None:
    # Eight layers of 1 s of compute each. Of 60 B of host memory 20 B are staging: 40 B are read in 8 s. With 10 B of
    # staging only 30 B are read, but after each read of 2 s the disk waits for a load of 1 s: 9 s.
    measured = profile((10,) * 8, bytes_per_s=10.0, disk=DISK)
    best = rank(measured, 20, 60)[0]
    assert (len(best.candidate.on_disk), best.candidate.read_ahead) == (4, 2)
    assert (best.read_bytes, best.host_bytes, best.latency_s) == (40, 60, 8)
    aheads = {one.candidate.read_ahead for one in rank(measured, 20, 60)}
    assert aheads == set(READ_AHEAD)


def test_which_budget_is_too_small() -> None:
    measured = profile((GB, 3 * GB), disk=DISK)
    with pytest.raises(BudgetTooSmallError, match=r"of host memory.*try max_cpu_gb=3\.15$") as caught:
        rank(measured, 4 * GB, 2 * GB)
    assert rank(measured, 4 * GB, caught.value.least_bytes)
    with pytest.raises(BudgetTooSmallError, match=r"try max_gpu_gb=3\.15$"):
        rank(measured, 2 * GB, 3 * GB)


def test_a_disk_that_was_not_measured() -> None:
    with pytest.raises(SettingError, match="no measurement of the disk"):
        rank(profile((10,) * 4), 40, 39)
