"""When activations go to host memory and come back: of a training pass's layers to offload.

What a visit forward saves leaves after it, while compute goes on. No more is under way than the visit has that has
most. What a visit backward needs comes back ahead of it: in its place among the weights, in the order of need, no
further ahead than the ring's weights are, and as long as what is back and not used up yet is at most two visits'.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from autosp.schedule.actions import Kind
from autosp.schedule.streaming import Transfer
from autosp.schedule.visits import used_up_after, visits_of
from autosp.spec import Candidate, Partition


class Restore(NamedTuple):
    """What one visit backward needs back. Visits are those of `visits_of`, as a training ring's are.

    It may be issued after visit `after`, is needed by visit `before`, and brings what the visits `saved` have saved.
    """

    after: int
    before: int
    n_bytes: int
    saved: tuple[int, ...]


def saves(candidate: Candidate, partition: Partition) -> dict[int, int]:
    """Visit forward -> bytes that it sends to the host, of all microbatches of a group."""
    if not candidate.offload:
        return {}
    away = frozenset(candidate.offload)
    sizes = partition.activation_bytes or (0,) * len(partition.visits)
    return {visit: candidate.group * sizes[visit] for visit, layer in enumerate(partition.visits) if layer in away}


def saves_held_up(candidate: Candidate, partition: Partition) -> dict[int, int]:
    """Visit forward -> the one before it whose activations must have left before compute goes on."""
    sizes = saves(candidate, partition)
    return held_up(sizes, max(sizes.values(), default=0))


def restores(candidate: Candidate, partition: Partition, transfers: Iterable[Transfer] = ()) -> list[Restore]:
    """What comes back, in the order of need. Without the pass's `transfers`: as early as any would have it."""
    sizes = saves(candidate, partition)
    if not sizes:
        return []
    n_forward = len(partition.visits)
    visits = visits_of(candidate, partition)
    backward = [visit for visit, (kind, _, _) in enumerate(visits) if kind is Kind.BACKWARD]
    saved: dict[int, list[int]] = {}
    for visit, position in enumerate(used_up_after(partition.visits, partition.backward)):
        if visit in sizes:
            saved.setdefault(backward[position], []).append(visit)
    n_bytes = {before: sum(map(sizes.__getitem__, mine)) for before, mine in saved.items()}
    most = 2 * max(n_bytes.values())
    issued_with = {transfer.before: transfer.after for transfer in transfers}
    needs = sorted(issued_with)
    after, total = n_forward - 1, 0
    there: deque[int] = deque()
    found = []
    for before in sorted(saved):
        while there and total + n_bytes[before] > most:
            after = max(after, there[0])
            total -= n_bytes[there.popleft()]
        there.append(before)
        total += n_bytes[before]
        while needs and needs[0] < before:
            after = max(after, issued_with[needs.pop(0)])
        after = max(after, before - 1 - max(1, candidate.ring))
        found.append(Restore(after, before, n_bytes[before], tuple(saved[before])))
    return found


def link_queue(transfers: Sequence[Transfer], back: Sequence[Restore]) -> Sequence[Transfer | Restore]:
    """Both in the order in which they are issued."""
    if not back:
        return transfers
    return sorted([*transfers, *back], key=lambda one: (one.after, one.before, isinstance(one, Restore)))


def held_up(sizes: Mapping[int, int], most: int) -> dict[int, int]:
    """Visit -> the one before it, of which what it sent must have left before compute goes on.

    `sizes`: what is sent after each visit. No more than `most` bytes are under way, unless one visit sends more.
    """
    under_way: deque[int] = deque()
    total = 0
    found: dict[int, int] = {}
    for visit in sorted(sizes):
        while under_way and total + sizes[visit] > most:
            found[visit] = under_way.popleft()
            total -= sizes[found[visit]]
        under_way.append(visit)
        total += sizes[visit]
    return found
