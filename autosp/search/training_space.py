"""Which settings of training there are under a budget: as in inference, for each choice of what is computed again."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import partial

from autosp.cost_model.placement import evenly_spread
from autosp.cost_model.training_memory import TrainingMemory, seconds_per_freed_byte
from autosp.schedule.training import least_training
from autosp.search.residents import Filling, Pass
from autosp.spec import Candidate, Profile

K_PRIMES = (1, 2, 4, 8)
DEPTHS = (1, 2, 3)
"""As in inference, but coarser: each is tried with every choice of what is computed again."""

SHARES = (1 / 4, 1 / 2, 3 / 4, 1)
"""Of the layers whose activations take more than their inputs: how many are computed again."""


def recompute_choices(profile: Profile, budget_bytes: int) -> list[tuple[int, ...]]:
    """Sets of layers to compute again: none, all that free memory, shares of these, and just enough for the budget.

    A share is spread evenly, and taken where a byte costs least time. Just enough is the least number, of the cheapest,
    with which one layer at a time fits the budget, and that with which two do.
    """
    cost_of = seconds_per_freed_byte(profile)
    useful = sorted(cost_of)
    if not useful:
        return [()]
    cheapest = sorted(useful, key=cost_of.__getitem__)
    counts = {max(1, round(len(useful) * share)) for share in SHARES}
    chosen = [(), *(evenly_spread(useful, count) for count in sorted(counts))]
    memory = TrainingMemory(profile)
    enough = {_just_enough(memory, cheapest, k, budget_bytes) for k in (1, 2)}
    chosen += (tuple(sorted(cheapest[:count])) for count in sorted(counts | enough))
    return list(dict.fromkeys(tuple(sorted(one)) for one in chosen))


def filled(profile: Profile, budget_bytes: int) -> Iterator[Candidate]:
    """For each ring and choice, resident sets that use up the budget. What is resident is never computed again."""
    memory = TrainingMemory(profile)
    of = Pass.of(profile)
    free = budget_bytes - profile.partition.resident_bytes - profile.workspace_bytes
    count = len(of.layers)
    for recompute in recompute_choices(profile, budget_bytes):
        moving = partial(_moving_bytes, memory, recompute)
        for k_prime in K_PRIMES:
            for depth in DEPTHS:
                if depth * k_prime > count:
                    break
                for residents in dict.fromkeys(Filling(of, k_prime, depth, free, moving).resident_sets()):
                    if count - len(residents) >= depth * k_prime:
                        k = len(residents) + depth * k_prime
                        streamed = _without(recompute, residents)
                        yield Candidate(k=k, k_prime=k_prime, residents=residents, recompute=streamed)


def recomputing(profile: Profile, candidates: Sequence[Candidate], budget_bytes: int) -> Iterator[Candidate]:
    """Each candidate with every choice of what is computed again; and the least-memory plan."""
    for recompute in recompute_choices(profile, budget_bytes):
        for candidate in candidates:
            streamed = _without(recompute, candidate.residents)
            yield candidate.model_copy(update={"recompute": streamed})
    yield least_training(profile.partition)


def _moving_bytes(memory: TrainingMemory, recompute: tuple[int, ...], residents: AbstractSet[int]) -> int:
    return memory.moving_bytes(_without(recompute, residents), tuple(sorted(residents)))


def _without(recompute: tuple[int, ...], residents: Container[int]) -> tuple[int, ...]:
    return tuple(layer for layer in recompute if layer not in residents)


def _just_enough(memory: TrainingMemory, cheapest: Sequence[int], k: int, budget_bytes: int) -> int:
    """How many of the cheapest must be computed again for a ring of `k` layers to fit; all, if that is not enough."""
    low, high = 0, len(cheapest)
    while low < high:
        middle = (low + high) // 2
        again = tuple(sorted(cheapest[:middle]))
        if memory.may_fit(Candidate(k=k, k_prime=1, recompute=again), budget_bytes):
            high = middle
        else:
            low = middle + 1
    return low
