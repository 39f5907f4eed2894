"""Predicts many candidates at once: their time, with what compute and links cost each other, their memory and traffic.

What a pass takes is `steady` in inference, `training_pass` in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from autosp.cost_model.memory import HostMemory
from autosp.cost_model.offload_memory import offloaded_bytes
from autosp.cost_model.simulate import Costs, costs_of
from autosp.cost_model.steady import Array, SteadyTraffic
from autosp.cost_model.training_memory import memory_of
from autosp.cost_model.training_pass import TrainingTraffic
from autosp.schedule.lowering import rings_of
from autosp.schedule.streaming import Ring
from autosp.spec import Candidate, Prediction, Profile

CONTENTION_ROUNDS = 4
"""Rounds of the fixed point between overlap and slowdown; it moves less than 0.1 % after three."""

Pair = tuple[Candidate, Ring]


class Timed(Protocol):
    """The transfers of C candidates, at the latencies and bandwidths of some costs."""

    @property
    def link_s(self) -> Array:
        """How long the link to the device is busy per pass if nothing slows it. [C]"""

    @property
    def disk_s(self) -> Array:
        """The same of the disk. [C]"""

    def run(self, compute_factor: Array, link_factor: Array, disk_factor: Array) -> tuple[Array, Array]:
        """Length and stall of a pass while everything takes these times longer. Shapes: [C]."""


class Traffic(Protocol):
    """The same before it is known how long anything takes."""

    def timed(self, costs: Costs) -> Timed:
        """At the costs' latencies and bandwidths."""


def predict(profile: Profile, candidates: Sequence[Candidate]) -> list[Prediction]:
    """One prediction per candidate, in their order."""
    return predict_rings(profile, with_rings(profile, candidates))


def with_rings(profile: Profile, candidates: Iterable[Candidate]) -> Iterator[Pair]:
    """Each candidate with its ring, built when it is asked for.

    Neighbours that differ in nothing but the layers that they offload, or compute again in their backward visits, have
    one ring, which is built once; a block that is computed again is visited, and loaded, once more.
    """
    found: tuple[Candidate, Ring] | None = None
    ring_of = rings_of(profile.mode, profile.partition)
    in_blocks = profile.partition.in_blocks
    for candidate in candidates:
        again = tuple(in_blocks.intersection(candidate.recompute))
        loads_as = candidate.model_copy(update={"recompute": again, "offload": ()})
        if found is None or found[0] != loads_as:
            found = loads_as, ring_of(candidate)
        yield candidate, found[1]


def predict_rings(profile: Profile, pairs: Iterable[Pair]) -> list[Prediction]:
    """`predict`, where the candidates' rings are at hand."""
    return Predictor(profile, pairs).predict(profile)


class Predictor:
    """Predicts the same candidates from one profile after another, which differ in their costs only.

    No ring is kept: of a thousand each has hundreds of parts.
    """

    def __init__(self, profile: Profile, pairs: Iterable[Pair]) -> None:
        memory, host = memory_of(profile), HostMemory(profile)
        self._figures: list[dict[str, Any]] = []
        self._groups: list[int] = []

        def noted() -> Iterator[Pair]:
            before: Ring | None = None
            traffic: dict[str, int] = {}
            for candidate, ring in pairs:
                if ring is not before:
                    before, traffic = ring, _bytes_of(candidate, ring, host, profile.partition.repeats)
                peak_bytes = memory.peak_bytes(candidate, ring.arena_bytes)
                figures = {"candidate": candidate, "peak_bytes": peak_bytes, **traffic}
                if candidate.offload:
                    away = offloaded_bytes(profile, candidate)
                    figures |= {"offloaded_bytes": away, "host_bytes": traffic["host_bytes"] + away}
                self._figures.append(figures)
                self._groups.append(candidate.group)
                yield candidate, ring

        self._traffic = _traffic(profile, noted())

    @property
    def candidates(self) -> list[Candidate]:
        """In the order of their predictions."""
        return [figures["candidate"] for figures in self._figures]

    def predict(self, profile: Profile) -> list[Prediction]:
        """One prediction per candidate, in their order."""
        repeats = profile.partition.repeats
        periods = _periods(profile, self._traffic, self._groups)
        return [
            Prediction(latency_s=float(period_s) * repeats, stall_s=float(stall_s) * repeats, **figures)
            for figures, period_s, stall_s in zip(self._figures, periods.period_s, periods.stall_s, strict=True)
        ]


def _bytes_of(candidate: Candidate, ring: Ring, host: HostMemory, repeats: int) -> dict[str, int]:
    """What a pass moves and reads, and what rests on the host: the same for all candidates of one ring."""
    moved = sum(ring.groups[transfer.group].n_bytes for transfer in ring.transfers)
    read = sum(ring.staging.group_bytes[read.group] for read in ring.staging.reads)
    host_bytes = host.n_bytes(candidate, ring.staging.n_bytes)
    return {"moved_bytes": moved * repeats, "read_bytes": read * repeats, "host_bytes": host_bytes}


class Periods(NamedTuple):
    """The steady period of each of C candidates, and how many times longer everything takes in it. Shapes: [C].

    A group computes as many times longer as it has microbatches.
    """

    period_s: Array
    stall_s: Array
    compute_factor: Array
    link_factor: Array
    disk_factor: Array


def contended_periods(profile: Profile, pairs: Iterable[Pair]) -> Periods:
    """Steady period and stall of each candidate, while compute, link and disk slow each other down.

    Each is slowed in proportion to the share of its own time in which the other is busy too. See `beside_compute_s`.
    What gradients on their way cost compute is not told apart from compute.
    """
    pairs = list(pairs)
    return _periods(profile, _traffic(profile, pairs), [candidate.group for candidate, _ in pairs])


def _traffic(profile: Profile, pairs: Iterable[Pair]) -> Traffic:
    partition = profile.partition
    if profile.mode == "training":
        return TrainingTraffic(partition, pairs)
    return SteadyTraffic((ring for _, ring in pairs), len(partition.visits))


def _periods(profile: Profile, traffic: Traffic, groups: Sequence[int]) -> Periods:
    link, disk = profile.link, profile.disk_link
    timed = traffic.timed(costs_of(profile))
    ones, often = np.ones_like(timed.link_s), np.array(groups, float)
    found = Periods(*timed.run(often, ones, ones), often, ones, ones)
    slowdowns = [link.compute_slowdown, link.link_slowdown]
    slowdowns += [disk.compute_slowdown, disk.link_slowdown] if disk else [1.0, 1.0]
    if max(slowdowns) == 1:
        return found
    by_link, on_link, by_disk, on_disk = (slowdown - 1 for slowdown in slowdowns)
    for _ in range(CONTENTION_ROUNDS):
        compute_s = found.period_s - found.stall_s
        link_s, disk_s = timed.link_s * found.link_factor, timed.disk_s * found.disk_factor
        link_beside, disk_beside = beside_compute_s(link_s, found.stall_s), beside_compute_s(disk_s, found.stall_s)
        factors = (
            often * (1 + by_link * _share(link_beside, compute_s) + by_disk * _share(disk_beside, compute_s)),
            1 + on_link * _share(link_beside, link_s),
            1 + on_disk * _share(disk_beside, disk_s),
        )
        found = Periods(*timed.run(*factors), *factors)
    return found


def beside_compute_s(busy_s: Array, stall_s: Array) -> Array:
    """Of the time in which a link is busy, what compute is busy in too: all but the stalls, which it is busy in. [C]"""
    return np.maximum(0.0, busy_s - stall_s)


def _share(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0).clip(0.0, 1.0)
