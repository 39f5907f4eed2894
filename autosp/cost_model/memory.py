"""Memory of a plan: what it reserves on the device and the host, and what of the arena is occupied over time."""

from __future__ import annotations

from collections.abc import Sequence

from autosp.schedule.actions import Kind
from autosp.schedule.arena import arena_bytes
from autosp.schedule.timeline import Timeline
from autosp.spec import Candidate, Partition, Profile, Tier


class DeviceMemory:
    """Peak device memory of a pass, for many candidates of one profile."""

    def __init__(self, profile: Profile) -> None:
        self._partition = profile.partition
        self._layer_bytes = [layer.n_bytes for layer in profile.partition.layers]
        self._resident_bytes = profile.partition.resident_bytes
        self._workspace_of = profile.planned_workspace_of

    def peak_bytes(self, candidate: Candidate, arena_bytes: int) -> int:
        """Resident tensors and layers, the arena, and the workspace.

        The workspace (activations, kernels' buffers, the allocator's own) was observed under the plans that the profile
        was made from; with it comes how far such an observation scatters. Of a group one microbatch computes at a time,
        and each of the others waits between two layers.
        """
        fixed_bytes = self._resident_bytes + self._workspace_of(candidate.group)
        return fixed_bytes + sum(map(self._layer_bytes.__getitem__, candidate.residents)) + arena_bytes

    def may_fit(self, candidate: Candidate, usable_bytes: int) -> bool:
        """Whether the candidate fits in the smallest arena that could hold its groups; found without placing them."""
        if self.peak_bytes(candidate, 0) > usable_bytes:
            return False
        return self.peak_bytes(candidate, self.least_arena_bytes(candidate)) <= usable_bytes

    def least_arena_bytes(self, candidate: Candidate) -> int:
        """The smallest arena that could hold the candidate's groups; found without placing them."""
        sizes = [sum(map(self._layer_bytes.__getitem__, group)) for group in candidate.groups(self._partition.visits)]
        return arena_bytes(sizes, candidate.depth)


def host_bytes(profile: Profile, candidate: Candidate, staging_bytes: int) -> int:
    """Host memory of a plan; none where the slow tier is the disk, for there all of a plan's RAM is the device's."""
    if profile.device.slow_tier is not Tier.HOST:
        return 0
    return resting_bytes(profile.partition, candidate) + staging_bytes


def resting_bytes(partition: Partition, candidate: Candidate) -> int:
    """What rests on the host: lookup tables, and layers that are neither resident nor on disk.

    And resident rows of a weight of which others rest there: a weight rests as a whole.
    """
    elsewhere = {*candidate.residents, *candidate.on_disk}
    tables = partition.lookups.n_bytes if partition.lookups else 0
    resting = partition.whole([layer.index for layer in partition.layers if layer.index not in elsewhere])
    return tables + sum(partition.layers[index].n_bytes for index in resting)


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
