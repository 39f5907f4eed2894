"""Which streamed layers rest on disk where the host has no room for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from autosp.cost_model.memory import Resting
from autosp.errors import BudgetTooSmallError
from autosp.schedule.arena import arena_bytes
from autosp.schedule.streaming import Ring, build_ring, stage
from autosp.spec import Candidate, Partition

T = TypeVar("T")


def evenly_spread(pool: Sequence[T], count: int) -> tuple[T, ...]:
    """`count` of the pool at even distances, so that what moves has compute between it to hide behind."""
    return tuple(pool[int((position + 0.5) * len(pool) / count)] for position in range(count))


def exceeds(partition: Partition, host_budget_bytes: int | None) -> bool:
    """Whether the host has no room for all layers and tables, so that plans may need the disk. None: it has."""
    return host_budget_bytes is not None and Resting(partition).n_bytes(Candidate(k=0, k_prime=1)) > host_budget_bytes


def least_host_bytes(partition: Partition) -> int:
    """What a plan takes of the host that has one layer at a time there: that layer's staging, and the lookup tables."""
    tables = partition.lookups.n_bytes if partition.lookups else 0
    return tables + max((layer.read_bytes for layer in partition.layers), default=0)


def host_too_small(partition: Partition, host_budget_bytes: int) -> BudgetTooSmallError:
    """The error for a host budget below the least that works, with the layer that sets it."""
    layer = max(partition.layers, key=lambda layer: layer.read_bytes)
    least = least_host_bytes(partition)
    tables = least - layer.read_bytes
    return BudgetTooSmallError(
        f"no setting fits {host_budget_bytes / 1e9:.4g} GB of host memory: the least that works is {least / 1e9:.4g} "
        f"GB. It is set by layer {layer.index} ({layer.name}), {layer.read_bytes / 1e9:.4g} GB at once, beside "
        f"{tables / 1e9:.4g} GB of lookup tables; try max_cpu_gb={least * 1.05 / 1e9:.4g}",
        budget_bytes=host_budget_bytes,
        least_bytes=least,
        layer=layer.name,
    )


Group = tuple[int, ...]

Bundle = tuple[Group, ...]
"""Groups that rest on one tier: one, or all that have rows of the same weights."""


class Placing:
    """Puts as little of what a candidate streams on disk as makes the rest, and a staging ring, fit the host.

    What a pass never moves comes first: layers that it does not visit, and groups that stay in the arena. Then what it
    moves least often. Groups of one kind are spread evenly over the pass, so that the disk has the time of the others
    to read them.
    """

    def __init__(self, candidate: Candidate, partition: Partition, host_budget_bytes: int) -> None:
        self._candidate = candidate
        self._partition = partition
        self._layer_bytes = [layer.n_bytes for layer in partition.layers]
        self._read_bytes = [layer.read_bytes for layer in partition.layers]
        self._free_bytes = host_budget_bytes - Resting(partition).n_bytes(candidate)
        self.ring = build_ring(candidate, self._layer_bytes, partition.visits)
        """Of the candidate with nothing on disk."""
        self._order = {group.layers: position for position, group in enumerate(self.ring.groups)}
        self._pools = self._by_times_moved() if self._free_bytes < 0 else []
        self._staged_bytes = {
            group: sum(map(self._read_bytes.__getitem__, group))
            for pool in self._pools
            for bundle in pool
            for group in bundle
        }

    def with_read_ahead(self, groups: int) -> tuple[Candidate, Ring] | None:
        """The candidate with a staging ring of so many groups; itself if it needs none; None if that does not fit."""
        if self._free_bytes >= 0:
            return self._candidate, self.ring
        chosen: set[Group] = set()
        for pool in self._pools:
            low, high = 0, len(pool)
            while low < high:
                middle = (low + high) // 2
                if self._may_fit(chosen.union(_spread(pool, middle)), groups):
                    high = middle
                else:
                    low = middle + 1
            for count in range(low, len(pool) + 1):
                found = self._if_it_fits(chosen.union(_spread(pool, count)), groups)
                if found is not None:
                    return found
            chosen.update(_spread(pool, len(pool)))
        return None

    def _may_fit(self, chosen: set[Group], read_ahead: int) -> bool:
        """Whether the largest neighbours fit: where groups are of unlike sizes the staging ring may be larger."""
        in_order = sorted(chosen.intersection(self._order), key=self._order.__getitem__)
        moving = [self._staged_bytes[group] for group in in_order]
        still = max((self._staged_bytes[group] for group in chosen.difference(self._order)), default=0)
        freed = self._freed_bytes(chosen)
        return max(arena_bytes(moving, read_ahead), still) <= self._free_bytes + freed

    def _if_it_fits(self, chosen: set[Group], read_ahead: int) -> tuple[Candidate, Ring] | None:
        if not chosen or not self._may_fit(chosen, read_ahead):
            return None
        on_disk = tuple(sorted(layer for group in chosen for layer in group))
        found = self._candidate.model_copy(update={"on_disk": on_disk, "read_ahead": read_ahead})
        staging = stage(self.ring, found, self._read_bytes, self._partition.visits)
        if staging.n_bytes > self._free_bytes + self._freed_bytes(chosen):
            return None
        return found, replace(self.ring, staging=staging)

    def _by_times_moved(self) -> list[list[Bundle]]:
        """Everything that may rest on disk."""
        times = dict.fromkeys((group.layers for group in self.ring.groups), 0)
        for transfer in self.ring.transfers:
            times[self.ring.groups[transfer.group].layers] += 1
        elsewhere = {*self._partition.visits, *self._candidate.residents}
        never: list[Bundle] = [((layer,),) for layer in range(len(self._layer_bytes)) if layer not in elsewhere]
        bundles = self._bundles()
        often = [max(times[group] for group in bundle) for bundle in bundles]
        moved = [
            [bundle for bundle, moves in zip(bundles, often, strict=True) if moves == count]
            for count in sorted(set(often))
        ]
        return [pool for pool in (never, *moved) if pool]

    def _bundles(self) -> list[Bundle]:
        """The ring's groups. Rows of one weight are visited one after another, so their groups are neighbours."""
        bundles: list[Bundle] = []
        before: set[str] = set()
        for group in (group.layers for group in self.ring.groups):
            layers = [self._partition.layers[layer] for layer in group]
            weights = {layer.path for layer in layers if layer.rows}
            if before.isdisjoint(weights):
                bundles.append((group,))
            else:
                bundles[-1] = *bundles[-1], group
            before = weights
        return bundles

    def _freed_bytes(self, chosen: set[Group]) -> int:
        """Of the host, if these rest on disk, and with them all rows of their weights."""
        freed = self._partition.whole([layer for group in chosen for layer in group])
        return sum(map(self._layer_bytes.__getitem__, freed))


def _spread(pool: Sequence[Bundle], count: int) -> list[Group]:
    return [group for position in evenly_spread(range(len(pool)), count) for group in pool[position]]
