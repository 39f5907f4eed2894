"""Measures everything the cost model needs: every visit of every layer, and the links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from autosp.batch import signature
from autosp.cost_model.placement import Placing, host_too_small
from autosp.cost_model.predict import predict
from autosp.errors import SettingError
from autosp.partition import model_fingerprint
from autosp.profiler.layers import LEAST_MEMORY, observe
from autosp.profiler.links import HostProbe, measure_disk, measure_link
from autosp.runtime.bench import Bench
from autosp.spec import PROFILE_SCHEMA_VERSION, Candidate, LinkProfile, Partition, Prediction, Profile, Trial
from autosp.workload import Workload

__all__ = ["LEAST_MEMORY", "measure"]


def measure(bench: Bench, workload: Workload, progress: Callable[[str], None] = lambda text: None) -> Profile:
    """The profile of a workload, taken under the least-memory plan. `progress` is told of each step.

    Raises: SettingError if the pass never called a module that could be a layer; BudgetTooSmallError if the host's
    budget has no room for one.
    """
    partition = bench.partition
    if not partition.visits:
        raise SettingError(
            f"the pass called no layer of {type(workload.model).__name__} that holds weights of its own: "
            "check that sample_batch and step run the model"
        )
    least = _least_memory(bench)
    observed = observe(bench, least, workload.run, progress)
    links = _links(bench, _dtype(workload.model), observed.load_s, progress)
    placeholder = Prediction(candidate=least, latency_s=0, stall_s=0, moved_bytes=0, peak_bytes=0)
    profile = Profile(
        schema_version=PROFILE_SCHEMA_VERSION,
        model_name=type(workload.model).__name__,
        model_fingerprint=model_fingerprint(workload.model),
        batch_signature=signature(workload.batch),
        mode=workload.mode,
        device=bench.device.info,
        partition=partition,
        visits=observed.visits,
        tail_s=observed.tail_s,
        least_compute_s=observed.least_compute_s,
        links=links,
        workspace_bytes=observed.workspace_bytes,
        observed=Trial(number=0, prediction=placeholder, measurement=observed.measurement),
    )
    (prediction,) = predict(profile, [least])
    return profile.model_copy(
        update={"observed": Trial(number=0, prediction=prediction, measurement=observed.measurement)}
    )


def _least_memory(bench: Bench) -> Candidate:
    """One layer at a time on the device; on the host what its budget allows.

    Raises: BudgetTooSmallError if that has no room for a staging ring.
    """
    if bench.host_budget_bytes is None:
        return LEAST_MEMORY
    placed = Placing(LEAST_MEMORY, bench.partition, bench.host_budget_bytes).with_read_ahead(1)
    if placed is None:
        raise host_too_small(bench.partition, bench.host_budget_bytes)
    return placed[0]


def _links(bench: Bench, dtype: torch.dtype, load_s: float, progress: Callable[[str], None]) -> tuple[LinkProfile, ...]:
    """The link to the device and, where layers may rest behind the host, the one from disk."""
    device, partition = bench.device, bench.partition
    total, largest = partition.streamable_bytes, max(layer.n_bytes for layer in partition.layers)
    if bench.host_budget_bytes is None:
        link = measure_link(device, bench.store, total, largest, dtype, progress)
        return (link.model_copy(update={"bytes_per_s": in_pass_bytes_per_s(link, partition, load_s)}),)
    probe = HostProbe(device, largest)
    link = measure_link(device, probe, largest, largest, dtype, progress)
    device.synchronize()
    probe.close()
    return link, measure_disk(device, bench.store, total, largest, dtype, progress)


def in_pass_bytes_per_s(link: LinkProfile, partition: Partition, load_s: float) -> float:
    """The bandwidth that the loads of a real pass had, if lower than the sweep's.

    `load_s`: one period's loads under the least-memory plan, where nothing overlaps them: one transfer per visit.
    """
    moved = sum(partition.layers[index].n_bytes for index in partition.visits)
    busy_s = load_s - link.latency_s * len(partition.visits)
    return min(link.bytes_per_s, moved / busy_s) if busy_s > 0 else link.bytes_per_s


def _dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype of most weights."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in model.parameters():
        sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32
