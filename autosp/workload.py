"""What a plan is for: a model, a sample batch, and the step that runs one on the other."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Protocol, cast, get_args

import torch
from torch import nn

from autosp.batch import (
    Step,
    backward,
    call,
    digest,
    map_tensors,
    no_backward_of_its_own,
    signature,
    tensors_in,
)
from autosp.described import behaviour_of, step_name
from autosp.devices import Device
from autosp.errors import BudgetError, ModelError, SettingError
from autosp.intercept import check_plain
from autosp.partition import model_fingerprint, partition
from autosp.partition.trace import attributes_of, restore_attributes
from autosp.spec import Mode, Partition, StudyKey, Tier

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class Grouping(Protocol):
    """A model under a plan, on which microbatches share a pass."""

    def run_group(self, batches: Iterable[Any], step: Step = call) -> list[Any]:
        """What `step(model, batch)` gives for each of them."""

    def backward_group(self, batches: Iterable[Any], step: Step) -> list[torch.Tensor]:
        """Losses of `step(model, batch)`, with their backward passes."""


@dataclass(frozen=True)
class Workload:
    """One pass: `step(model, batch)`, or the plain call of the model on the batch; in training, with its backward.

    Under a plan, of `group` microbatches of the batch's shapes and values.
    """

    model: nn.Module
    batch: Any
    step: Step | None
    mode: Mode
    seed: int = 0
    group: int = 1

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batch: Any,
        step: Step | None,
        mode: str,
        device: Device,
        seed: int = 0,
        group: int = 1,
    ) -> Workload:
        """Check the arguments, and put the batch where compute happens.

        Raises: SettingError for a model, batch, step, mode, seed or group of the wrong kind, ModelError for a model
        of torch.jit.
        """
        check_plain(model)
        _refuse_scripted(model)
        if step is not None and not callable(step):
            raise SettingError(f"step is a {type(step).__name__}; pass a function step(model, batch)")
        if mode not in get_args(Mode):
            raise SettingError(f"mode={mode!r}: pass one of {', '.join(map(repr, get_args(Mode)))}")
        if mode == "training" and step is None:
            raise SettingError("mode='training' needs step(model, batch) that returns the loss")
        if mode == "training" and torch.is_inference_mode_enabled():
            raise SettingError("mode='training' under torch.inference_mode(), where nothing gets a gradient: leave it")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise SettingError(f"seed={seed!r}: pass a whole number from 0 to 2^63 - 1")
        if any(tensor.is_meta for tensor in tensors_in(batch)):
            raise SettingError("sample_batch has tensors on the meta device: they have no data to run the model on")
        batch = map_tensors(lambda tensor: tensor.to(device.torch_device), batch)
        return cls(model, batch, step, cast("Mode", mode), seed, checked_group(group))

    def run_forward(self) -> Any:
        """One pass without autograd: in training, its forward. What the model raises passes through.

        Raises: SettingError if a training step goes backward itself.
        """
        with torch.no_grad(), no_backward_of_its_own() if self.mode == "training" else nullcontext():
            return call(self.model, self.batch) if self.step is None else self.step(self.model, self.batch)

    def run(self) -> Any:
        """A pass of one microbatch. In training without its update: old gradients are dropped, the loss is returned.

        Raises: SettingError if a training step's answer is no loss.
        """
        if self.mode == "training":
            self.model.zero_grad()
        return self._run()

    def run_under(self, streamed: Grouping) -> Any:
        """A pass under a plan, by all microbatches of the group: what `run` gives, or a list of that for each of them.

        Each has a batch of its own, as different ones would. Raises: as `run`.
        """
        if self.group == 1:
            return self.run()
        batches = [self.batch, *(map_tensors(torch.clone, self.batch) for _ in range(self.group - 1))]
        step = self.step or call
        if self.mode == "inference":
            with torch.no_grad():
                return streamed.run_group(batches, step)
        self.model.zero_grad()
        return streamed.backward_group(batches, step)

    def _run(self) -> Any:
        """`run`, after which gradients are added to those that there were."""
        if self.mode == "inference":
            return self.run_forward()
        with torch.enable_grad():
            return backward(self.step or call, self.model, self.batch)

    def _run_each(self) -> Any:
        """What `run_under` stands for: the microbatches one after another, each with the random numbers of its own."""
        if self.group == 1:
            return self.run()
        if self.mode == "training":
            self.model.zero_grad()
        results = []
        for seed in torch.randint(2**63 - 1, (self.group,), device="cpu").tolist():
            torch.manual_seed(seed)
            results.append(self._run())
        return results

    @contextmanager
    def leaving_no_trace(self) -> Iterator[None]:
        """Afterwards gradients, buffers, attributes of modules and random generators are as before.

        Meanwhile there are no gradients but those of the passes run, and no hook is told of one that is complete: it
        might train the model.
        """
        attributes = attributes_of(self.model)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        gradients = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            with torch.random.fork_rng(), _untold(self.model):
                yield
        finally:
            restore_attributes(attributes)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def trial(self) -> AbstractContextManager[None]:
        """Around passes that nobody asked for: what training writes is as before."""
        return self.leaving_no_trace() if self.mode == "training" else nullcontext()

    def run_seeded(self, streamed: Grouping | None = None) -> Any:
        """What a pass under a plan gives from a fixed state of the random generators, which are left as they were.

        Without a plan: the same of the microbatches one after another. In training: the loss of each, and a digest of
        each gradient, so that no second copy of them all is held.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            output = self._run_each() if streamed is None else self.run_under(streamed)
        if self.mode == "inference":
            return output
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        return output, {name: None if gradient is None else digest(gradient) for name, gradient in gradients.items()}

    def identity(self, device: Device) -> dict[str, Any]:
        """What a plan is for, and what made it."""
        key = self.key(device, 0)
        return {
            "autosp_version": version("autosp"),
            "torch_version": device.info.torch_version,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "mode": self.mode,
            "model_name": key.model_name,
            "model_fingerprint": key.model_fingerprint,
            "batch_signature": key.batch_signature,
            "device": device.info,
        }

    def observed_pass(self, device: Device) -> tuple[Partition, Any]:
        """The layers that one microbatch visits, and what the unstreamed model gives for all of them.

        One pass shows both where there is one microbatch.
        """
        outputs: list[Any] = []
        parts = self.layers(device, lambda: outputs.append(self.run_seeded()))
        return (parts if self.group == 1 else self.layers(device)), outputs[0]

    def layers(self, device: Device, run: Callable[[], Any] | None = None) -> Partition:
        """The layers, by one pass of the unstreamed model, which `run` makes (default: `self.run_forward`).

        In training tables move as other layers do: they get gradients.

        Raises: ModelError if the model has none, SettingError if the pass called none of them; what `partition` does.
        """
        parts = partition(
            self.model,
            run or self.run_forward,
            device.torch_device,
            lookups=device.reads_host and self.mode == "inference",
            slow_tier=device.info.slow_tier,
            mode=self.mode,
        )
        self._refuse_without_visits(parts)
        return parts

    def _refuse_without_visits(self, parts: Partition) -> None:
        if parts.visits:
            return
        name = type(self.model).__name__
        if parts.layers:
            raise SettingError(
                f"the pass called none of the {len(parts.layers)} layers of {name}, {parts.layers[0].name} first: "
                "check that sample_batch and step run the model, to the end of what it yields"
            )
        raise ModelError(
            f"{name} has no layer to stream: all of its {len(parts.resident_tensors)} tensors stay on the device, for "
            "they are small, sparse, written to by the pass, or used outside of the modules that hold them"
        )

    def key(
        self, device: Device, budget_bytes: int, host_budget_bytes: int | None = None, slack: float | None = None
    ) -> StudyKey:
        """What identifies a study of this workload."""
        return StudyKey(
            model_name=type(self.model).__name__,
            model_fingerprint=model_fingerprint(self.model),
            device_fingerprint=device.info.fingerprint,
            batch_signature=signature(self.batch),
            step=step_name(self.step),
            behaviour=behaviour_of(self.model),
            mode=self.mode,
            trained=_trained(self.model) if self.mode == "training" else None,
            group=self.group,
            budget_bytes=budget_bytes,
            host_budget_bytes=host_budget_bytes,
            slack=slack,
        )


