"""Tuning under a budget of host memory: what the host has no room for rests on disk behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import equal
from autosp.devices import CpuDevice
from autosp.errors import BudgetError, BudgetTooSmallError, SettingError, StudyMismatchError
from autosp.profiler import host
from autosp.settings import settings
from autosp.spec import Outcome, Plan, Tier
from autosp.store import Repository
from models import EarlyExit, vectors

WIDTH = 384
GPU_GB = 0.030
CPU_GB = 0.008
"""Of 8 blocks of 4.7 MB."""


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    """Weights rest in host memory."""
    made = CpuDevice(slow_tier=Tier.HOST)
    yield made
    made.close()


def big() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return EarlyExit(blocks=8, width=WIDTH).eval(), vectors(4, WIDTH)


def test_tune_under_both_budgets_and_run(device: CpuDevice, tmp_path: Path) -> None:
    model, batch = big()
    with torch.no_grad():
        expected = model(batch)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters()}
    plan = autosp.tune(model, batch, GPU_GB, max_cpu_gb=CPU_GB, device=device, progress=False, max_trials=4)
    assert plan.measurement is not None and plan.prediction is not None
    assert plan.measurement.outcome is Outcome.FITS
    assert plan.measurement.misses == 0
    assert plan.host_budget_bytes == 8_000_000 >= plan.prediction.host_bytes
    assert plan.candidate.on_disk
    assert all(
        (id(tensor), True) == (before[name][0], equal(tensor, before[name][1]))
        for name, tensor in model.named_parameters()
    )
    assert [path.name for path in settings().cache_dir.iterdir()] == ["locks"]
    plan.save(tmp_path / "plan.json")
    streamed = autosp.apply(model, Plan.load(tmp_path / "plan.json"))
    with torch.no_grad():
        for _ in range(3):
            assert equal(model(batch), expected)
    assert streamed.stats().link_bytes["disk->host"] > 0
    assert streamed.stats().misses == 0
    streamed.remove()
    assert all(
        (id(tensor), True) == (before[name][0], equal(tensor, before[name][1]))
        for name, tensor in model.named_parameters()
    )
    with torch.no_grad():
        assert equal(model(batch), expected)
    assert autosp.tune(model, batch, GPU_GB, max_cpu_gb=CPU_GB, device=device, progress=False) == plan
    with Repository() as repository:
        profile = repository.profile(plan.study_name or "")
    assert profile is not None and profile.disk_link is not None
    assert (profile.disk_link.source, profile.disk_link.target) == (Tier.DISK, Tier.HOST)
    assert autosp.floor(profile, GPU_GB, CPU_GB) == plan.floor_s >= autosp.floor(profile, GPU_GB)
    assert all(one.host_bytes <= 8_000_000 for one in autosp.estimate(profile, GPU_GB, CPU_GB))
    with pytest.raises(StudyMismatchError, match="host_budget_bytes"):
        autosp.tune(model, batch, GPU_GB, device=device, progress=False, study_name=plan.study_name)


def test_a_host_with_room_for_all_needs_no_disk(device: CpuDevice) -> None:
    model, batch = big()
    plan = autosp.tune(model, batch, GPU_GB, max_cpu_gb=1, device=device, progress=False, max_trials=1)
    assert (plan.candidate.on_disk, plan.host_budget_bytes) == ((), None)
    profile = autosp.profile(model, batch, device=device, progress=False)
    assert profile.disk_link is None
    with pytest.raises(SettingError, match="no measurement of the disk"):
        autosp.estimate(profile, GPU_GB, CPU_GB)


def test_what_the_machine_has_is_the_limit_and_said(device: CpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "host_room_bytes", lambda parts: 8_000_000)
    model, batch = big()
    with pytest.warns(UserWarning, match=r"host memory has room for 0\.01 of the model's 0\.04 GB"):
        plan = autosp.plan(model, batch, k=2, k_prime=1, device=device)
    assert plan.host_budget_bytes == 8_000_000
    assert plan.candidate.on_disk and plan.candidate.read_ahead == 2


def test_without_an_accelerator_the_smaller_budget_holds() -> None:
    model, batch = big()
    plan = autosp.tune(model, batch, 1, max_cpu_gb=GPU_GB, device="cpu", progress=False, max_trials=3)
    assert (plan.budget_bytes, plan.host_budget_bytes, plan.candidate.on_disk) == (30_000_000, None, ())
    assert autosp.tune(model, batch, GPU_GB, device="cpu", progress=False) == plan


def test_a_host_budget_that_no_layer_fits(device: CpuDevice) -> None:
    model, batch = big()
    with pytest.raises(BudgetTooSmallError, match=r"of host memory: the least .*; try max_cpu_gb=") as caught:
        autosp.tune(model, batch, GPU_GB, max_cpu_gb=0.001, device=device, progress=False)
    assert autosp.list_studies() == []
    least_gb = caught.value.least_bytes / 1e9
    assert autosp.plan(model, batch, k=1, k_prime=1, max_cpu_gb=least_gb, device=device).candidate.read_ahead == 1


@pytest.mark.parametrize("budget", [0, -1, float("nan"), "8 apples", True])
def test_host_budgets_that_are_none(budget: object) -> None:
    model, batch = big()
    with pytest.raises(BudgetError, match="max_cpu_gb"):
        autosp.tune(model, batch, 1, max_cpu_gb=budget, device="cpu")  # type: ignore[arg-type]
