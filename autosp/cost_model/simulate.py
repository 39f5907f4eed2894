"""Runs an action list on paper: when each action starts and ends, where compute stalls, what memory is occupied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autosp.schedule.actions import RESOURCE, Kind, Ref, Resource, Schedule
from autosp.schedule.timeline import SEEN_STALL_S, Span, Timeline
from autosp.spec import Profile


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Durations in seconds. `before_s` and `forward_s` have one entry per FORWARD of the schedule, in order."""

    before_s: Sequence[float]
    forward_s: Sequence[float]
    tail_s: float
    layer_bytes: Sequence[int]
    read_bytes: Sequence[int] | None = None
    """Of layers on disk; None: `layer_bytes`."""
    link_latency_s: float
    link_bytes_per_s: float
    disk_latency_s: float = 0.0
    disk_bytes_per_s: float = math.inf
    wake_s: float = 0.0
    """Added to a FORWARD that had to wait longer than `SEEN_STALL_S`."""

    def load_s(self, layers: Sequence[int]) -> float:
        """One transfer of `layers`: latency plus bytes over bandwidth."""
        return self.link_latency_s + sum(self.layer_bytes[layer] for layer in layers) / self.link_bytes_per_s

    def read_s(self, layers: Sequence[int]) -> float:
        """One read of `layers` from disk."""
        n_bytes = self.layer_bytes if self.read_bytes is None else self.read_bytes
        return self.disk_latency_s + sum(n_bytes[layer] for layer in layers) / self.disk_bytes_per_s

    def contended(self, compute_factor: float, link_factor: float, disk_factor: float = 1.0) -> Costs:
        """The same work while compute, link and disk slow each other down by these factors."""
        return replace(
            self,
            before_s=[seconds * compute_factor for seconds in self.before_s],
            forward_s=[seconds * compute_factor for seconds in self.forward_s],
            tail_s=self.tail_s * compute_factor,
            link_latency_s=self.link_latency_s * link_factor,
            link_bytes_per_s=self.link_bytes_per_s / link_factor,
            disk_latency_s=self.disk_latency_s * disk_factor,
            disk_bytes_per_s=self.disk_bytes_per_s / disk_factor,
        )


def costs_of(profile: Profile) -> Costs:
    """The costs of one period of the profiled pass, uncontended. The pass's tail is spread over its periods."""
    disk = profile.disk_link
    return Costs(
        before_s=[visit.before_s for visit in profile.visits],
        forward_s=[visit.forward_s for visit in profile.visits],
        tail_s=profile.tail_s / profile.partition.repeats,
        layer_bytes=[layer.n_bytes for layer in profile.partition.layers],
        read_bytes=[layer.read_bytes for layer in profile.partition.layers],
        link_latency_s=profile.link.latency_s,
        link_bytes_per_s=profile.link.bytes_per_s,
        disk_latency_s=disk.latency_s if disk else 0.0,
        disk_bytes_per_s=disk.bytes_per_s if disk else math.inf,
        wake_s=profile.wake_s,
    )


PERIODS = 4
"""Periods simulated: a cold one, one to settle, and two that are the steady state."""


def simulate(schedule: Schedule, costs: Costs, periods: int = PERIODS) -> Timeline:
    """The timeline of `periods` passes in a row, prefetching across their boundaries.

    Each resource runs its actions in list order, one at a time; an action starts when its resource is free and its
    waits are over. A FORWARD is preceded by the compute that lies before it, which needs no weights.
    """
    free = dict.fromkeys(Resource, 0.0)
    spans: list[Span] = []
    ends: list[float] = []
    arrived: dict[int, float] = {}  # layer -> end of its cold load
    done: dict[Ref, float] = {}
    for action in schedule.cold:
        start = max([free[RESOURCE[action.kind]], *(done[ref] for ref in action.waits)])
        end = start + (costs.load_s(action.layers) if action.kind is Kind.LOAD else costs.read_s(action.layers))
        free[RESOURCE[action.kind]] = done[action.ref] = end
        if action.kind is Kind.LOAD:
            arrived.update(dict.fromkeys(action.layers, end))
        spans.append(Span(action, 0, start, end))
    previous, done = done, {}
    for period in range(periods):
        forward = 0
        for action in schedule.actions:
            ready = max((_end_of(ref, done, previous) for ref in action.waits), default=0.0)
            begin = free[RESOURCE[action.kind]]
            stall = 0.0
            if action.kind is Kind.FORWARD:
                begin += costs.before_s[forward]
                ready = max(ready, arrived.get(action.layers[0], 0.0))
                stall = max(0.0, ready - begin)
                end = begin + stall + costs.forward_s[forward] + costs.wake_s * (stall > SEEN_STALL_S)
                forward += 1
            elif action.kind is Kind.LOAD:
                end = max(begin, ready) + costs.load_s(action.layers)
            elif action.kind is Kind.READ:
                end = max(begin, ready) + costs.read_s(action.layers)
            else:
                end = max(begin, ready)
            free[RESOURCE[action.kind]] = done[action.ref] = end
            spans.append(Span(action, period, max(begin, ready), end, stall))
        free[Resource.COMPUTE] += costs.tail_s
        ends.append(free[Resource.COMPUTE])
        previous, done = done, {}
    return Timeline(tuple(spans), tuple(ends))


def _end_of(ref: Ref, done: dict[Ref, float], previous: dict[Ref, float]) -> float:
    """When the action ended that `ref` names; 0 if it was before the beginning."""
    if ref.previous_pass:
        return previous.get(Ref(ref.kind, ref.layers, ref.occurrence), 0.0)
    return done.get(ref, 0.0)