@contextmanager
def _untold(model: nn.Module) -> Iterator[None]:
    """Without the hooks that autograd calls once it has added to a parameter's gradient."""
    hooks: list[dict[Any, Any]] = [one for p in model.parameters() if (one := p._post_accumulate_grad_hooks)]
    before = [dict(one) for one in hooks]
    try:
        for one in hooks:
            one.clear()
        yield
    finally:
        for one, its in zip(hooks, before, strict=True):
            one.clear()
            one.update(its)


def _refuse_scripted(model: nn.Module) -> None:
    """Raises: ModelError for a module of torch.jit: its layers run outside of Python, which would load them."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            which = f"its module {path}" if path else "the model"
            raise ModelError(
                f"{which} is a {type(module).__name__} of torch.jit, whose layers cannot be seen or loaded one by one; "
                "pass the module that it was made from"
            )


def _trained(model: nn.Module) -> str:
    """Which parameters get gradients: how many, and a hash of their names. Gradients take memory, and time to leave."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return f"{len(names)} parameters, {hashlib.sha256(','.join(names).encode()).hexdigest()[:16]}"


def checked_group(group: int) -> int:
    """The number of microbatches, if it is one.

    Raises: SettingError if it is not positive.
    """
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise SettingError(f"group={group!r}: pass how many microbatches share a pass, a whole number of at least 1")
    return group


