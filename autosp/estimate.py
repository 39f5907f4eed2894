"""What is known before anything is tried: the profile, and what the cost model makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from autosp.batch import Step
from autosp.cost_model.floor import floor_s
from autosp.devices import Device, choose_device
from autosp.errors import SettingError
from autosp.profiler import measure
from autosp.profiler.host import binding_host_budget
from autosp.profiler.training import layers_of
from autosp.progress import progress_bar
from autosp.runtime.bench import Bench
from autosp.search.space import rank
from autosp.settings import settings
from autosp.spec import Prediction, Profile
from autosp.workload import Workload, checked_group, parse_budget, parse_budgets, refuse_host_budget

if TYPE_CHECKING:
    import torch


def profile(
    model: nn.Module,
    sample_batch: Any,
    *,
    max_cpu_gb: float | str | None = None,
    mode: str = "inference",
    step: Step | None = None,
    device: torch.device | str | Device | None = None,
    group: int = 1,
    progress: bool = True,
) -> Profile:
    """Measure every layer and link, under the least-memory plan and under a ring that overlaps loads with compute.

    The disk is measured, too, where the host has no room for all. With mode="training", where `step` returns the loss,
    passes are forward and backward. With `group`, so many microbatches share a pass under the least-memory plan, and
    what they hold is measured: groups of other sizes are predicted from that.

    The model is as before when this returns or raises.
    """
    chosen = choose_device(device, mode)
    workload = Workload.of(model, sample_batch, step, mode, chosen, group=group)
    refuse_host_budget(mode, max_cpu_gb)
    with progress_bar(progress) as show:
        show("order of the layers")
        parts = layers_of(workload, chosen, settings().cache_dir)
        show("weights to the slow tier")
        host_bytes = None if max_cpu_gb is None else parse_budget(max_cpu_gb, "max_cpu_gb")
        host_bytes = binding_host_budget(parts, chosen, host_bytes, workload.mode)
        with Bench(model, parts, chosen, settings().cache_dir, host_bytes, workload.mode) as bench:
            return measure(bench, workload, show)


def estimate(
    profile: Profile, max_gpu_gb: float | str, max_cpu_gb: float | str | None = None, *, group: int = 1
) -> list[Prediction]:
    """Every setting predicted to fit the budgets, the fastest first. Needs no device.

    With `group`, of passes that so many microbatches of the profiled shapes share.

    Raises: BudgetError, BudgetTooSmallError; SettingError if `group` is no positive number, or if the profile does not
    know groups, or the disk, and settings need it.
    """
    budgets = _budgets_of(profile, max_gpu_gb, max_cpu_gb)
    return rank(profile, *budgets, checked_group(group))


def floor(profile: Profile, max_gpu_gb: float | str, max_cpu_gb: float | str | None = None, *, group: int = 1) -> float:
    """Seconds that no schedule can beat under the budgets on the profiled hardware, for `group` microbatches."""
    budgets = _budgets_of(profile, max_gpu_gb, max_cpu_gb)
    return floor_s(profile, *budgets, checked_group(group))


def _budgets_of(profile: Profile, max_gpu_gb: float | str, max_cpu_gb: float | str | None) -> tuple[int, int | None]:
    if not isinstance(profile, Profile):
        raise SettingError(f"profile is a {type(profile).__name__}; pass what autosp.profile gives")
    return parse_budgets(max_gpu_gb, max_cpu_gb, profile.device.slow_tier)
