"""Lowers a candidate to the action list of an inference pass: a resident set, a ring for the rest, a ring before it.

The Superpipeline paper's sliding window (arXiv 2410.08791, k layers on the device, k' moved per transfer) is the case
without residents.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import add, itemgetter
from typing import NamedTuple

from autosp.schedule.actions import Action, Kind, Ref, Schedule
from autosp.schedule.arena import place
from autosp.schedule.staging import EMPTY, Staging, build_staging
from autosp.spec import Candidate

PASSES = 8
"""Whose first visits are remembered: a ranking asks a thousand times for those of one pass."""


class Group(NamedTuple):
    """Streamed layers that travel together, at a fixed place in the arena."""

    layers: tuple[int, ...]
    offset: int
    n_bytes: int

    def overlaps(self, other: Group) -> bool:
        """Whether the two share arena memory."""
        return self.offset < other.offset + other.n_bytes and other.offset < self.offset + self.n_bytes


class Transfer(NamedTuple):
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
    staging: Staging = EMPTY


def build_ring(
    candidate: Candidate,
    layer_bytes: Sequence[int],
    visits: Sequence[int],
    read_bytes: Sequence[int] | None = None,
) -> Ring:
    """Group, place and time the transfers of a candidate. `read_bytes`: of layers on disk, default: `layer_bytes`.

    Groups of `k_prime` layers, in the order of their first visit, get places in which any `ring // k_prime` neighbours
    (at least one) do not overlap. The arena also has room for any one layer that was never visited, should it be called
    after all, and the staging ring for any such layer that rests on disk.

    Raises: ValueError if only some layers of a group rest on disk.
    """
    groups, arena_bytes = place_groups(candidate, layer_bytes, visits)
    walks = 1 if len(_first_visits(tuple(visits))) == len(visits) else 2
    ring = Ring(groups, arena_bytes, time_transfers(groups, visits, walks))
    if not candidate.on_disk:
        return ring
    return replace(ring, staging=stage(ring, candidate, layer_bytes if read_bytes is None else read_bytes, visits))


def place_groups(
    candidate: Candidate,
    layer_bytes: Sequence[int],
    visits: Sequence[int],
    placing: Callable[[Sequence[int], int], Sequence[int]] = place,
) -> tuple[tuple[Group, ...], int]:
    """A candidate's groups in their places, and the bytes of the arena: see `build_ring`."""
    members = candidate.groups(visits)
    sizes = [sum(map(layer_bytes.__getitem__, group)) for group in members]
    offsets = placing(sizes, candidate.depth)
    groups = tuple(map(Group, members, offsets, sizes))
    unvisited = set(_never_visited(tuple(visits), len(layer_bytes))).difference(candidate.residents)
    ends = [*map(add, offsets, sizes), *(layer_bytes[layer] for layer in unvisited)]
    return groups, max(ends, default=0)


def stage(ring: Ring, candidate: Candidate, read_bytes: Sequence[int], visits: Sequence[int]) -> Staging:
    """The staging ring of a candidate's groups on disk, for a ring that is the same wherever its groups rest.

    Raises: ValueError if only some layers of a group rest on disk.
    """
    split = candidate.split_groups(visits)
    if split:
        raise ValueError(f"layers {split[0]} travel together, and only some of them rest on disk")
    on_disk = frozenset(candidate.on_disk)
    group_bytes = {
        index: sum(map(read_bytes.__getitem__, group.layers))
        for index, group in enumerate(ring.groups)
        if not on_disk.isdisjoint(group.layers)
    }
    return build_staging(
        group_bytes,
        [transfer.group for transfer in ring.transfers],
        _cold_groups(ring, visits),
        candidate.read_ahead,
        max((read_bytes[layer] for layer in on_disk.difference(visits)), default=0),
    )


