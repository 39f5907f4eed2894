"""What the executor's own Python costs per layer call: forwards that do nothing, copies that take no time.

python studies/executor_overhead.py
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from record import markdown, save
from torch import nn

from autosp.devices import CpuDevice, Region
from autosp.devices.cpu import CopyEvent
from autosp.partition import bind, partition
from autosp.runtime.streamed_model import StreamedModel
from autosp.schedule.streaming import lower
from autosp.spec import Candidate, Tier
from autosp.tiers import HostStore, Originals

LAYERS = 160
PASSES = 60
TARGET_US = 30.0


class InstantDevice(CpuDevice):
    """Copies are over when they are issued, and moved nothing."""

    def copy(
        self, regions: Sequence[Region], target: torch.Tensor, after: None = None, written: CopyEvent | None = None
    ) -> CopyEvent:
        """A finished event."""
        event = CopyEvent()
        event.set()
        return event


class Idle(nn.Module):
    """A layer with so many weight tensors that computes nothing."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(16384)) for _ in range(tensors))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give back what came."""
        for weight in self.weights if x.numel() else ():
            x = x + weight[:1]
        return x


def overhead_us(tensors: int, candidate: Candidate) -> list[float]:
    """Per pass: microseconds per layer call beyond the plain model's."""
    model = nn.Sequential(*(Idle(tensors) for _ in range(LAYERS)))
    device = InstantDevice(slow_tier=Tier.HOST)
    parts = partition(model, lambda: model(torch.ones(1)), torch.device("cpu"))
    assert len(parts.layers) == LAYERS, "every layer streams"
    nothing = torch.empty(0)

    def seconds() -> float:
        begin = time.perf_counter()
        model(nothing)
        return time.perf_counter() - begin

    with torch.no_grad():
        plain_s = median(seconds() for _ in range(PASSES))
        schedule = lower(candidate, [layer.n_bytes for layer in parts.layers], parts.visits)
        store = HostStore(bind(model, parts).layers, device)
        streamed: StreamedModel[nn.Module] = StreamedModel(
            bind(model, parts), schedule, device, store, Originals.KEPT, store.close
        )
        samples = [seconds() for _ in range(PASSES)][PASSES // 4 :]
        assert streamed.stats().misses == 0
        streamed.remove()
    return [(sample - plain_s) / LAYERS * 1e6 for sample in samples]


def main() -> None:
    """A leaf module, a norm's neighbour, a whole block; one layer per transfer, and four."""
    torch.set_num_threads(1)
    rows = []
    figures = {}
    for tensors in (1, 2, 9, 16):
        for candidate in (Candidate(k=4, k_prime=1), Candidate(k=8, k_prime=4)):
            samples = overhead_us(tensors, candidate)
            name = f"{tensors} tensors a layer, {candidate.label()}"
            figures[name] = samples
            held = "yes" if median(samples) < TARGET_US else "no"
            rows.append([name, f"{median(samples):.1f}", f"{max(samples):.1f}", held])
    columns = ["", "median, µs per layer call", "worst pass", f"below {TARGET_US:g}"]
    save("executor_overhead", figures, markdown(columns, rows))


if __name__ == "__main__":
    main()
