"""One measurement of training steps under a budget of host memory, and of the disk that the state rests on."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kept_rows import answering
from torch import nn

import autosp
from autosp.batch import equal
from autosp.devices import CpuDevice
from autosp.devices.cpu import resident_bytes
from autosp.devices.memory import anonymous, anonymous_bytes, memory_of
from autosp.errors import BudgetTooSmallError
from autosp.runtime.stats import Stats
from autosp.tiers.state_file import StateFile

IN_MEMORY, HALF, ON_DISK = "in memory", "half on disk", "on disk"
WAYS = (IN_MEMORY, HALF, ON_DISK)

WARM_UP, STEPS = 2, 6
CHECKED_STEPS = 3
"""Beside plain training."""
TRIED_BYTES = 256 * 2**20
"""Of the disk, read and written."""


@dataclass(frozen=True)
class Scale:
    """Square linear layers, and how many rows the batches have."""

    width: int
    layers: int
    batches: tuple[int, ...]


SCALES = {"toy": Scale(64, 8, (4,)), "cpu": Scale(2048, 24, (16, 512))}


@dataclass(frozen=True)
class Job:
    """A case with what its process needs."""

    case: Any
    scratch: str


def run_job(job: Job, answer: str) -> None:
    """Measure in this process."""
    answering(_figures, job, answer)


def _figures(job: Job) -> dict[str, Any]:
    case = job.case
    scale = SCALES[case.scale]
    folder = Path(job.scratch)
    read, written, both = _disk_bytes_per_s(folder, min(TRIED_BYTES, 8 * scale.width**2))
    before_bytes = anonymous_bytes()
    model, optimizer = _made(scale)
    batch = torch.randn(case.batch, scale.width)
    plan = autosp.plan(model, batch, k=3, k_prime=1, mode="training", step=_loss, device="cpu")
    weight_bytes = sum(one.numel() * 4 for one in model.parameters())
    gc.collect()
    CpuDevice().restart_peak()
    streamed = _applied(model, plan, optimizer, case.way)
    with streamed:
        for _ in range(WARM_UP):
            _step(model, optimizer, batch)
        step_s = [_timed(partial(_step, model, optimizer, batch)) for _ in range(STEPS)]
        optimizer.state_dict()
        before = streamed.stats()
        update_s = [_updated_s(model, optimizer, batch) for _ in range(STEPS)]
        after = streamed.stats()
        resident, most = resident_bytes()
        peak_bytes = most - (resident - anonymous_bytes()) - before_bytes
    del model, optimizer, streamed
    return {
        "figures": {
            "title": f"{scale.layers} linear layers of {scale.width} × {scale.width}, Adam",
            "weight_bytes": weight_bytes,
            "state_bytes": 2 * weight_bytes,
            "step_s": step_s,
            "update_s": update_s,
            "read_bytes": _moved(before, after, "disk->host") // STEPS,
            "written_bytes": _moved(before, after, "host->disk") // STEPS,
            "read_bytes_per_s": read,
            "write_bytes_per_s": written,
            "both_bytes_per_s": both,
            "peak_bytes": peak_bytes,
            "equal": _same_as_plain(scale, batch, plan, case.way),
        }
    }


def _made(scale: Scale) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(scale.width, scale.width, bias=False) for _ in range(scale.layers))).train()
    return model, torch.optim.Adam(model.parameters(), lr=1e-4, foreach=False)


def _applied(
    model: nn.Module, plan: autosp.Plan, optimizer: torch.optim.Optimizer, way: str
) -> autosp.StreamedModel[nn.Module]:
    """With as much of the state on disk as the way says."""
    if way == IN_MEMORY:
        return autosp.apply(model, plan, optimizer=optimizer)
    try:
        return autosp.apply(model, plan, optimizer=optimizer, max_cpu_gb="1B")
    except BudgetTooSmallError as error:
        half_bytes = sum(one.numel() * 4 for one in model.parameters())  # Adam's state is twice the weights
        budget_bytes = error.least_bytes + (half_bytes if way == HALF else 0)
    return autosp.apply(model, plan, optimizer=optimizer, max_cpu_gb=f"{budget_bytes}B")


def _loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(batch).square().mean()
    return loss


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    _loss(model, batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _updated_s(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    """Of an update that nothing runs beside."""
    _loss(model, batch).backward()

    def update() -> None:
        optimizer.step()
        optimizer.state_dict()  # waits for all of it

    seconds = _timed(update)
    optimizer.zero_grad()
    return seconds


def _timed(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _moved(before: Stats, after: Stats, link: str) -> int:
    return after.link_bytes.get(link, 0) - before.link_bytes.get(link, 0)


def _same_as_plain(scale: Scale, batch: torch.Tensor, plan: autosp.Plan, way: str) -> bool:
    """Whether a few steps from the beginning give plain training's weights and state."""
    gc.collect()
    found = []
    for streamed in (True, False):
        model, optimizer = _made(scale)
        if streamed:
            with _applied(model, plan, optimizer, way):
                for _ in range(CHECKED_STEPS):
                    _step(model, optimizer, batch)
        else:
            for _ in range(CHECKED_STEPS):
                _step(model, optimizer, batch)
        found.append((list(model.parameters()), optimizer.state_dict()["state"]))
    return bool(equal(*found))


def _disk_bytes_per_s(folder: Path, n_bytes: int) -> tuple[float, float, float]:
    """Reading, writing, and both at once: as state is read and written."""
    file = StateFile(2 * n_bytes, folder)
    memories = [anonymous(n_bytes) for _ in range(2)]
    for memory in memories:
        memory.fill_(1)
    written, read = (memory_of(memory) for memory in memories)

    def write(offset: int) -> None:
        file.write(written, offset)

    def read_back(offset: int) -> None:
        file.read(read, offset, "a trial")

    def both() -> None:
        other = threading.Thread(target=write, args=(0,))
        other.start()
        read_back(n_bytes)
        other.join()

    for offset in (0, n_bytes):  # blocks that were never written take longer
        write(offset)
    rates = [n_bytes / _timed(partial(one, 0)) for one in (read_back, write)]
    rates.append(2 * n_bytes / _timed(both))
    file.close()
    return rates[0], rates[1], rates[2]
