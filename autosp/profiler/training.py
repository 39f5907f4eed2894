"""What only a training pass tells: whose weights its backward needs, in which order, and what gets gradients."""

from __future__ import annotations

from pathlib import Path

from autosp.devices import Device
from autosp.partition import partition
from autosp.profiler import LEAST_MEMORY
from autosp.runtime.bench import Bench
from autosp.spec import Partition
from autosp.workload import Workload


def training_partition(workload: Workload, device: Device, cache_dir: Path) -> Partition:
    """The layers in the order of the forward, and of the backward as one pass under the least-memory plan shows it.

    The model is left as it was; what it raises passes through.

    Raises: SettingError if the step gives no loss; and what `partition` and `Bench` raise.
    """
    model = workload.model
    parts = partition(model, workload.run, device.torch_device, slow_tier=device.info.slow_tier, mode=workload.mode)
    visits = parts.visits * parts.repeats
    expected = parts.model_copy(update={"visits": visits, "repeats": 1, "backward": tuple(reversed(visits))})
    with workload.leaving_no_trace():
        with Bench(model, expected, device, cache_dir, mode="training") as bench:
            streamed = bench.apply(LEAST_MEMORY)
            try:
                workload.run_backward()
                backward = streamed.backward_visits
            finally:
                streamed.remove()
        gradients = {
            name: parameter.numel() * parameter.element_size()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    layers = tuple(
        layer.model_copy(update={"gradient_bytes": sum(gradients.get(name, 0) for name in layer.tensors)})
        for layer in expected.layers
    )
    return expected.model_copy(update={"layers": layers, "backward": backward})