def time_transfers(groups: Sequence[Group], visits: Sequence[int], walks: int) -> tuple[Transfer, ...]:
    """The transfers of a period that follows as many `walks` of the visits, the first of them from an empty arena.

    Where every layer is visited once, the groups present at a period's end are those of the period before; with
    repeated visits one more walk settles it. Without a walk before it, a period finds the arena empty.

    A transfer may be issued as soon as every group that it overwrites has been used for the last time, and not before
    an earlier one: the link is a queue, in the order of need.
    """
    period = len(visits)
    runs = _runs(groups, visits)
    begin_of = [group.offset for group in groups]
    end_of = [group.offset + group.n_bytes for group in groups]
    begins: list[int] = []  # of the groups in the arena, sorted: they do not overlap
    there: list[int] = []
    last_use: dict[int, int] = {}
    issued = -walks * period - 1
    steady: list[Transfer] = []
    for walk in range(-walks, 1):
        for index, first, last in runs:
            begin, end = begin_of[index], end_of[index]
            low = bisect_right(begins, begin)
            if low == 0 or there[low - 1] != index:
                if low and begin < end_of[there[low - 1]]:
                    low -= 1
                high = bisect_left(begins, end, low)
                evicted = [(other, last_use[other]) for other in there[low:high]]
                begins[low:high], there[low:high] = [begin], [index]
                if len(evicted) > 1:
                    evicted.sort(key=itemgetter(1))
                if evicted and evicted[-1][1] > issued:
                    issued = evicted[-1][1]
                if walk == 0:
                    steady.append(Transfer(index, issued, first, tuple(evicted)))
            last_use[index] = walk * period + last
    return tuple(steady)


def _runs(groups: Sequence[Group], visits: Sequence[int]) -> list[tuple[int, int, int]]:
    """Neighbouring visits of one group, as (group, first visit, last visit). Residents' visits are left out."""
    visit_of = _first_visits(tuple(visits))
    if len(visit_of) == len(visits):
        return [(index, visit_of[group.layers[0]], visit_of[group.layers[-1]]) for index, group in enumerate(groups)]
    group_of = {layer: index for index, group in enumerate(groups) for layer in group.layers}
    runs: list[tuple[int, int, int]] = []
    before, first, last = -1, 0, 0
    for visit, layer in enumerate(visits):
        index = group_of.get(layer, -1)
        if index == before:
            last = visit
        elif index >= 0:
            if before >= 0:
                runs.append((before, first, last))
            before, first, last = index, visit, visit
    if before >= 0:
        runs.append((before, first, last))
    return runs


@lru_cache(maxsize=PASSES)
def _first_visits(visits: tuple[int, ...]) -> Mapping[int, int]:
    """Of each layer that is visited."""
    return {layer: visit for visit, layer in reversed(list(enumerate(visits)))}


