"""Memory of a plan: what it reserves on the device and the host, and what of the arena is occupied over time."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import accumulate

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
        self._largest_bytes = [0, *accumulate(sorted(self._layer_bytes, reverse=True))]
        """Of so many layers, at most."""

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
        arena_bytes = usable_bytes - self.peak_bytes(candidate, 0)
        if arena_bytes < 0:
            return False
        most = min(candidate.depth * candidate.k_prime, len(self._layer_bytes))
        return self._largest_bytes[most] <= arena_bytes or self.least_arena_bytes(candidate) <= arena_bytes

    def least_arena_bytes(self, candidate: Candidate) -> int:
        """The smallest arena that could hold the candidate's groups; found without placing them."""
        sizes = [sum(map(self._layer_bytes.__getitem__, group)) for group in candidate.groups(self._partition.visits)]
        return arena_bytes(sizes, candidate.depth)


class HostMemory:
    """Host memory of plans, for many candidates of one profile.

    None where the slow tier is the disk, for there all of a plan's RAM is the device's.
    """

    def __init__(self, profile: Profile) -> None:
        self._counts = profile.device.slow_tier is Tier.HOST
        self._resting = Resting(profile.partition)
        self._gradient_bytes = [layer.gradient_bytes for layer in profile.partition.layers]

    def n_bytes(self, candidate: Candidate, staging_bytes: int) -> int:
        """Of what rests there, of the ring that disk is read into, and of the gradients of what a pass streams."""
        if not self._counts:
            return 0
        stay = sum(map(self._gradient_bytes.__getitem__, candidate.residents))
        return self._resting.n_bytes(candidate) + staging_bytes + sum(self._gradient_bytes) - stay


class Resting:
    """What rests on the host, for many candidates of one partition."""

    def __init__(self, partition: Partition) -> None:
        self._layer_bytes = [layer.n_bytes for layer in partition.layers]
        self._all_bytes = sum(self._layer_bytes) + (partition.lookups.n_bytes if partition.lookups else 0)
        runs: dict[str, set[int]] = {}
        for layer in partition.layers:
            if layer.rows is not None:
                runs.setdefault(layer.path, set()).add(layer.index)
        self._runs = list(runs.values())
        """The layers of each weight that is several."""

    def n_bytes(self, candidate: Candidate) -> int:
        """Lookup tables, and layers that are neither resident nor on disk.

        And resident rows of a weight of which others rest there: a weight rests as a whole.
        """
        elsewhere = {*candidate.residents, *candidate.on_disk}
        n_bytes = self._all_bytes - self._bytes_of(elsewhere)
        for runs in self._runs:
            if not elsewhere.issuperset(runs):
                n_bytes += self._bytes_of(elsewhere & runs)
        return n_bytes

    def _bytes_of(self, layers: AbstractSet[int]) -> int:
        return sum(map(self._layer_bytes.__getitem__, layers))


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
