"""A model under each of two plans, one layer at a time or a ring beside residents; and one that is trained."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import Step
from autosp.devices import CpuDevice, Device
from autosp.partition import bind
from autosp.profiler.training import training_partition
from autosp.runtime.disk_state import DiskState
from autosp.runtime.streamed_model import StreamedModel
from autosp.schedule.training import lower_training
from autosp.schedule.updates import with_updates
from autosp.spec import Candidate, Tier
from autosp.tiers import Originals, open_store
from autosp.workload import Workload
from trained import Apply, loss_step

SETTINGS = [
    pytest.param({"k": 1, "k_prime": 1}, id="k=1 k'=1"),
    pytest.param({"k": 4, "k_prime": 1, "residents": 2}, id="ring and residents"),
]


@pytest.fixture(params=SETTINGS)
def stream(request: pytest.FixtureRequest) -> Iterator[Callable[..., autosp.StreamedModel[nn.Module]]]:
    """Plans for a batch and applies, on a CPU; removed at the end."""
    applied: list[autosp.StreamedModel[nn.Module]] = []

    def make_it(model: nn.Module, batch: Any) -> autosp.StreamedModel[nn.Module]:
        plan = autosp.plan(model, batch, device="cpu", **request.param)
        applied.append(autosp.apply(model, plan))
        return applied[-1]

    yield make_it
    for streamed in applied:
        streamed.remove()


@pytest.fixture
def can_be_interrupted() -> Iterator[None]:
    """Also where the tests were started in the background of a shell, which has them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def apply(tmp_path: Path) -> Iterator[Apply]:
    """Trains a model under a candidate; what of the candidate is no layer of the model's is left out.

    Where a layer of a block is computed again, so is the block. `disk_state` makes the room on disk for the optimizer's
    state: it gets the optimizer, the streamed layers, and the order of their updates.
    """
    devices: list[Device] = []
    applied: list[StreamedModel[nn.Module]] = []

    def make_it(
        model: nn.Module,
        batch: Any,
        candidate: Candidate,
        step: Step = loss_step,
        device: Device | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        disk_state: Callable[..., DiskState | None] | None = None,
    ) -> StreamedModel[nn.Module]:
        device = device or CpuDevice(slow_tier=Tier.HOST)
        devices.append(device)
        parts = training_partition(Workload.of(model, batch, step, "training", device), device, tmp_path)
        residents = tuple(index for index in candidate.residents if index < len(parts.layers))
        whole = {index for unit in parts.recomputable if {*unit} & {*candidate.recompute} for index in unit}
        recompute = tuple(sorted(whole))
        offload = tuple(index for index in candidate.offload if index in parts.backward and index not in whole)
        candidate = candidate.model_copy(update={"residents": residents, "recompute": recompute, "offload": offload})
        bound = bind(model, parts)
        store = open_store(device, bound.layers, tmp_path, Originals.FREED)
        schedule = lower_training(candidate, bound.partition)
        if optimizer is not None:
            schedule = with_updates(schedule)
        opened = ExitStack()
        state = None
        if disk_state is not None:
            layers = [one for one in bound.layers if one.layer.index not in candidate.residents]
            state = disk_state(optimizer, layers, schedule.steps)
            opened.callback(state.close if state is not None else lambda: None)
        opened.callback(store.close)
        options: dict[str, Any] = {"mode": "training", "optimizer": optimizer, "disk_state": state}
        streamed = StreamedModel(bound, schedule, device, store, Originals.FREED, opened.close, **options)
        applied.append(streamed)
        return streamed

    yield make_it
    for streamed in applied:
        streamed.remove()
    for device in devices:
        device.close()
