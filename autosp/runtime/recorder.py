"""Keeps the stamps of the last passes, from which stalls, traffic and the measured timeline are read."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple, TypeVar

from autosp.devices import Copied, CopyTimes, Device, Stamp
from autosp.schedule.actions import Action, Kind
from autosp.schedule.timeline import SEEN_STALL_S, Span, Timeline
from autosp.spec import Usage

KEPT_PASSES = 8
"""Whole passes that are remembered; a few events each per layer, so the rest is forgotten."""


@dataclass(slots=True)
class Visit:
    """One call of a layer, or its backward: when it came, when its weights were there, when it ended."""

    kind: Kind
    layer: int
    arrive: Stamp
    start: Stamp = None
    recomputed: Stamp = None
    """Of a backward: when its activations were there again, if they were dropped."""
    finish: Stamp = None


@dataclass(frozen=True, slots=True)
class VisitTimes:
    """What one visit took, in seconds: compute before it, the wait for its weights, and its own compute."""

    kind: Kind
    layer: int
    before_s: float
    wait_s: float
    recompute_s: float
    compute_s: float


class Load(NamedTuple):
    """One transfer, to `offset` of the arena, and the groups that it overwrote."""

    layers: tuple[int, ...]
    offset: int
    times: CopyTimes
    evicted: tuple[tuple[int, ...], ...]


class Read(NamedTuple):
    """One read from disk, to `offset` of the staging ring."""

    layers: tuple[int, ...]
    offset: int
    n_bytes: int
    times: CopyTimes


class Sent(NamedTuple):
    """One gradient that left the device, and its place among those of its layer."""

    layer: int
    place: int
    times: CopyTimes


class Update(NamedTuple):
    """One layer's update on the host."""

    layer: int
    times: CopyTimes


@dataclass(frozen=True, slots=True)
class Moved:
    """One layer's activations, to the host or back."""

    kind: Kind
    layer: int
    times: tuple[CopyTimes, ...]


@dataclass(slots=True)
class Pass:
    """One outermost call of the model."""

    begin: Stamp
    end: Stamp = None
    visits: list[Visit] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    gradients: list[Sent] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    """By the step before it."""
    moved: list[Moved] = field(default_factory=list)


