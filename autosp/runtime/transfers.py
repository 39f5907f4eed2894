"""What moves together, and when: the executor's view of a schedule's loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch

from autosp.devices import Copied, Region
from autosp.runtime.streamed_layer import StreamedLayer
from autosp.schedule.actions import Kind, Ref, Schedule


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
    state: State = State.ABSENT
    ready: Copied | None = None
    running: int = 0
    """Layers of the group that are in a forward right now."""
    version: int = 0
    sample: int | None = None
    """Checksum of its weights at rest at the end of the last pass, if it was on the device then."""
    indices: tuple[int, ...] = ()
    """Of its layers."""

    def __post_init__(self) -> None:
        self.indices = tuple(layer.layer.index for layer in self.layers)


@dataclass(frozen=True)
class Prefetch:
    group: TransferGroup
    needed_in: int
    """Visits between the one that issues it and the one that needs it."""


def prefetches(
    schedule: Schedule, groups: dict[tuple[int, ...], TransferGroup], visits: Sequence[int]
) -> tuple[list[TransferGroup], list[list[Prefetch]]]:
    """What to load before the first pass, and after each visit of a streamed layer.

    A load is due after the last of the visits that its waits stand for, and not before the load ahead of it.
    """
    period = len(visits)
    streamed = {index for layers in groups for index in layers}
    forwards = [action for action in schedule.forwards if action.layers[0] in streamed]
    position = {action.ref: visit for visit, action in enumerate(forwards)}
    evicted_after = {action.ref: position[action.waits[0]] for action in schedule.actions if action.kind is Kind.EVICT}
    needed_by: dict[Ref, int] = {}
    for visit, action in enumerate(forwards):
        for ref in action.waits:
            needed_by.setdefault(ref, visit)
    due = [
        max((_visit_of(ref, evicted_after, period) for ref in load.waits), default=-period) for load in schedule.loads
    ]
    latest = max(due, default=0) - period  # of the pass before
    start = [groups[load.layers] for load in schedule.cold]
    after: list[list[Prefetch]] = [[] for _ in visits]
    for load, visit in zip(schedule.loads, due, strict=True):
        latest = max(latest, visit)
        prefetch = Prefetch(groups[load.layers], needed_by[load.ref] - latest)
        after[latest % period].append(prefetch)
        if latest < 0:
            start.append(prefetch.group)
    return start, after


def _visit_of(ref: Ref, evicted_after: dict[Ref, int], period: int) -> int:
    """The visit after which an eviction happens; negative for one of the pass before."""
    plain = Ref(ref.kind, ref.layers, ref.occurrence)
    return evicted_after[plain] - period if ref.previous_pass else evicted_after[plain]
