"""Measures everything the cost model needs: every visit of every layer, and the link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from autosp.batch import signature
from autosp.cost_model.predict import predict
from autosp.errors import SettingError
from autosp.partition import model_fingerprint
from autosp.profiler.layers import LEAST_MEMORY, observe
from autosp.profiler.links import measure_link
from autosp.runtime.bench import Bench
from autosp.spec import Prediction, Profile, Trial
from autosp.workload import Workload

__all__ = ["LEAST_MEMORY", "measure"]

MOST_SLOWDOWN = 2.0
"""A link that compute slows down by more than this was disturbed by something else."""

LEAST_STALL_SHARE = 0.1
"""Share of a pass that must be waiting for the link, for the pass to tell how fast the link is."""


def measure(bench: Bench, workload: Workload, progress: Callable[[str], None] = lambda text: None) -> Profile:
    """The profile of a workload, taken under the least-memory plan. `progress` is told of each step.

    Raises: SettingError if the pass never called a module that could be a layer.
    """
    partition = bench.partition
    if not partition.visits:
        raise SettingError(
            f"the pass called no layer of {type(workload.model).__name__} that holds weights of its own: "
            "check that sample_batch and step run the model"
        )
    observed = observe(bench, workload.run, progress)
    link = measure_link(
        bench.device,
        bench.store,
        partition.streamable_bytes,
        max(layer.n_bytes for layer in partition.layers),
        _dtype(workload.model),
        progress,
    )
    placeholder = Prediction(candidate=LEAST_MEMORY, latency_s=0, stall_s=0, moved_bytes=0, peak_bytes=0)
    profile = Profile(
        model_name=type(workload.model).__name__,
        model_fingerprint=model_fingerprint(workload.model),
        batch_signature=signature(workload.batch),
        mode=workload.mode,
        device=bench.device.info,
        partition=partition,
        visits=observed.visits,
        tail_s=observed.tail_s,
        links=(link,),
        workspace_bytes=observed.workspace_bytes,
        observed=Trial(number=0, prediction=placeholder, measurement=observed.measurement),
    )
    profile = calibrate(profile)
    (prediction,) = predict(profile, [LEAST_MEMORY])
    return profile.model_copy(update={"observed": Trial(number=0, prediction=prediction, measurement=observed.measurement)})


def calibrate(profile: Profile) -> Profile:
    """Set the link's slowdown under compute so that the least-memory plan's own pass is predicted as observed.

    The probe beside a matrix product misses what a real pass costs the link. Where the observed pass hardly waited for
    the link there is nothing to learn, and the probe stands.
    """
    observed_s = profile.observed.measurement.latency_s

    def predicted(slowdown: float) -> tuple[Profile, Prediction]:
        links = (profile.link.model_copy(update={"link_slowdown": slowdown}), *profile.links[1:])
        changed = profile.model_copy(update={"links": links})
        return changed, predict(changed, [LEAST_MEMORY])[0]

    low, high = 1.0, MOST_SLOWDOWN
    if predicted(high)[1].stall_s < LEAST_STALL_SHARE * observed_s:
        return profile
    for _ in range(20):
        middle = (low + high) / 2
        if predicted(middle)[1].latency_s < observed_s:
            low = middle
        else:
            high = middle
    return predicted(high)[0]


def _dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype of most weights."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in model.parameters():
        sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32
