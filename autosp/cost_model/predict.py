"""Latency of many candidates at once: the simulator's recurrence over arrays, one column per candidate.

`read_end[j] = max(read_end[j-1], copy_end[e(j)]) + latency + bytes_j / disk bandwidth`, where layers rest on disk
`copy_end[j] = max(copy_end[j-1], comp_end[s(j)], read_end[j]) + latency + bytes_j / bandwidth`
`comp_end[i] = max(comp_end[i-1] + before_i, copy_end[i]) + forward_i`

iterated over periods until steady; s(j) frees the memory of the j-th copy, e(j) empties the staging of the j-th read.
The same numbers as `simulate` on the lowered action list (a property test holds the two together), about a thousand
times faster per candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from autosp.cost_model.memory import DeviceMemory, host_bytes
from autosp.cost_model.simulate import PERIODS, Costs, costs_of
from autosp.schedule.streaming import Ring, build_ring
from autosp.spec import Candidate, Prediction, Profile

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
NumberT = TypeVar("NumberT", bound=np.number[Any])

CONTENTION_ROUNDS = 4
"""Rounds of the fixed point between overlap and slowdown; it moves less than 0.1 % after three."""


def predict(profile: Profile, candidates: Sequence[Candidate]) -> list[Prediction]:
    """One prediction per candidate, in their order."""
    layer_bytes = [layer.n_bytes for layer in profile.partition.layers]
    visits = profile.partition.visits
    return predict_rings(profile, ((candidate, build_ring(candidate, layer_bytes, visits)) for candidate in candidates))


def predict_rings(profile: Profile, pairs: Iterable[tuple[Candidate, Ring]]) -> list[Prediction]:
    """`predict`, where the candidates' rings are at hand. No ring is kept: of a thousand each has hundreds of parts."""
    repeats = profile.partition.repeats
    memory = DeviceMemory(profile)
    figures: list[dict[str, Any]] = []

    def rings() -> Iterator[Ring]:
        for candidate, ring in pairs:
            figures.append(
                {
                    "candidate": candidate,
                    "moved_bytes": sum(ring.groups[transfer.group].n_bytes for transfer in ring.transfers) * repeats,
                    "peak_bytes": memory.peak_bytes(candidate, ring.arena_bytes),
                    "read_bytes": sum(ring.groups[read.group].n_bytes for read in ring.staging.reads) * repeats,
                    "host_bytes": host_bytes(profile, candidate, ring.staging.n_bytes),
                }
            )
            yield ring

    periods = contended_periods(profile, rings())
    return [
        Prediction(latency_s=float(period_s) * repeats, stall_s=float(stall_s) * repeats, **numbers)
        for numbers, period_s, stall_s in zip(figures, periods.period_s, periods.stall_s, strict=True)
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

    Compute is slowed in proportion to the time that link and disk are busy, each of these in proportion to the time
    that compute is.
    """
    costs = costs_of(profile)
    link, disk = profile.link, profile.disk_link
    tables = _tables(rings, costs)
    compute_alone = sum(costs.before_s) + sum(costs.forward_s) + costs.tail_s
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
        link_busy = np.minimum(1.0, link_alone * found.link_factor / found.period_s)
        disk_busy = np.minimum(1.0, disk_alone * found.disk_factor / found.period_s)
        compute_busy = np.minimum(1.0, compute_alone * found.compute_factor / found.period_s)
        factors = (
            1 + by_link * link_busy + by_disk * disk_busy,
            1 + on_link * compute_busy,
            1 + on_disk * compute_busy,
        )
        found = Periods(*_steady(costs, tables, *factors), *factors)
    return found


@dataclass(frozen=True)
class _Tables:
    """Per visit and candidate, of the transfer that the visit needs. Shapes: [visits, candidates]."""

    load_s: Array
    """0: none."""
    after: Indices
    """The visit that frees its memory; negative in the period before."""
    read_s: Array
    """0: it does not rest on disk."""
    emptied: Indices
    """The visit whose transfer empties its place of staging; negative in the period before."""


def _tables(rings: Iterable[Ring], costs: Costs) -> _Tables:
    n_visits = len(costs.forward_s)
    loads: list[list[float]] = []
    afters: list[list[int]] = []
    reads: list[list[float]] = []
    empties: list[list[int]] = []
    for ring in rings:
        load_s, after, read_s, emptied = [0.0] * n_visits, [0] * n_visits, [0.0] * n_visits, [0] * n_visits
        for transfer in ring.transfers:
            n_bytes = ring.groups[transfer.group].n_bytes
            load_s[transfer.before] = costs.link_latency_s + n_bytes / costs.link_bytes_per_s
            after[transfer.before] = transfer.after
        for read in ring.staging.reads:
            visit = ring.transfers[read.transfer].before
            n_bytes = ring.groups[read.group].n_bytes
            read_s[visit] = costs.disk_latency_s + n_bytes / costs.disk_bytes_per_s
            waits = (ring.transfers[transfer].before - n_visits * before for transfer, before in read.waits)
            emptied[visit] = max(waits, default=-n_visits)  # none: reads before it waited for them
        loads.append(load_s)
        afters.append(after)
        reads.append(read_s)
        empties.append(emptied)
    return _Tables(
        _by_visit(np.array(loads), n_visits),
        _by_visit(np.array(afters, np.intp), n_visits),
        _by_visit(np.array(reads), n_visits),
        _by_visit(np.array(empties, np.intp), n_visits),
    )


def _by_visit(columns: npt.NDArray[NumberT], n_visits: int) -> npt.NDArray[NumberT]:
    """Rows of visits from a list with one entry per candidate."""
    return np.ascontiguousarray(columns.reshape(-1, n_visits).T)


def _steady(
    costs: Costs, tables: _Tables, compute_factor: Array, link_factor: Array, disk_factor: Array
) -> tuple[Array, Array]:
    """Mean period and stall over the last two of `PERIODS` periods. Shapes: [C]."""
    n_visits, columns = tables.load_s.shape
    needs, reads = tables.load_s > 0, tables.read_s > 0
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
            stall += np.maximum(0.0, ready - now)
            now = np.maximum(now, ready) + costs.forward_s[visit] * compute_factor
            comp_end[n_visits + visit] = now
        now = now + costs.tail_s * compute_factor
        ends.append(now)
        stalls.append(stall)
    return (ends[-1] - ends[-3]) / 2, (stalls[-1] + stalls[-2]) / 2
