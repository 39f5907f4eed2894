"""What other libraries do with a model that a plan is applied to. torch's device without memory stands for another."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import nn
from torch.amp import grad_scaler

from autosp.runtime import surroundings
from autosp.runtime.surroundings import bring_state, surrounded

META = torch.device("meta")


def outside() -> bool:
    """No pass runs."""
    return False


def devices(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in model.state_dict().values()}


def test_a_move_to_the_plan_s_device_leaves_a_model_where_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    around = nn.Sequential(model)
    with surrounded(model, META, "inference", outside):
        assert model.to(META) is model
        around.to("meta")  # as an adapter's wrapper is moved
        assert devices(model) == {"cpu"}
        assert copy.deepcopy(model).to(META)[0].weight.device == META
        assert devices(model) == {"cpu"}
        model.to(torch.float64)
        assert model[0].weight.dtype == torch.float64
        model.half()
        assert model[0].weight.dtype == torch.float16
        assert model.to(META, torch.float16) is model
        assert devices(model) == {"cpu"}
    assert "_apply" not in vars(model)
    assert devices(model.to(META)) == {"meta"}


def test_a_move_elsewhere_is_a_move() -> None:
    model = nn.Linear(3, 3)
    with surrounded(model, torch.device("cuda:7"), "inference", outside):
        assert devices(model.to(META)) == {"meta"}


def test_what_a_move_does_is_seen_on_the_host_wherever_tensors_are_made_by_default() -> None:
    model = nn.Linear(3, 3)
    with surrounded(model, META, "inference", outside), torch.device("meta"):
        assert model.to("cpu") is model
        assert devices(model) == {"cpu"}


def test_state_follows_its_parameter() -> None:
    here, there = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.Adam([here, there])
    here.grad, there.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    stays = optimizer.state[here]["exp_avg"]
    there_now = nn.Parameter(torch.ones(3, device=META))
    optimizer.state[there_now] = optimizer.state.pop(there)
    bring_state(optimizer, [here, there_now, nn.Parameter(torch.ones(3))])
    assert optimizer.state[there_now]["exp_avg"].device == META
    assert optimizer.state[there_now]["exp_avg_sq"].device == META
    assert optimizer.state[there_now]["step"].device.type == "cpu"  # the host reads it
    assert optimizer.state[here]["exp_avg"] is stays


def test_state_is_brought_at_a_step_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 3)
    optimizer, unused = (torch.optim.SGD(model.parameters()) for _ in range(2))
    brought: list[tuple[object, list[int]]] = []

    def note(optimizer: object, parameters: Iterable[nn.Parameter]) -> None:
        brought.append((optimizer, [parameter.numel() for parameter in parameters]))

    monkeypatch.setattr(surroundings, "bring_state", note)
    with surrounded(model, META, "training", outside):
        assert not brought
        optimizer.step()
        assert brought == [(optimizer, [9, 3])]
    assert brought == [(optimizer, [9, 3])] * 2  # once a step, once at the end
    optimizer.step()
    unused.step()
    assert len(brought) == 2


def test_scalers_wait_as_long_as_there_is_a_plan() -> None:
    own = grad_scaler._MultiDeviceReplicator.get
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    with surrounded(one, META, "training", outside):
        with surrounded(other, META, "training", outside):
            assert grad_scaler._MultiDeviceReplicator.get is not own
        assert grad_scaler._MultiDeviceReplicator.get is not own
        master = torch.ones(1)
        replicator = grad_scaler._MultiDeviceReplicator(master)
        assert replicator.get(torch.device("cpu")).item() == 1
        assert replicator.get(torch.device("cpu")) is replicator.get(torch.device("cpu"))
    assert grad_scaler._MultiDeviceReplicator.get is own
    with surrounded(one, META, "inference", outside):
        assert grad_scaler._MultiDeviceReplicator.get is own
