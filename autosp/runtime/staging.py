"""The host memory between disk and device: what was read to it, and when its places are free again.

[Note: bytes are loaded once] What is read stays until a load takes it, or until somebody else needs the place. Which
bytes are there is decided by the groups' state, never by the schedule: a load that finds nothing read for it, or
something older than its weights are now, reads on the spot. See [Note: prefetch is a hint].
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from autosp.devices import Copied, Device, Event
from autosp.devices.memory import unpin
from autosp.runtime.transfers import TransferGroup


class Staging:
    """Reads groups that rest on disk, and loads them."""

    def __init__(self, memory: torch.Tensor, device: Device, on_read: Callable[[TransferGroup], None]) -> None:
        """`on_read` is told of every read that was started."""
        self._memory = memory
        self._device = device
        self._on_read = on_read
        self._there: list[TransferGroup] = []
        """Groups whose bytes were the last to be read to their place."""

    def read(self, group: TransferGroup) -> None:
        """Start reading a group, unless that is done or under way.

        A read in its place that no load has taken is forgotten: reads go in the order of the calls.
        """
        version = group.version()
        if group.read is not None and group.read_version == version:
            return
        place = self._place(group)
        emptied = []
        for other in [other for other in self._there if _overlap(self._place(other), place)]:
            if other.emptied is not None:
                emptied.append(other.emptied)
            other.read = other.emptied = None
            self._there.remove(other)
        group.read = self._device.read(group.regions, self._memory[place], emptied)
        group.read_version = version
        self._there.append(group)
        self._on_read(group)

    def load(self, group: TransferGroup, after: Event) -> Copied:
        """Start loading a group from its place, once it is read. If the read fails, so does this."""
        self.read(group)
        staged = self._memory[self._place(group)]
        group.emptied = self._device.copy_staged(group.read, staged, group.pieces, group.target, after)
        group.read = None
        return group.emptied

    def ahead(self) -> list[TransferGroup]:
        """Groups that were read and not loaded since."""
        return [group for group in self._there if group.read is not None]

    def close(self) -> None:
        """Let go of the memory. Nothing may be under way."""
        for group in self._there:
            group.read = group.emptied = None
        self._there.clear()
        unpin(self._memory)
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _place(self, group: TransferGroup) -> slice:
        assert group.staging_offset is not None, "only what rests on disk is read"
        return slice(group.staging_offset, group.staging_offset + group.read_bytes)


def _overlap(one: slice, other: slice) -> bool:
    return bool(one.start < other.stop and other.start < one.stop)
