"""Which settings of training there are under a budget: as in inference, for each choice of what is computed again."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import partial

from autosp.cost_model.placement import evenly_spread
from autosp.cost_model.training_memory import Together, TrainingMemory, seconds_per_freed_byte
from autosp.schedule.training import least_training
from autosp.search.residents import Filling, Pass
from autosp.spec import Candidate, Profile

K_PRIMES = (1, 2, 4, 8)
DEPTHS = (1, 2, 3)
"""As in inference, but coarser: each is tried with every choice of what is computed again."""

SHARES = (1 / 4, 1 / 2, 3 / 4, 1)
"""Of the blocks and layers whose activations take more than their inputs: how many are computed again."""


def recompute_choices(profile: Profile, budget_bytes: int, group: int = 1) -> list[tuple[int, ...]]:
    """Sets of layers to compute again, blocks as a whole: none, all that free memory, shares, and just enough.

    A share is spread evenly, and taken where a byte costs least time. Just enough is the least number, of the cheapest,
    with which one layer at a time fits the budget beside the activations of a group, and that with which two do.
    """
    cost_of = seconds_per_freed_byte(profile)
    useful = list(cost_of)
    if not useful:
        return [()]
    cheapest = sorted(useful, key=cost_of.__getitem__)
    counts = {max(1, round(len(useful) * share)) for share in SHARES}
    chosen: list[tuple[Together, ...]] = [(), *(evenly_spread(useful, count) for count in sorted(counts))]
    memory = TrainingMemory(profile)
    enough = {_just_enough(memory, cheapest, Candidate(k=k, k_prime=1, group=group), budget_bytes) for k in (1, 2)}
    chosen += (tuple(cheapest[:count]) for count in sorted(counts | enough))
    return list(dict.fromkeys(map(_layers_of, chosen)))


def filled(profile: Profile, budget_bytes: int, group: int = 1) -> Iterator[Candidate]:
    """For each ring and choice, resident sets that use up the budget. Residents are computed again in blocks only."""
    memory = TrainingMemory(profile)
    of = Pass.of(profile)
    in_blocks = _in_blocks(profile)
    free = budget_bytes - profile.partition.resident_bytes - profile.planned_workspace_of(group)
    count = len(of.layers)
    for recompute in recompute_choices(profile, budget_bytes, group):
        moving = partial(_moving_bytes, memory, in_blocks, recompute, group)
        for k_prime in K_PRIMES:
            for depth in DEPTHS:
                if depth * k_prime > count:
                    break
                for residents in dict.fromkeys(Filling(of, k_prime, depth, free, moving).resident_sets()):
                    if count - len(residents) >= depth * k_prime:
                        k = len(residents) + depth * k_prime
                        again = _again_beside(residents, in_blocks, recompute)
                        yield Candidate(k=k, k_prime=k_prime, residents=residents, recompute=again)


def recomputing(
    profile: Profile, candidates: Sequence[Candidate], budget_bytes: int, group: int = 1
) -> Iterator[Candidate]:
    """Each candidate, one after another, with every choice of what is computed again; and the least-memory plan."""
    in_blocks = _in_blocks(profile)
    choices = recompute_choices(profile, budget_bytes, group)
    for candidate in candidates:
        for recompute in choices:
            again = _again_beside(candidate.residents, in_blocks, recompute)
            yield candidate.model_copy(update={"recompute": again})
    yield least_training(profile.partition)


def _moving_bytes(
    memory: TrainingMemory,
    in_blocks: AbstractSet[int],
    recompute: tuple[int, ...],
    group: int,
    residents: AbstractSet[int],
) -> int:
    return memory.moving_bytes(_again_beside(residents, in_blocks, recompute), tuple(sorted(residents)), group)


def _in_blocks(profile: Profile) -> AbstractSet[int]:
    return {layer for block in profile.partition.blocks for layer in block.layers}


def _again_beside(
    residents: Container[int], in_blocks: AbstractSet[int], recompute: tuple[int, ...]
) -> tuple[int, ...]:
    """Of layers to compute again, those that are not resident, and those of blocks."""
    return tuple(layer for layer in recompute if layer in in_blocks or layer not in residents)


def _layers_of(chosen: Sequence[Together]) -> tuple[int, ...]:
    return tuple(sorted(layer for layers in chosen for layer in layers))


def _just_enough(memory: TrainingMemory, cheapest: Sequence[Together], ring: Candidate, budget_bytes: int) -> int:
    """How many of the cheapest must be computed again for a ring to fit; all, if that is not enough."""
    low, high = 0, len(cheapest)
    while low < high:
        middle = (low + high) // 2
        again = _layers_of(cheapest[:middle])
        if memory.may_fit(ring.model_copy(update={"recompute": again}), budget_bytes):
            high = middle
        else:
            low = middle + 1
    return low