class Recorder:
    """Told by the executor what happens; costs a stamp per event and never waits for anything."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stamp = device.stamp
        self._passes: deque[Pass] = deque(maxlen=KEPT_PASSES)
        self._now: Pass | None = None
        self._open: list[Visit] = []

    def begin_pass(self) -> None:
        """The outermost call starts."""
        self._now = Pass(self._stamp())
        self._open.clear()

    def end_pass(self) -> None:
        """The outermost call returned, or its backward; what was dropped does not end."""
        if self._now is None:
            return
        self._now.end = self._stamp()
        self._passes.append(self._now)
        self._now = None

    def drop_pass(self) -> None:
        """The outermost call raised: its stamps say nothing about a whole pass."""
        self._now = None

    def arrive(self, layer: int, kind: Kind = Kind.FORWARD) -> None:
        """A layer is called, or its backward begins; nothing was waited for yet."""
        self._open.append(Visit(kind, layer, self._stamp()))

    def start(self) -> None:
        """Its weights are there."""
        self._open[-1].start = self._stamp()

    def recomputed(self) -> None:
        """Its activations are there again."""
        self._open[-1].recomputed = self._stamp()

    def finish(self) -> None:
        """Its forward returned, or its backward is over."""
        visit = self._open.pop()
        visit.finish = self._stamp()
        if self._now is not None:
            self._now.visits.append(visit)

    def loaded(
        self, layers: tuple[int, ...], offset: int, copied: Copied, evicted: tuple[tuple[int, ...], ...]
    ) -> None:
        """A transfer was issued."""
        if self._now is not None:
            self._now.loads.append(Load(layers, offset, copied.times, evicted))

    def was_read(self, layers: tuple[int, ...], offset: int, n_bytes: int, read: Copied) -> None:
        """A read was issued."""
        if self._now is not None:
            self._now.reads.append(Read(layers, offset, n_bytes, read.times))

    def sent(self, layer: int, place: int, copied: Copied) -> None:
        """A gradient leaves."""
        if self._now is not None:
            self._now.gradients.append(Sent(layer, place, copied.times))

    def updated(self, layer: int, updated: Copied) -> None:
        """An update is over, which may have begun before the pass."""
        if self._now is not None:
            self._now.updates.append(Update(layer, updated.times))

    def moved(self, kind: Kind, layer: int, copies: Sequence[Copied]) -> None:
        """Copies of a layer's activations were issued."""
        if self._now is not None and copies:
            self._now.moved.append(Moved(kind, layer, tuple(copied.times for copied in copies)))

    # -- what is read from it: waits for compute, so not for use within a pass ---------------------------------------

    def pass_s(self) -> list[float]:
        """Seconds of each remembered pass. Loads for the next one go on meanwhile."""
        return [self._device.seconds(one.begin, one.end) for one in self._passes]

    def stall_s(self) -> dict[int, float]:
        """Layer -> mean seconds per remembered pass that compute stood still before it, waiting for its weights.

        Loads for the next pass go on meanwhile.
        """
        stalls: dict[int, list[float]] = {}
        for one in self._passes:
            for visit in one.visits:
                stalls.setdefault(visit.layer, []).append(self._device.seconds(visit.arrive, visit.start))
        count = len(self._passes)
        return {layer: sum(seconds) / count for layer, seconds in sorted(stalls.items())}

    def visit_times(self, last: int) -> list[tuple[list[VisitTimes], float]]:
        """Of each of the last so many of the remembered passes: its visits, and the compute after the last of them.

        Loads for the next pass go on meanwhile.
        """
        seconds = self._device.seconds
        found = []
        for one in list(self._passes)[-last:]:
            previous = one.begin
            times = []
            for visit in one.visits:
                computes = visit.start if visit.recomputed is None else visit.recomputed
                times.append(
                    VisitTimes(
                        visit.kind,
                        visit.layer,
                        seconds(previous, visit.arrive),
                        seconds(visit.arrive, visit.start),
                        seconds(visit.start, computes),
                        seconds(computes, visit.finish),
                    )
                )
                previous = visit.finish
            found.append((times, seconds(previous, one.end)))
        return found

    def usage(self, last: int) -> Usage:
        """What the last so many of the remembered passes spent their time on: the median of each figure.

        Waits for loads of the next pass, too.
        Where nothing moves, the end of a training pass is not seen: none is remembered, and nothing was waited for.
        """
        self._device.synchronize()
        seconds = self._device.seconds
        figures = []
        for one in list(self._passes)[-last:]:
            stalls = [seconds(visit.arrive, visit.start) for visit in one.visits]
            loads, reads = _over(one.loads), _over(one.reads)
            link_s = sum(seconds(load.times.began, load.times.ended) for load in loads)
            disk_s = sum(seconds(read.times.began, read.times.ended) for read in reads)
            read_bytes = sum(read.n_bytes for read in reads)
            waited = sum(stall > SEEN_STALL_S for stall in stalls)
            figures.append((sum(stalls), waited, link_s, len(loads), disk_s, len(reads), read_bytes))
        if not figures:
            return Usage(stall_s=0.0, stalls=0.0, link_s=0.0, loads=0.0)
        stall_s, waited, link_s, loads, disk_s, reads, read_bytes = map(median, zip(*figures, strict=True))
        return Usage(
            stall_s=stall_s,
            stalls=waited,
            link_s=link_s,
            loads=loads,
            disk_s=disk_s,
            reads=reads,
            read_bytes=read_bytes,
        )

    def timeline(self) -> Timeline:
        """The remembered passes as spans, in seconds from the first one's beginning. Waits for loads of the next."""
        self._device.synchronize()
        passes = list(self._passes)  # another thread's may end meanwhile
        if not passes:
            return Timeline((), ())
        zero = passes[0].begin

        def at(stamp: Stamp) -> float:
            return self._device.seconds(zero, stamp)

        spans: list[Span] = []
        for period, one in enumerate(passes):
            numbers: Counter[tuple[Kind, tuple[int, ...]]] = Counter()

            def action(
                kind: Kind, layers: tuple[int, ...], offset: int | None = None, numbers: Counter[Any] = numbers
            ) -> Action:
                numbers[kind, layers] += 1
                return Action(kind, layers, numbers[kind, layers] - 1, (), offset)

            for read in _over(one.reads):
                begin, end = at(read.times.began), at(read.times.ended)
                spans.append(Span(action(Kind.READ, read.layers, read.offset), period, begin, end))
            for load in _over(one.loads):
                begin, end = at(load.times.began), at(load.times.ended)
                spans += (Span(action(Kind.EVICT, gone), period, begin, begin) for gone in load.evicted)
                spans.append(Span(action(Kind.LOAD, load.layers, load.offset), period, begin, end))
            for layer, first, last in _by_layer(one.gradients):
                spans.append(Span(action(Kind.GRADIENTS, (layer,)), period, at(first.began), at(last.ended)))
            for moved in one.moved:
                begin, end = at(moved.times[0].began), at(moved.times[-1].ended)
                spans.append(Span(action(moved.kind, (moved.layer,)), period, begin, end))
            for update in one.updates:
                begin, end = max(0.0, at(update.times.began)), max(0.0, at(update.times.ended))
                spans.append(Span(action(Kind.STEP, (update.layer,)), period, begin, end))
            for visit in one.visits:
                arrive, start, finish = at(visit.arrive), at(visit.start), at(visit.finish)
                if visit.recomputed is not None:
                    again = action(Kind.RECOMPUTE, (visit.layer,))
                    spans.append(Span(again, period, start, at(visit.recomputed), start - arrive))
                    arrive = start = at(visit.recomputed)
                spans.append(Span(action(visit.kind, (visit.layer,)), period, start, finish, start - arrive))
        return Timeline(tuple(spans), tuple(at(one.end) for one in passes))


CopyT = TypeVar("CopyT", Load, Read)


def _over(copies: Sequence[CopyT]) -> list[CopyT]:
    """All but those that failed, which have no times."""
    return [one for one in copies if one.times.ended is not None]


def _by_layer(gradients: Sequence[Sent]) -> list[tuple[int, CopyTimes, CopyTimes]]:
    """Layers whose gradients left one after another, with the first and the last; one that comes again begins anew."""
    runs: list[list[Sent]] = []
    places: set[int] = set()
    for one in gradients:
        if not runs or runs[-1][0].layer != one.layer or one.place in places:
            runs.append([])
            places.clear()
        runs[-1].append(one)
        places.add(one.place)
    return [(run[0].layer, run[0].times, run[-1].times) for run in runs]
