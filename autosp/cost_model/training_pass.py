"""Time of a training pass for many candidates at once: the simulator's recurrence over arrays, a column per candidate.

`copy_end[j] = max(copy_end[j-1], comp_end[s(j)], sent[o(j)]) + latency + bytes_j / bandwidth`
`comp_end[i] = max(comp_end[i-1] + before_i, copy_end[i], sent[h(i)]) + compute_i`, and `wake` more where it had to wait
`sent[i] = max(sent[i-1], comp_end[i]) + latency + returned bytes_i / return bandwidth`
`T = max(comp_end[last] + tail, sent[last])`

over the visits forward, then backward; compute_i is forward_i, or backward_i and, of what is recomputed, recompute_i.
Each pass begins with an empty arena when the one before it is over, so one of them is all there is. s(j) frees the
memory of the j-th copy, or leaves room for the activations that it brings back, which o(j) sent; h(i) is what must have
left for the gradients, or activations, before i to have room. The same numbers as `simulate` on the lowered action
list: a property test holds them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autosp.cost_model.simulate import Costs
from autosp.cost_model.steady import Array, Flags, Indices, by_visit
from autosp.schedule.offload import link_queue, restores, saves, saves_held_up
from autosp.schedule.streaming import Ring, Transfer
from autosp.schedule.timeline import SEEN_STALL_S
from autosp.schedule.training import held_up_by, leaving_after
from autosp.spec import Candidate, Partition


class _Jobs(NamedTuple):
    """Jobs of the link, at most one before each visit: their bytes, -1 where there is none.

    Each begins once visit `after` is over, and what visit `saved` sent has left; -1: at once. [visits]
    """

    n_bytes: list[int]
    after: list[int]
    saved: list[int]


class TrainingTraffic:
    """What each visit of a pass needs and sends, before it is known how long anything takes. [visits, candidates]"""

    def __init__(self, partition: Partition, pairs: Iterable[tuple[Candidate, Ring]]) -> None:
        n_visits = len(partition.visits) + len(partition.backward)
        queues: list[list[_Jobs]] = []
        agains: list[list[int]] = []
        sends: list[list[int]] = []
        sent: list[list[int]] = []
        holds: list[list[int]] = []
        for candidate, ring in pairs:
            queues.append(_queue(candidate, partition, ring, n_visits))
            layers, returned = [0] * n_visits, [0] * n_visits
            leaving = leaving_after(candidate, partition)
            for visit, mine in leaving.items():
                layers[visit] = len(mine)
                returned[visit] = sum(partition.layers[layer].gradient_bytes for layer in mine)
            for visit, n_bytes in saves(candidate, partition).items():
                layers[visit] += 1
                returned[visit] += n_bytes
            held_up = held_up_by(leaving, partition)
            for visit, before in saves_held_up(candidate, partition).items():
                held_up[visit] = max(before, held_up.get(visit, -1))
            holds.append([held_up.get(visit - 1, -1) for visit in range(n_visits)])
            again = frozenset(candidate.recompute)
            agains.append([int(layer in again) for layer in partition.backward])
            sends.append(layers)
            sent.append(returned)
        nothing = _Jobs([-1] * n_visits, [-1] * n_visits, [-1] * n_visits)
        width = max(map(len, queues), default=1)
        slots = [[queue[slot] if slot < len(queue) else nothing for queue in queues] for slot in range(width)]
        self._jobs = [
            tuple(by_visit([getattr(one, field) for one in slot], n_visits) for field in _Jobs._fields)
            for slot in slots
        ]
        self._again = by_visit(agains, len(partition.backward))
        self._leaving, self._sent_bytes = by_visit(sends, n_visits), by_visit(sent, n_visits)
        self._held_up = by_visit(holds, n_visits)

    def timed(self, costs: Costs) -> TrainingPass:
        """At the costs' latencies and bandwidths."""
        columns = self._held_up.shape[1]
        jobs = [
            Jobs(
                n_bytes >= 0,
                np.where(n_bytes >= 0, costs.link_latency_s + n_bytes / costs.link_bytes_per_s, 0.0),
                after,
                saved,
            )
            for n_bytes, after, saved in self._jobs
        ]
        forward_s = np.repeat(np.array(costs.forward_s, float)[:, None], columns, axis=1)
        recompute_s, backward_s = (np.array(one, float)[:, None] for one in (costs.recompute_s, costs.backward_s))
        return TrainingPass(
            costs,
            jobs,
            np.concatenate([forward_s, backward_s + recompute_s * self._again]),
            self._leaving * costs.return_latency_s + self._sent_bytes / costs.return_bytes_per_s,
            self._held_up,
        )


