"""Which layers stay: as many as fit beside a ring, so spread that every copy has compute to hide behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Self

from autosp.cost_model.placement import evenly_spread
from autosp.schedule.arena import arena_bytes
from autosp.spec import Profile

Spread = Callable[[Sequence[int], int], tuple[int, ...]]
"""Of a pool of layers, in the order of the pass: about so many that stay."""

PINNED_FIRST = 3
"""How many of the largest layer sizes may be made resident first, so that the ring is cut for the smaller ones."""

SMALLEST_STREAMED = (0.0, 1 / 8, 1 / 2)
"""Layers below this share of the largest that is streamed may be made resident first, too: a small layer takes a turn
in the ring and hides little, while a ring of equal layers keeps the link busy with the fewest places."""


@dataclass(frozen=True)
class Pass:
    """A pass as the filling sees it. Shapes: bytes per layer; layer and compute per visit."""

    layer_bytes: tuple[int, ...]
    visits: tuple[tuple[int, float], ...]
    layers: tuple[int, ...]
    """Those visited, in the order of their first visit."""
    pools: tuple[tuple[int, ...], ...]
    """These layers, the ones visited most often first: each visit of a resident saves a transfer."""
    compute_s: float

    @classmethod
    def of(cls, profile: Profile) -> Self:
        """The pass of a profile. What a layer computes backward counts for its first visit."""
        layers, visits = profile.partition.layers, profile.partition.visits
        counts = Counter((*visits, *profile.partition.backward))
        backward_s: dict[int, float] = {}
        for again in profile.backward:
            backward_s[again.layer] = backward_s.get(again.layer, 0.0) + again.before_s + again.backward_s
        timed = tuple(
            (visit.layer, visit.before_s + visit.forward_s + backward_s.pop(visit.layer, 0.0))
            for visit in profile.visits
        )
        return cls(
            layer_bytes=tuple(layer.n_bytes for layer in layers),
            visits=timed,
            layers=tuple(counts),
            pools=tuple(
                tuple(layer for layer, often in counts.items() if often == times)
                for times in sorted(set(counts.values()), reverse=True)
            ),
            compute_s=sum(seconds for _, seconds in timed),
        )


@dataclass(frozen=True)
class Filling:
    """A ring of `depth` groups of `k_prime` layers, and `free_bytes` for it and for what there is beside it."""

    of: Pass
    k_prime: int
    depth: int
    free_bytes: int
    moving_bytes: Callable[[AbstractSet[int]], int] = lambda residents: 0
    """What a training pass takes besides weights, where these layers stay."""

    def resident_sets(self) -> Iterator[tuple[int, ...]]:
        """Sets that use up the memory: spread evenly or to the pace of compute, all or some sizes being streamed."""
        for pinned in dict.fromkeys(self._pinned()):
            if self._fits(pinned):
                yield self._filled(pinned, evenly_spread)
                yield self._filled(pinned, self._to_pace)

    def _pinned(self) -> Iterator[frozenset[int]]:
        """Layers that stay in any case: the largest, and the smallest of the others."""
        sizes = {layer: self.of.layer_bytes[layer] for layer in self.of.layers}
        for most in sorted(set(sizes.values()), reverse=True)[: PINNED_FIRST + 1]:
            for share in SMALLEST_STREAMED:
                yield frozenset(layer for layer, size in sizes.items() if not share * most <= size <= most)

    def _filled(self, pinned: frozenset[int], spread: Spread) -> tuple[int, ...]:
        """`pinned`, and as many of the others as fit."""
        chosen = set(pinned)
        for pool in self.of.pools:
            open_layers = [layer for layer in pool if layer not in chosen]
            low, high = 0, len(open_layers)
            while low < high:
                middle = (low + high + 1) // 2
                if self._fits(chosen.union(spread(open_layers, middle))):
                    low = middle
                else:
                    high = middle - 1
            chosen.update(spread(open_layers, low))
        return tuple(sorted(chosen))

    def _fits(self, residents: AbstractSet[int]) -> bool:
        sizes = self.of.layer_bytes
        free_bytes = self.free_bytes - sum(map(sizes.__getitem__, residents))
        if free_bytes < 0:
            return False
        free_bytes -= self.moving_bytes(residents)
        streamed = [sizes[layer] for layer in self.of.layers if layer not in residents]
        if self.k_prime == 1:
            return free_bytes >= arena_bytes(streamed, self.depth)
        groups = [sum(streamed[start : start + self.k_prime]) for start in range(0, len(streamed), self.k_prime)]
        return free_bytes >= arena_bytes(groups, self.depth)

    def _to_pace(self, pool: Sequence[int], count: int) -> tuple[int, ...]:
        """What stays if streamed bytes come in proportion to compute: more stays where a layer computes for less time.

        Error diffusion along the pass: compute earns bytes, a layer is streamed when half of it is earned. What is
        earned and not used is worth no more than the ring holds, since nothing can be prefetched further ahead.
        """
        sizes = self.of.layer_bytes
        compute_s = self.of.compute_s
        if count == 0 or compute_s == 0:
            return evenly_spread(pool, count)
        pool_bytes = sum(map(sizes.__getitem__, pool))
        bytes_per_s = pool_bytes * (1 - count / len(pool)) / compute_s
        most_ahead = pool_bytes / len(pool) * self.k_prime * self.depth
        undecided = set(pool)
        stay: list[int] = []
        earned = 0.0
        for layer, seconds in self.of.visits:
            earned += seconds * bytes_per_s
            if earned > most_ahead:
                earned = most_ahead
            if layer not in undecided:
                continue
            undecided.remove(layer)
            n_bytes = sizes[layer]
            if earned >= n_bytes / 2:
                earned -= n_bytes
            else:
                stay.append(layer)
        return tuple(stay)
