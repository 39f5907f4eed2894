"""The hardware behind one protocol."""

from __future__ import annotations

import torch

from autosp.devices.accelerator import AcceleratorDevice
from autosp.devices.base import Copied, CopyTimes, Device, Event, Piece, Region, Stamp
from autosp.devices.cpu import CpuDevice
from autosp.devices.virtual import VirtualDevice
from autosp.errors import SettingError
from autosp.spec import DeviceInfo, Tier

__all__ = [
    "AcceleratorDevice",
    "Copied",
    "CopyTimes",
    "CpuDevice",
    "Device",
    "Event",
    "Piece",
    "Region",
    "Stamp",
    "VirtualDevice",
    "choose_device",
    "device_for",
]

STREAMING_TYPES = ("cuda", "xpu")
"""Device types with the streams, events and memory figures that streaming needs. ROCm calls itself cuda."""


def choose_device(device: torch.device | str | Device | None, mode: str = "inference") -> Device:
    """The device to plan for: the accelerator if there is one, else the CPU; or what the user names or brings.

    In training, weights rest in host memory: an update writes to all of them.

    Raises: SettingError if the named device is not there, or has the disk for its slow tier in training.
    """
    slow_tier = Tier.HOST if mode == "training" else Tier.DISK
    if device is None:
        return AcceleratorDevice() if _accelerator() else CpuDevice(slow_tier=slow_tier)
    if not isinstance(device, torch.device | str):
        if not hasattr(device, "info"):
            raise SettingError(f"device is a {type(device).__name__}; pass a torch.device, its name such as 'cuda:0'")
        if mode == "training" and device.info.slow_tier is Tier.DISK:
            raise SettingError(
                f"{device.info.name}: its weights rest on disk, and training updates them at rest, in host memory; "
                "use CpuDevice(slow_tier=Tier.HOST), or device='cpu'"
            )
        return device
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise SettingError(f"device {device!r} is not a torch device: {error}") from error
    if wanted.type == "cpu":
        return CpuDevice(slow_tier=slow_tier)
    if wanted.type not in STREAMING_TYPES:
        raise SettingError(f"device {device!r}: autosp streams to {', '.join(STREAMING_TYPES)} and cpu")
    found = _accelerator()
    count = torch.accelerator.device_count() if found else 0
    if found != wanted.type or (wanted.index or 0) >= count:
        raise SettingError(f"device {device!r} is not here: torch sees {count} accelerators ({found or 'none'})")
    return AcceleratorDevice(wanted)


def device_for(planned: DeviceInfo, wanted: torch.device | str | Device | None = None) -> Device:
    """A device such as a plan was made on: of that kind, with what streams at rest on that tier.

    `wanted`: which one, where there are several.

    Raises: SettingError if there is none here, or the wanted one is of another kind.
    """
    if planned.kind == "cpu" and (wanted is None or str(wanted) == "cpu"):
        return CpuDevice(slow_tier=planned.slow_tier)
    chosen = choose_device(planned.kind if wanted is None else wanted)
    if (chosen.info.kind, chosen.info.slow_tier) != (planned.kind, planned.slow_tier):
        raise SettingError(
            f"device {wanted}: weights would stream from {chosen.info.slow_tier.value} to a {chosen.info.kind} device; "
            f"the plan is for {planned.kind} ({planned.name}) and weights that rest on {planned.slow_tier.value}"
        )
    return chosen


def _accelerator() -> str | None:
    """The type of the accelerator that autosp would use."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found is not None and found.type in STREAMING_TYPES else None
