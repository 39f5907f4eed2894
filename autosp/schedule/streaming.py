"""Lowers a candidate to the action list of an inference pass: a resident set and a ring for the rest.

The Superpipeline paper's sliding window (arXiv 2410.08791, k layers on the device, k' moved per transfer) is the case
without residents.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autosp.schedule.actions import Action, Kind, Ref, Schedule
from autosp.spec import Candidate


@dataclass(frozen=True)
class Group:
    """Streamed layers that travel together, at a fixed place in the arena."""

    layers: tuple[int, ...]
    offset: int
    n_bytes: int

    def overlaps(self, other: Group) -> bool:
        """Whether the two share arena memory."""
        return self.offset < other.offset + other.n_bytes and other.offset < self.offset + self.n_bytes


@dataclass(frozen=True)
class Transfer:
    """One load of a steady period. Visits count from the period's beginning; negative ones are of the period before.

    It may be issued after visit `after`, is needed by visit `before`, and overwrites the groups in `evicts`, each with
    the visit of its last use.
    """

    group: int
    after: int
    before: int
    evicts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Ring:
    """Where streamed layers live and when they move, for one period of visits."""

    groups: tuple[Group, ...]
    arena_bytes: int
    transfers: tuple[Transfer, ...]


def arena_bytes(group_bytes: Sequence[int], window: int) -> int:
    """The most bytes that any `window` neighbouring groups of one pass have together: no smaller arena holds them."""
    total = peak = sum(group_bytes[:window])
    for index in range(window, len(group_bytes)):
        total += group_bytes[index] - group_bytes[index - window]
        peak = max(peak, total)
    return peak


def build_ring(candidate: Candidate, layer_bytes: Sequence[int], visits: Sequence[int]) -> Ring:
    """Group, place and time the transfers of a candidate.

    Groups of `k_prime` layers, in the order of their first visit, get places in which any `ring // k_prime` neighbours
    (at least one) do not overlap. The arena also has room for any one layer that was never visited, should it be called
    after all.
    """
    size = candidate.k_prime
    residents = frozenset(candidate.residents)
    streamed = [layer for layer in dict.fromkeys(visits) if layer not in residents]
    members = [tuple(streamed[start : start + size]) for start in range(0, len(streamed), size)]
    sizes = [sum(layer_bytes[layer] for layer in group) for group in members]
    offsets = _place(sizes, max(1, candidate.ring // size))
    groups = [Group(*group) for group in zip(members, offsets, sizes, strict=True)]
    unvisited = set(range(len(layer_bytes))).difference(visits, residents)
    ends = [*(group.offset + group.n_bytes for group in groups), *(layer_bytes[layer] for layer in unvisited)]
    return Ring(tuple(groups), max(ends, default=0), _time_transfers(groups, visits))


def _place(sizes: Sequence[int], window: int) -> list[int]:
    """An offset for each group, free of the `window - 1` groups before it.

    The bottom of the arena is tried first, then its top, then the gaps between. So with two groups in the window the
    arena is never larger than its largest two neighbours, and with equal sizes never larger than `window` of them;
    otherwise it grows where no gap is wide enough.
    """
    capacity = arena_bytes(sizes, window)
    offsets: list[int] = []
    live: list[tuple[int, int]] = []  # (begin, end) of the groups before this one, sorted
    for index, size in enumerate(sizes):
        if index >= window:
            gone = index - window
            live.remove((offsets[gone], offsets[gone] + sizes[gone]))
        offset, capacity = _free_offset(live, size, capacity)
        offsets.append(offset)
        insort(live, (offset, offset + size))
    return offsets


def _free_offset(live: Sequence[tuple[int, int]], size: int, capacity: int) -> tuple[int, int]:
    """Where `size` bytes fit beside the sorted live ranges, and the capacity, which grows if they fit nowhere."""
    if not live or live[0][0] >= size:
        return 0, capacity
    if capacity - live[-1][1] >= size:
        return capacity - size, capacity
    for (_, low), (high, _) in itertools.pairwise(live):
        if high - low >= size:
            return low, capacity
    return live[-1][1], live[-1][1] + size


def _time_transfers(groups: Sequence[Group], visits: Sequence[int]) -> tuple[Transfer, ...]:
    """Walk the visits from an empty arena; the last walk is the steady state.

    Where every layer is visited once, the groups present at a period's end are those of the period before; with
    repeated visits one more walk settles it.

    A transfer may be issued as soon as every group that it overwrites has been used for the last time, and not before
    an earlier one: the link is a queue, in the order of need.
    """
    period = len(visits)
    runs = _runs(groups, visits)
    walks = 1 if len(set(visits)) == period else 2
    present: list[int] = []
    last_use: dict[int, int] = {}
    issued = -walks * period - 1
    steady: list[Transfer] = []
    for walk in range(-walks, 1):
        for index, first, last in runs:
            if index not in present:
                group = groups[index]
                evicted = [other for other in present if group.overlaps(groups[other])]
                for other in evicted:
                    issued = max(issued, last_use[other])
                    present.remove(other)
                present.append(index)
                if walk == 0:
                    steady.append(Transfer(index, issued, first, tuple((other, last_use[other]) for other in evicted)))
            last_use[index] = walk * period + last
    return tuple(steady)


def _runs(groups: Sequence[Group], visits: Sequence[int]) -> list[tuple[int, int, int]]:
    """Neighbouring visits of one group, as (group, first visit, last visit). Residents' visits are left out."""
    group_of = {layer: index for index, group in enumerate(groups) for layer in group.layers}
    runs: list[tuple[int, int, int]] = []
    for visit, layer in enumerate(visits):
        index = group_of.get(layer)
        if index is None:
            continue
        if runs and runs[-1][0] == index:
            runs[-1] = index, runs[-1][1], visit
        else:
            runs.append((index, visit, visit))
    return runs


