"""One measurement of training under a system, made in a process of its own.

[Note: device memory on a processor] Device and host are both RAM, so what a system has of each is told apart by what
rests. Between steps the weights (as often as the system keeps them in host memory) and the optimizer's state are in
host memory, and a gradient is from the moment when it is complete. What the process takes beyond that, in a forward and
backward, is what an accelerator would hold: weights that came, activations, gradients in the making. autosp counts so
itself, its residents with their gradients included; of its figure the optimizer's state, which comes later, is taken
off. A system that keeps everything on the device has everything counted, its update too.

[Note: one state of the heap] Left alone, the C library keeps what was freed: steps are quicker, for the kernel clears
no new pages, and take two to five times the memory (FSDP2 on models of 0.2 GB). So where weights rest in host memory a
step's time and its memory are those of a heap that gives freed memory back at once, as it does under autosp's plans.
What the heap takes left alone, and how long a step is then, is measured beside. A system that keeps everything on the
device has its times from a heap left alone: nothing is held against it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from kept_rows import answering
from peer_models import PeerModel
from peer_systems import weight_bytes
from torch import nn
from train_peer_systems import SYSTEMS, TUNED, Setting, System, Trained, process_group
from training_models import build, mean_square

import autosp
from autosp.batch import map_tensors, tensors_in
from autosp.devices import Device, choose_device
from autosp.devices.heap import free_kernel_buffers, trim_heap
from autosp.devices.memory import anonymous_bytes
from autosp.errors import BudgetTooSmallError
from autosp.spec import Plan

COMPARED = 4
"""Losses of so many steps from the initial weights are compared; then steps are timed."""
ROOM = 1.05
"""What `tune` advises to add to the least that works."""

LEAST_STEPS, ENOUGH_S, MOST_STEPS = 5, 5.0, 20


@dataclass(frozen=True)
class Job:
    """A case with what its process needs."""

    case: Any
    scratch: str
    cap_bytes: int | None = None
    """Of device memory. autosp is tuned under it, or under the least that works if that is more; where the platform
    can, every system is held to it."""


def run_job(job: Job, answer: str) -> None:
    """Measure, and write the row to the file `answer`."""
    answering(measure, job, answer)


def measure(job: Job) -> dict[str, Any]:
    """Steps under the job's system. Out of memory is an outcome."""
    device = choose_device(None, "training")
    try:
        return {"figures": _figures(job, device)}
    except Exception as error:
        if not device.is_out_of_memory(error):
            raise
        return {"outcome": "out of memory", "note": str(error).splitlines()[0]}
    finally:
        device.close()


def _figures(job: Job, device: Device) -> dict[str, Any]:
    case, system = job.case, SYSTEMS[job.case.system]
    with TemporaryDirectory(dir=job.scratch) as folder, ExitStack() as opened:
        if system.distributed:
            opened.enter_context(process_group(device, Path(folder)))
        if device.is_host:
            rehearse(system, device, case.optimizer)
        made = _placed(build(case.model, case.scale), device)
        setting = Setting(device, case.optimizer)
        figures: dict[str, Any] = {"title": made.title, "cap_bytes": job.cap_bytes}
        if case.system == TUNED:
            plan = tuned(job, made, device, Path(folder))
            setting = Setting(device, case.optimizer, plan)
            figures |= {"plan": plan.candidate.label(), "budget_bytes": plan.budget_bytes}
        memory = Memory(system, device, made.model)
        opened.enter_context(device.limit(setting.plan.budget_bytes if setting.plan else job.cap_bytes))
        trained = opened.enter_context(system.apply(made, setting))
        return figures | {"weight_bytes": memory.weight_bytes} | _steps(made, trained, device, memory)


def tuned(job: Job, made: PeerModel, device: Device, folder: Path) -> Plan:
    """Under the cap, in a database of its own; where no setting fits that, under the least that works."""
    options: dict[str, Any] = {"mode": "training", "step": made.step, "device": device, "progress": False}
    options["storage"] = folder / "tuned.db"
    assert job.cap_bytes is not None
    try:
        return autosp.tune(made.model, made.batch, f"{job.cap_bytes}B", **options)
    except BudgetTooSmallError as error:
        least_bytes = round(error.least_bytes * ROOM)
        return autosp.tune(made.model, made.batch, f"{least_bytes}B", **options)


def _steps(made: PeerModel, trained: Trained, device: Device, memory: Memory) -> dict[str, Any]:
    """Losses of the first steps, seconds of later ones, and the most memory of one."""

    def step() -> float:
        loss = passed(made, trained)
        trained.update()
        return float(loss)

    losses = [step() for _ in range(COMPARED)]
    alone: dict[str, Any] = {}
    if memory.of_a_guest(trained):
        alone = {"alone_step_s": median(_timed(step, device)), "alone_peak_bytes": memory.alone_bytes(made, trained)}
    with memory.given_back(trained):
        samples_s = _timed(step, device)
    peak_bytes = memory.peak_bytes(made, trained)
    return alone | {
        "losses": losses,
        "samples_s": samples_s,
        "step_s": median(samples_s),
        "state_bytes": state_bytes(trained),
        "peak_bytes": peak_bytes,
    }


