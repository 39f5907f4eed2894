"""Latency of many candidates at once: the simulator's recurrence over arrays, one column per candidate.

`copy_end[j] = max(copy_end[j-1], comp_end[s(j)]) + latency + bytes_j / bandwidth`
`comp_end[i] = max(comp_end[i-1] + before_i, copy_end[i]) + forward_i`

iterated over periods until steady. The same numbers as `simulate` on the lowered action list (a property test holds the
two together), about a thousand times faster per candidate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autosp.cost_model.memory import peak_bytes
from autosp.cost_model.simulate import PERIODS, Costs, costs_of
from autosp.schedule.streaming import Ring, build_ring
from autosp.spec import Candidate, Prediction, Profile

Array = npt.NDArray[np.float64]

CONTENTION_ROUNDS = 4
"""Rounds of the fixed point between overlap and slowdown; it moves less than 0.1 % after three."""


def predict(profile: Profile, candidates: Sequence[Candidate]) -> list[Prediction]:
    """One prediction per candidate, in their order."""
    if not candidates:
        return []
    layer_bytes = [layer.n_bytes for layer in profile.partition.layers]
    visits = profile.partition.visits
    repeats = profile.partition.repeats
    rings = [build_ring(candidate, layer_bytes, visits) for candidate in candidates]
    latency_s, stall_s, _, _ = contended_periods(profile, rings)
    moved = [sum(ring.groups[transfer.group].n_bytes for transfer in ring.transfers) for ring in rings]
    return [
        Prediction(
            candidate=candidate,
            latency_s=float(latency_s[column]) * repeats,
            stall_s=float(stall_s[column]) * repeats,
            moved_bytes=moved[column] * repeats,
            peak_bytes=peak_bytes(profile, candidate, ring.arena_bytes),
        )
        for column, (candidate, ring) in enumerate(zip(candidates, rings, strict=True))
    ]


def contended_periods(profile: Profile, rings: Sequence[Ring]) -> tuple[Array, Array, Array, Array]:
    """Steady period, stall, compute factor and link factor of each ring, in seconds and ratios. Shapes: [C].

    Compute is slowed in proportion to the time the link is busy, and the link in proportion to the time compute is.
    """
    costs = costs_of(profile)
    link = profile.link
    load_s, after = _tables(rings, costs)
    compute_alone = sum(costs.before_s) + sum(costs.forward_s) + costs.tail_s
    link_alone = load_s.sum(axis=0)
    compute_factor = np.ones(len(rings))
    link_factor = np.ones(len(rings))
    period, stall = _steady(costs, load_s, after, compute_factor, link_factor)
    if link.compute_slowdown == 1 and link.link_slowdown == 1:
        return period, stall, compute_factor, link_factor
    for _ in range(CONTENTION_ROUNDS):
        link_busy = np.minimum(1.0, link_alone * link_factor / period)
        compute_busy = np.minimum(1.0, compute_alone * compute_factor / period)
        compute_factor = 1 + (link.compute_slowdown - 1) * link_busy
        link_factor = 1 + (link.link_slowdown - 1) * compute_busy
        period, stall = _steady(costs, load_s, after, compute_factor, link_factor)
    return period, stall, compute_factor, link_factor


def _tables(rings: Sequence[Ring], costs: Costs) -> tuple[Array, npt.NDArray[np.intp]]:
    """Per visit and candidate: seconds of the transfer it needs (0: none), and the visit that frees its memory.

    Shapes: [visits, candidates].
    """
    shape = (len(costs.forward_s), len(rings))
    load_s = np.zeros(shape)
    after = np.zeros(shape, dtype=np.intp)
    for column, ring in enumerate(rings):
        for transfer in ring.transfers:
            n_bytes = ring.groups[transfer.group].n_bytes
            load_s[transfer.before, column] = costs.link_latency_s + n_bytes / costs.link_bytes_per_s
            after[transfer.before, column] = transfer.after
    return load_s, after


def _steady(
    costs: Costs, load_s: Array, after: npt.NDArray[np.intp], compute_factor: Array, link_factor: Array
) -> tuple[Array, Array]:
    """Mean period and stall over the last two of `PERIODS` periods. Shapes: [C]."""
    n_visits, columns = load_s.shape
    needs = load_s > 0
    every = np.arange(columns)
    comp_end = np.zeros((2 * n_visits, columns))  # the period before, then this one
    now = np.zeros(columns)
    copy_end = np.zeros(columns)
    ends: list[Array] = []
    stalls: list[Array] = []
    for _ in range(PERIODS):
        comp_end[:n_visits] = comp_end[n_visits:]
        stall = np.zeros(columns)
        for visit in range(n_visits):
            freed = comp_end[after[visit] + n_visits, every]
            done = np.maximum(copy_end, freed) + load_s[visit] * link_factor
            copy_end = np.where(needs[visit], done, copy_end)
            now = now + costs.before_s[visit] * compute_factor
            ready = np.where(needs[visit], copy_end, now)
            stall += np.maximum(0.0, ready - now)
            now = np.maximum(now, ready) + costs.forward_s[visit] * compute_factor
            comp_end[n_visits + visit] = now
        now = now + costs.tail_s * compute_factor
        ends.append(now)
        stalls.append(stall)
    return (ends[-1] - ends[-3]) / 2, (stalls[-1] + stalls[-2]) / 2
