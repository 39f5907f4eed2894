"""The host's staging ring: where groups that rest on disk are read to, in the order in which they are loaded from it.

Every load of such a group follows a read of its own: bytes are loaded once and their place is free again. A place is
taken over as soon as it is empty, so that reads run ahead of loads by as much as the ring holds, also into the next
period.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autosp.schedule.arena import place


@dataclass(frozen=True)
class Read:
    """One read of a steady period, for the load of the ring's transfer number `transfer`."""

    group: int
    transfer: int
    waits: tuple[tuple[int, bool], ...]
    """The transfers whose loads empty its place; True: of the period before. Those that an earlier read waited for are
    left out."""
    cold: tuple[int, ...]
    """Groups whose loads before the first period empty its place then."""
    after: int
    """The transfer of this period whose load it may be issued after: the latest of `waits`, and not before an earlier
    read. -1: at the period's beginning."""


@dataclass(frozen=True)
class Staging:
    """Where groups are read to and when, for one period; `cold` are the reads before the first one."""

    offsets: Mapping[int, int] = field(default_factory=dict)
    group_bytes: Mapping[int, int] = field(default_factory=dict)
    """Of one read of each."""
    n_bytes: int = 0
    reads: tuple[Read, ...] = ()
    cold: tuple[Read, ...] = ()


EMPTY = Staging()
"""Nothing rests on disk."""


def build_staging(
    group_bytes: Mapping[int, int], loads: Sequence[int], cold: Sequence[int], window: int, unvisited_bytes: int
) -> Staging:
    """Place and time the reads of the groups on disk.

    `group_bytes`: what is read of each; `loads`: the group of each transfer of a period; `cold`: the groups that are
    loaded before the first one. Any `window` groups that follow each other within a period have places of their own;
    groups that no period loads, and a layer of `unvisited_bytes` that is called after all, begin at 0.
    """
    sequence = [(transfer, group) for transfer, group in enumerate(loads) if group in group_bytes]
    order = list(dict.fromkeys(group for _, group in sequence))
    places = place([group_bytes[group] for group in order], max(1, window))
    offsets = {**dict.fromkeys(group_bytes, 0), **dict(zip(order, places, strict=True))}
    n_bytes = max(unvisited_bytes, *(offsets[group] + size for group, size in group_bytes.items()), 0)
    walk = _Walk(group_bytes, offsets)
    cold_reads = [
        Read(group, -1, (), tuple(other for other, _ in walk.read(group, -1, 0)), -1)
        for group in cold
        if group in group_bytes
    ]
    first = [walk.read(group, transfer, 1) for transfer, group in sequence]
    steady = [walk.read(group, transfer, 2) for transfer, group in sequence]
    return Staging(offsets, group_bytes, n_bytes, tuple(_reads(sequence, first, steady)), tuple(cold_reads))


_Emptied = list[tuple[int, tuple[int, int]]]
"""Groups whose loads empty a place, each with the transfer and the period of that load."""


class _Walk:
    """Which groups were read last to which bytes of the ring, period after period; 0 is what comes before the first."""

    def __init__(self, group_bytes: Mapping[int, int], offsets: Mapping[int, int]) -> None:
        self._ranges = {group: (offsets[group], offsets[group] + size) for group, size in group_bytes.items()}
        self._there: dict[int, tuple[int, int]] = {}  # group -> transfer and period of the load that emptied it

    def read(self, group: int, transfer: int, period: int) -> _Emptied:
        """Take over a place."""
        begin, end = self._ranges[group]
        emptied = [
            (other, load)
            for other, load in self._there.items()
            if self._ranges[other][0] < end and begin < self._ranges[other][1]
        ]
        for other, _ in emptied:
            del self._there[other]
        self._there[group] = transfer, period
        return emptied


def _reads(sequence: Sequence[tuple[int, int]], first: Sequence[_Emptied], steady: Sequence[_Emptied]) -> list[Read]:
    """The reads of a steady period, which in the first one wait for what was loaded before it instead."""
    reads: list[Read] = []
    after = -1
    for (transfer, group), at_first, later in zip(sequence, first, steady, strict=True):
        waits = tuple((load, period < 2) for _, (load, period) in later)
        after = max([after, *(load for load, of_before in waits if not of_before)])
        cold = tuple(other for other, (_, period) in at_first if period == 0)
        reads.append(Read(group, transfer, waits, cold, after))
    return reads
