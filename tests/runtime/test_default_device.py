"""Plans where the caller's `torch.device(...)`, or torch's default device, is not the host: device "meta" stands for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import autosp
from autosp.devices import CpuDevice
from autosp.parcel import Parcel, open_parcel
from autosp.spec import Tier
from trained import loss_step

BATCH = torch.ones(3, 64)


class Part(nn.Module):
    """Parameters and buffers; in training a checkpoint of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(64, 64), nn.BatchNorm1d(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self._inner, x, use_reentrant=False) if self.training else self._inner(x)

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(self.linear(x)))


def parts() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Part() for _ in range(4)))


def devices(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in model.state_dict().values()}


@pytest.mark.parametrize("tier", [Tier.DISK, Tier.HOST])
def test_a_pass_and_what_is_before_and_after_it(tier: Tier) -> None:
    model = parts().eval()
    plain = model(BATCH)
    with torch.device("meta"):
        plan = autosp.plan(model, BATCH, k=3, k_prime=1, residents=1, device=CpuDevice(slow_tier=tier))
        with autosp.apply(model, plan, device=CpuDevice(slow_tier=tier)):
            streamed = model(BATCH)
    assert torch.equal(streamed, plain)
    assert devices(model) == {"cpu"}
    assert torch.equal(model(BATCH), plain)


@pytest.mark.parametrize("max_cpu_gb", [None, "255KB"], ids=["in memory", "state on disk"])
def test_training(max_cpu_gb: str | None) -> None:
    streamed, plain = parts(), parts()
    with torch.device("meta"):
        plan = autosp.plan(streamed, BATCH, k=2, k_prime=1, mode="training", step=loss_step, device="cpu")
    for model in (streamed, plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        applied = None
        if model is streamed:
            with torch.device("meta"):
                applied = autosp.apply(model, plan, optimizer=optimizer, max_cpu_gb=max_cpu_gb)
        for _ in range(2):
            with torch.device("meta"):
                loss = loss_step(model, BATCH)
            loss.backward()
            with torch.device("meta"):
                optimizer.step()
            optimizer.zero_grad()
        if applied is not None:
            with torch.device("meta"):
                applied.remove()
    assert devices(streamed) == {"cpu"}
    for ours, theirs in zip(streamed.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_that_is_sent_to_another_process(tmp_path: Path) -> None:
    model = parts().eval()
    plain = model(BATCH)
    with torch.device("meta"):
        parcel = Parcel(model, tmp_path)
        with parcel.moved(model):
            arrived = open_parcel(parcel.pickled, parcel.places, parcel.descriptor)
            assert torch.equal(model(BATCH), plain)
        parcel.close()
    assert devices(model) == devices(arrived) == {"cpu"}
    assert torch.equal(arrived(BATCH), plain) and torch.equal(model(BATCH), plain)


def test_tuning(tmp_path: Path) -> None:
    model = parts().eval()
    plain = model(BATCH)
    with torch.device("meta"):
        plan = autosp.tune(model, BATCH, 1, storage=str(tmp_path / "studies.db"), max_trials=1, progress=False)
    assert plan.measurement is not None
    assert devices(model) == {"cpu"}
    assert torch.equal(model(BATCH), plain)
