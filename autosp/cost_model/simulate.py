"""Runs an action list on paper: when each action starts and ends, where compute stalls, what memory is occupied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from autosp.schedule.actions import COMPUTES, RESOURCE, Action, Kind, Ref, Resource, Schedule
from autosp.schedule.timeline import SEEN_STALL_S, Span, Timeline
from autosp.spec import Profile


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Durations in seconds. `before_s` and `forward_s` have one entry per FORWARD of the schedule, in order.

    Those of a training pass have one per BACKWARD in `backward` (its layer), `before_backward_s`, `recompute_s` and
    `backward_s`.
    """

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
    """Added to a visit that had to wait longer than `SEEN_STALL_S`."""
    backward: Sequence[int] = ()
    before_backward_s: Sequence[float] = ()
    recompute_s: Sequence[float] = ()
    backward_s: Sequence[float] = ()
    gradient_bytes: Sequence[int] = ()
    return_latency_s: float = 0.0
    return_bytes_per_s: float = math.inf
    activation_bytes: Sequence[int] = ()
    """What each FORWARD sends to the host, if its layer's activations are offloaded; empty: nothing."""

    def load_s(self, layers: Sequence[int]) -> float:
        """One transfer of `layers`: latency plus bytes over bandwidth."""
        return self.link_latency_s + sum(self.layer_bytes[layer] for layer in layers) / self.link_bytes_per_s

    def read_s(self, layers: Sequence[int]) -> float:
        """One read of `layers` from disk."""
        n_bytes = self.layer_bytes if self.read_bytes is None else self.read_bytes
        return self.disk_latency_s + sum(n_bytes[layer] for layer in layers) / self.disk_bytes_per_s

    def return_s(self, layers: Sequence[int]) -> float:
        """The gradients of `layers` on their way to the host."""
        return self.return_latency_s + sum(self.gradient_bytes[layer] for layer in layers) / self.return_bytes_per_s

    def save_s(self, visit: int) -> float:
        """The activations of a visit forward on their way to the host."""
        n_bytes = self.activation_bytes[visit] if self.activation_bytes else 0
        return self.return_latency_s + n_bytes / self.return_bytes_per_s

    def restore_s(self, n_bytes: int) -> float:
        """Activations on their way back."""
        return self.link_latency_s + n_bytes / self.link_bytes_per_s

    def before_computes(self, actions: Iterable[Action]) -> Iterator[float]:
        """The compute before each FORWARD, RECOMPUTE and BACKWARD of passes in a row, which needs no weights."""
        forwards, backwards = cycle(self.before_s), cycle(self.before_backward_s)
        again = False
        for action in actions:
            if action.kind is Kind.FORWARD:
                yield next(forwards)
            else:
                yield 0.0 if again else next(backwards)
                again = action.kind is Kind.RECOMPUTE

    def contended(self, compute_factor: float, link_factor: float, disk_factor: float = 1.0) -> Costs:
        """The same work while compute, link and disk slow each other down by these factors."""

        def slower(seconds: Sequence[float]) -> list[float]:
            return [one * compute_factor for one in seconds]

        return replace(
            self,
            before_s=slower(self.before_s),
            forward_s=slower(self.forward_s),
            before_backward_s=slower(self.before_backward_s),
            recompute_s=slower(self.recompute_s),
            backward_s=slower(self.backward_s),
            tail_s=self.tail_s * compute_factor,
            link_latency_s=self.link_latency_s * link_factor,
            link_bytes_per_s=self.link_bytes_per_s / link_factor,
            disk_latency_s=self.disk_latency_s * disk_factor,
            disk_bytes_per_s=self.disk_bytes_per_s / disk_factor,
        )


def costs_of(profile: Profile, group: int = 1) -> Costs:
    """The costs of one period of the profiled pass, uncontended. The pass's tail is spread over its periods.

    What is offloaded is that of all microbatches of a group; how much longer it computes is not in them.
    """
    disk, back = profile.disk_link, profile.return_link
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
        backward=[visit.layer for visit in profile.backward],
        before_backward_s=[visit.before_s for visit in profile.backward],
        recompute_s=[visit.recompute_s for visit in profile.backward],
        backward_s=[visit.backward_s for visit in profile.backward],
        gradient_bytes=[layer.gradient_bytes for layer in profile.partition.layers],
        activation_bytes=[group * n_bytes for n_bytes in profile.partition.activation_bytes],
        return_latency_s=back.latency_s if back else 0.0,
        return_bytes_per_s=back.bytes_per_s if back else math.inf,
    )


PERIODS = 4
"""Periods simulated: a cold one, one to settle, and two that are the steady state."""


