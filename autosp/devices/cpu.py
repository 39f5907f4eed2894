"""The device tier on a machine without an accelerator: budgeted RAM, filled by one copying thread."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path

import psutil
import torch

from autosp.devices.base import Piece, Region
from autosp.devices.heap import (
    Plugs,
    Tidy,
    free_kernel_buffers,
    heap_of_training,
    settle_heap,
)
from autosp.devices.memory import anonymous, copy_bytes, memory_of, read_regions, status_bytes
from autosp.devices.worker import CopyEvent, Worker
from autosp.spec import DeviceInfo, Tier


class CpuDevice:
    """Compute is synchronous with the host, so a point in the compute order is over when it is made.

    `slow_tier` is where streamed weights rest: DISK, or HOST for a study or test of the host -> device path, with a
    second thread for what rests on disk behind it.
    `paced_bytes_per_s` makes every copy take at least its bytes over that: a stand-in for a link, never a default.
    """

    reads_host = True
    is_host = True

    def __init__(self, *, slow_tier: Tier = Tier.DISK, paced_bytes_per_s: float | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self.info = _info(slow_tier, paced_bytes_per_s)
        self._pace = paced_bytes_per_s
        self._copier = Worker("autosp-copier")
        self._reader = Worker("autosp-reader")
        self._sender = Worker("autosp-sender")
        self._plugs = Plugs()
        self._host = Worker("autosp-host")
        self._baseline = 0

    def __reduce__(self) -> tuple[Callable[[], CpuDevice], tuple[()]]:
        """Another process gets one of its own, with threads of its own."""
        return partial(CpuDevice, slow_tier=self.info.slow_tier, paced_bytes_per_s=self._pace), ()

    def allocate(self, n_bytes: int) -> torch.Tensor:
        """Anonymous pages, huge where the kernel grants them, touched once so that no pass pays for page faults."""
        memory = anonymous(n_bytes)
        memory.zero_()
        return memory

    def pin(self, memory: torch.Tensor) -> None:
        """The copier copies with the processor, which pages need no pinning for."""

    def host_view(self, memory: torch.Tensor) -> torch.Tensor:
        """Itself."""
        return memory

    def copy(
        self, regions: Sequence[Region], target: torch.Tensor, after: None = None, written: CopyEvent | None = None
    ) -> CopyEvent:
        """Queue the job. The compute that `after` stands for is over already."""
        if written is None:
            return self._copier.start(partial(self._fill, regions, target))
        return self._copier.start(partial(self._fill_written, written, regions, target), (written,))

    def read(self, regions: Sequence[Region], staging: torch.Tensor, after: Sequence[CopyEvent]) -> CopyEvent:
        """Queue the job for the other thread."""
        return self._reader.start(partial(self._read, regions, staging), after)

    def copy_staged(
        self, read: CopyEvent, staging: torch.Tensor, pieces: Sequence[Piece], target: torch.Tensor, after: None = None
    ) -> CopyEvent:
        """Queue the job, which waits for the other thread's."""
        return self._copier.start(partial(self._upload, read, staging, pieces, target), (read,))

    def send(self, source: torch.Tensor, target: torch.Tensor, after: None = None) -> CopyEvent:
        """Queue the job for a third thread."""
        return self._sender.start(partial(self._return, source, target))

    def work(self, job: Callable[[], object]) -> CopyEvent:
        """Queue the job for a fourth thread."""
        return self._host.start(job)

    def settle(self, copied: CopyEvent | None) -> None:
        """As `wait`: compute is synchronous with the host."""
        self.wait(copied)

    def join(self) -> None:
        """All compute is over when its call returns."""

    def record(self) -> None:
        """Nothing to mark: the host has waited for all compute."""

    def wait(self, copied: CopyEvent | None) -> None:
        """Block until the copy is over."""
        if copied is not None:
            copied.wait()

    def finished(self, copied: CopyEvent | None) -> bool:
        """Whether the copier is done with it."""
        return copied is None or copied.over()

    def finish_compute(self) -> None:
        """It is finished when its call returns."""

    def synchronize(self) -> None:
        """Block until all queued jobs are over; their errors, if any, are their waiters' to raise."""
        self._host.settle()
        self._copier.settle()
        self._reader.settle()
        self._sender.settle()

    def stamp(self) -> float:
        """Seconds of the monotonic clock."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Plain difference."""
        return end - start

    def training(self) -> AbstractContextManager[None]:
        """Gradients leave the heap at once."""
        return heap_of_training()

    def start_measuring(self, libraries: bool = True) -> None:
        """Return freed heap to the kernel and close its holes, so that what comes next is seen.

        Pages of files do not count. See [Note: holes].
        """
        _start_thread_pools()
        if libraries:
            free_kernel_buffers()
        settle_heap()
        self._plugs.fill()
        self.restart_peak()
        self._baseline = status_bytes("RssAnon")

    def originals_freed(self, n_bytes: int) -> None:
        """A new baseline, which the freed originals are no part of; the moment with both copies is forgotten."""
        self.start_measuring()
        self._baseline -= n_bytes

    def free_bytes(self) -> None:
        """The host's is asked for elsewhere."""

    def peak_bytes(self) -> int:
        """The kernel's peak of resident memory, less pages of files as they are now, less the baseline."""
        files = status_bytes("RssFile") + status_bytes("RssShmem")
        return max(0, status_bytes("VmHWM") - files - self._baseline)

    def restart_peak(self) -> None:
        """Reset the kernel's high-water mark (proc(5), clear_refs, value 5)."""
        Path("/proc/self/clear_refs").write_text("5")

    def keep_within(self, n_bytes: int) -> Callable[[], None]:
        """The heap's unused pages go back to the kernel."""
        return Tidy(n_bytes, lambda: self._baseline)

    @contextmanager
    def limit(self, budget_bytes: int | None) -> Iterator[None]:
        """No cap that is safe to hit: the measured peak decides instead."""
        yield

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Python's MemoryError, or the failure of torch's CPU allocator."""
        return isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
        )

    def is_fatal(self, error: BaseException) -> bool:
        """A processor has no state that an exception spoils."""
        return False

    def close(self) -> None:
        """End the threads after their queued jobs: those that the copier may wait for before it."""
        self._host.close()
        self._sender.close()
        self._reader.close()
        self._copier.close()
        self._plugs.release()

    def _fill(self, regions: Sequence[Region], target: torch.Tensor) -> None:
        """A copy from the slow tier, at its pace."""
        start = time.perf_counter()
        self._pause(start, read_regions(regions, target))

    def _fill_written(self, written: CopyEvent, regions: Sequence[Region], target: torch.Tensor) -> None:
        """A copy of what a job wrote."""
        written.wait()  # it is over: raises its error
        self._fill(regions, target)

    def _return(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """A copy to the slow tier, at the link's pace."""
        start = time.perf_counter()
        copy_bytes(source, memory_of(target))
        self._pause(start, target.numel())

    def _read(self, regions: Sequence[Region], staging: torch.Tensor) -> None:
        """A read from disk behind the slow tier."""
        read_regions(regions, staging)

    def _upload(self, read: CopyEvent, staging: torch.Tensor, pieces: Sequence[Piece], target: torch.Tensor) -> None:
        """A copy of what was read, at the link's pace."""
        read.wait()  # it is over: raises its error
        start = time.perf_counter()
        view = memory_of(target)
        for piece in pieces:
            source = staging[piece.source : piece.source + piece.n_bytes]
            copy_bytes(source, view[piece.target : piece.target + piece.n_bytes])
        self._pause(start, sum(piece.n_bytes for piece in pieces))

    def _pause(self, start_s: float, n_bytes: int) -> None:
        if self._pace is not None:
            time.sleep(max(0.0, start_s + n_bytes / self._pace - time.perf_counter()))


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
        ones = torch.ones(256, 256, device="cpu")
        torch.mm(ones, ones)
