"""Timed passes follow one another as in a loop: none begins with more loaded than the one before it left."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from torch import nn

import autosp
from autosp.devices.virtual import VirtualDevice
from autosp.profiler import LEAST_MEMORY, measure
from autosp.profiler.layers import Repeats, enough
from autosp.runtime.bench import Bench
from autosp.search.validate import Reference, validate
from autosp.spec import Candidate, Mode, Outcome
from autosp.workload import Workload
from models import vectors

WIDTH = 16


class Counting(VirtualDevice):
    """Counts how often the host waits for all copies."""

    waits = 0

    def synchronize(self) -> None:
        self.waits += 1
        super().synchronize()


def workload_on(device: VirtualDevice, mode: Mode) -> Workload:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
    step = (lambda model, batch: model(batch).sum()) if mode == "training" else None
    return Workload.of(model, vectors(2, WIDTH), step, mode, device)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_nothing_waits_for_loads_between_timed_passes(mode: Mode, tmp_path: Path) -> None:
    device = Counting(bytes_per_s=1e9)
    workload = workload_on(device, mode)
    plan = autosp.plan(workload.model, workload.batch, k=3, k_prime=1, mode=mode, step=workload.step, device=device)
    told: list[tuple[str, int]] = []

    def progress(text: str) -> None:
        told.append((text, device.waits))

    with Bench(workload.model, plan.partition, device, tmp_path, mode=mode) as bench:
        measure(bench, workload, progress)
        if mode == "training":
            reference = Reference.of_training(bench, workload)
        else:
            reference = Reference.of_inference(device, workload)
        found = validate(bench, workload, reference, 10**9, Candidate(k=3, k_prime=1), progress=progress)
    assert found.outcome is Outcome.FITS
    follow = [
        (waits, before)
        for (_, before), (text, waits) in zip(told, told[1:], strict=False)
        if "pass" in text and "cold" not in text and "memory" not in text and "without a plan" not in text
    ]
    assert len(follow) >= len(found.samples_s) + 2
    assert all(waits == before for waits, before in follow)


def test_asking_for_counters_after_each_pass_waits_for_no_load(tmp_path: Path) -> None:
    device = Counting(bytes_per_s=1e9)
    workload = workload_on(device, "inference")
    parts, _ = workload.observed_pass(device)
    with Bench(workload.model, parts, device, tmp_path) as bench:
        streamed = bench.apply(LEAST_MEMORY)
        workload.run()
        waits = device.waits
        for _ in range(5):
            workload.run()
            stats = streamed.stats()
        assert device.waits == waits
        assert stats.passes == 6 and all(seconds > 0 for seconds in stats.pass_s)
        streamed.timeline()
        assert device.waits == waits + 1
        streamed.remove()


@pytest.mark.parametrize(
    ("samples", "least", "cold_s", "told"),
    [
        ([0.5], 2, 0.5, False),
        ([0.5, 0.5], 2, 0.5, True),
        ([2.0], 2, 2.0, True),  # long, and the cold pass says the same
        ([2.0], 2, math.inf, True),
        ([2.0], 2, 1.8, False),  # the cold pass was faster: something came between
        ([2.0, 1.8], 2, 1.8, False),
        ([2.0, 1.8, 1.8], 2, 1.8, True),
        ([2.0], 1, 1.8, True),  # seen for its memory
        ([0.1], 1, 0.1, False),  # too short for any clock
    ],
)
def test_how_many_passes_are_enough(samples: list[float], least: int, cold_s: float, told: bool) -> None:
    assert enough(samples, Repeats(least, 0.3), cold_s) is told
