"""Times passes without a plan: compute that waits for nothing, where the model at rest can show it."""

from __future__ import annotations

from collections.abc import Callable
from resource import RUSAGE_SELF, getrusage
from statistics import median

from autosp.devices.memory import anonymous_bytes
from autosp.profiler.layers import ENOUGH, enough
from autosp.runtime.bench import Bench, timed_pass
from autosp.tiers.host import available_bytes
from autosp.workload import Workload


def plain_pass_s(bench: Bench, workload: Workload, progress: Callable[[str], None]) -> float | None:
    """Seconds of a pass of the model at rest. None where that is no pass of the device's, with all weights in memory.

    So it is None on an accelerator; where memory has no room for the weights; where a page of them came from a file
    that was not in memory; and in training, whose heap is another one under a plan. What the model raises passes
    through.
    """
    if bench.device.torch_device.type != "cpu" or workload.mode == "training":
        return None
    if bench.partition.total_bytes > available_bytes() + anonymous_bytes():
        return None
    samples: list[float] = []
    while not enough(samples, ENOUGH):
        progress(f"pass without a plan {len(samples) + 1}")
        faults = getrusage(RUSAGE_SELF).ru_majflt
        seconds, _ = timed_pass(bench.device, workload.run)
        if getrusage(RUSAGE_SELF).ru_majflt > faults or seconds <= 0:
            return None
        samples.append(seconds)
    return median(samples)
