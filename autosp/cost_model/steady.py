"""Latency of many candidates at once: the simulator's recurrence over arrays, one column per candidate.

`read_end[j] = max(read_end[j-1], copy_end[e(j)]) + latency + bytes_j / disk bandwidth`, where layers rest on disk
`copy_end[j] = max(copy_end[j-1], comp_end[s(j)], read_end[j]) + latency + bytes_j / bandwidth`
`comp_end[i] = max(comp_end[i-1] + before_i, copy_end[i]) + forward_i`, and `wake` more where it had to wait

iterated over periods until steady; s(j) frees the memory of the j-th copy, e(j) empties the staging of the j-th read.
The same numbers as `simulate` on the lowered action list (a property test holds the two together), about a thousand
times faster per candidate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autosp.cost_model.simulate import PERIODS, Costs
from autosp.schedule.streaming import Ring
from autosp.schedule.timeline import SEEN_STALL_S

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Flags = npt.NDArray[np.bool_]


class SteadyTraffic:
    """What each visit of a period needs, before it is known how long anything takes. [visits, candidates]"""

    def __init__(self, rings: Iterable[Ring], n_visits: int) -> None:
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
        self._load_bytes = by_visit(loads, n_visits)
        """-1: nothing is needed."""
        self._after = by_visit(afters, n_visits)
        self._read_bytes = by_visit(reads, n_visits)
        """-1: it does not rest on disk."""
        self._emptied = by_visit(empties, n_visits)

    def timed(self, costs: Costs) -> Steady:
        """At the costs' latencies and bandwidths."""
        needs, reads = self._load_bytes >= 0, self._read_bytes >= 0
        return Steady(
            costs,
            needs,
            np.where(needs, costs.link_latency_s + self._load_bytes / costs.link_bytes_per_s, 0.0),
            self._after,
            reads,
            np.where(reads, costs.disk_latency_s + self._read_bytes / costs.disk_bytes_per_s, 0.0),
            self._emptied,
        )


def by_visit(columns: list[list[int]], n_visits: int) -> Indices:
    """Rows of visits from a list with one entry per candidate."""
    return np.ascontiguousarray(np.array(columns, np.intp).reshape(len(columns), n_visits).T)


@dataclass(frozen=True)
class Steady:
    """Per visit and candidate, of the transfer that the visit needs. Shapes: [visits, candidates]."""

    costs: Costs
    needs: Flags
    load_s: Array
    after: Indices
    """The visit that frees its memory; negative in the period before."""
    reads: Flags
    """Whether it rests on disk."""
    read_s: Array
    emptied: Indices
    """The visit whose transfer empties its place of staging; negative in the period before."""

    @property
    def link_s(self) -> Array:
        """How long the link to the device is busy per period. [C]"""
        return np.asarray(self.load_s.sum(axis=0))

    @property
    def disk_s(self) -> Array:
        """The same of the disk. [C]"""
        return np.asarray(self.read_s.sum(axis=0))

    def run(self, compute_factor: Array, link_factor: Array, disk_factor: Array) -> tuple[Array, Array]:
        """Mean period and stall over the last two of `PERIODS` periods. Shapes: [C]."""
        costs, needs, reads = self.costs, self.needs, self.reads
        n_visits, columns = self.load_s.shape
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
                begin = np.maximum(copy_end, comp_end[self.after[visit] + n_visits, every])
                if from_disk:
                    emptied = copies[self.emptied[visit] + n_visits, every]
                    read = np.maximum(read_end, emptied) + self.read_s[visit] * disk_factor
                    read_end = np.where(reads[visit], read, read_end)
                    begin = np.where(reads[visit], np.maximum(begin, read_end), begin)
                copy_end = np.where(needs[visit], begin + self.load_s[visit] * link_factor, copy_end)
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
