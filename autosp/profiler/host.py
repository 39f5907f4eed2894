"""What streamed weights may take of host memory."""

from __future__ import annotations

import warnings

from autosp.cost_model.placement import exceeds
from autosp.devices import Device
from autosp.devices.memory import anonymous_bytes
from autosp.spec import Mode, Partition, Tier
from autosp.tiers.host import available_bytes

RAM_STEPS = 8
DEVICE_STEPS = 64


def binding_host_budget(
    parts: Partition, device: Device, budget_bytes: int | None, mode: Mode = "inference"
) -> int | None:
    """What streamed weights may take of the host, if that is less than all of them; None if all may rest there.

    In training all do: an update writes to them.
    """
    if device.info.slow_tier is not Tier.HOST or mode == "training":
        return None
    room = host_room_bytes(parts)
    if exceeds(parts, room) and (budget_bytes is None or budget_bytes > room):
        warnings.warn(
            f"host memory has room for {room / 1e9:.2f} of the model's {parts.total_bytes / 1e9:.2f} GB: what is "
            "streamed beyond that rests on disk; max_cpu_gb sets a lower limit",
            stacklevel=3,
        )
        budget_bytes = room
    return budget_bytes if exceeds(parts, budget_bytes) else None


def whole_device(device: Device) -> str:
    """All memory of a device, as a budget.

    Other programs have some of it, and a driver: what is free, in steps of an eighth of a machine's RAM or of a 64th of
    an accelerator's memory, so that the same question gets the same answer.
    """
    total, free = device.info.memory_bytes, device.free_bytes()
    if device.info.kind == "cpu":
        step, free = total // RAM_STEPS, available_bytes()
    elif free is not None:
        step = total // DEVICE_STEPS
    else:
        return f"{total}B"
    return f"{max(1, free // max(1, step)) * max(1, step)}B"


def host_room_bytes(partition: Partition) -> int:
    """What weights may take of the host: its free memory, and this process's own, from which they move one by one."""
    moves = (partition.whole([layer.index]) for layer in partition.layers)
    largest = max((sum(partition.layers[index].n_bytes for index in move) for move in moves), default=0)
    return max(0, available_bytes() + anonymous_bytes() - largest)