def _queue(candidate: Candidate, partition: Partition, ring: Ring, n_visits: int) -> list[_Jobs]:
    """What the link moves, in the order in which it does, each before the first visit that needs it or what follows."""
    slots = [_Jobs([-1] * n_visits, [-1] * n_visits, [-1] * n_visits)]
    queue = link_queue(ring.transfers, restores(candidate, partition, ring.transfers))
    least, slot = n_visits, 0
    visits = []
    for job in reversed(queue):
        least = min(least, job.before)
        visits.append(least)
    last = -1
    for job, visit in zip(queue, reversed(visits), strict=True):
        slot = slot + 1 if visit == last else 0
        last = visit
        if slot == len(slots):
            slots.append(_Jobs([-1] * n_visits, [-1] * n_visits, [-1] * n_visits))
        slots[slot].n_bytes[visit] = ring.groups[job.group].n_bytes if isinstance(job, Transfer) else job.n_bytes
        slots[slot].after[visit] = job.after
        slots[slot].saved[visit] = -1 if isinstance(job, Transfer) else max(job.saved)
    return slots


@dataclass(frozen=True)
class Jobs:
    """Jobs of the link, at most one before each visit. Shapes: [visits, candidates]."""

    needed: Flags
    """Whether there is one, which the visit waits for."""
    seconds: Array
    after: Indices
    """The visit after which it may begin: a load's frees its memory; -1: when the pass begins."""
    saved: Indices
    """The visit of which what it sent must have left; -1: none."""


@dataclass(frozen=True)
class TrainingPass:
    """Per visit and candidate. Shapes: [visits, candidates]."""

    costs: Costs
    jobs: Sequence[Jobs]
    """In the order of the queue before each visit."""
    compute_s: Array
    send_s: Array
    """Of the activations or gradients that leave after the visit."""
    held_up: Indices
    """The visit of which what it sends must have left before this one begins; -1: none."""

    @property
    def link_s(self) -> Array:
        """How long the link to the device is busy per pass. [C]"""
        return np.asarray(sum(one.seconds.sum(axis=0) for one in self.jobs))

    @property
    def disk_s(self) -> Array:
        """None of a training pass rests on disk. [C]"""
        return np.zeros_like(self.link_s)

    def run(self, compute_factor: Array, link_factor: Array, disk_factor: Array) -> tuple[Array, Array]:
        """Length and stall of a pass. Shapes: [C]."""
        costs = self.costs
        n_visits, columns = self.send_s.shape
        every = np.arange(columns)
        before_s = (*costs.before_s, *costs.before_backward_s)
        comp_end = np.zeros((1 + n_visits, columns))  # first the beginning, which comes after visit -1
        sent = np.zeros((1 + n_visits, columns))  # likewise
        now, copy_end, sent_end, stall = (np.zeros(columns) for _ in range(4))
        for visit in range(n_visits):
            needs = np.zeros(columns, bool)
            for jobs in self.jobs:
                begin = np.maximum(copy_end, comp_end[jobs.after[visit] + 1, every])
                begin = np.maximum(begin, sent[jobs.saved[visit] + 1, every])
                copy_end = np.where(jobs.needed[visit], begin + jobs.seconds[visit] * link_factor, copy_end)
                needs |= jobs.needed[visit]
            now = now + before_s[visit] * compute_factor
            ready = np.maximum(np.where(needs, copy_end, 0.0), sent[self.held_up[visit] + 1, every])
            waited = np.maximum(0.0, ready - now)
            stall += waited
            now = now + waited + self.compute_s[visit] * compute_factor
            if costs.wake_s:
                now = now + costs.wake_s * (waited > SEEN_STALL_S)
            comp_end[visit + 1] = now
            sends = self.send_s[visit]
            sent[visit + 1] = sent_end = np.where(sends > 0, np.maximum(sent_end, now) + sends, sent_end)
        return np.maximum(now + costs.tail_s * compute_factor, sent_end), stall
