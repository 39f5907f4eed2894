"""Device memory of a plan: what it reserves, and what of it is occupied over time."""

from __future__ import annotations

from collections.abc import Sequence

from autosp.schedule.actions import Kind
from autosp.schedule.timeline import Timeline
from autosp.spec import Candidate, Profile


def peak_bytes(profile: Profile, candidate: Candidate, arena_bytes: int) -> int:
    """Peak device memory of a pass: resident tensors and layers, the arena, and the workspace.

    The workspace (activations, kernels' buffers, the allocator's own) was observed under the least-memory plan.
    """
    layers = profile.partition.layers
    residents = sum(layers[index].n_bytes for index in candidate.residents)
    return profile.partition.resident_bytes + residents + arena_bytes + profile.workspace_bytes


def occupancy(timeline: Timeline, layer_bytes: Sequence[int]) -> list[tuple[float, int]]:
    """Arena bytes in use over time, as (second, bytes) steps.

    A layer occupies its range from the start of its load until its eviction.
    """
    steps: list[tuple[float, int]] = []
    for span in timeline.spans:
        n_bytes = sum(layer_bytes[layer] for layer in span.action.layers)
        if span.action.kind is Kind.LOAD:
            steps.append((span.start_s, n_bytes))
        elif span.action.kind is Kind.EVICT:
            steps.append((span.end_s, -n_bytes))
    curve: list[tuple[float, int]] = []
    total = 0
    for when, change in sorted(steps):  # at equal times an eviction (negative) comes before the load it makes room for
        total += change
        curve.append((when, total))
    return curve
