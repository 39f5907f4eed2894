"""What the demo compares with: accelerate's offloading of the same model, on the same batch, in the same process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from autosp.batch import equal
from autosp.devices import Device
from autosp.devices.cpu import resident_bytes
from autosp.settings import settings
from autosp.workload import Workload

PASSES = 3


@dataclass(frozen=True)
class PeerResult:
    """One system: median seconds of a pass, and the peak beyond the process without the model's weights.

    On a CPU a peer's weight files that it computes from in place, mapped, count as the memory they are resident in.
    """

    name: str
    latency_s: float
    peak_bytes: int
    same_output: bool


def accelerate_offload(model: nn.Module, batch: Any, reference: Any, device: Device) -> PeerResult:
    """`disk_offload` on a CPU, `cpu_offload` on an accelerator. The model stays offloaded: use it last."""
    from accelerate import cpu_offload, disk_offload

    workload = Workload.of(model, batch, None, "inference", device)
    if device.torch_device.type != "cpu":
        cpu_offload(model, execution_device=device.torch_device)
        return _measure("accelerate cpu_offload", workload, reference, device)
    cache = settings().cache_dir
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache, prefix="accelerate-") as folder:
        disk_offload(model, str(Path(folder)), execution_device=device.torch_device)
        return _measure("accelerate disk_offload", workload, reference, device)


def _measure(name: str, workload: Workload, reference: Any, device: Device) -> PeerResult:
    device.start_measuring()
    start_bytes, _ = resident_bytes()
    output = workload.run()
    samples = []
    for _ in range(PASSES):
        begin = time.perf_counter()
        output = workload.run()
        device.finish_compute()
        samples.append(time.perf_counter() - begin)
    on_cpu = device.torch_device.type == "cpu"
    peak_bytes = resident_bytes()[1] - start_bytes if on_cpu else device.peak_bytes()
    return PeerResult(name, median(samples), peak_bytes, equal(output, reference))
