"""The device tier on a machine without an accelerator: budgeted RAM, filled by one reader thread."""

from __future__ import annotations

import hashlib
import os
import platform
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

from autosp.devices.base import Region
from autosp.devices.memory import anonymous, free_kernel_buffers, memory_of, settle_heap, status_bytes, trim_heap
from autosp.spec import DeviceInfo, Tier


@dataclass(slots=True)
class ReadTimes:
    """Seconds of `time.perf_counter`."""

    began: float = 0.0
    ended: float = 0.0


class CopyEvent:
    """The end of one job of the reader thread, with the exception it ended in."""

    __slots__ = ("_done", "error", "times")

    def __init__(self) -> None:
        self._done = threading.Lock()
        self._done.acquire()
        self.times = ReadTimes()
        self.error: BaseException | None = None

    def begin(self) -> None:
        """The reader took the job."""
        self.times.began = time.perf_counter()

    def set(self) -> None:
        """The job is over."""
        self.times.ended = time.perf_counter()
        self._done.release()

    def over(self) -> bool:
        """Whether it is."""
        return not self._done.locked()

    def settle(self) -> None:
        """Block until it is over, however it ended."""
        with self._done:  # held until then
            pass

    def wait(self) -> None:
        """Block until it is over. Raises what the reader raised."""
        self.settle()
        if self.error is not None:
            raise self.error


_Job = tuple[Sequence[Region], torch.Tensor, CopyEvent]


class CpuDevice:
    """Compute is synchronous with the host, so a point in the compute order is over when it is made.

    `slow_tier` is where streamed weights rest: DISK, or HOST for a study or test of the host -> device path.
    `paced_bytes_per_s` makes every copy take at least its bytes over that: a stand-in for a link, never a default.
    """

    reads_host = True

    def __init__(self, *, slow_tier: Tier = Tier.DISK, paced_bytes_per_s: float | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self.info = _info(slow_tier, paced_bytes_per_s)
        self._pace = paced_bytes_per_s
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._reader: threading.Thread | None = None
        self._last: CopyEvent | None = None
        self._baseline = 0

    def allocate(self, n_bytes: int) -> torch.Tensor:
        """Anonymous pages, huge where the kernel grants them, touched once so that no pass pays for page faults."""
        memory = anonymous(n_bytes)
        memory.zero_()
        return memory

    def pin(self, memory: torch.Tensor) -> None:
        """The reader copies with the processor, which pages need no pinning for."""

    def host_view(self, memory: torch.Tensor) -> torch.Tensor:
        """Itself."""
        return memory

    def copy(self, regions: Sequence[Region], target: torch.Tensor, after: None = None) -> CopyEvent:
        """Queue the job. The compute that `after` stands for is over already."""
        if self._reader is None:
            self._reader = threading.Thread(target=self._read_jobs, name="autosp-reader", daemon=True)
            self._reader.start()
        event = CopyEvent()
        self._last = event
        self._jobs.put((regions, target, event))
        return event

    def record(self) -> None:
        """Nothing to mark: the host has waited for all compute."""

    def wait(self, event: CopyEvent | None) -> None:
        """Block until the copy is over."""
        if event is not None:
            event.wait()

    def finished(self, event: CopyEvent | None) -> bool:
        """Whether the reader is done with it."""
        return event is None or event.over()

    def finish_compute(self) -> None:
        """It is finished when its call returns."""

    def synchronize(self) -> None:
        """Block until the last copy is over; its error, if any, is its waiter's to raise."""
        if self._last is not None:
            self._last.settle()

    def stamp(self) -> float:
        """Seconds of the monotonic clock."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Plain difference."""
        return end - start

    def start_measuring(self) -> None:
        """Return freed heap to the kernel, so that what comes next is seen. Pages of files do not count."""
        _start_thread_pools()
        settle_heap()
        free_kernel_buffers()
        trim_heap()
        self.restart_peak()
        self._baseline = status_bytes("RssAnon")

    def originals_freed(self, n_bytes: int) -> None:
        """A new baseline, which the freed originals are no part of; the moment with both copies is forgotten."""
        self.start_measuring()
        self._baseline -= n_bytes

    def peak_bytes(self) -> int:
        """The kernel's peak of resident memory, less pages of files as they are now, less the baseline."""
        files = status_bytes("RssFile") + status_bytes("RssShmem")
        return max(0, status_bytes("VmHWM") - files - self._baseline)

    def restart_peak(self) -> None:
        """Reset the kernel's high-water mark (proc(5), clear_refs, value 5)."""
        Path("/proc/self/clear_refs").write_text("5")

    @contextmanager
    def limit(self, budget_bytes: int | None) -> Iterator[None]:
        """No cap that is safe to hit: the measured peak decides instead."""
        yield

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Python's MemoryError, or the failure of torch's CPU allocator."""
        return isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
        )

    def close(self) -> None:
        """End the reader thread after its queued jobs."""
        if self._reader is not None:
            self._jobs.put(None)
            self._reader.join()
            self._reader = None

    def _read_jobs(self) -> None:
        while (job := self._jobs.get()) is not None:
            regions, target, event = job
            del job
            event.begin()
            try:
                self._fill(regions, target)
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for the event
                event.error = error
            del regions, target
            event.set()
            del event

    def _fill(self, regions: Sequence[Region], target: torch.Tensor) -> None:
        start = time.perf_counter()
        view = memory_of(target)
        done = 0
        for region in regions:
            region.read_into(view[done : done + region.n_bytes])
            done += region.n_bytes
        if self._pace is not None:
            time.sleep(max(0.0, start + done / self._pace - time.perf_counter()))


def resident_bytes() -> tuple[int, int]:
    """The process's resident memory now, and its peak since the last `restart_peak`; mapped files included."""
    return status_bytes("VmRSS"), status_bytes("VmHWM")


def _info(slow_tier: Tier, pace: float | None) -> DeviceInfo:
    name = _processor_name()
    memory = psutil.virtual_memory().total
    text = f"{name}|{os.cpu_count()}|{memory >> 28}|{torch.__version__}|{torch.get_num_threads()}|{slow_tier}|{pace}"
    return DeviceInfo(
        kind="cpu",
        name=f"{name}, {os.cpu_count()} cores" + (f", link paced to {pace / 1e9:g} GB/s" if pace else ""),
        slow_tier=slow_tier,
        memory_bytes=memory,
        torch_version=str(torch.__version__),
        fingerprint=hashlib.sha256(text.encode()).hexdigest()[:16],
    )


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def _start_thread_pools() -> None:
    """What torch takes once for its threads and kernels is any torch program's, not a plan's."""
    with torch.no_grad():
        torch.mm(torch.ones(256, 256), torch.ones(256, 256))
