"""Measures the links that weights take, alone. What link and compute cost each other is seen in passes."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Protocol

import numpy as np
import torch

from autosp.devices import Copied, Device, Piece, Region
from autosp.devices.memory import anonymous, unpin
from autosp.partition.tensors import LAYER_ALIGNMENT
from autosp.spec import LinkPoint, LinkProfile, Tier
from autosp.tiers.host import HostRegion

SMALLEST_BYTES = 64 * 2**10
REPEATS = 5

EXPECTED_SLOWDOWN = 1.03
"""Of link and compute by each other, until a pass was seen in which they overlap."""


class Windowed(Protocol):
    """What transfers can be measured from: a store, or memory made for it."""

    def window(self, offset: int, n_bytes: int) -> Region:
        """See `Store`."""


class _Timed(Protocol):
    """Transfers one after another."""

    def seconds(self, n_bytes: int) -> float:
        """One transfer, alone."""


def measure_link(
    device: Device, store: Windowed, store_bytes: int, largest_bytes: int, progress: Callable[[str], None]
) -> LinkProfile:
    """Sweep transfer sizes up to `largest_bytes`, twice the memory of which this takes.

    Sources rotate through the store, so that no cache of the slow tier answers instead of it; targets rotate through as
    much memory as the smallest ring has that overlaps loads, for a processor's cache makes writes to less of it faster.
    """
    largest = min(largest_bytes, store_bytes) // LAYER_ALIGNMENT * LAYER_ALIGNMENT
    sweep = _Sweep(device, store, store_bytes, device.allocate(2 * largest))
    return _measure(sweep, largest, (device.info.slow_tier, Tier.DEVICE), progress)


def measure_return(device: Device, largest_bytes: int, progress: Callable[[str], None]) -> LinkProfile:
    """The same for copies from the device to host memory, which gradients take. What they cost compute is in passes."""
    largest = max(LAYER_ALIGNMENT, largest_bytes // LAYER_ALIGNMENT * LAYER_ALIGNMENT)
    host = anonymous(2 * largest)
    host.zero_()
    device.pin(host)
    found = _measure(_ReturnSweep(device, device.allocate(largest), host), largest, (Tier.DEVICE, Tier.HOST), progress)
    device.synchronize()
    unpin(host)
    return found.model_copy(update={"link_slowdown": 1.0, "compute_slowdown": 1.0})


def measure_disk(
    device: Device, store: Windowed, store_bytes: int, largest_bytes: int, progress: Callable[[str], None]
) -> LinkProfile:
    """The same for reads from disk to the host, of what rests behind it."""
    largest = min(largest_bytes, store_bytes) // LAYER_ALIGNMENT * LAYER_ALIGNMENT
    staging = anonymous(2 * largest)
    staging.zero_()
    device.pin(staging)
    sweep = _DiskSweep(device, store, store_bytes, staging, device.allocate(LAYER_ALIGNMENT))
    found = _measure(sweep, largest, (Tier.DISK, Tier.HOST), progress)
    device.synchronize()
    unpin(staging)
    return found


def _measure(sweep: _Timed, largest: int, ends: tuple[Tier, Tier], progress: Callable[[str], None]) -> LinkProfile:
    points = []
    for n_bytes in _sizes(largest):
        progress(f"{ends[0].value} → {ends[1].value}, {n_bytes / 1e6:.3g} MB")
        points.append(LinkPoint(n_bytes=n_bytes, seconds=median(sweep.seconds(n_bytes) for _ in range(REPEATS))))
    latency_s, bytes_per_s = fit([(point.n_bytes, point.seconds) for point in points])
    return LinkProfile(
        source=ends[0],
        target=ends[1],
        latency_s=latency_s,
        bytes_per_s=bytes_per_s,
        link_slowdown=EXPECTED_SLOWDOWN,
        compute_slowdown=EXPECTED_SLOWDOWN,
        points=tuple(points),
    )


class HostProbe:
    """Pinned host memory to measure the link from, where no layer rests on the host. Its window is all there is."""

    def __init__(self, device: Device, n_bytes: int) -> None:
        self._memory = anonymous(n_bytes)
        self._memory.zero_()
        device.pin(self._memory)

    def window(self, offset: int, n_bytes: int) -> HostRegion:
        """A run of it."""
        offset = offset // LAYER_ALIGNMENT * LAYER_ALIGNMENT
        return HostRegion(self._memory[offset : offset + n_bytes], n_bytes)

    def close(self) -> None:
        """Nothing may be under way."""
        unpin(self._memory)


def fit(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Latency and bandwidth of `seconds = latency + bytes / bandwidth`, least squares of the relative errors."""
    sizes = np.array([size for size, _ in points], dtype=float)
    seconds = np.array([second for _, second in points])
    if len(points) == 1:
        return 0.0, float(sizes[0] / seconds[0])
    table = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(table, np.ones_like(seconds), rcond=None)
    if latency < 0 or per_byte <= 0:
        return 0.0, float(sizes[-1] / seconds[-1])
    return float(latency), float(1 / per_byte)