def lower(candidate: Candidate, layer_bytes: Sequence[int], visits: Sequence[int]) -> Schedule:
    """The action list of one steady period of `visits` (layer index per call) under `candidate`."""
    ring = build_ring(candidate, layer_bytes, visits)
    period = len(visits)
    load_of = _number((transfer.group, transfer.before) for transfer in ring.transfers)
    eviction_of = _number(
        (group, last_use % period) for transfer in ring.transfers for group, last_use in transfer.evicts
    )
    forward_of = _number((layer, visit) for visit, layer in enumerate(visits))
    group_of = {layer: index for index, group in enumerate(ring.groups) for layer in group.layers}
    evicted_after: dict[int, list[int]] = {}
    for group, visit in eviction_of:
        evicted_after.setdefault(visit, []).append(group)
    pending = list(reversed(ring.transfers))  # sorted by `before`, and so by `after`
    brought: dict[int, Ref] = {}
    actions: list[Action] = []

    def issue_until(visit: int) -> None:
        while pending and pending[-1].after <= visit:
            transfer = pending.pop()
            group = ring.groups[transfer.group]
            waits = tuple(
                Ref(Kind.EVICT, ring.groups[other].layers, eviction_of[other, last_use % period], last_use < 0)
                for other, last_use in transfer.evicts
            )
            load = Action(Kind.LOAD, group.layers, load_of[transfer.group, transfer.before], waits, group.offset)
            actions.append(load)
            brought[transfer.group] = load.ref

    issue_until(-1)
    for visit, layer in enumerate(visits):
        index = group_of.get(layer)
        waits = (brought[index],) if index in brought else ()
        forward = Action(Kind.FORWARD, (layer,), forward_of[layer, visit], waits)
        actions.append(forward)
        for group in sorted(evicted_after.get(visit, ())):
            layers = ring.groups[group].layers
            actions.append(Action(Kind.EVICT, layers, eviction_of[group, visit], (forward.ref,)))
        issue_until(visit)
    return Schedule(tuple(actions), _cold_loads(ring, visits), candidate.residents, ring.arena_bytes)


def _cold_loads(ring: Ring, visits: Sequence[int]) -> tuple[Action, ...]:
    """The groups that a steady period finds in the arena, left there by the period before."""
    brought = {(transfer.group, transfer.before) for transfer in ring.transfers}
    return tuple(
        Action(Kind.LOAD, group.layers, 0, (), group.offset)
        for index, group in enumerate(ring.groups)
        if (index, min(visits.index(layer) for layer in group.layers)) not in brought
    )


def _number(events: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Occurrence number of each (subject, visit), counting a subject's visits in order."""
    numbered: dict[tuple[int, int], int] = {}
    seen: dict[int, int] = {}
    for subject, visit in sorted(set(events)):
        numbered[subject, visit] = seen.get(subject, 0)
        seen[subject] = numbered[subject, visit] + 1
    return numbered
