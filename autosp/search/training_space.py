"""Which settings of training there are under a budget: as in inference, for each choice of what is computed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import add

from autosp.cost_model.placement import evenly_spread
from autosp.cost_model.training_memory import TrainingMemory, freed_bytes, seconds_per_freed_byte
from autosp.schedule.training import least_training
from autosp.search.residents import Filling, Pass
from autosp.spec import Candidate, Profile

K_PRIMES = (1, 2, 4, 8)
DEPTHS = (1, 2, 3)
"""As in inference, but coarser: each is tried with every choice of what is computed again."""

SHARES = (1 / 4, 1 / 2, 3 / 4, 1)
"""Of the layers whose activations take more than their inputs: how many are computed again."""


def recompute_choices(profile: Profile, budget_bytes: int, group: int = 1) -> list[tuple[int, ...]]:
    """Sets of layers to compute again: none, all that free memory, shares of these, and just enough for the budget.

    A share is spread evenly, and taken where a byte costs least time. Just enough is the least number, of the cheapest,
    with which one layer at a time fits the budget beside the activations of a group, and that with which two do.
    """
    cost_of = seconds_per_freed_byte(profile)
    useful = sorted(cost_of)
    if not useful:
        return [()]
    cheapest = sorted(useful, key=cost_of.__getitem__)
    counts = {max(1, round(len(useful) * share)) for share in SHARES}
    chosen = [(), *(evenly_spread(useful, count) for count in sorted(counts))]
    memory = TrainingMemory(profile)
    enough = {_just_enough(memory, cheapest, Candidate(k=k, k_prime=1, group=group), budget_bytes) for k in (1, 2)}
    chosen += (tuple(sorted(cheapest[:count])) for count in sorted(counts | enough))
    return list(dict.fromkeys(tuple(sorted(one)) for one in chosen))


def filled(profile: Profile, budget_bytes: int, group: int = 1) -> Iterator[Candidate]:
    """For each ring and choice, resident sets that use up the budget. What is resident is never computed again.

    Activations are at their peak before residents have gradients, so each is filled twice: without these, which may
    be too much later in the pass, and with them, which always fits.
    """
    memory = TrainingMemory(profile)
    of = Pass.of(profile)
    freed = freed_bytes(profile)
    fixed = profile.partition.resident_bytes + profile.workspace_of(group)
    count = len(of.layers)
    for recompute in recompute_choices(profile, budget_bytes, group):
        kept = [group * freed[layer] if layer in recompute else 0 for layer in range(len(of.layer_bytes))]
        without = replace(of, resident_bytes=tuple(map(add, of.layer_bytes, kept)))
        with_gradients = replace(of, resident_bytes=tuple(map(add, of.resident_bytes, kept)))
        free = budget_bytes - fixed - memory.activation_bytes(recompute, group)
        for k_prime in K_PRIMES:
            for depth in DEPTHS:
                if depth * k_prime > count:
                    break
                fillings = (
                    Filling(without, k_prime, depth, free),
                    Filling(with_gradients, k_prime, depth, free - memory.gradient_bytes()),
                )
                for residents in dict.fromkeys(found for filling in fillings for found in filling.resident_sets()):
                    if count - len(residents) >= depth * k_prime:
                        k = len(residents) + depth * k_prime
                        streamed = tuple(layer for layer in recompute if layer not in residents)
                        yield Candidate(k=k, k_prime=k_prime, residents=residents, recompute=streamed)


def recomputing(
    profile: Profile, candidates: Sequence[Candidate], budget_bytes: int, group: int = 1
) -> Iterator[Candidate]:
    """Each candidate with every choice of what is computed again; and the least-memory plan."""
    for recompute in recompute_choices(profile, budget_bytes, group):
        for candidate in candidates:
            streamed = tuple(layer for layer in recompute if layer not in candidate.residents)
            yield candidate.model_copy(update={"recompute": streamed})
    yield least_training(profile.partition)


def _just_enough(memory: TrainingMemory, cheapest: Sequence[int], ring: Candidate, budget_bytes: int) -> int:
    """How many of the cheapest must be computed again for a ring to fit; all, if that is not enough."""
    low, high = 0, len(cheapest)
    while low < high:
        middle = (low + high) // 2
        again = tuple(sorted(cheapest[:middle]))
        if memory.may_fit(ring.model_copy(update={"recompute": again}), budget_bytes):
            high = middle
        else:
            low = middle + 1
    return low
