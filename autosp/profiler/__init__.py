"""Measures everything the cost model needs: every visit of every layer, the links, and what these cost each other."""

from __future__ import annotations

import math
from collections.abc import Callable

from autosp.batch import signature
from autosp.cost_model.calibrate import calibrated, observations
from autosp.cost_model.placement import Placing, host_too_small
from autosp.cost_model.predict import predict
from autosp.cost_model.training_memory import memory_of
from autosp.partition import model_fingerprint
from autosp.profiler.layers import LEAST_MEMORY, Observation, group_peak_bytes, observe, observe_times
from autosp.profiler.links import HostProbe, measure_disk, measure_link, measure_return
from autosp.profiler.plain import plain_pass_s
from autosp.profiler.reading import measure_reading
from autosp.profiler.training import observe_training
from autosp.runtime.bench import Bench
from autosp.schedule.training import least_training
from autosp.spec import (
    PROFILE_SCHEMA_VERSION,
    Candidate,
    LayerProfile,
    LinkProfile,
    Measurement,
    Prediction,
    Profile,
    Trial,
)
from autosp.workload import Workload

__all__ = ["LEAST_MEMORY", "measure"]

OVERLAPPING = 4
"""Layers in the ring whose passes show what loads and compute cost each other."""

HEAP_SCATTER_OF_WORKSPACE = 0.35
"""On a CPU: how much more of the heap one plan's passes may take than another's, see [Note: holes]. Over 60 trials of a
model with 23 MB of workspace it was up to a third."""


def measure(
    bench: Bench,
    workload: Workload,
    progress: Callable[[str], None] = lambda text: None,
    budget_bytes: int | None = None,
) -> Profile:
    """The profile of a workload, taken under the least-memory plan and under a ring that overlaps loads with compute.

    A pass without a plan is timed, too, where that can be seen. The ring stays within the budget, if there is one;
    where none fits, nothing that does will overlap either. `progress` is told of each step.

    Raises: BudgetTooSmallError if the host's budget has no room for a layer.
    """
    partition = bench.partition
    trains = workload.mode == "training"
    least = _placed(bench, least_training(partition) if trains else LEAST_MEMORY, 1)
    if least is None:
        assert bench.host_budget_bytes is not None, "a host without a budget has room for all"
        raise host_too_small(partition, bench.host_budget_bytes)
    reads = measure_reading(bench, progress)
    plain_s = plain_pass_s(bench, workload, progress)
    if trains:
        observed = observe_training(bench, least, workload, progress)
    else:
        observed = observe(bench, least, workload.run, progress)
    links = _links(bench, progress)
    if trains:
        links = (*links, measure_return(bench.device, max(one.gradient_bytes for one in partition.layers), progress))
    if reads is not None:
        links = (*links[:-1], links[-1].model_copy(update=reads._asdict()))
    profile = Profile(
        schema_version=PROFILE_SCHEMA_VERSION,
        model_name=type(workload.model).__name__,
        model_fingerprint=model_fingerprint(workload.model),
        batch_signature=signature(workload.batch),
        mode=workload.mode,
        device=bench.device.info,
        partition=partition,
        visits=observed.visits,
        backward=observed.backward,
        tail_s=observed.tail_s,
        plain_s=plain_s,
        least_compute_s=min(observed.least_compute_s, plain_s or math.inf),
        links=links,
        workspace_bytes=0,
        observed=_trial(least, observed.measurement),
    )
    profile = profile.model_copy(update={"workspace_bytes": max(0, _beyond(profile, bench, least, observed))})
    ring = _overlapping(bench, profile, budget_bytes)
    if ring is not None:
        if trains:
            together = observe_training(bench, ring, workload, progress)
        else:
            together = observe_times(bench, ring, workload.run, progress)
        warm_bytes = _beyond(profile, bench, ring, together)
        workspace_bytes = max(profile.workspace_bytes, warm_bytes)
        profile = profile.model_copy(
            update={
                "workspace_bytes": workspace_bytes,
                "heap_scatter_bytes": max(0, warm_bytes + _heap_scatter(profile, warm_bytes) - workspace_bytes),
                "visits": tuple(map(_timed_as, observed.visits, together.visits)),
                "backward": together.backward,
                "tail_s": together.tail_s,
                "least_compute_s": min(profile.least_compute_s, together.least_compute_s),
                "overlapped": _trial(ring, together.measurement),
            }
        )
    if workload.group > 1:
        waiting_bytes = _waiting_bytes(profile, bench, least, workload, progress)
        profile = profile.model_copy(update={"waiting_bytes": waiting_bytes})
    return _predicted(calibrated(profile, observations(profile)))


