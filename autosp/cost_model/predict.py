"""Latency of many candidates at once: the simulator's recurrence over arrays, one column per candidate.

`read_end[j] = max(read_end[j-1], copy_end[e(j)]) + latency + bytes_j / disk bandwidth`, where layers rest on disk
`copy_end[j] = max(copy_end[j-1], comp_end[s(j)], read_end[j]) + latency + bytes_j / bandwidth`
`comp_end[i] = max(comp_end[i-1] + before_i, copy_end[i]) + forward_i`, and `wake` more where it had to wait

iterated over periods until steady; s(j) frees the memory of the j-th copy, e(j) empties the staging of the j-th read.
The same numbers as `simulate` on the lowered action list (a property test holds the two together), about a thousand
times faster per candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from autosp.cost_model.memory import DeviceMemory, host_bytes
from autosp.cost_model.simulate import PERIODS, Costs, costs_of
from autosp.schedule.streaming import Ring, build_ring
from autosp.schedule.timeline import SEEN_STALL_S
from autosp.spec import Candidate, Prediction, Profile

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Flags = npt.NDArray[np.bool_]

CONTENTION_ROUNDS = 4
"""Rounds of the fixed point between overlap and slowdown; it moves less than 0.1 % after three."""


def predict(profile: Profile, candidates: Sequence[Candidate]) -> list[Prediction]:
    """One prediction per candidate, in their order."""
    return predict_rings(profile, with_rings(profile, candidates))


def with_rings(profile: Profile, candidates: Iterable[Candidate]) -> Iterator[tuple[Candidate, Ring]]:
    """Each candidate with its ring, built when it is asked for."""
    layers, visits = profile.partition.layers, profile.partition.visits
    layer_bytes, read_bytes = [layer.n_bytes for layer in layers], [layer.read_bytes for layer in layers]
    return ((candidate, build_ring(candidate, layer_bytes, visits, read_bytes)) for candidate in candidates)


def predict_rings(profile: Profile, pairs: Iterable[tuple[Candidate, Ring]]) -> list[Prediction]:
    """`predict`, where the candidates' rings are at hand."""
    return Predictor(profile, pairs).predict(profile)


class Predictor:
    """Predicts the same candidates from one profile after another, which differ in their costs only.

    No ring is kept: of a thousand each has hundreds of parts.
    """

    def __init__(self, profile: Profile, pairs: Iterable[tuple[Candidate, Ring]]) -> None:
        repeats = profile.partition.repeats
        memory = DeviceMemory(profile)
        self._figures: list[dict[str, Any]] = []

        def rings() -> Iterator[Ring]:
            for candidate, ring in pairs:
                moved = sum(ring.groups[transfer.group].n_bytes for transfer in ring.transfers)
                read = sum(ring.staging.group_bytes[read.group] for read in ring.staging.reads)
                self._figures.append(
                    {
                        "candidate": candidate,
                        "moved_bytes": moved * repeats,
                        "peak_bytes": memory.peak_bytes(candidate, ring.arena_bytes),
                        "read_bytes": read * repeats,
                        "host_bytes": host_bytes(profile, candidate, ring.staging.n_bytes),
                    }
                )
                yield ring

        self._traffic = _traffic(rings(), len(profile.visits))

    def predict(self, profile: Profile) -> list[Prediction]:
        """One prediction per candidate, in their order."""
        repeats = profile.partition.repeats
        periods = _periods(profile, self._traffic)
        return [
            Prediction(latency_s=float(period_s) * repeats, stall_s=float(stall_s) * repeats, **figures)
            for figures, period_s, stall_s in zip(self._figures, periods.period_s, periods.stall_s, strict=True)
        ]


class Periods(NamedTuple):
    """The steady period of each of C rings, and how many times longer everything takes in it. Shapes: [C]."""

    period_s: Array
    stall_s: Array
    compute_factor: Array
    link_factor: Array
    disk_factor: Array


def contended_periods(profile: Profile, rings: Iterable[Ring]) -> Periods:
    """Steady period and stall of each ring, while compute, link and disk slow each other down.

    Each is slowed in proportion to the share of its own time in which the other is busy too. See `beside_compute_s`.
    """
    return _periods(profile, _traffic(rings, len(profile.visits)))


def _periods(profile: Profile, traffic: _Traffic) -> Periods:
    costs = costs_of(profile)
    link, disk = profile.link, profile.disk_link
    tables = traffic.timed(costs)
    link_alone = tables.load_s.sum(axis=0)
    disk_alone = tables.read_s.sum(axis=0)
    ones = np.ones(tables.load_s.shape[1])
    found = Periods(*_steady(costs, tables, ones, ones, ones), ones, ones, ones)
    slowdowns = [link.compute_slowdown, link.link_slowdown]
    slowdowns += [disk.compute_slowdown, disk.link_slowdown] if disk else [1.0, 1.0]
    if max(slowdowns) == 1:
        return found
    by_link, on_link, by_disk, on_disk = (slowdown - 1 for slowdown in slowdowns)
    for _ in range(CONTENTION_ROUNDS):
        compute_s = found.period_s - found.stall_s
        link_s, disk_s = link_alone * found.link_factor, disk_alone * found.disk_factor
        link_beside, disk_beside = beside_compute_s(link_s, found.stall_s), beside_compute_s(disk_s, found.stall_s)
        factors = (
            1 + by_link * _share(link_beside, compute_s) + by_disk * _share(disk_beside, compute_s),
            1 + on_link * _share(link_beside, link_s),
            1 + on_disk * _share(disk_beside, disk_s),
        )
        found = Periods(*_steady(costs, tables, *factors), *factors)
    return found


