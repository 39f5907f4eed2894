"""Which layers stay beside a ring."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from autosp.schedule.arena import arena_bytes
from autosp.search.residents import Filling, Pass
from autosp.search.space import rank
from autosp.spec import Profile
from builders import profile, profiles, quick


def filling(measured: Profile, k_prime: int, depth: int, free_bytes: int) -> Filling:
    """Over all visited layers."""
    return Filling(Pass.of(measured), k_prime, depth, free_bytes)


@quick
@given(profiles(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 200))
def test_what_stays_fits_beside_the_ring(measured: Profile, k_prime: int, depth: int, free_bytes: int) -> None:
    layers = measured.partition.layers
    for residents in filling(measured, k_prime, depth, free_bytes).resident_sets():
        streamed = [layers[i].n_bytes for i in dict.fromkeys(measured.partition.visits) if i not in residents]
        groups = [sum(streamed[start : start + k_prime]) for start in range(0, len(streamed), k_prime)]
        assert sum(layers[i].n_bytes for i in residents) + arena_bytes(groups, depth) <= free_bytes
        assert set(residents) <= set(measured.partition.visits)


def test_layers_that_compute_for_less_time_stay() -> None:
    # Ten layers of 1.9 s, then ten of 0.1 s. Half of the 20 s of copies fits beside the compute of either half's share.
    measured = profile((10,) * 20, forward_s=(1.9,) * 10 + (0.1,) * 10, bytes_per_s=10.0)
    evenly, to_pace = filling(measured, 1, 2, 120).resident_sets()
    assert len([layer for layer in evenly if layer >= 10]) == 5
    assert len([layer for layer in to_pace if layer >= 10]) >= 9
    best = rank(measured, 120)[0]
    assert best.latency_s < 20.5  # 20 s of compute, 10 s of copies; spread evenly the copies of 5 short layers stall it
    assert best.stall_s < 0.5


def test_equal_layers_are_streamed_at_even_distances() -> None:
    measured = profile((10,) * 12, bytes_per_s=10.0)
    _, to_pace = filling(measured, 1, 2, 80).resident_sets()
    streamed = [layer for layer in range(12) if layer not in to_pace]
    assert len(streamed) == 6
    assert {after - before for before, after in pairwise(streamed)} == {2}


def test_a_ring_may_be_of_the_larger_layers_alone() -> None:
    # Small layers beside large ones: streamed, each takes a turn in the ring and hides little behind its compute.
    measured = profile((160, 20, 20, 160) * 6, forward_s=0.1, bytes_per_s=100.0)
    sets = list(filling(measured, 1, 2, 1200).resident_sets())
    small = {layer for layer in range(24) if layer % 4 in (1, 2)}
    assert any(small <= set(residents) < set(range(24)) for residents in sets)
    best = rank(measured, 1200)[0]
    assert small <= set(best.candidate.residents)
