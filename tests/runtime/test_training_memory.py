"""The memory of training as a CPU measures it: what is predicted of it, and what a removed plan leaves."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from autosp import profiler
from autosp.cost_model.predict import predict
from autosp.devices import CpuDevice
from autosp.devices.memory import anonymous_bytes
from autosp.profiler.training import training_partition
from autosp.runtime.bench import Bench
from autosp.spec import Candidate, Profile, Tier
from autosp.workload import Workload
from models import vectors
from trained import loss_step

MB = 10**6
ALLOWED_BYTES = MB
"""What objects and small pieces of the heap may take more than predicted, whatever the model."""

WIDTH, LAYERS, ROWS = 1024, 6, 256
BACKWARD = tuple(range(1, LAYERS))
"""The first one's backward needs no weights."""

CANDIDATES = [
    pytest.param(Candidate(k=1, k_prime=1, recompute=BACKWARD), id="least"),
    pytest.param(Candidate(k=2, k_prime=1), id="window"),
    pytest.param(Candidate(k=4, k_prime=2), id="two at a time"),
    pytest.param(Candidate(k=4, k_prime=1, residents=(1, 4)), id="residents"),
    pytest.param(Candidate(k=4, k_prime=1, residents=(1, 4), recompute=(2, 3, 5)), id="residents, the others again"),
    pytest.param(Candidate(k=LAYERS, k_prime=1, residents=tuple(range(LAYERS))), id="all stay"),
]


@pytest.fixture(scope="module")
def workload() -> Workload:
    """Layers of 4 MB between activations of 1 MB: half of these are saved outside of all layers."""
    torch.manual_seed(0)
    layers = (part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH), nn.GELU()))
    device = CpuDevice(slow_tier=Tier.HOST)
    return Workload.of(nn.Sequential(*layers).train(), vectors(ROWS, WIDTH), loss_step, "training", device)


@pytest.fixture(scope="module")
def bench(workload: Workload, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    device = CpuDevice(slow_tier=Tier.HOST)
    folder: Path = tmp_path_factory.mktemp("bench")
    parts = training_partition(workload, device, folder)
    with Bench(workload.model, parts, device, folder, mode="training") as made:
        yield made
    device.close()


@pytest.fixture(scope="module")
def profile(bench: Bench, workload: Workload) -> Profile:
    return profiler.measure(bench, workload)


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_a_peak_is_as_predicted(bench: Bench, workload: Workload, profile: Profile, candidate: Candidate) -> None:
    (prediction,) = predict(profile, [candidate])
    with workload.leaving_no_trace():
        streamed = bench.apply(candidate)
        for _ in range(3):
            workload.run()
        streamed.remove()
        peak_bytes = streamed.stats().peak_bytes
    assert peak_bytes <= 1.01 * prediction.peak_bytes + ALLOWED_BYTES
    assert prediction.peak_bytes <= 1.06 * peak_bytes + ALLOWED_BYTES


def test_what_is_saved_between_layers_is_kept_in_any_case(profile: Profile) -> None:
    row_bytes = 4 * ROWS * WIDTH
    # Each but the first saves its input, and a GELU before it that one's; after the last layer come a GELU and the loss.
    expected = [0, *[2 * row_bytes] * (LAYERS - 2), 4 * row_bytes]
    assert [visit.kept_bytes for visit in profile.visits] == expected
    assert [visit.input_bytes for visit in profile.visits] == expected


def test_a_removed_plan_leaves_no_memory_to_the_garbage_collector(bench: Bench, workload: Workload) -> None:
    """Freed in the middle of the next trial it would hide as much of that one's peak."""

    def trial() -> int:
        with workload.leaving_no_trace():
            streamed = bench.apply(CANDIDATES[0].values[0])
            workload.run()
            streamed.remove()
        del streamed
        return anonymous_bytes()

    gc.collect()
    gc.disable()
    try:
        trial()
        before = trial()
        assert trial() < before + ALLOWED_BYTES
    finally:
        gc.enable()
