"""Plans for groups of microbatches whose transfers are whole blocks: layer packs, as Harmony has them.

A microbatch computes such a block again and goes backward through it in one turn, so that the others of its group hold
nothing of it but its inputs: see `cost_model.rounds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from autosp.cost_model.placement import evenly_spread
from autosp.spec import Candidate, Partition

DEPTHS = (1, 2, 3)
"""Blocks in the ring."""


@dataclass(frozen=True)
class Packs:
    """Blocks of equally many layers; of the other layers those visited before the last block: they stay."""

    blocks: tuple[tuple[int, ...], ...]
    between: tuple[int, ...]

    @classmethod
    def of(cls, partition: Partition) -> Self | None:
        """None where transfers of equally many layers cannot be blocks."""
        blocks = tuple(block.layers for block in partition.blocks)
        if len({len(layers) for layers in blocks}) != 1:
            return None
        order = list(dict.fromkeys(partition.visits))
        position = {layer: place for place, layer in enumerate(order)}
        if not all(layer in position for layers in blocks for layer in layers):
            return None
        blocks = tuple(sorted(blocks, key=lambda layers: position[layers[0]]))
        in_blocks = partition.in_blocks
        return cls(blocks, tuple(layer for layer in order[: position[blocks[-1][0]]] if layer not in in_blocks))

    def plan(self, depth: int, kept: int, group: int, recompute: tuple[int, ...]) -> Candidate:
        """A ring of `depth` blocks; `kept` blocks stay. Of layers to `recompute` those that stay in no block do not."""
        chosen = evenly_spread(self.blocks, kept)
        residents = tuple(sorted({*self.between, *(layer for layers in chosen for layer in layers)}))
        size, in_blocks = len(self.blocks[0]), frozenset(layer for layers in self.blocks for layer in layers)
        return Candidate(
            k=len(residents) + depth * size,
            k_prime=size,
            residents=residents,
            recompute=tuple(layer for layer in recompute if layer in in_blocks or layer not in residents),
            group=group,
        )

    def filled(self, group: int, recompute: tuple[int, ...], fits: Callable[[Candidate], bool]) -> Iterator[Candidate]:
        """For each depth the plan of most blocks that fits."""
        for depth in DEPTHS:
            low, high = -1, len(self.blocks) - depth
            while low < high:
                middle = (low + high + 1) // 2
                if fits(self.plan(depth, middle, group, recompute)):
                    low = middle
                else:
                    high = middle - 1
            if low >= 0:
                yield self.plan(depth, low, group, recompute)
