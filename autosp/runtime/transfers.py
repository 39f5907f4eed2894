"""What moves together, and when: the executor's view of a schedule's loads and reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import pairwise
from typing import Any

import torch

from autosp.devices import Copied, Piece, Region
from autosp.runtime.streamed_layer import StreamedLayer, version_of
from autosp.schedule.actions import COMPUTES, Action, Kind, Ref, Schedule
from autosp.tiers import Store


class State(Enum):
    """Who owns a group's range of the arena."""

    ABSENT = auto()
    """Somebody else, or nobody."""
    LOADING = auto()
    """The link, until the group's `ready` event."""
    READY = auto()
    """Compute, until the group is evicted."""


@dataclass(eq=False)
class TransferGroup:
    """Layers that are loaded by one copy, at a fixed place of the arena."""

    layers: tuple[StreamedLayer, ...]
    regions: tuple[Region, ...]
    target: torch.Tensor
    begin: int
    end: int
    staging_offset: int | None = None
    """Where it is read to if it rests on disk, else None."""
    state: State = State.ABSENT
    ready: Copied | None = None
    running: int = 0
    """Layers of the group that are in a forward right now."""
    loaded_version: int = 0
    """`version()` when the bytes in the arena left their place at rest."""
    sample: int | None = None
    """Checksum of its weights at rest at the end of the last pass, if they were in the arena or in staging then."""
    read: Any = None
    """A read of its bytes that no load has taken yet."""
    read_version: int = 0
    """`version()` when that was asked for."""
    emptied: Copied | None = None
    """The load that took its bytes from their place in staging, if nothing was read there since."""
    indices: tuple[int, ...] = field(init=False)
    """Of its layers."""
    read_bytes: int = field(init=False)
    """Of one read."""
    pieces: tuple[Piece, ...] = field(init=False)
    """What a load from staging copies."""
    n_bytes: int = field(init=False)
    """Of one load."""
    tensors: tuple[torch.Tensor, ...] = field(init=False)
    """Of its layers."""

    def __post_init__(self) -> None:
        self.indices = tuple(layer.index for layer in self.layers)
        self.read_bytes = sum(layer.layer.read_bytes for layer in self.layers)
        self.pieces = _joined(self.layers)
        self.n_bytes = self.end - self.begin
        self.tensors = tuple(tensor for layer in self.layers for tensor in layer.tensors)

    def version(self) -> int:
        """Changes when its weights at rest are written to, in place and under autograd's eyes."""
        return sum(map(version_of, self.tensors))

    def take_sample(self) -> None:
        """Of its weights at rest, for `written_since`."""
        self.sample = self._checksum()

    def written_since(self, version: int) -> bool:
        """Whether its weights at rest were written to since they had that version, or since the last sample."""
        return version != self.version() or self.sample not in (None, self._checksum())

    def place_of(self, layer: StreamedLayer) -> torch.Tensor:
        """The device memory of one of its layers."""
        begin = sum(one.layer.n_bytes for one in self.layers[: self.layers.index(layer)])
        return self.target[begin : begin + layer.layer.n_bytes]

    def _checksum(self) -> int:
        return hash(tuple(layer.sample() for layer in self.layers))


def _joined(layers: Sequence[StreamedLayer]) -> tuple[Piece, ...]:
    """The pieces of all layers. Neighbours that lie as far apart at both ends are one, with what is between them."""
    pieces: list[Piece] = []
    source = target = 0
    for layer in layers:
        for piece in layer.pieces:
            begin, at = source + piece.source, target + piece.target
            last = pieces[-1] if pieces else None
            if last is not None and last.source - last.target == begin - at:
                pieces[-1] = Piece(last.source, last.target, at + piece.n_bytes - last.target)
            else:
                pieces.append(Piece(begin, at, piece.n_bytes))
        source += layer.layer.read_bytes
        target += layer.layer.n_bytes
    return tuple(pieces)


def build_groups(
    schedule: Schedule, by_index: Mapping[int, StreamedLayer], store: Store, arena: torch.Tensor
) -> dict[tuple[int, ...], TransferGroup]:
    """One group per distinct load; a layer that no load brings gets one of its own, at the beginning of both rings."""
    actions = (*schedule.cold, *schedule.actions)
    places = {action.layers: action.offset or 0 for action in actions if action.kind is Kind.LOAD}
    staged = {action.layers: action.offset or 0 for action in actions if action.kind is Kind.READ}
    loaded = {index for layers in places for index in layers}
    for index in by_index:
        if index not in loaded:
            places[index,] = 0
            if index in schedule.on_disk:
                staged[index,] = 0
    groups: dict[tuple[int, ...], TransferGroup] = {}
    for indices, begin in places.items():
        layers = tuple(by_index[index] for index in indices)
        end = begin + sum(layer.layer.n_bytes for layer in layers)
        regions = store.regions(indices)
        groups[indices] = TransferGroup(layers, regions, arena[begin:end], begin, end, staged.get(indices))
    return groups


@dataclass(frozen=True)
class Prefetch:
    """A load, or a read, that is issued ahead of its need."""

    kind: Kind
    group: TransferGroup
    needed_in: int
    """Visits between the one that issues it and the one that needs it."""


