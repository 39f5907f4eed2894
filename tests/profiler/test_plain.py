"""Passes without a plan, which show compute that waits for nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autosp.devices.virtual import VirtualDevice
from autosp.profiler import measure, plain
from autosp.profiler.plain import plain_pass_s
from autosp.runtime.bench import Bench
from autosp.spec import Mode, Profile
from autosp.workload import Workload
from models import vectors

LAYERS, FORWARD_S, WAITING_FORWARD_S = 6, 0.5, 0.8


class Waking(nn.Linear):
    """Computes for longer while the link is busy, or just was."""

    def __init__(self, width: int, device: VirtualDevice) -> None:
        super().__init__(width, width)
        self.device = device

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        streamed = self.device.copies and self.device.copies[-1][1] > self.device.now_s - FORWARD_S
        self.device.spend(WAITING_FORWARD_S if streamed else FORWARD_S)
        return super().forward(input)


def virtual(width: int = 64, mode: Mode = "inference") -> tuple[VirtualDevice, Workload]:
    torch.manual_seed(0)
    device = VirtualDevice(bytes_per_s=4 * width * width)
    model = nn.Sequential(*(Waking(width, device) for _ in range(LAYERS)))
    step = (lambda model, batch: model(batch).sum()) if mode == "training" else None
    return device, Workload.of(model, vectors(2, width), step, mode, device)


def profiled(tmp_path: Path) -> Profile:
    device, workload = virtual()
    parts, _ = workload.observed_pass(device)
    with Bench(workload.model, parts, device, tmp_path) as bench:
        return measure(bench, workload)


def test_compute_is_that_of_a_pass_which_waits_for_nothing(tmp_path: Path) -> None:
    profile = profiled(tmp_path)
    assert profile.plain_s == pytest.approx(LAYERS * FORWARD_S)
    assert profile.least_compute_s == pytest.approx(LAYERS * FORWARD_S)
    assert profile.compute_s == pytest.approx(LAYERS * FORWARD_S, rel=0.05)
    assert profile.observed.prediction.latency_s == pytest.approx(profile.observed.measurement.latency_s, rel=0.05)


def test_without_such_a_pass_all_compute_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "available_bytes", lambda: 0)
    monkeypatch.setattr(plain, "anonymous_bytes", lambda: 0)
    profile = profiled(tmp_path)
    assert profile.plain_s is None
    assert profile.compute_s > LAYERS * FORWARD_S * 1.2


def test_weights_that_came_from_a_file_meanwhile_spoil_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = iter(range(100))
    monkeypatch.setattr(plain, "getrusage", lambda _: SimpleNamespace(ru_majflt=next(faults)))
    assert profiled(tmp_path).plain_s is None


def test_training_has_none(tmp_path: Path) -> None:
    device, workload = virtual(mode="training")
    with Bench(workload.model, workload.layers(device), device, tmp_path, mode="training") as bench:
        assert plain_pass_s(bench, workload, lambda text: None) is None
