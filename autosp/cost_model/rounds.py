"""Where the microbatches of a group wait for each other in a pass, and what they hold then.

One waits before a streamed layer that another transfer brings than the streamed layer before it; layers that stay hold
up nobody. Between two such places they make a round: one after another, while the others are where it begins or ends.
So of what only a round needs there is one microbatch's: activations of a block that is computed again are one's where
one transfer brings all of the block that moves, and everybody's where several do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from autosp.schedule.actions import Kind
from autosp.schedule.visits import used_up_after, visits_of
from autosp.spec import Candidate, Partition

Indices = npt.NDArray[np.intp]
Bytes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rounds:
    """Those of a training pass: R rounds of its V visits, forward, backward and to compute a block again.

    A curve has F + B + 1 entries: the visits forward, those backward, each with what was computed again before it, and
    the end of the pass.
    """

    number: Indices
    """Of the round that each visit is in. [V]"""
    first: Indices
    """The first visit of each round. [R]"""
    entry: Indices
    """Of a curve, for each visit. [V]"""

    @classmethod
    def of(cls, candidate: Candidate, partition: Partition) -> Self:
        """The rounds of a candidate's group."""
        visits = visits_of(candidate, partition)
        brought_by = np.full(len(partition.layers), -1, np.intp)
        for transfer, layers in enumerate(candidate.groups(partition.visits)):
            brought_by[list(layers)] = transfer
        transfers = brought_by[[visit.layer for visit in visits]]
        moves = np.flatnonzero(transfers >= 0)
        begins = np.zeros(len(visits), bool)
        begins[moves[np.diff(transfers[moves], prepend=-1) != 0]] = True
        begins[0] = False
        again = np.array([visit.kind is Kind.RECOMPUTE for visit in visits])
        entry = np.cumsum(~again) - ~again
        return cls(np.cumsum(begins), np.concatenate([[0], np.flatnonzero(begins)]), entry)

    def most_held(self, held: Bytes) -> Bytes:
        """What a waiting microbatch holds during each visit: the most of where its round begins and ends. [V]

        `held`: before each visit, and when the pass is over. [V + 1]
        """
        at_ends = np.concatenate([held[self.first], held[-1:]])
        most: Bytes = np.maximum(at_ends[:-1], at_ends[1:])[self.number]
        return most

    def as_curve(self, values: Bytes) -> Bytes:
        """The largest of the visits of each entry, but the last. [V] -> [F + B]"""
        curve = np.zeros(self.entry[-1] + 1, np.int64)
        np.maximum.at(curve, self.entry, values)
        return curve

    def of_entries(self, curve: Bytes) -> Bytes:
        """What an entry of a curve adds, at its own visit forward or backward. [F + B] -> [V]"""
        last = np.append(np.diff(self.entry) > 0, True)
        values: Bytes = np.where(last, curve[self.entry], 0)
        return values

    def total(self, values: Bytes) -> Bytes:
        """The sum over the visits of a round, during each of them. [V] -> [V]"""
        totals: Bytes = np.add.reduceat(values, self.first)[self.number]
        return totals


def held_by_one(recompute: tuple[int, ...], partition: Partition, inputs: Bytes, kept: Bytes) -> tuple[Bytes, Bytes]:
    """Activations of one microbatch: during each visit, and before each visit and at the end of the pass. [V], [V + 1]

    `inputs`, `kept`: of each visit forward, what is kept of it if it is computed again, and if not. [F]
    """
    visits, again = visits_of(Candidate(k=1, k_prime=1, recompute=recompute), partition), frozenset(recompute)
    until = used_up_after(partition.visits, partition.backward)
    backward = [index for index, visit in enumerate(visits) if visit.kind is Kind.BACKWARD]
    computed = {visit.layer: index for index, visit in enumerate(visits) if visit.kind is Kind.RECOMPUTE}
    arrives, leaves = np.zeros((2, len(visits)), np.int64)
    for visit, layer in enumerate(partition.visits):
        held = int(inputs[visit] if layer in again else kept[visit])
        arrives[visit] += held
        if until[visit] < len(backward):
            gone = backward[until[visit]]
            beyond = max(0, int(kept[visit] - inputs[visit])) if layer in again else 0
            arrives[computed.get(layer, gone)] += beyond
            leaves[gone] += held + beyond
    before = np.concatenate([[0], np.cumsum(arrives - leaves)])
    return before[:-1] + arrives, before
