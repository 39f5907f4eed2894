"""What a timeline says of the link and of compute: bytes, bandwidth, stalls, and the time of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from autosp.cost_model.predict import contended_periods, with_rings
from autosp.cost_model.simulate import Costs, costs_of, simulate
from autosp.schedule.actions import Kind
from autosp.schedule.lowering import lower_for
from autosp.schedule.timeline import Span, Timeline
from autosp.spec import Candidate, Partition, Profile


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One pass in the steady state."""

    pass_s: float
    moved_bytes: float
    link_busy_s: float
    stall_s: float
    layer_stalls_s: dict[int, float]
    """Layer -> seconds that compute waited for it, over all its visits. Streamed layers only."""
    read_bytes: float = 0.0
    """From disk to host, where layers rest behind it."""
    disk_busy_s: float = 0.0

    @property
    def bytes_per_s(self) -> float | None:
        """The link's bandwidth while it was busy; None if it never was."""
        return self.moved_bytes / self.link_busy_s if self.link_busy_s > 0 else None

    @property
    def disk_bytes_per_s(self) -> float | None:
        """The disk's bandwidth while it was busy; None if it never was."""
        return self.read_bytes / self.disk_busy_s if self.disk_busy_s > 0 else None


def expected_costs(profile: Profile, candidate: Candidate) -> Costs:
    """What each action takes while link and compute slow each other down as they do under this candidate."""
    found = contended_periods(profile, with_rings(profile, [candidate]))
    factors = (float(factor[0]) for factor in (found.compute_factor, found.link_factor, found.disk_factor))
    return costs_of(profile, candidate.group).contended(*factors)


def expected(profile: Profile, candidate: Candidate, periods: int) -> Timeline:
    """The timeline that the cost model expects: periods of the profiled pass, the first from empty buffers."""
    costs = expected_costs(profile, candidate)
    return simulate(lower_for(profile.mode, candidate, profile.partition), costs, periods)


def calls_periods(timeline: Timeline, partition: Partition, candidate: Candidate) -> int:
    """Periods of the partition in the last period of a timeline.

    A measured timeline counts calls of the model; one that loops within its forward runs several periods in a call. All
    microbatches of a group are in one call, and a predicted visit is that of all of them.
    """
    residents = set(candidate.residents)
    streamed = sum(layer not in residents for layer in partition.visits)
    last = len(timeline.period_ends_s) - 1
    seen = sum(
        span.period == last and span.action.layers[0] not in residents for span in timeline.of_kind(Kind.FORWARD)
    )
    return max(1, round(seen / (streamed * candidate.group))) if streamed else 1


def periods_of(timeline: Timeline, partition: Partition, candidate: Candidate) -> int:
    """How many periods of the partition a timeline has."""
    return len(timeline.period_ends_s) * calls_periods(timeline, partition, candidate)


def traffic(timeline: Timeline, partition: Partition, candidate: Candidate) -> Traffic:
    """A pass as the mean over the timeline, without its first period if there are others; its time is the median.

    Raises: ValueError if the timeline has no period.
    """
    ends = timeline.period_ends_s
    if not ends:
        raise ValueError("a timeline of no period has no traffic")
    first = min(1, len(ends) - 1)
    lengths = [end - begin for begin, end in zip((0.0, *ends), ends, strict=False)][first:]
    periods = calls_periods(timeline, partition, candidate)
    # The timeline's last periods -> periods of the partition -> one pass.
    share = partition.repeats / (periods * len(lengths))
    loads, reads = (
        [span for span in timeline.of_kind(kind) if span.period >= first] for kind in (Kind.LOAD, Kind.READ)
    )

    def moved(spans: Sequence[Span], layer_bytes: Sequence[int]) -> tuple[float, float]:
        n_bytes = sum(layer_bytes[layer] for span in spans for layer in span.action.layers)
        return n_bytes * share, sum(span.end_s - span.start_s for span in spans) * share

    moved_bytes, link_busy_s = moved(loads, [layer.n_bytes for layer in partition.layers])
    read_bytes, disk_busy_s = moved(reads, [layer.read_bytes for layer in partition.layers])

    stalls = dict.fromkeys((layer for layer in partition.visits if layer not in candidate.residents), 0.0)
    for span in timeline.computes:
        layer = span.action.layers[0]
        if span.period >= first and layer in stalls:
            stalls[layer] += span.stall_s * share
    return Traffic(
        pass_s=median(lengths) * partition.repeats / periods,
        moved_bytes=moved_bytes,
        link_busy_s=link_busy_s,
        read_bytes=read_bytes,
        disk_busy_s=disk_busy_s,
        stall_s=sum(stalls.values()),
        layer_stalls_s=stalls,
    )