def beside_compute_s(busy_s: Array, stall_s: Array) -> Array:
    """Of the time in which a link is busy, what compute is busy in too: all but the stalls, which it is busy in. [C]"""
    return np.maximum(0.0, busy_s - stall_s)


def _share(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0).clip(0.0, 1.0)


@dataclass(frozen=True)
class _Tables:
    """Per visit and candidate, of the transfer that the visit needs. Shapes: [visits, candidates]."""

    needs: Flags
    load_s: Array
    after: Indices
    """The visit that frees its memory; negative in the period before."""
    reads: Flags
    """Whether it rests on disk."""
    read_s: Array
    emptied: Indices
    """The visit whose transfer empties its place of staging; negative in the period before."""


@dataclass(frozen=True)
class _Traffic:
    """The same before it is known how long anything takes."""

    load_bytes: Indices
    """-1: nothing is needed."""
    after: Indices
    read_bytes: Indices
    """-1: it does not rest on disk."""
    emptied: Indices

    def timed(self, costs: Costs) -> _Tables:
        """At the costs' latencies and bandwidths."""
        needs, reads = self.load_bytes >= 0, self.read_bytes >= 0
        return _Tables(
            needs,
            np.where(needs, costs.link_latency_s + self.load_bytes / costs.link_bytes_per_s, 0.0),
            self.after,
            reads,
            np.where(reads, costs.disk_latency_s + self.read_bytes / costs.disk_bytes_per_s, 0.0),
            self.emptied,
        )


def _traffic(rings: Iterable[Ring], n_visits: int) -> _Traffic:
    loads: list[list[int]] = []
    afters: list[list[int]] = []
    reads: list[list[int]] = []
    empties: list[list[int]] = []
    for ring in rings:
        load_bytes, after, read_bytes, emptied = [-1] * n_visits, [0] * n_visits, [-1] * n_visits, [0] * n_visits
        for transfer in ring.transfers:
            load_bytes[transfer.before] = ring.groups[transfer.group].n_bytes
            after[transfer.before] = transfer.after
        for read in ring.staging.reads:
            visit = ring.transfers[read.transfer].before
            read_bytes[visit] = ring.staging.group_bytes[read.group]
            waits = (ring.transfers[transfer].before - n_visits * before for transfer, before in read.waits)
            emptied[visit] = max(waits, default=-n_visits)  # none: reads before it waited for them
        loads.append(load_bytes)
        afters.append(after)
        reads.append(read_bytes)
        empties.append(emptied)
    return _Traffic(*(_by_visit(columns, n_visits) for columns in (loads, afters, reads, empties)))


def _by_visit(columns: list[list[int]], n_visits: int) -> Indices:
    """Rows of visits from a list with one entry per candidate."""
    return np.ascontiguousarray(np.array(columns, np.intp).reshape(-1, n_visits).T)


def _steady(
    costs: Costs, tables: _Tables, compute_factor: Array, link_factor: Array, disk_factor: Array
) -> tuple[Array, Array]:
    """Mean period and stall over the last two of `PERIODS` periods. Shapes: [C]."""
    n_visits, columns = tables.load_s.shape
    needs, reads = tables.needs, tables.reads
    from_disk = bool(reads.any())
    every = np.arange(columns)
    comp_end = np.zeros((2 * n_visits, columns))  # the period before, then this one
    copies = np.zeros((2 * n_visits if from_disk else 0, columns))  # likewise: the end of the copy for each visit
    now = np.zeros(columns)
    copy_end = np.zeros(columns)
    read_end = np.zeros(columns)
    ends: list[Array] = []
    stalls: list[Array] = []
    for _ in range(PERIODS):
        comp_end[:n_visits] = comp_end[n_visits:]
        copies[:n_visits] = copies[n_visits:]
        stall = np.zeros(columns)
        for visit in range(n_visits):
            begin = np.maximum(copy_end, comp_end[tables.after[visit] + n_visits, every])
            if from_disk:
                emptied = copies[tables.emptied[visit] + n_visits, every]
                read = np.maximum(read_end, emptied) + tables.read_s[visit] * disk_factor
                read_end = np.where(reads[visit], read, read_end)
                begin = np.where(reads[visit], np.maximum(begin, read_end), begin)
            copy_end = np.where(needs[visit], begin + tables.load_s[visit] * link_factor, copy_end)
            if from_disk:
                copies[n_visits + visit] = copy_end
            now = now + costs.before_s[visit] * compute_factor
            ready = np.where(needs[visit], copy_end, now)
            waited = np.maximum(0.0, ready - now)
            stall += waited
            now = np.maximum(now, ready) + costs.forward_s[visit] * compute_factor
            if costs.wake_s:
                now = now + costs.wake_s * (waited > SEEN_STALL_S)
            comp_end[n_visits + visit] = now
        now = now + costs.tail_s * compute_factor
        ends.append(now)
        stalls.append(stall)
    return (ends[-1] - ends[-3]) / 2, (stalls[-1] + stalls[-2]) / 2