def refuse_host_budget(mode: str, max_cpu_gb: float | str | None) -> None:
    """Raises: SettingError for a host budget in training, where weights are updated at rest."""
    if mode == "training" and max_cpu_gb is not None:
        raise SettingError(
            "max_cpu_gb with mode='training': all weights rest in host memory; to have the optimizer's state on disk "
            "where RAM is short, give it to autosp.apply(model, plan, optimizer=optimizer, max_cpu_gb=...)"
        )


def parse_budgets(max_gpu_gb: float | str, max_cpu_gb: float | str | None, slow_tier: Tier) -> tuple[int, int | None]:
    """Bytes of the device's and of the host's budget; None: as much as the host has.

    Where the slow tier is the disk, device and host are one pool of RAM: the smaller of the two holds for it.

    Raises: BudgetError if one is not a positive, finite amount.
    """
    budget_bytes = parse_budget(max_gpu_gb)
    host_bytes = None if max_cpu_gb is None else parse_budget(max_cpu_gb, "max_cpu_gb")
    if slow_tier is Tier.DISK:
        return budget_bytes if host_bytes is None else min(budget_bytes, host_bytes), None
    return budget_bytes, host_bytes


def parse_budget(budget: float | str, name: str = "max_gpu_gb") -> int:
    """Bytes of a budget: a number is GB (10^9 bytes), a string has a unit: "8GB", "7.5 GiB", "900MB".

    Raises: BudgetError if it is not a positive, finite amount.
    """
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*((?:[KMGT]I?)?B)\s*", budget.upper())
        try:
            n_bytes = float(match[1]) * _UNITS[match[2]] if match else math.nan
        except ValueError:
            n_bytes = math.nan
    elif isinstance(budget, bool) or not isinstance(budget, int | float):
        raise BudgetError(f"{name} is a {type(budget).__name__}; pass GB as a number, or a string such as '8GiB'")
    else:
        n_bytes = float(min(budget, sys.float_info.max)) * 1e9
    if not math.isfinite(n_bytes) or n_bytes < 1:
        raise BudgetError(f"{name}={budget!r} is not a positive amount; pass GB as a number, or a string like '8GiB'")
    return round(n_bytes)
