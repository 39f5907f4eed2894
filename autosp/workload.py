"""What a plan is for: a model, a sample batch, and the step that runs one on the other."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autosp.batch import Step, call, map_tensors, signature, step_name, tensors_in
from autosp.devices import Device
from autosp.errors import BudgetError, SettingError
from autosp.intercept import is_intercepted
from autosp.partition import model_fingerprint, partition
from autosp.spec import Mode, Partition, StudyKey, Tier

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Workload:
    """One pass: `step(model, batch)`, or the plain call of the model on the batch."""

    model: nn.Module
    batch: Any
    step: Step | None
    mode: Mode
    seed: int = 0

    @classmethod
    def of(cls, model: nn.Module, batch: Any, step: Step | None, mode: str, device: Device, seed: int = 0) -> Workload:
        """Check the arguments, and put the batch where compute happens.

        Raises: SettingError for a model, step or mode of the wrong kind.
        """
        if not isinstance(model, nn.Module):
            raise SettingError(f"model is a {type(model).__name__}, not a torch.nn.Module")
        if is_intercepted(model):
            raise SettingError(f"a plan is applied to this {type(model).__name__}: remove() it first")
        if step is not None and not callable(step):
            raise SettingError(f"step is a {type(step).__name__}; pass a function step(model, batch)")
        if mode != "inference":
            raise SettingError(f"mode={mode!r}: this version plans mode='inference' only")
        if any(tensor.is_meta for tensor in tensors_in(batch)):
            raise SettingError("sample_batch has tensors on the meta device: they have no data to run the model on")
        return cls(model, map_tensors(lambda tensor: tensor.to(device.torch_device), batch), step, "inference", seed)

    def run(self) -> Any:
        """One pass, without autograd. What the model raises passes through."""
        with torch.no_grad():
            return call(self.model, self.batch) if self.step is None else self.step(self.model, self.batch)

    def run_seeded(self) -> Any:
        """One pass from a fixed state of the random generators, which are left as they were."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return self.run()

    def observed_pass(self, device: Device) -> tuple[Partition, Any]:
        """The layers, and the output, of one pass of the unstreamed model."""
        outputs: list[Any] = []
        parts = partition(
            self.model,
            lambda: outputs.append(self.run_seeded()),
            device.torch_device,
            lookups=device.reads_host,
            slow_tier=device.info.slow_tier,
        )
        return parts, outputs[0]

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
            mode=self.mode,
            budget_bytes=budget_bytes,
            host_budget_bytes=host_budget_bytes,
            slack=slack,
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