def _timed(step: Callable[[], float], device: Device) -> list[float]:
    """Seconds of steps, as many as are enough."""
    samples_s: list[float] = []
    while len(samples_s) < LEAST_STEPS or (sum(samples_s) < ENOUGH_S and len(samples_s) < MOST_STEPS):
        begin = time.perf_counter()
        step()
        device.finish_compute()
        samples_s.append(time.perf_counter() - begin)
    return samples_s


def passed(made: PeerModel, trained: Trained) -> torch.Tensor:
    """Forward and backward."""
    assert made.step is not None
    loss: torch.Tensor = made.step(trained.model, made.batch)
    trained.backward(loss)
    return loss.detach()


def rehearse(system: System, device: Device, optimizer: str) -> None:
    """Train a model of a few kilobytes: what is imported and compiled on the way is the process's, not the model's."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    small = PeerModel("rehearsal", model, torch.ones(2, 64), mean_square)
    options: dict[str, Any] = {"mode": "training", "step": mean_square, "device": device}
    plan = autosp.plan(model, small.batch, k=2, k_prime=1, **options) if system is SYSTEMS[TUNED] else None
    with system.apply(small, Setting(device, optimizer, plan)) as trained:
        passed(small, trained)
        trained.update()


class Memory:
    """Device memory that a system takes. See [Note: device memory on a processor].

    On an accelerator: what torch's allocator reserved at most, from before the system was applied.
    """

    def __init__(self, system: System, device: Device, model: nn.Module) -> None:
        """When the model is in host memory and its batch on the device."""
        self.weight_bytes = weight_bytes(model)
        self._gradient_bytes = sum(one.nbytes for one in model.parameters() if one.requires_grad)
        self._system = system
        self._device = device
        gc.collect()
        if device.is_host:
            free_kernel_buffers()
            trim_heap()
            self._before_bytes = anonymous_bytes() - self.weight_bytes
        else:
            device.start_measuring()

    def of_a_guest(self, trained: Trained) -> bool:
        """Whether it is, on a processor, of a system with weights in host memory that leaves the heap alone."""
        return self._device.is_host and trained.own_peak is None and self._system.weights_at_rest > 0

    @contextmanager
    def given_back(self, trained: Trained) -> Iterator[None]:
        """For such a system: freed memory goes back to the kernel. See [Note: one state of the heap]."""
        with ExitStack() as held:
            if self.of_a_guest(trained):
                held.enter_context(self._device.training())
                self._device.start_measuring()
            yield

    def alone_bytes(self, made: PeerModel, trained: Trained) -> int:
        """Of one more step, in a heap left alone: what freed gradients leave there counts as host memory."""
        self._device.restart_peak()
        before_bytes = anonymous_bytes() - self._device.peak_bytes()
        passed(made, trained)
        most_bytes = before_bytes + self._device.peak_bytes()
        trained.update()
        rest_bytes = self._system.weights_at_rest * self.weight_bytes + state_bytes(trained) + self._gradient_bytes
        return max(0, most_bytes - self._before_bytes - rest_bytes)

    def peak_bytes(self, made: PeerModel, trained: Trained) -> int:
        """So far; on a processor that of one more step."""
        if not self._device.is_host:
            return self._device.peak_bytes()
        with self._device.training():
            for _ in range(2):  # gradients and activations of timed steps leave the heap
                passed(made, trained)
                trained.update()
            gc.collect()
            if trained.own_peak is not None:
                self._device.restart_peak()
                passed(made, trained)
                return trained.own_peak() - state_bytes(trained)
            self._device.start_measuring()
            kept_bytes = anonymous_bytes() - self._before_bytes - self._at_rest_bytes(trained)
            return max(0, kept_bytes) + self._step_bytes(made, trained)

    def _at_rest_bytes(self, trained: Trained) -> int:
        """In host memory between steps."""
        if self._system.weights_at_rest == 0:
            return 0
        reserved_bytes = self._gradient_bytes if self._system.gradients_reserved else 0
        return self._system.weights_at_rest * self.weight_bytes + state_bytes(trained) + reserved_bytes

    def _step_bytes(self, made: PeerModel, trained: Trained) -> int:
        """Most that a step takes beyond what there is between steps, and beyond the gradients that are complete."""
        most_bytes = complete_bytes = 0

        def completed(parameter: torch.Tensor) -> None:
            nonlocal most_bytes, complete_bytes
            most_bytes = max(most_bytes, self._device.peak_bytes() - complete_bytes)
            complete_bytes += parameter.nbytes
            self._device.restart_peak()

        with ExitStack() as hooks:
            if self._system.weights_at_rest and not self._system.gradients_reserved:
                for parameter in made.model.parameters():
                    hooks.callback(parameter.register_post_accumulate_grad_hook(completed).remove)
            passed(made, trained)
        if self._system.weights_at_rest == 0:
            trained.update()
        return max(most_bytes, self._device.peak_bytes() - complete_bytes)


def state_bytes(trained: Trained) -> int:
    """Of the optimizer."""
    return sum(tensor.nbytes for tensor in tensors_in([dict(one) for one in trained.optimizer.state.values()]))


def _placed(made: PeerModel, device: Device) -> PeerModel:
    """Its batch where compute happens."""
    return replace(made, batch=map_tensors(lambda tensor: tensor.to(device.torch_device), made.batch))
