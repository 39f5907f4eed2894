"""Time of a training pass for many candidates at once: the simulator's recurrence over arrays, a column per candidate.

`copy_end[j] = max(copy_end[j-1], comp_end[s(j)], sent[o(j)]) + latency + bytes_j / bandwidth`
`comp_end[i] = max(comp_end[i-1] + before_i, copy_end[i], sent[h(i)]) + compute_i`, and `wake` more where it had to wait
`sent[i] = max(sent[i-1], comp_end[i]) + latency + returned bytes_i / return bandwidth`
`T = max(comp_end[last] + tail, sent[last])`

over the visits forward, then backward; compute_i is forward_i, or backward_i and, of what is recomputed, recompute_i.
All candidates have the visits of one that computes everything again: those that a candidate leaves out take no time.
Each pass begins with an empty arena when the one before it is over, so one of them is all there is. s(j) frees the
memory of the j-th copy, or leaves room for the activations that it brings back, which o(j) sent; h(i) is what must have
left for the gradients, or activations, before i to have room. The same numbers as `simulate` on the lowered action
list: a property test holds them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from autosp.cost_model.simulate import Costs
from autosp.cost_model.steady import Array, Flags, Indices
from autosp.schedule.actions import Kind
from autosp.schedule.offload import link_queue, restores, saves, saves_held_up
from autosp.schedule.streaming import Ring, Transfer
from autosp.schedule.timeline import SEEN_STALL_S
from autosp.schedule.training import held_up_by, leaving_after
from autosp.schedule.visits import Visit, visits_of
from autosp.spec import Candidate, Partition


class TrainingTraffic:
    """What each visit of a pass needs and sends, before it is known how long anything takes. [visits, candidates]"""

    def __init__(self, partition: Partition, pairs: Iterable[tuple[Candidate, Ring]]) -> None:
        everything = tuple(set(partition.backward))
        self._visits = visits = visits_of(Candidate(k=1, k_prime=1, recompute=everything), partition)
        n_visits = len(visits)
        layer_of = np.array([visit.layer for visit in visits], np.intp)
        in_every_pass = np.array([visit.kind is not Kind.RECOMPUTE for visit in visits], bool)
        can_compute_again = np.array([computes_again(visit) for visit in visits], bool)
        queues: list[list[Indices]] = []
        agains: list[Indices] = []
        returns: list[Indices] = []
        returns_of: dict[tuple[bool, tuple[int, ...], tuple[int, ...], int], Indices] = {}
        loads: Indices | None = None
        before: Ring | None = None
        for candidate, ring in pairs:
            again = np.isin(layer_of, candidate.recompute)
            if ring is not before:
                before, loads = ring, None
            if candidate.offload:
                queues.append(_queue(candidate, partition, ring, np.flatnonzero(in_every_pass | again), n_visits))
            else:
                if loads is None:
                    loads = _loads(ring, np.flatnonzero(in_every_pass | again), n_visits)
                queues.append([loads])
            group = candidate.group if candidate.offload else 1
            key = candidate.k <= 1, candidate.residents, candidate.offload, group
            if key not in returns_of:
                returns_of[key] = _returns(candidate, partition, visits)
            returns.append(returns_of[key])
            agains.append((can_compute_again & again).astype(np.intp))
        self._jobs = [
            _side_by_side([queue[slot] if slot < len(queue) else _no_jobs(n_visits) for queue in queues], (3, n_visits))
            for slot in range(max(map(len, queues), default=1))
        ]
        self._leaving, self._sent_bytes, self._held_up = _side_by_side(returns, (3, n_visits))
        self._again = _side_by_side(agains, (n_visits,))

    def timed(self, costs: Costs) -> TrainingPass:
        """At the costs' latencies and bandwidths."""
        before_s, own_s, again_s = self._compute(costs)
        return TrainingPass(
            costs,
            before_s,
            [_timed(jobs, costs) for jobs in self._jobs],
            own_s[:, None] + again_s[:, None] * self._again,
            self._leaving * costs.return_latency_s + self._sent_bytes / costs.return_bytes_per_s,
            self._held_up,
        )

    def _compute(self, costs: Costs) -> tuple[Array, Array, Array]:
        """Of each visit: compute before it, its own, and to compute its layer again. Shapes: [visits]."""
        before_s, own_s, again_s = (np.zeros(len(self._visits)) for _ in range(3))
        again_of = dict(zip(costs.backward, costs.recompute_s, strict=True))
        forward = backward = 0
        after_recompute = False
        for row, visit in enumerate(self._visits):
            if visit.kind is Kind.FORWARD:
                before_s[row], own_s[row] = costs.before_s[forward], costs.forward_s[forward]
                forward += 1
                continue
            if not after_recompute:
                before_s[row] = costs.before_backward_s[backward]
            after_recompute = visit.kind is Kind.RECOMPUTE
            if after_recompute:
                again_s[row] = again_of[visit.layer]  # a block's layer, which has one visit backward
            else:
                own_s[row], again_s[row] = costs.backward_s[backward], costs.recompute_s[backward]
                backward += 1
        return before_s, own_s, again_s