def simulate(schedule: Schedule, costs: Costs, periods: int = PERIODS) -> Timeline:
    """The timeline of `periods` passes in a row, prefetching across their boundaries.

    Each resource runs its actions in list order, one at a time; an action starts when its resource is free and its
    waits are over. A FORWARD is preceded by the compute that lies before it, which needs no weights; so is a BACKWARD,
    or the first RECOMPUTE that comes before it.

    A training pass begins when the one before it is over, its gradients at rest. What lies between, the update, is
    no part of either.
    """
    run = _Run(costs)
    for action in schedule.cold:
        run.take(action)
    run.begin_pass()
    ends: list[float] = []
    for _ in range(periods):
        for action in schedule.actions:
            run.take(action)
        ends.append(run.end_pass(at_rest=schedule.ends_at_rest))
        run.begin_pass()
    return Timeline(tuple(run.spans), tuple(ends))


class _Run:
    """Resources, and what was done on them."""

    def __init__(self, costs: Costs) -> None:
        self.spans: list[Span] = []
        self._costs = costs
        self._free = dict.fromkeys(Resource, 0.0)
        self._period = 0
        self._begun = False
        self._arrived: dict[int, float] = {}
        """Layer -> end of its cold load."""
        self._done: dict[Ref, float] = {}
        self._previous: dict[Ref, float] = {}
        self._forwards = self._backwards = 0
        self._away: dict[Ref, int] = {}
        """Bytes that a SAVE of this pass sent."""
        self._recomputed = False
        """Whether the BACKWARD to come follows a RECOMPUTE, before which its other compute was."""
        self._recompute_s: dict[tuple[int, int], float] = {}
        """By layer and occurrence."""
        for layer, seconds in zip(costs.backward, costs.recompute_s, strict=True):
            occurrence = sum(known == layer for known, _ in self._recompute_s)
            self._recompute_s[layer, occurrence] = seconds

    def begin_pass(self) -> None:
        """What was done so far was in the pass before."""
        self._previous, self._done = self._done, {}
        self._forwards = self._backwards = 0
        self._period += self._begun
        self._begun = True

    def end_pass(self, at_rest: bool) -> float:
        """When the pass is over. `at_rest`: it waits for everything, and everything for it."""
        self._free[Resource.COMPUTE] += self._costs.tail_s
        if at_rest:
            self._free = dict.fromkeys(Resource, max(self._free.values()))
        return self._free[Resource.COMPUTE]

    def take(self, action: Action) -> None:
        """Do it as soon as may be."""
        resource = RESOURCE[action.kind]
        before_s, seconds = self._duration(action)
        begin = self._free[resource] + before_s
        ready = max((self._end_of(ref) for ref in action.waits), default=0.0)
        stall = 0.0
        if action.kind in COMPUTES:
            ready = max(ready, self._arrived.get(action.layers[0], 0.0))
            stall = max(0.0, ready - begin)
            end = begin + stall + seconds + self._costs.wake_s * (stall > SEEN_STALL_S)
        else:
            end = max(begin, ready) + seconds
        if action.kind is Kind.LOAD and not self._begun:
            self._arrived.update(dict.fromkeys(action.layers, end))
        self._free[resource] = self._done[action.ref] = end
        self.spans.append(Span(action, self._period, max(begin, ready), end, stall))

    def _duration(self, action: Action) -> tuple[float, float]:
        """Compute before the action, and the action's own time."""
        costs = self._costs
        match action.kind:
            case Kind.LOAD:
                return 0.0, costs.load_s(action.layers)
            case Kind.READ:
                return 0.0, costs.read_s(action.layers)
            case Kind.SAVE:  # follows its FORWARD
                visit = self._forwards - 1
                self._away[action.ref] = costs.activation_bytes[visit] if costs.activation_bytes else 0
                return 0.0, costs.save_s(visit)
            case Kind.RESTORE:
                return 0.0, costs.restore_s(sum(self._away.get(ref, 0) for ref in action.waits))
            case Kind.GRADIENTS:
                return 0.0, costs.return_s(action.layers)
            case Kind.FORWARD:
                self._forwards += 1
                return costs.before_s[self._forwards - 1], costs.forward_s[self._forwards - 1]
            case Kind.RECOMPUTE:
                before_s = 0.0 if self._recomputed else costs.before_backward_s[self._backwards]
                self._recomputed = True
                return before_s, self._recompute_s[action.layers[0], action.occurrence]
            case Kind.BACKWARD:
                before_s = 0.0 if self._recomputed else costs.before_backward_s[self._backwards]
                self._recomputed = False
                self._backwards += 1
                return before_s, costs.backward_s[self._backwards - 1]
            case _:
                return 0.0, 0.0

    def _end_of(self, ref: Ref) -> float:
        """When the action ended that `ref` names; 0 if it was before the beginning."""
        if ref.previous_pass:
            return self._previous.get(Ref(ref.kind, ref.layers, ref.occurrence), 0.0)
        return self._done.get(ref, 0.0)
