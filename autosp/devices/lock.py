"""One measurement at a time on a device: two at once would measure each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from autosp.devices.base import Device
from autosp.errors import TierError
from autosp.files import locked


@contextmanager
def device_lock(device: Device, cache_dir: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """Hold the device, of all processes of this machine that share a cache folder. It ends with the process.

    Raises: TierError if the lock file cannot be made.
    """
    path = cache_dir / "locks" / f"{hardware_name(device)}.lock"
    waiting = f"waiting for {device.info.name}, which another process measures on"
    with ExitStack() as held:
        try:
            held.enter_context(locked(path, lambda: progress(waiting)))
        except OSError as error:
            raise TierError(f"{path} cannot be made ({error.strerror}): set AUTOSP_CACHE_DIR") from error
        yield


def hardware_name(device: Device) -> str:
    """The same in all processes, whatever index they see the device by. All CPU devices are one piece of hardware."""
    kind = device.torch_device.type
    if kind == "cpu":
        return kind
    properties = torch.get_device_module(device.torch_device).get_device_properties(device.torch_device)
    name = getattr(properties, "uuid", None) or device.torch_device.index
    return f"{kind}-{re.sub(r'[^0-9A-Za-z-]', '_', str(name))}"
