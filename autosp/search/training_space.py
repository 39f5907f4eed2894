"""Which settings of training there are under a budget: as in inference, for each choice of which activations stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import add

from autosp.cost_model.placement import evenly_spread
from autosp.cost_model.training_memory import TrainingMemory, freed_bytes, seconds_per_freed_byte
from autosp.schedule.training import least_training
from autosp.search.residents import Filling, Pass
from autosp.spec import Candidate, Profile

K_PRIMES = (1, 2, 4, 8)
DEPTHS = (1, 2, 3)
"""As in inference, but coarser: each is tried with every choice of which activations stay."""

SHARES = (1 / 4, 1 / 2, 3 / 4, 1)
"""Of the layers whose activations take more than their inputs, how many are computed again; of those that save any, how
many offload them."""

Activations = tuple[tuple[int, ...], tuple[int, ...]]
"""Layers to recompute, and layers to offload."""


def activation_choices(profile: Profile, budget_bytes: int) -> list[Activations]:
    """What is computed again, where nothing is offloaded; what is offloaded, all others keeping or recomputing theirs.

    The first layers are offloaded, which have most time for it: shares of all, and just enough for the budget. Where
    the device counts host memory as its own, none are.
    """
    choices: list[Activations] = [(recompute, ()) for recompute in recompute_choices(profile, budget_bytes)]
    partition = profile.partition
    if profile.device.counts_host_memory:
        return choices
    sizes = dict.fromkeys(partition.visits, 0)
    for layer, n_bytes in zip(partition.visits, partition.activation_bytes, strict=False):
        sizes[layer] += n_bytes if layer in partition.backward else 0
    first = [layer for layer, n_bytes in sizes.items() if n_bytes]
    if not first:
        return choices
    memory, again = TrainingMemory(profile), sorted(seconds_per_freed_byte(profile))

    shares = {max(1, round(len(first) * share)) for share in SHARES}
    for others in ([], again):
        enough = {
            max(1, _just_enough(partial(_offloading, k, others, first), len(first), memory, budget_bytes))
            for k in (1, 2)
        }
        for count in sorted(shares | enough):
            candidate = _offloading(1, others, first, count)
            choices.append((candidate.recompute, candidate.offload))
    return list(dict.fromkeys(choices))


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
    enough = {_just_enough(partial(_recomputing, k, cheapest), len(cheapest), memory, budget_bytes) for k in (1, 2)}
    chosen += (tuple(sorted(cheapest[:count])) for count in sorted(counts | enough))
    return list(dict.fromkeys(tuple(sorted(one)) for one in chosen))


def filled(profile: Profile, budget_bytes: int) -> Iterator[Candidate]:
    """For each ring and choice, resident sets that use up the budget. What is resident keeps its activations.

    Activations are at their peak before residents have gradients, so each is filled twice: without these, which may
    be too much later in the pass, and with them, which always fits.
    """
    memory = TrainingMemory(profile)
    of = Pass.of(profile)
    freed = freed_bytes(profile)
    fixed = profile.partition.resident_bytes + profile.workspace_bytes
    count = len(of.layers)
    saved = Counter[int]()
    for layer, n_bytes in zip(profile.partition.visits, profile.partition.activation_bytes, strict=False):
        saved[layer] += n_bytes
    for recompute, offload in activation_choices(profile, budget_bytes):
        kept = [0] * len(of.layer_bytes)
        for layer in recompute:
            kept[layer] = freed[layer]
        for layer in offload:
            kept[layer] = saved[layer]
        without = replace(of, resident_bytes=tuple(map(add, of.layer_bytes, kept)))
        with_gradients = replace(of, resident_bytes=tuple(map(add, of.resident_bytes, kept)))
        free = budget_bytes - fixed - memory.activation_bytes(recompute, offload)
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
                        candidate = Candidate(k=k, k_prime=k_prime, residents=residents)
                        yield _with(candidate, recompute, offload)


def with_activations(profile: Profile, candidates: Sequence[Candidate], budget_bytes: int) -> Iterator[Candidate]:
    """Each candidate with every choice of which activations stay; and the least-memory plan.

    Activations are offloaded beside rings as small as those that are `filled`: they come back no sooner in larger ones.
    """
    small = [one for one in candidates if one.k_prime in K_PRIMES and one.depth in DEPTHS]
    for recompute, offload in activation_choices(profile, budget_bytes):
        for candidate in small if offload else candidates:
            yield _with(candidate, recompute, offload)
    yield least_training(profile.partition)


def _with(candidate: Candidate, recompute: Sequence[int], offload: Sequence[int]) -> Candidate:
    """Of what the candidate streams."""
    residents = frozenset(candidate.residents)
    again, away = (tuple(layer for layer in one if layer not in residents) for one in (recompute, offload))
    return candidate.model_copy(update={"recompute": again, "offload": away})


def _recomputing(k: int, cheapest: Sequence[int], count: int) -> Candidate:
    """So many of them."""
    return Candidate(k=k, k_prime=1, recompute=tuple(sorted(cheapest[:count])))


def _offloading(k: int, others: Sequence[int], first: Sequence[int], count: int) -> Candidate:
    """So many of the first; of the rest, the `others` are computed again."""
    away = frozenset(first[:count])
    again = tuple(layer for layer in others if layer not in away)
    return Candidate(k=k, k_prime=1, recompute=again, offload=tuple(sorted(away)))


def _just_enough(candidate_of: Callable[[int], Candidate], most: int, memory: TrainingMemory, budget_bytes: int) -> int:
    """The least number, of `most`, with which a candidate fits; `most`, if that is not enough."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if memory.may_fit(candidate_of(middle), budget_bytes):
            high = middle
        else:
            low = middle + 1
    return low
