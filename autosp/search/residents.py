"""Which layers stay: as many as fit beside a ring, so spread that every copy has compute to hide behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from autosp.cost_model.placement import evenly_spread
from autosp.schedule.arena import arena_bytes
from autosp.spec import Profile

Spread = Callable[[Sequence[int], int], tuple[int, ...]]
"""Of a pool of layers, in the order of the pass: about so many that stay."""

PINNED_FIRST = 3
"""How many of the largest layer sizes may be made resident first, so that the ring is cut for the smaller ones."""


@dataclass(frozen=True)
class Filling:
    """A ring of `depth` groups of `k_prime` layers, and `free_bytes` for it and for what stays beside it."""

    profile: Profile
    visited: Sequence[int]
    """The layers of a pass, in the order of their first visit."""
    k_prime: int
    depth: int
    free_bytes: int

    def resident_sets(self) -> Iterator[tuple[int, ...]]:
        """Sets that use up the memory: spread evenly or to the pace of compute, with and without the largest layers."""
        layers = self.profile.partition.layers
        sizes = sorted({layers[index].n_bytes for index in self.visited}, reverse=True)
        for limit in sizes[: PINNED_FIRST + 1]:
            largest = {index for index in self.visited if layers[index].n_bytes > limit}
            if self._fits(largest):
                yield self._filled(largest, evenly_spread)
                yield self._filled(largest, self._to_pace)

    def _filled(self, chosen: set[int], spread: Spread) -> tuple[int, ...]:
        """Layers visited more often in a pass come first: each visit saves a transfer."""
        chosen = set(chosen)
        counts = Counter(self.profile.partition.visits)
        for times in sorted(set(counts.values()), reverse=True):
            pool = [index for index in self.visited if counts[index] == times and index not in chosen]
            low, high = 0, len(pool)
            while low < high:
                middle = (low + high + 1) // 2
                if self._fits(chosen.union(spread(pool, middle))):
                    low = middle
                else:
                    high = middle - 1
            chosen.update(spread(pool, low))
        return tuple(sorted(chosen))

    def _fits(self, residents: set[int]) -> bool:
        layers = self.profile.partition.layers
        streamed = [layers[index].n_bytes for index in self.visited if index not in residents]
        groups = [sum(streamed[start : start + self.k_prime]) for start in range(0, len(streamed), self.k_prime)]
        resident_bytes = sum(layers[index].n_bytes for index in residents)
        return resident_bytes + arena_bytes(groups, self.depth) <= self.free_bytes

    def _to_pace(self, pool: Sequence[int], count: int) -> tuple[int, ...]:
        """What stays if streamed bytes come in proportion to compute: more stays where a layer computes for less time.

        Error diffusion along the pass: compute earns bytes, a layer is streamed when half of it is earned. What is
        earned and not used is worth no more than the ring holds, since nothing can be prefetched further ahead.
        """
        layers = self.profile.partition.layers
        compute_s = sum(visit.before_s + visit.forward_s for visit in self.profile.visits)
        if count == 0 or compute_s == 0:
            return evenly_spread(pool, count)
        pool_bytes = sum(layers[index].n_bytes for index in pool)
        bytes_per_s = pool_bytes * (1 - count / len(pool)) / compute_s
        most_ahead = pool_bytes / len(pool) * self.k_prime * self.depth
        undecided = set(pool)
        stay: list[int] = []
        earned = 0.0
        for visit in self.profile.visits:
            earned = min(earned + (visit.before_s + visit.forward_s) * bytes_per_s, most_ahead)
            if visit.layer not in undecided:
                continue
            undecided.remove(visit.layer)
            n_bytes = layers[visit.layer].n_bytes
            if earned >= n_bytes / 2:
                earned -= n_bytes
            else:
                stay.append(visit.layer)
        return tuple(stay)