@lru_cache(maxsize=PASSES)
def _never_visited(visits: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Of so many layers."""
    return tuple(layer for layer in range(layers) if layer not in _first_visits(visits))


def _cold_groups(ring: Ring, visits: Sequence[int]) -> tuple[int, ...]:
    """The groups that a steady period finds in the arena, left there by the period before."""
    brought = {(transfer.group, transfer.before) for transfer in ring.transfers}
    first_visit = _first_visits(tuple(visits))
    return tuple(
        index
        for index, group in enumerate(ring.groups)
        if (index, min(first_visit[layer] for layer in group.layers)) not in brought
    )


def lower(
    candidate: Candidate,
    layer_bytes: Sequence[int],
    visits: Sequence[int],
    read_bytes: Sequence[int] | None = None,
) -> Schedule:
    """The action list of one steady period of `visits` (layer index per call) under `candidate`.

    `read_bytes`: of layers on disk, default: `layer_bytes`.

    Raises: ValueError if only some layers of a group rest on disk.
    """
    ring = build_ring(candidate, layer_bytes, visits, read_bytes)
    lowering = _Lowering(ring, visits)
    cold = lowering.cold()
    actions = lowering.steady()
    return Schedule(
        actions, cold, candidate.residents, ring.arena_bytes, tuple(sorted(candidate.on_disk)), ring.staging.n_bytes
    )


class _Lowering:
    """The names of a ring's transfers and reads, and the actions in their order."""

    def __init__(self, ring: Ring, visits: Sequence[int]) -> None:
        self._ring = ring
        self._visits = visits
        self._load_of = _number((transfer.group, transfer.before) for transfer in ring.transfers)
        self._eviction_of = _number(
            (group, last_use % len(visits)) for transfer in ring.transfers for group, last_use in transfer.evicts
        )
        self._actions: list[Action] = []
        self._next_transfer = 0
        self._next_read = 0

    def cold(self) -> tuple[Action, ...]:
        """The loads before the first pass, each from disk right after its read."""
        actions: list[Action] = []
        reads = {read.group: read for read in self._ring.staging.cold}
        for index in _cold_groups(self._ring, self._visits):
            group = self._ring.groups[index]
            waits: tuple[Ref, ...] = ()
            if index in reads:
                emptied = tuple(Ref(Kind.LOAD, self._ring.groups[other].layers, 0) for other in reads[index].cold)
                offset = self._ring.staging.offsets[index]
                actions.append(Action(Kind.READ, group.layers, 0, emptied, offset))
                waits = (actions[-1].ref,)
            actions.append(Action(Kind.LOAD, group.layers, 0, waits, group.offset))
        return tuple(actions)

    def steady(self) -> tuple[Action, ...]:
        """One period."""
        groups = self._ring.groups
        forward_of = _number((layer, visit) for visit, layer in enumerate(self._visits))
        group_of = {layer: index for index, group in enumerate(groups) for layer in group.layers}
        evicted_after: dict[int, list[int]] = {}
        for group, visit in self._eviction_of:
            evicted_after.setdefault(visit, []).append(group)
        brought: dict[int, Ref] = {}
        self._read_until(-1)
        self._load_until(-1, brought)
        for visit, layer in enumerate(self._visits):
            index = group_of.get(layer)
            waits = (brought[index],) if index in brought else ()
            forward = Action(Kind.FORWARD, (layer,), forward_of[layer, visit], waits)
            self._actions.append(forward)
            for group in sorted(evicted_after.get(visit, ())):
                eviction = self._eviction_of[group, visit]
                self._actions.append(Action(Kind.EVICT, groups[group].layers, eviction, (forward.ref,)))
            self._load_until(visit, brought)
        return tuple(self._actions)

    def _load_until(self, visit: int, brought: dict[int, Ref]) -> None:
        """The loads that may be issued after a visit; they are sorted by `before`, and so by `after`."""
        transfers = self._ring.transfers
        while self._next_transfer < len(transfers) and transfers[self._next_transfer].after <= visit:
            transfer = transfers[self._next_transfer]
            group = self._ring.groups[transfer.group]
            waits = [self._eviction(other, last_use) for other, last_use in transfer.evicts]
            load = Ref(Kind.LOAD, group.layers, self._load_of[transfer.group, transfer.before])
            if transfer.group in self._ring.staging.offsets:
                waits.append(Ref(Kind.READ, group.layers, load.occurrence))
            self._actions.append(Action(Kind.LOAD, group.layers, load.occurrence, tuple(waits), group.offset))
            brought[transfer.group] = load
            self._read_until(self._next_transfer)
            self._next_transfer += 1

    def _read_until(self, transfer: int) -> None:
        """The reads into places that the loads up to a transfer empty."""
        staging = self._ring.staging
        while self._next_read < len(staging.reads) and staging.reads[self._next_read].after <= transfer:
            read = staging.reads[self._next_read]
            ref = self._load(read.transfer)
            emptied = [self._load(other, before) for other, before in read.waits]
            emptied += (Ref(Kind.LOAD, self._ring.groups[other].layers, 0, True) for other in read.cold)
            waits = tuple(dict.fromkeys(emptied))
            self._actions.append(Action(Kind.READ, ref.layers, ref.occurrence, waits, staging.offsets[read.group]))
            self._next_read += 1

    def _load(self, transfer: int, previous_pass: bool = False) -> Ref:
        one = self._ring.transfers[transfer]
        occurrence = self._load_of[one.group, one.before]
        return Ref(Kind.LOAD, self._ring.groups[one.group].layers, occurrence, previous_pass)

    def _eviction(self, group: int, last_use: int) -> Ref:
        occurrence = self._eviction_of[group, last_use % len(self._visits)]
        return Ref(Kind.EVICT, self._ring.groups[group].layers, occurrence, last_use < 0)


def _number(events: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Occurrence number of each (subject, visit), counting a subject's visits in order."""
    numbered: dict[tuple[int, int], int] = {}
    seen: dict[int, int] = {}
    for subject, visit in sorted(set(events)):
        numbered[subject, visit] = seen.get(subject, 0)
        seen[subject] = numbered[subject, visit] + 1
    return numbered
