"""The systems of the peers' benchmark: how each is put on a model, as its documentation tells a user to.

A system is applied inside a context and may leave the model unusable after it: every measurement has its own process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import autosp
from autosp.devices import Device
from autosp.spec import Plan


@dataclass(frozen=True)
class Setting:
    """What a system is given: the device, a folder for its files, and the knobs that it has."""

    device: Device
    folder: Path
    share_bytes: int | None = None
    """Device memory for weights, for a system that takes that number and keeps activations out of it."""
    plan: Plan | None = None
    """For autosp and its own baselines."""
    paced: bool = False
    """Whether the device is a stand-in: its slow tier is memory of this process, too."""


OwnPeak = Callable[[], int] | None
"""Peak bytes as the system measured them, where the process's memory holds the slow tier as well."""

Apply = Callable[[nn.Module, Setting], AbstractContextManager[OwnPeak]]


@dataclass(frozen=True)
class System:
    """One row of the table."""

    title: str
    apply: Apply
    planned: bool = False
    """Runs a plan of autosp's, made for the budget."""
    shares: bool = False
    """Takes `share_bytes`, which its user lowers until the measured peak is within the budget."""
    accelerator_only: bool = False
    """Cannot run on a processor; it is tried there once all the same, and the table has what it said."""

    def budgeted(self, on_cpu: bool) -> bool:
        """Whether a run depends on the budget: through a setting, or through the allocator's cap on an accelerator."""
        return not on_cpu or self.planned or (self.shares and not self.accelerator_only)


def block_modules(model: nn.Module) -> list[str]:
    """Names of the children through which diffusers reaches the model's lists of blocks.

    It looks for `ModuleList` and `Sequential` among the direct children of the model and of the modules named so.
    """
    names: set[str] = set()

    def holds_blocks(module: nn.Module) -> bool:
        found = False
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList | nn.Sequential):
                found = True
            elif holds_blocks(child):
                names.add(name)
                found = True
        return found

    holds_blocks(model)
    return sorted(names)


@contextmanager
def _plain(model: nn.Module, setting: Setting) -> Iterator[OwnPeak]:
    model.to(setting.device.torch_device)
    yield None


@contextmanager
def _planned(model: nn.Module, setting: Setting) -> Iterator[OwnPeak]:
    assert setting.plan is not None
    streamed = autosp.apply(model, setting.plan, device=setting.device)
    with streamed:
        yield (lambda: streamed.stats().peak_bytes) if setting.paced else None


@contextmanager
def _accelerate_map(model: nn.Module, setting: Setting) -> Iterator[OwnPeak]:
    """`device_map="auto"` as transformers does it, with the device's share of the weights as its `max_memory`."""
    from accelerate import dispatch_model, infer_auto_device_map

    assert setting.share_bytes is not None
    device = setting.device.torch_device
    on_cpu = device.type == "cpu"
    host_bytes = 2 * weight_bytes(model)
    share: dict[int | str, int | str] = (
        {"cpu": setting.share_bytes} if on_cpu else {device.index: setting.share_bytes, "cpu": host_bytes}
    )
    unsplit = sorted(getattr(model, "_no_split_modules", None) or [])
    device_map = infer_auto_device_map(model, max_memory=share, no_split_module_classes=unsplit)
    skipped = getattr(model, "_skip_keys_device_placement", None)
    main = device if on_cpu else device.index
    dispatch_model(model, device_map, main_device=main, offload_dir=setting.folder, skip_keys=skipped)
    yield None


@contextmanager
def _accelerate_offload(model: nn.Module, setting: Setting) -> Iterator[OwnPeak]:
    """`disk_offload` on a processor, `cpu_offload` on an accelerator."""
    from accelerate import cpu_offload, disk_offload

    device = setting.device.torch_device
    if device.type == "cpu":
        disk_offload(model, str(setting.folder), execution_device=device)
    else:
        cpu_offload(model, execution_device=device)
    yield None