def _waiting_bytes(
    profile: Profile, bench: Bench, candidate: Candidate, workload: Workload, progress: Callable[[str], None]
) -> int:
    """What a group was seen to take beyond what the cost model knows of, for each microbatch but the one that runs."""
    group = candidate.model_copy(update={"group": workload.group})
    bare = memory_of(profile.model_copy(update={"waiting_bytes": 0}))
    beyond = group_peak_bytes(bench, group, workload, progress) - bare.peak_bytes(group, bench.arena_bytes(group))
    return max(0, math.ceil(beyond / (workload.group - 1)))


def _beyond(profile: Profile, bench: Bench, candidate: Candidate, observed: Observation) -> int:
    """What the plan took beyond what the cost model knows of."""
    bare = memory_of(profile.model_copy(update={"workspace_bytes": 0}))
    return observed.measurement.peak_bytes - bare.peak_bytes(candidate, bench.arena_bytes(candidate))


def _heap_scatter(profile: Profile, warm_bytes: int) -> int:
    """How much more than in this process's second plan a workspace may take: the first one's has first uses in it.

    In training larger pieces have pages of their own, and an accelerator's allocator does not scatter.
    """
    scatters = profile.device.kind == "cpu" and profile.mode == "inference"
    return int(HEAP_SCATTER_OF_WORKSPACE * warm_bytes) if scatters else 0


def _timed_as(visit: LayerProfile, timed: LayerProfile) -> LayerProfile:
    return visit.model_copy(update={"before_s": timed.before_s, "forward_s": timed.forward_s})


def _trial(candidate: Candidate, measurement: Measurement) -> Trial:
    """Observed before anything could be predicted."""
    unknown = Prediction(candidate=candidate, latency_s=0, stall_s=0, moved_bytes=0, peak_bytes=0)
    return Trial(number=0, prediction=unknown, measurement=measurement)


def _predicted(profile: Profile) -> Profile:
    """With what the profile itself predicts of the plans that it was made from."""
    predictions = predict(profile, [trial.prediction.candidate for trial in observations(profile)])
    trials = (
        trial.model_copy(update={"prediction": prediction})
        for trial, prediction in zip(observations(profile), predictions, strict=True)
    )
    return profile.model_copy(update=dict(zip(("observed", "overlapped"), trials, strict=False)))


def _placed(bench: Bench, candidate: Candidate, read_ahead: int) -> Candidate | None:
    """On the host what its budget allows of the candidate's layers, the rest on disk; None if not even a ring fits."""
    if bench.host_budget_bytes is None:
        return candidate
    placed = Placing(candidate, bench.partition, bench.host_budget_bytes).with_read_ahead(read_ahead)
    return placed[0] if placed else None


def _overlapping(bench: Bench, profile: Profile, budget_bytes: int | None) -> Candidate | None:
    """The deepest ring, of up to `OVERLAPPING` layers, that fits the budget and overlaps loads with compute."""
    least = profile.observed.prediction.candidate
    for depth in range(min(OVERLAPPING, len(set(bench.partition.visits))), 1, -1):
        ring = _placed(bench, Candidate(k=depth, k_prime=1, recompute=least.recompute), 2)
        if ring is None:
            continue
        (prediction,) = predict(profile, [ring])
        if budget_bytes is None or prediction.peak_bytes <= budget_bytes:
            return ring
    return None


def _links(bench: Bench, progress: Callable[[str], None]) -> tuple[LinkProfile, ...]:
    """The link to the device and, where layers may rest behind the host, the one from disk, which is last."""
    device, partition = bench.device, bench.partition
    total, largest = partition.streamable_bytes, max(layer.n_bytes for layer in partition.layers)
    if bench.host_budget_bytes is None:
        return (measure_link(device, bench.store, total, largest, progress),)
    probe = HostProbe(device, largest)
    link = measure_link(device, probe, largest, largest, progress)
    device.synchronize()
    probe.close()
    return link, measure_disk(device, bench.store, total, largest, progress)
