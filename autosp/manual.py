"""A plan whose k and k' the user sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from autosp.batch import Step
from autosp.cost_model.placement import Placing, evenly_spread, host_too_small
from autosp.devices import Device, choose_device
from autosp.errors import SettingError
from autosp.profiler.host import binding_host_budget
from autosp.profiler.training import training_partition
from autosp.settings import settings
from autosp.spec import Candidate, Plan
from autosp.workload import Workload, parse_budget, refuse_host_budget

if TYPE_CHECKING:
    import torch


def plan(
    model: nn.Module,
    sample_batch: Any,
    *,
    k: int,
    k_prime: int,
    residents: int = 0,
    max_cpu_gb: float | str | None = None,
    mode: str = "inference",
    step: Step | None = None,
    device: torch.device | str | Device | None = None,
    recompute: int = 0,
    offload: int = 0,
    group: int = 1,
) -> Plan:
    """The plan with the k and k' that the user sets, as the Superpipeline paper uses them: nothing is searched.

    One pass is observed for the order of the layers. `residents` layers, spread evenly, never leave the device. What
    the host has no room for rests on disk, spread evenly too.

    With mode="training", `step` returns the loss, and weights rest in host memory. Of `recompute` blocks of the model,
    such as decoder layers, and layers that are in none, spread evenly, only the inputs are kept for the backward pass,
    which computes their activations again. Of `offload` of the other streamed layers, spread evenly too, activations
    are in host memory until the backward pass comes to them: on a CPU, where that is no other memory, to no gain. With
    `group` the plan says how many microbatches share a pass, and more are refused.

    Raises: SettingError if the numbers do not fit together or the model has fewer layers; BudgetTooSmallError if the
    host has no room for a transfer.
    """
    chosen = choose_device(device, mode)
    workload = Workload.of(model, sample_batch, step, mode, chosen, group=group)
    if mode == "training":
        return _training_plan(workload, chosen, k, k_prime, residents, recompute, offload, max_cpu_gb)
    if recompute or offload:
        raise SettingError(f"recompute={recompute!r}, offload={offload!r}: these are for mode='training' only")
    parts = workload.layers(chosen)
    candidate = _candidate(k, k_prime, residents, list(dict.fromkeys(parts.visits)), group)
    host_bytes = None if max_cpu_gb is None else parse_budget(max_cpu_gb, "max_cpu_gb")
    host_bytes = binding_host_budget(parts, chosen, host_bytes)
    if host_bytes is not None:
        placing = Placing(candidate, parts, host_bytes)
        placed = placing.with_read_ahead(2) or placing.with_read_ahead(1)
        if placed is None:
            raise host_too_small(parts, host_bytes)
        candidate = placed[0]
    return Plan(
        **workload.identity(chosen),
        host_budget_bytes=host_bytes,
        partition=parts,
        candidate=candidate,
        why=f"{candidate.label()} was set by the user",
    )


def _training_plan(
    workload: Workload,
    device: Device,
    k: int,
    k_prime: int,
    residents: int,
    recompute: int,
    offload: int,
    max_cpu_gb: float | str | None,
) -> Plan:
    """`plan` for training: a training pass is observed too."""
    refuse_host_budget(workload.mode, max_cpu_gb)
    parts = training_partition(workload, device, settings().cache_dir)
    candidate = _candidate(k, k_prime, residents, list(dict.fromkeys(parts.visits)), workload.group)
    units = parts.recomputable
    if isinstance(recompute, bool) or not isinstance(recompute, int) or not 0 <= recompute <= len(units):
        raise SettingError(
            f"recompute={recompute!r}: the backward pass visits {len(parts.blocks)} blocks, and "
            f"{len(units) - len(parts.blocks)} layers that are in none; pass a whole number of up to {len(units)}"
        )
    again = tuple(sorted(layer for unit in evenly_spread(units, recompute) for layer in unit))
    there = {*again, *candidate.residents}
    left = [layer for layer in dict.fromkeys(parts.backward) if layer not in there]
    if isinstance(offload, bool) or not isinstance(offload, int) or not 0 <= offload <= len(left):
        raise SettingError(f"offload={offload!r}: {len(left)} layers are streamed, go backward and are not recomputed")
    away = tuple(sorted(evenly_spread(left, offload)))
    candidate = candidate.model_copy(update={"recompute": again, "offload": away})
    return Plan(
        **workload.identity(device),
        partition=parts,
        candidate=candidate,
        why=f"{candidate.label()} was set by the user",
    )


def _candidate(k: int, k_prime: int, residents: int, visited: list[int], group: int) -> Candidate:
    """The user's numbers, checked. k' beyond the ring would move layers that have no place to go."""
    for name, value, least in (("k", k, 1), ("k_prime", k_prime, 1), ("residents", residents, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingError(f"{name}={value!r}: pass a whole number of at least {least}")
    if k > len(visited):
        raise SettingError(f"k={k}: the pass visits {len(visited)} layers only")
    if residents > k or (residents < len(visited) and k - residents < k_prime):
        raise SettingError(
            f"k={k} with residents={residents} leaves {max(0, k - residents)} places for streamed layers, too few to "
            f"move k_prime={k_prime} at a time; raise k to at least {min(residents + k_prime, len(visited))}"
        )
    return Candidate(k=k, k_prime=k_prime, residents=tuple(sorted(evenly_spread(visited, residents))), group=group)
