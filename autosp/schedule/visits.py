"""The visits of a training pass, forward and backward, and which of them use up what others saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from autosp.schedule.actions import Kind
from autosp.spec import Candidate, Partition


class Visit(NamedTuple):
    """One visit of a pass. A BACKWARD comes after a RECOMPUTE of its layer if the layer is computed `again`."""

    kind: Kind
    layer: int
    again: bool = False


def visits_of(candidate: Candidate, partition: Partition) -> list[Visit]:
    """A pass: its visits forward, then those backward.

    [Note: a block computed again] Before the backward of a block that is computed again all its layers are visited as
    in the forward, the last of them once for both. So the ring loads the others for that, and again for their backward,
    unless it has room for the whole block.
    """
    again = frozenset(candidate.recompute)
    blocks = {block.layers[-1]: block.layers[:-1] for block in partition.recomputed_blocks(again)}
    others = {layer for layers in blocks.values() for layer in layers}
    visits = [Visit(Kind.FORWARD, layer) for layer in partition.visits]
    for layer in partition.backward:
        visits += (Visit(Kind.RECOMPUTE, one) for one in blocks.get(layer, ()))
        visits.append(Visit(Kind.BACKWARD, layer, layer in again and layer not in others))
    return visits


def used_up_after(visits: Sequence[int], backward: Sequence[int]) -> list[int]:
    """Forward visit -> the backward visit that uses up its activations; `len(backward)`: the end of the pass.

    A layer's visits are used up from its last to its first; where it has fewer backward, all others by the last.
    """
    remaining: dict[int, list[int]] = {}
    for position, layer in enumerate(backward):
        remaining.setdefault(layer, []).append(position)
    order = [len(backward)] * len(visits)
    for visit in reversed(range(len(visits))):
        mine = remaining.get(visits[visit])
        if mine:
            order[visit] = mine.pop(0) if len(mine) > 1 else mine[0]
    return order
