"""Host memory for what comes and goes: pinned once, taken and given back many times."""

from __future__ import annotations

import torch

from autosp.devices import Device
from autosp.devices.memory import anonymous
from autosp.errors import HostMemoryError
from autosp.tiers.host import available_bytes

KEPT_PASSES = 8
"""A run that nobody took for so many passes is let go: batches of another shape do not come back."""

LEAST_BYTES = 4096


class Lease:
    """A run of pinned memory. Where its last reference goes, the run is free for others."""

    __slots__ = ("_memory", "_pool", "data")

    def __init__(self, pool: PinnedPool, memory: torch.Tensor, n_bytes: int) -> None:
        self._pool, self._memory = pool, memory
        self.data = memory[:n_bytes]
        """uint8."""

    def __del__(self) -> None:
        self._pool.give_back(self._memory)


class PinnedPool:
    """Runs of a few sizes, so that a run that is free fits what comes next. Any thread may let go of a lease."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._free: dict[int, list[tuple[int, torch.Tensor]]] = {}
        """Size -> runs that are free, each with the pass in which it became so."""
        self._pass = 0
        self._closed = False
        self.runs_taken = 0
        """Runs of memory that were taken from the system, and pinned, so far."""

    def take(self, n_bytes: int) -> Lease:
        """A run of at least so many bytes: one that is free, if there is one of its size.

        Raises: HostMemoryError if there is none, and no room for one.
        """
        size = size_class(n_bytes)
        free = self._free.setdefault(size, [])
        if free:
            return Lease(self, free.pop()[1], n_bytes)
        if size > (room := available_bytes()):
            raise HostMemoryError(
                f"host memory has room for {room / 1e9:.2f} GB, and {size / 1e9:.2f} GB of activations are to be "
                "offloaded beside what it has: offload fewer layers, or compute them again"
            )
        memory = anonymous(size)
        memory.zero_()  # its pages are taken before a copy comes
        self._device.pin(memory)
        self.runs_taken += 1
        return Lease(self, memory, n_bytes)

    def give_back(self, memory: torch.Tensor) -> None:
        """By a lease that ends."""
        if not self._closed:
            self._free.setdefault(memory.numel(), []).append((self._pass, memory))

    def begin_pass(self) -> None:
        """Let go of what was not taken for long."""
        self._pass += 1
        for runs in self._free.values():
            runs[:] = [one for one in runs if self._pass - one[0] <= KEPT_PASSES]

    def close(self) -> None:
        """Let go of all that is free; what is taken goes with its lease."""
        self._closed = True
        self._free.clear()


def size_class(n_bytes: int) -> int:
    """The least size of a run that holds so many bytes: eight sizes for each power of two."""
    step = max(LEAST_BYTES, 1 << max(0, (n_bytes - 1).bit_length() - 4))
    return -(-n_bytes // step) * step
