"""Measures the links that weights take: latency and bandwidth alone, and what link and compute cost each other."""

from __future__ import annotations

import time
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
PROBE_BYTES = 256 * 2**20
"""Bytes moved by the contention probe."""

WORK_BYTES = 64 * 2**20
ROWS = 128
"""The compute beside it: products of so many rows with a matrix of at most so many bytes."""

CHUNK_BYTES = 16 * 2**20
"""Bytes of each of its transfers, at most."""


class Windowed(Protocol):
    """What transfers can be measured from: a store, or memory made for it."""

    def window(self, offset: int, n_bytes: int) -> Region:
        """See `Store`."""


def measure_link(
    device: Device,
    store: Windowed,
    store_bytes: int,
    largest_bytes: int,
    dtype: torch.dtype,
    progress: Callable[[str], None],
) -> LinkProfile:
    """Sweep transfer sizes up to `largest_bytes` (twice the memory of which this takes), then probe contention.

    Sources rotate through the store, so that no cache of the slow tier answers instead of it; targets rotate through as
    much memory as the smallest ring has that overlaps loads, for a processor's cache makes writes to less of it faster.
    """
    largest = min(largest_bytes, store_bytes) // LAYER_ALIGNMENT * LAYER_ALIGNMENT
    target = device.allocate(2 * largest)
    sweep = _Sweep(device, store, store_bytes, target)
    beside = _Sweep(device, store, store_bytes, target[:largest])
    step = _compute_step(device, target[largest:], dtype)
    return _measure(device, sweep, beside, largest, step, (device.info.slow_tier, Tier.DEVICE), progress)


def measure_disk(
    device: Device,
    store: Windowed,
    store_bytes: int,
    largest_bytes: int,
    dtype: torch.dtype,
    progress: Callable[[str], None],
) -> LinkProfile:
    """The same for reads from disk to the host, of what rests behind it: beside them compute, and no copies."""
    largest = min(largest_bytes, store_bytes) // LAYER_ALIGNMENT * LAYER_ALIGNMENT
    memory = device.allocate(largest)
    staging = anonymous(2 * largest)
    staging.zero_()
    device.pin(staging)
    sweep = _DiskSweep(device, store, store_bytes, staging, memory)
    beside = _DiskSweep(device, store, store_bytes, staging[:largest], memory)
    found = _measure(
        device, sweep, beside, largest, _compute_step(device, memory, dtype), (Tier.DISK, Tier.HOST), progress
    )
    device.synchronize()
    unpin(staging)
    return found


def _measure(
    device: Device,
    sweep: _Sweep,
    beside: _Sweep,
    largest: int,
    step: Callable[[], None],
    ends: tuple[Tier, Tier],
    progress: Callable[[str], None],
) -> LinkProfile:
    points = []
    for n_bytes in _sizes(largest):
        progress(f"{ends[0].value} → {ends[1].value}, {n_bytes / 1e6:.3g} MB")
        points.append(LinkPoint(n_bytes=n_bytes, seconds=median(sweep.seconds(n_bytes) for _ in range(REPEATS))))
    latency_s, bytes_per_s = fit([(point.n_bytes, point.seconds) for point in points])
    progress(f"{ends[0].value} → {ends[1].value} under compute")
    compute_slowdown, link_slowdown = _contention(device, beside, step)
    return LinkProfile(
        source=ends[0],
        target=ends[1],
        latency_s=latency_s,
        bytes_per_s=bytes_per_s,
        link_slowdown=link_slowdown,
        compute_slowdown=compute_slowdown,
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


def _contention(device: Device, sweep: _Sweep, step: Callable[[], None]) -> tuple[float, float]:
    """How many times longer compute takes during transfers, and transfers during compute.

    Compute steps run one by one until a queue of transfers is through; both are compared with running alone.
    """
    chunk = min(sweep.target.numel() // 2 // LAYER_ALIGNMENT * LAYER_ALIGNMENT, CHUNK_BYTES)
    if chunk == 0:
        return 1.0, 1.0
    count = max(2, PROBE_BYTES // chunk)
    queue_alone_s, _ = _until_through(device, sweep, chunk, count, device.synchronize)
    step_alone_s = median(_step_s(device, step) for _ in range(max(8, 4 * REPEATS)))
    queue_s, steps = _until_through(device, sweep, chunk, count, step)
    if steps < 2:  # too short to tell
        return 1.0, 1.0
    return max(1.0, queue_s / steps / step_alone_s), max(1.0, queue_s / queue_alone_s)


def _until_through(
    device: Device, sweep: _Sweep, chunk: int, count: int, step: Callable[[], None]
) -> tuple[float, int]:
    """Seconds until `count` transfers are over, and how often `step` ran meanwhile."""
    device.synchronize()
    begin = time.perf_counter()
    events = [sweep.start(chunk) for _ in range(count)]
    steps = 0
    while not device.finished(events[-1]):
        step()
        steps += 1
    return time.perf_counter() - begin, steps


def _step_s(device: Device, step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def _compute_step(device: Device, memory: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """A product of a few rows with a matrix that fills `memory`: like a streamed layer, it reads its weights once."""
    usable = dtype if dtype.is_floating_point and dtype.itemsize >= 2 else torch.float32
    inner = 1024
    elements = min(memory.numel(), WORK_BYTES) // usable.itemsize
    outer = max(1, elements // inner)
    inner = min(inner, elements)
    aligned = memory[-memory.data_ptr() % usable.itemsize :]
    weights = aligned[: inner * outer * usable.itemsize].view(usable).view(inner, outer)
    weights.fill_(0.01)
    rows = torch.ones(ROWS, inner, dtype=usable, device=device.torch_device)

    def step() -> None:
        with torch.no_grad():
            torch.mm(rows, weights)
        device.finish_compute()

    return step