def _diffusers(blocks: int, **options: Any) -> Apply:
    """`apply_group_offloading` at block level: to files on a processor, to host memory on an accelerator."""

    @contextmanager
    def apply(model: nn.Module, setting: Setting) -> Iterator[OwnPeak]:
        from diffusers.hooks import apply_group_offloading

        device = setting.device.torch_device
        apply_group_offloading(
            model,
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=blocks,
            block_modules=block_modules(model),
            offload_to_disk_path=str(setting.folder) if device.type == "cpu" else None,
            **options,
        )
        yield None

    return apply


@contextmanager
def _mmgp(model: nn.Module, setting: Setting) -> Iterator[OwnPeak]:
    """Everything in pinned memory, asynchronous transfers, no quantization, which would change the output."""
    from mmgp import offload

    budgets = 0 if setting.share_bytes is None else {"*": setting.share_bytes / 2**20}
    handle: Any = offload.all(
        {"model": model},
        pinnedMemory=True,
        quantizeTransformer=False,
        convertWeightsFloatTo=None,
        asyncTransfers=True,
        budgets=budgets,
        verboseLevel=0,
    )
    try:
        yield None
    finally:
        handle.release()


PLAIN = "plain"
TUNED = "autosp"
WINDOW = "window"

SYSTEMS: dict[str, System] = {
    PLAIN: System("all weights in memory", _plain),
    TUNED: System("autosp", _planned, planned=True),
    WINDOW: System("sliding window, no residents", _planned, planned=True),
    "accelerate-map": System("accelerate dispatch_model", _accelerate_map, shares=True),
    "accelerate-offload": System("accelerate disk_offload / cpu_offload", _accelerate_offload),
    "diffusers-1": System("diffusers group offloading, 1 block", _diffusers(1)),
    "diffusers-2": System("diffusers group offloading, 2 blocks", _diffusers(2)),
    "diffusers-4": System("diffusers group offloading, 4 blocks", _diffusers(4)),
    "diffusers-stream": System(
        "diffusers group offloading, stream", _diffusers(1, use_stream=True), accelerator_only=True
    ),
    "diffusers-stream-record": System(
        "diffusers group offloading, stream, record_stream",
        _diffusers(1, use_stream=True, record_stream=True),
        accelerator_only=True,
    ),
    "mmgp": System("mmgp offload.all", _mmgp, shares=True, accelerator_only=True),
}
"""The systems themselves. With a stream diffusers takes groups of one block only, whatever it is asked for."""

PACED_SYSTEMS: dict[str, System] = {
    PLAIN: SYSTEMS[PLAIN],
    TUNED: SYSTEMS[TUNED],
    WINDOW: SYSTEMS[WINDOW],
    "policy-sequential": System("as accelerate cpu_offload: one layer, no overlap", _planned, planned=True),
    "policy-first-fit": System("as accelerate device_map: the first layers stay, no overlap", _planned, planned=True),
    "policy-stream-1": System("as diffusers stream: two groups of 1 layer", _planned, planned=True),
    "policy-stream-2": System("as diffusers stream: two groups of 2 layers", _planned, planned=True),
    "policy-stream-4": System("as diffusers stream: two groups of 4 layers", _planned, planned=True),
}
"""Peers' policies as settings of autosp's own runtime, for the paced link."""


def rehearse(system: System, setting: Setting) -> None:
    """Run the system on a model of a few kilobytes: what it imports on the way is the process's, not the model's."""
    small = nn.Sequential(nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), nn.Linear(64, 64))
    batch = torch.ones(1, 64)
    plan = autosp.plan(small, batch, k=2, k_prime=1, device=setting.device) if system.planned else None
    setting = replace(setting, plan=plan, share_bytes=weight_bytes(small) // 2)
    with system.apply(small, setting), torch.no_grad():
        small(batch)


def weight_bytes(model: nn.Module) -> int:
    """Memory of all parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
