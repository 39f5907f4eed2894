"""Which settings of training there are under a budget: as in inference, for each choice of which activations stay."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Container, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

from autosp.cost_model.placement import evenly_spread
from autosp.cost_model.training_memory import Together, TrainingMemory, seconds_per_freed_byte
from autosp.schedule.training import least_training
from autosp.search.residents import Filling, Pass
from autosp.spec import Candidate, Partition, Profile

K_PRIMES = (1, 2, 4, 8)
DEPTHS = (1, 2, 3)
"""As in inference, but coarser: each is tried with every choice of which activations stay."""

SHARES = (1 / 4, 1 / 2, 3 / 4, 1)
"""Of the blocks and layers whose activations take more than their inputs, how many are computed again; of those that
save any, how many offload them."""


class Activations(NamedTuple):
    """Layers whose activations do not stay on the device."""

    recompute: tuple[int, ...] = ()
    offload: tuple[int, ...] = ()

    def beside(self, residents: Container[int], in_blocks: AbstractSet[int]) -> Activations:
        """Of layers to compute again, those that are not resident, and those of blocks; to offload: not resident."""
        return Activations(
            tuple(layer for layer in self.recompute if layer in in_blocks or layer not in residents),
            tuple(layer for layer in self.offload if layer not in residents),
        )


@dataclass(frozen=True)
class Packs:
    """Blocks of equally many layers that move as a whole: Harmony's layer packs, for groups of microbatches.

    One of them computes such a block again and goes backward through it in one turn, so that the others hold nothing of
    it but its inputs: see `cost_model.rounds`.
    """

    blocks: tuple[tuple[int, ...], ...]
    between: tuple[int, ...]
    """Other layers that are visited before the last block: they stay."""
    in_blocks: frozenset[int]

    @classmethod
    def of(cls, partition: Partition) -> Self | None:
        """None where transfers of equally many layers cannot be blocks."""
        blocks = tuple(block.layers for block in partition.blocks)
        order = list(dict.fromkeys(partition.visits))
        position = {layer: place for place, layer in enumerate(order)}
        in_blocks = partition.in_blocks
        if len(set(map(len, blocks))) != 1 or not in_blocks <= position.keys():
            return None
        blocks = tuple(sorted(blocks, key=lambda layers: position[layers[0]]))
        between = tuple(layer for layer in order[: position[blocks[-1][0]]] if layer not in in_blocks)
        return cls(blocks, between, in_blocks)

    def plan(self, depth: int, kept: int, group: int, recompute: tuple[int, ...]) -> Candidate:
        """A ring of `depth` blocks; `kept` blocks stay. Of layers to `recompute` those that stay in no block do not."""
        chosen = evenly_spread(self.blocks, kept)
        residents = tuple(sorted({*self.between, *(layer for layers in chosen for layer in layers)}))
        size, here = len(self.blocks[0]), Activations(recompute).beside(residents, self.in_blocks)
        k = len(residents) + depth * size
        return Candidate(k=k, k_prime=size, residents=residents, group=group, **here._asdict())

    def filled(self, group: int, recompute: tuple[int, ...], fits: Callable[[Candidate], bool]) -> Iterator[Candidate]:
        """For each depth the plan of most blocks that fits."""
        for depth in DEPTHS:
            plans = [partial(self.plan, depth, kept, group, recompute) for kept in range(len(self.blocks) - depth + 1)]
            fitting = bisect_left(plans, True, key=lambda plan: not fits(plan()))
            if fitting:
                yield plans[fitting - 1]()


def activation_choices(profile: Profile, budget_bytes: int, group: int = 1) -> list[Activations]:
    """What is computed again, where nothing is offloaded; what is offloaded, all others keeping or recomputing theirs.

    The first blocks and layers are offloaded, which have most time for it: shares of all, and just enough for the
    budget. Where the device counts host memory as its own, none are.
    """
    choices = [Activations(recompute) for recompute in recompute_choices(profile, budget_bytes, group)]
    if profile.device.counts_host_memory:
        return choices
    partition = profile.partition
    saving = {layer for layer, n_bytes in zip(partition.visits, partition.activation_bytes, strict=False) if n_bytes}
    first = [together for together in partition.recomputable if not saving.isdisjoint(together)]
    memory, again = TrainingMemory(profile), list(seconds_per_freed_byte(profile))
    counts = {max(1, round(len(first) * share)) for share in SHARES} if first else set()
    for others in ([], again) if first else ():
        choice_of = partial(_offloading, others, first, saving)
        rings = (Candidate(k=k, k_prime=1, group=group) for k in (1, 2))
        enough = {max(1, _just_enough(memory, choice_of, len(first), ring, budget_bytes)) for ring in rings}
        choices += map(choice_of, sorted(counts | enough))
    return list(dict.fromkeys(choices))


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
    memory, choice_of = TrainingMemory(profile), partial(_recomputing, cheapest)
    rings = (Candidate(k=k, k_prime=1, group=group) for k in (1, 2))
    enough = {_just_enough(memory, choice_of, len(cheapest), ring, budget_bytes) for ring in rings}
    chosen += (tuple(cheapest[:count]) for count in sorted(counts | enough))
    return list(dict.fromkeys(map(_layers_of, chosen)))


def filled(profile: Profile, budget_bytes: int, group: int = 1) -> Iterator[Candidate]:
    """For each ring and choice, resident sets that use up the budget. Residents are computed again in blocks only.

    For a group also rings of whole blocks.
    """
    memory = TrainingMemory(profile)
    packs = Packs.of(profile.partition) if group > 1 else None
    of = Pass.of(profile)
    in_blocks = profile.partition.in_blocks
    free = budget_bytes - profile.partition.resident_bytes - profile.planned_workspace_of(group)
    count = len(of.layers)
    for choice in activation_choices(profile, budget_bytes, group):
        if packs is not None and not choice.offload:
            yield from packs.filled(group, choice.recompute, lambda plan: memory.may_fit(plan, budget_bytes))
        for k_prime in K_PRIMES:
            for depth in DEPTHS:
                if depth * k_prime > count:
                    break
                moving = partial(_moving_bytes, memory, in_blocks, choice, group, k_prime, depth)
                for residents in dict.fromkeys(Filling(of, k_prime, depth, free, moving).resident_sets()):
                    if count - len(residents) >= depth * k_prime:
                        k = len(residents) + depth * k_prime
                        here = choice.beside(residents, in_blocks)
                        yield Candidate(k=k, k_prime=k_prime, residents=residents, **here._asdict())


def least_of_group(profile: Profile, candidates: Sequence[Candidate], group: int) -> list[Candidate]:
    """These with as few activations as they can have, and the least that moves whole blocks, if there are such."""
    again, in_blocks = Activations(least_training(profile.partition).recompute), profile.partition.in_blocks
    packs = Packs.of(profile.partition)
    plans = [one.model_copy(update=again.beside(one.residents, in_blocks)._asdict()) for one in candidates]
    return plans if packs is None else [*plans, packs.plan(1, 0, group, again.recompute)]


def with_activations(
    profile: Profile, candidates: Sequence[Candidate], budget_bytes: int, group: int = 1
) -> Iterator[Candidate]:
    """Each candidate, one after another, with every choice of which activations stay; and the least-memory plan.

    Activations are offloaded beside rings as small as those that are `filled`: they come back no sooner in larger ones.
    """
    in_blocks = profile.partition.in_blocks
    choices = activation_choices(profile, budget_bytes, group)
    for candidate in candidates:
        small = candidate.k_prime in K_PRIMES and candidate.depth in DEPTHS
        for choice in choices:
            if small or not choice.offload:
                yield candidate.model_copy(update=choice.beside(candidate.residents, in_blocks)._asdict())
    yield least_training(profile.partition)


def _moving_bytes(
    memory: TrainingMemory,
    in_blocks: AbstractSet[int],
    choice: Activations,
    group: int,
    k_prime: int,
    depth: int,
    residents: AbstractSet[int],
) -> int:
    here = choice.beside(residents, in_blocks)
    stay = tuple(sorted(residents))
    k = len(stay) + depth * k_prime
    return memory.moving_bytes(Candidate(k=k, k_prime=k_prime, residents=stay, group=group, **here._asdict()))


def _layers_of(chosen: Sequence[Together]) -> tuple[int, ...]:
    return tuple(sorted(layer for layers in chosen for layer in layers))


def _recomputing(cheapest: Sequence[Together], count: int) -> Activations:
    """So many of them."""
    return Activations(_layers_of(cheapest[:count]))


def _offloading(
    others: Sequence[Together], first: Sequence[Together], saving: AbstractSet[int], count: int
) -> Activations:
    """So many of the first, their layers that are `saving` any; of the rest, the `others` are computed again."""
    away = frozenset(first[:count])
    again = [together for together in others if together not in away]
    return Activations(_layers_of(again), tuple(layer for layer in _layers_of(first[:count]) if layer in saving))


def _just_enough(
    memory: TrainingMemory, choice_of: Callable[[int], Activations], most: int, ring: Candidate, budget_bytes: int
) -> int:
    """The least number, of `most`, with which a ring fits beside what stays; `most`, if that is not enough."""

    def fits(count: int) -> bool:
        return memory.may_fit(ring.model_copy(update=choice_of(count)._asdict()), budget_bytes)

    return bisect_left(range(most), True, key=fits)