def _sizes(largest: int) -> list[int]:
    sizes = [largest]
    while sizes[-1] // 4 >= SMALLEST_BYTES:
        sizes.append(sizes[-1] // 4 // LAYER_ALIGNMENT * LAYER_ALIGNMENT)
    return sorted(sizes)


class _Sweep:
    """Transfers of any size from rotating places of the store."""

    def __init__(self, device: Device, store: Windowed, store_bytes: int, target: torch.Tensor) -> None:
        self._device = device
        self._store = store
        self._store_bytes = store_bytes
        self.target = target
        self._next = 0
        self._place = 0

    def start(self, n_bytes: int) -> Copied:
        """Begin one transfer."""
        region, target = self._next_places(n_bytes)
        return self._device.copy([region], target, self._device.record())

    def _next_places(self, n_bytes: int) -> tuple[Region, torch.Tensor]:
        if self._next + n_bytes > self._store_bytes:
            self._next = 0
        if self._place + n_bytes > self.target.numel():
            self._place = 0
        region = self._store.window(self._next, n_bytes)
        target = self.target[self._place : self._place + n_bytes]
        self._next += n_bytes
        self._place += n_bytes
        return region, target

    def seconds(self, n_bytes: int) -> float:
        """One transfer, alone."""
        self._device.synchronize()
        begin = self._device.stamp()
        self._device.wait(self.start(n_bytes))
        end = self._device.stamp()
        self._device.synchronize()
        return self._device.seconds(begin, end)


class _DiskSweep(_Sweep):
    """Reads into rotating places of staging, each followed by a copy of a page: what a device can wait for."""

    def __init__(
        self, device: Device, store: Windowed, store_bytes: int, staging: torch.Tensor, memory: torch.Tensor
    ) -> None:
        super().__init__(device, store, store_bytes, staging)
        self._page = memory[:LAYER_ALIGNMENT]

    def start(self, n_bytes: int) -> Copied:
        """Begin one read."""
        region, target = self._next_places(n_bytes)
        self._read = self._device.read([region], target, [])
        page = Piece(0, 0, self._page.numel())
        return self._device.copy_staged(self._read, target, [page], self._page, self._device.record())

    def seconds(self, n_bytes: int) -> float:
        """One read, alone."""
        self._device.synchronize()
        self._device.wait(self.start(n_bytes))
        self._device.synchronize()
        return self._device.seconds(self._read.times.began, self._read.times.ended)


class _ReturnSweep:
    """Copies to rotating places of host memory."""

    def __init__(self, device: Device, source: torch.Tensor, host: torch.Tensor) -> None:
        self._device = device
        self._source = source
        self._host = host
        self._place = 0

    def seconds(self, n_bytes: int) -> float:
        """One copy, alone."""
        if self._place + n_bytes > self._host.numel():
            self._place = 0
        target = self._host[self._place : self._place + n_bytes]
        self._place += n_bytes
        self._device.synchronize()
        sent = self._device.send(self._source[:n_bytes], target, self._device.record())
        self._device.settle(sent)
        self._device.synchronize()
        return self._device.seconds(sent.times.began, sent.times.ended)