@dataclass(frozen=True)
class ComingBack:
    """What a layer's last so many visits forward sent to the host, brought back ahead of its need."""

    layer: int
    visits: int
    needed_in: int
    """As a prefetch's."""


Issued = Prefetch | ComingBack

Visit = tuple[Kind, int]
"""A compute action and its layer."""

Issues = tuple[Sequence[Visit], Sequence[Issued], Sequence[Sequence[Issued]]]
"""A period's visits of streamed layers; what to issue before the first of them, and after each."""

Groups = Mapping[tuple[int, ...], TransferGroup]

Issue = Callable[[Schedule, Groups], Issues]
"""Reads from a schedule what to issue when."""


def prefetches(schedule: Schedule, groups: Groups) -> Issues:
    """Across passes without end: the first list is for the time before the first pass.

    A load is due after the last of the visits that its waits stand for, a read with the last of the loads that its
    waits stand for; neither before the one ahead of it in its queue. What is due before a pass begins is issued in the
    pass before; a read may be due as early as the one before that.
    """
    streamed = {index for layers in groups for index in layers}
    forwards = [action for action in schedule.forwards if action.layers[0] in streamed]
    period = len(forwards)
    needed_by: dict[tuple[tuple[int, ...], int], int] = {}
    for visit, action in enumerate(forwards):
        for ref in action.waits:
            needed_by.setdefault((ref.layers, ref.occurrence), visit)
    visit_of = {action.ref: visit for visit, action in enumerate(forwards)}
    evicted = {action.ref: visit_of[action.waits[0]] for action in schedule.actions if action.kind is Kind.EVICT}
    loaded = _due(schedule.loads, evicted, period)
    due = loaded | _due(schedule.reads, loaded, period)
    start = [(-3 * period, 0, 0, Prefetch(one.kind, groups[one.layers], 0)) for one in schedule.cold]
    after: list[list[tuple[int, int, Prefetch]]] = [[] for _ in forwards]
    for number, action in enumerate(schedule.actions):
        if action.ref not in due:
            continue
        visit = due[action.ref]
        needed_in = needed_by[action.layers, action.occurrence] - visit
        prefetch = Prefetch(action.kind, groups[action.layers], needed_in)
        ahead = -(visit // period)  # for a pass so many later than the one that issues it
        after[visit % period].append((ahead, number, prefetch))
        start += ((visit + passed * period, passed, number, prefetch) for passed in range(ahead))
    return (
        [(Kind.FORWARD, action.layers[0]) for action in forwards],
        [prefetch for *_, prefetch in sorted(start, key=lambda entry: entry[:3])],
        [[prefetch for *_, prefetch in sorted(entries, key=lambda entry: entry[:2])] for entries in after],
    )


def prefetches_of_one_pass(schedule: Schedule, groups: Groups) -> Issues:
    """Within a pass only, in list order: what moves is issued after the compute action that it follows in the list.

    A RECOMPUTE is part of the visit of a BACKWARD of its layer that is next.
    """
    streamed = {index for layers in groups for index in layers}
    visits: list[Visit] = []
    issued_after: list[tuple[int, Action]] = []
    needed_by: dict[Ref, int] = {}
    computes = schedule.computes
    merged = {one.ref for one, other in pairwise(computes) if one.kind is Kind.RECOMPUTE and one.layers == other.layers}
    for action in schedule.actions:
        if action.kind in (Kind.LOAD, Kind.RESTORE):
            issued_after.append((len(visits) - 1, action))
        elif action.kind in COMPUTES and action.layers[0] in streamed and action.ref not in merged:
            for ref in action.waits:
                needed_by.setdefault(ref, len(visits))
            visits.append((action.kind, action.layers[0]))
    start: list[Issued] = []
    after: list[list[Issued]] = [[] for _ in visits]
    for visit, action in issued_after:
        needed_in = needed_by[action.ref] - visit
        prefetch: Issued
        if action.kind is Kind.LOAD:
            prefetch = Prefetch(Kind.LOAD, groups[action.layers], needed_in)
        else:
            saved = sum(ref.kind is Kind.SAVE for ref in action.waits)
            prefetch = ComingBack(action.layers[0], saved, needed_in)
        (after[visit] if visit >= 0 else start).append(prefetch)
    return visits, start, after


def _due(queue: Sequence[Action], visit_of: Mapping[Ref, int], period: int) -> dict[Ref, int]:
    """The visit of a pass after which each action of a queue is issued; negative ones are of the passes before.

    `visit_of`: the same of what they wait for; other waits are for what comes before the first pass.
    """

    def earliest(ref: Ref) -> int:
        plain = Ref(ref.kind, ref.layers, ref.occurrence)
        return visit_of.get(plain, -2 * period) - (period if ref.previous_pass else 0)

    due = [
        max((earliest(ref) for ref in action.waits if ref.kind is not Kind.READ), default=-period) for action in queue
    ]
    latest = max(due, default=0) - period  # of the pass before
    found: dict[Ref, int] = {}
    for action, visit in zip(queue, due, strict=True):
        found[action.ref] = latest = max(latest, visit)
    return found
