"""Training by the public names: plan, apply, an ordinary loop; and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import equal
from autosp.devices import CpuDevice
from autosp.errors import PlanMismatchError, SettingError
from autosp.spec import Tier
from models import Headed, Stack, make, tokens, vectors


def loss_step(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()


def train(model: nn.Module, batch: Any, steps: int = 4) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        loss_step(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


SETTINGS: list[dict[str, int]] = [
    {"k": 1, "k_prime": 1},
    {"k": 4, "k_prime": 2, "recompute": 5},
    {"k": 5, "k_prime": 1, "residents": 3},
    {"k": 14, "k_prime": 1, "residents": 14, "recompute": 7},
    {"k": 3, "k_prime": 1, "residents": 1, "recompute": 2, "offload": 4},
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_saved_plan_trains_as_plain_torch_does(setting: dict[str, int], tmp_path: Path) -> None:
    model, batch = make("stack")
    model.train()
    twin = copy.deepcopy(model)
    autosp.plan(model, batch, mode="training", step=loss_step, device="cpu", **setting).save(tmp_path / "plan.json")
    plan = autosp.Plan.load(tmp_path / "plan.json")
    assert plan.mode == "training"
    assert plan.device.slow_tier is Tier.HOST
    again = [unit for unit in plan.partition.recomputable if {*unit} & {*plan.candidate.recompute}]
    assert len(again) == setting.get("recompute", 0)
    assert sorted(layer for unit in again for layer in unit) == list(plan.candidate.recompute)
    assert len(plan.candidate.offload) == setting.get("offload", 0)
    with autosp.apply(model, plan) as applied:
        train(applied, batch)
    train(twin, batch)
    assert equal(dict(model.state_dict()), dict(twin.state_dict()))


def test_the_plan_says_what_a_step_does() -> None:
    model, batch = make("stack")
    for parameter in model.blocks[2].parameters():
        parameter.requires_grad_(False)
    plan = autosp.plan(model, batch, k=2, k_prime=1, mode="training", step=loss_step, device="cpu")
    layers = {layer.name: layer for layer in plan.partition.layers}
    assert plan.partition.visits == tuple(range(14))
    assert plan.partition.backward == tuple(range(13, 0, -1))  # an embedding's backward needs no weights
    assert layers["embed"].gradient_bytes == 4 * model.embed.weight.numel()
    assert layers["blocks.2.up"].gradient_bytes == 0


def test_a_step_of_two_forwards_is_one_pass() -> None:
    model, batch = make("stack")
    twin = copy.deepcopy(model)

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss_step(model, batch) + loss_step(model, tokens(2, 7))

    plan = autosp.plan(model, batch, k=2, k_prime=1, mode="training", step=step, device="cpu")
    assert plan.partition.repeats == 1
    assert plan.partition.visits == 2 * tuple(range(14))
    with autosp.apply(model, plan):
        step(model, batch).backward()
    step(twin, batch).backward()
    assert all(equal(*both) for both in zip(gradients(model), gradients(twin), strict=True))


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    return [parameter.grad for parameter in model.parameters()]


def test_gradients_that_were_there_are_kept() -> None:
    model, batch = make("stack")
    twin = copy.deepcopy(model)
    for one in (model, twin):
        loss_step(one, batch).backward()
    plan = autosp.plan(model, batch, k=2, k_prime=1, mode="training", step=loss_step, device="cpu")
    with autosp.apply(model, plan):
        loss_step(model, batch).backward()
        assert all(equal(*both) for both in zip(gradients(model), gradients(twin), strict=True)) is False
        loss_step(twin, batch).backward()
        assert all(equal(*both) for both in zip(gradients(model), gradients(twin), strict=True))
    assert all(equal(*both) for both in zip(gradients(model), gradients(twin), strict=True))


def test_what_a_budget_counts_stays_small() -> None:
    """Arena, activations and gradients under way; neither weights nor gradients at rest."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(12)))
    batch = vectors(4, 1024)
    plan = autosp.plan(model, batch, k=2, k_prime=1, mode="training", step=loss_step, device="cpu")
    with autosp.apply(model, plan):
        loss_step(model, batch).backward()
    streamed = autosp.apply(model, plan)
    for _ in range(3):
        model.zero_grad()
        loss_step(model, batch).backward()
    peak_bytes = streamed.stats().peak_bytes
    streamed.remove()
    weight_bytes = 12 * 4 * 1024 * 1024
    assert peak_bytes < weight_bytes * 7 / 12  # a place for two; up to three gradients and their kernels' memory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": None}, "needs step"),
        ({"step": lambda model, batch: model(batch)}, "a tensor of shape"),
        ({"step": lambda model, batch: loss_step(model, batch).detach()}, "requires no gradient"),
        ({"step": lambda model, batch: 1.0}, "step returned a float"),
        ({"max_cpu_gb": 1}, "give it to autosp.apply"),
        ({"recompute": 8}, "visits 6 blocks, and 1 layers that are in none"),
        ({"recompute": -1}, "visits 6 blocks"),
        ({"recompute": True}, "visits 6 blocks"),
        ({"recompute": 3, "offload": 8}, "7 layers are streamed, go backward and are not recomputed"),
        ({"offload": -1}, "13 layers are streamed"),
        ({"offload": True}, "13 layers are streamed"),
        ({"device": CpuDevice()}, "rest on disk, and training updates them"),
        ({"mode": "inference", "step": None, "recompute": 1}, "for mode='training' only"),
        ({"mode": "inference", "step": None, "offload": 1}, "for mode='training' only"),
    ],
)
def test_what_cannot_be_planned(changes: dict[str, Any], message: str) -> None:
    model, batch = make("stack")
    before = copy.deepcopy(model.state_dict())
    setting: dict[str, Any] = {"k": 2, "k_prime": 1, "mode": "training", "step": loss_step, "device": "cpu"}
    with pytest.raises(SettingError, match=message):
        autosp.plan(model, batch, **(setting | changes))
    assert equal(dict(model.state_dict()), dict(before))
    assert gradients(model) == [None] * len(gradients(model))


def test_an_oversized_weight_travels_as_a_whole() -> None:
    """Of a weight that is computed with run by run there would be no gradient."""
    torch.manual_seed(0)
    model, batch = Headed().train(), tokens(3, 11)
    twin = copy.deepcopy(model)
    assert autosp.plan(model, batch, k=2, k_prime=1, device="cpu").partition.leaves
    plan = autosp.plan(model, batch, k=2, k_prime=1, mode="training", step=loss_step, device="cpu")
    assert not plan.partition.leaves
    with autosp.apply(model, plan):
        for one in (model, twin):
            loss_step(one, batch).backward()
        assert all(equal(*both) for both in zip(gradients(model), gradients(twin), strict=True))


def test_a_plan_is_for_its_model() -> None:
    model, batch = make("stack")
    plan = autosp.plan(model, batch, k=2, k_prime=1, mode="training", step=loss_step, device="cpu")
    with pytest.raises(PlanMismatchError):
        autosp.apply(Stack(blocks=2), plan)