def computes_again(visit: Visit) -> bool:
    """Whether the layer's activations are computed in this visit, where they are computed again."""
    return visit.again or visit.kind is Kind.RECOMPUTE


def _no_jobs(n_visits: int) -> Indices:
    """Of jobs before each visit their bytes, -1: none; the visits after which they begin, and which sent it. [3, V]"""
    return np.full((3, n_visits), -1, np.intp)


def _loads(ring: Ring, made: Indices, n_visits: int) -> Indices:
    """The jobs where nothing but weights is loaded: each is before the visit that needs it. [3, V]

    `made`: which of all visits the ring's are.
    """
    found = _no_jobs(n_visits)
    if ring.transfers:
        groups, afters, before, _ = zip(*ring.transfers, strict=True)
        after = np.array(afters, np.intp)
        at = made[list(before)]
        found[0, at] = [ring.groups[group].n_bytes for group in groups]
        found[1, at] = np.where(after >= 0, made[after], -1)
    return found


def _queue(candidate: Candidate, partition: Partition, ring: Ring, made: Indices, n_visits: int) -> list[Indices]:
    """The jobs in their order, each before the first visit that needs it or what follows it, in so many [3, V]."""
    queue = link_queue(ring.transfers, restores(candidate, partition, ring.transfers))
    needs = np.minimum.accumulate([job.before for job in reversed(queue)])[::-1]
    found = [_no_jobs(n_visits)]
    last, slot = -1, 0
    for job, before in zip(queue, made[needs], strict=True):
        slot = slot + 1 if before == last else 0
        last = before
        if slot == len(found):
            found.append(_no_jobs(n_visits))
        after = made[job.after] if job.after >= 0 else -1
        if isinstance(job, Transfer):
            found[slot][:, before] = ring.groups[job.group].n_bytes, after, -1
        else:
            found[slot][:, before] = job.n_bytes, after, max(job.saved)
    return found


def _returns(candidate: Candidate, partition: Partition, visits: Sequence[Visit]) -> Indices:
    """After a visit, how many layers send something, and its bytes; and the visit whose must have left before. [3, V]

    Gradients, or activations.
    """
    found = np.zeros((3, len(visits)), np.intp)
    leaving = leaving_after(candidate, partition, visits)
    for visit, mine in leaving.items():
        found[:2, visit] = len(mine), sum(partition.layers[layer].gradient_bytes for layer in mine)
    for visit, n_bytes in saves(candidate, partition).items():
        found[:2, visit] += 1, n_bytes
    found[2] = -1
    held = held_up_by(leaving, partition, candidate)
    for visit, other in (*held.items(), *saves_held_up(candidate, partition).items()):
        found[2, visit + 1 : visit + 2] = np.maximum(found[2, visit + 1 : visit + 2], other)
    return found


def _side_by_side(columns: list[Indices], shape: tuple[int, ...]) -> Indices:
    """Equal arrays of this shape, one per candidate, as one. [..., C]"""
    return np.stack(columns, axis=-1) if columns else np.zeros((*shape, 0), np.intp)


@dataclass(frozen=True)
class Jobs:
    """Jobs of the link, at most one before each visit. Shapes: [visits, candidates]."""

    needed: Flags
    """Whether there is one, which the visit waits for."""
    seconds: Array
    after: Indices
    """The visit after which it may begin: a load's frees its memory; -1: when the pass begins."""
    saved: Indices | None
    """The visit of which what it sent must have left; -1: none; None: of no candidate."""


def _timed(jobs: Indices, costs: Costs) -> Jobs:
    n_bytes, after, saved = jobs
    needed = n_bytes >= 0
    seconds = np.where(needed, costs.link_latency_s + n_bytes / costs.link_bytes_per_s, 0.0)
    return Jobs(needed, seconds, after, saved if saved.max(initial=-1) >= 0 else None)


@dataclass(frozen=True)
class TrainingPass:
    """Per visit and candidate. Shapes: [visits, candidates]."""

    costs: Costs
    before_s: Array
    """Compute before it. [visits]"""
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
        comp_end = np.zeros((1 + n_visits, columns))  # first the beginning, which comes after visit -1
        sent = np.zeros((1 + n_visits, columns))  # likewise
        now, copy_end, sent_end, stall = (np.zeros(columns) for _ in range(4))
        for visit in range(n_visits):
            needs = np.zeros(columns, bool)
            for jobs in self.jobs:
                needed = jobs.needed[visit]
                begin = np.maximum(copy_end, comp_end[jobs.after[visit] + 1, every])
                if jobs.saved is not None:
                    begin = np.maximum(begin, sent[jobs.saved[visit] + 1, every])
                copy_end = np.where(needed, begin + jobs.seconds[visit] * link_factor, copy_end)
                needs = needs | needed
            now = now + self.before_s[visit] * compute_factor
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
