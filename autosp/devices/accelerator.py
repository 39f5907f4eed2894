"""CUDA, ROCm and XPU through torch's device modules: a stream for copies each way beside the user's compute stream."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch

from autosp.devices import memory as pages
from autosp.devices.base import Piece, Region, nothing_to_do
from autosp.devices.copy_queue import AskedCopy, CopyQueue, StreamCopy
from autosp.devices.worker import CopyEvent, Worker
from autosp.errors import TierError
from autosp.spec import DeviceInfo, Tier

ALLOCATION_FAILED = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "unable to find an engine to execute")
"""What libraries of the accelerator say where an allocation of their own fails. The last is cuDNN's, through torch."""

LIBRARIES = ("CUDA error: CUBLAS_", "CUDA error: CUDNN_", "CUDA error: CUSPARSE_", "CUDA error: CUSOLVER_")
"""What their errors begin with. These are of one call, not of the device."""


class _HostBytes:
    """Pinned host memory in the form in which torch takes device memory from others; it keeps the memory alive."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.numel(),),
            "typestr": "|u1",
            "data": (memory.data_ptr(), False),
            "version": 2,
        }


class AcceleratorDevice:
    """Host memory -> device memory. The host never blocks on a copy: `wait` orders streams, not the host.

    Only for a copy whose bytes are still being read from disk, or written by a job of the host's, the host waits, until
    it can be issued.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        chosen = torch.device(device) if device is not None else torch.accelerator.current_accelerator()
        assert chosen is not None, "choose_device checks that there is an accelerator"
        if chosen.index is None:
            chosen = torch.device(chosen.type, torch.accelerator.current_device_index())
        self.torch_device = chosen
        self._module = torch.get_device_module(chosen)
        self._copies = self._module.Stream(chosen)
        self._sends = self._module.Stream(chosen)
        # A thread that waits for a blocking event sleeps; for others it would take a core.
        self._event_options = {"blocking": True} if chosen.type == "cuda" else {}
        self._queue = CopyQueue(self._issue)
        self._reader = Worker("autosp-reader", self._queue.issue)
        self._host = Worker("autosp-host", self._queue.issue)
        self._joined: Any = None
        self._anchor: tuple[Any, float, float] | None = None
        self.clock_error_s = 0.0
        """How far from its place an event may stand among the host's times: known once `seconds` has placed one."""
        self._baseline = 0
        self.is_host = False
        self.reads_host = self._can_read_host()
        self.info = self._describe()

    def __reduce__(self) -> tuple[type[AcceleratorDevice], tuple[torch.device]]:
        """Another process gets one of its own, with streams of its own."""
        return AcceleratorDevice, (self.torch_device,)

    def allocate(self, n_bytes: int) -> torch.Tensor:
        """From torch's caching allocator, cut to a 4096-byte boundary."""
        with torch.inference_mode(False):
            memory = torch.empty(n_bytes + 4096, dtype=torch.uint8, device=self.torch_device)
        shift = -memory.data_ptr() % 4096
        return memory[shift : shift + n_bytes]

    def pin(self, memory: torch.Tensor) -> None:
        """`cudaHostRegister` of the pages, undone when they are freed. Where that fails, copies are pageable."""
        if memory.numel():
            pages.pin(memory, self.torch_device)

    def host_view(self, memory: torch.Tensor) -> torch.Tensor:
        """A device tensor over pinned host memory: what kernels read of it crosses the link, row by row.

        Raises: TierError if the memory is not pinned: the first kernel to read it would end the device's context.
        """
        try:
            if memory.numel() and not pages.is_pinned(memory):
                raise RuntimeError("it is not pinned")
            return torch.as_tensor(_HostBytes(memory), device=self.torch_device)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise TierError(
                f"{self.info.name} cannot read {memory.numel() / 1e9:.2f} GB of host memory in place ({error}): lookup "
                "tables need pinned memory; raise the limit of locked memory (ulimit -l)"
            ) from error

    def copy(
        self, regions: Sequence[Region], target: torch.Tensor, after: Any = None, written: CopyEvent | None = None
    ) -> StreamCopy:
        """One `cudaMemcpyAsync` (or its like) per region, on the copy stream."""
        runs = []
        done = 0
        for region in regions:
            assert region.host is not None, "an accelerator streams from host memory"
            runs.append((target[done : done + region.n_bytes], region.host))
            done += region.n_bytes
        return self._queue.ask(AskedCopy(StreamCopy(), runs, after, written))

    def read(self, regions: Sequence[Region], staging: torch.Tensor, after: Sequence[StreamCopy]) -> CopyEvent:
        """On the reader's thread."""
        return self._reader.start(partial(pages.read_regions, regions, staging), after)

    def copy_staged(
        self, read: CopyEvent, staging: torch.Tensor, pieces: Sequence[Piece], target: torch.Tensor, after: Any = None
    ) -> StreamCopy:
        """One `cudaMemcpyAsync` (or its like) per piece, on the copy stream."""
        runs = [
            (target[one.target : one.target + one.n_bytes], staging[one.source : one.source + one.n_bytes])
            for one in pieces
        ]
        return self._queue.ask(AskedCopy(StreamCopy(), runs, after, read))

    def send(self, source: torch.Tensor, target: torch.Tensor, after: Any = None) -> StreamCopy:
        """One `cudaMemcpyAsync` (or its like) on the stream of the other direction."""
        copied = StreamCopy()
        self._put(copied, self._sends, [(target, source)], after)
        return copied

    def work(self, job: Callable[[], object]) -> CopyEvent:
        """On a thread of its own, which issues the copies that waited for it."""
        return self._host.start(job)

    def settle(self, copied: StreamCopy | None) -> None:
        """Wait for the event at its end."""
        if copied is not None:
            copied.wait_issued()
            copied.times.ended.synchronize()

    def join(self) -> None:
        """The user's current stream waits for the one that was current then: passes may come on different streams."""
        stream = self._module.current_stream(self.torch_device)
        if self._joined is not None and stream != self._joined:
            stream.wait_stream(self._joined)
        self._joined = stream

    def record(self) -> Any:
        """On the user's current stream."""
        return self._module.current_stream(self.torch_device).record_event()

    def wait(self, copied: StreamCopy | None) -> None:
        """The user's current stream waits; the host does not, once the copy is issued."""
        if copied is not None:
            copied.wait_issued()
            self._module.current_stream(self.torch_device).wait_event(copied.times.ended)

    def finished(self, copied: StreamCopy | None) -> bool:
        """Query the event at its end."""
        if copied is None:
            return True
        return copied.is_issued() and (copied.error is not None or bool(copied.times.ended.query()))

    def finish_compute(self) -> None:
        """Wait for the user's current stream."""
        self._module.current_stream(self.torch_device).synchronize()

    def synchronize(self) -> None:
        """Wait for the host's jobs, for the reader, and for all streams of the device."""
        self._host.settle()
        self._reader.settle()
        self._queue.issue()
        self._module.synchronize(self.torch_device)
        self._anchor = None

    def stamp(self) -> Any:
        """A timing event on the current stream."""
        return self._timing_event()

    def seconds(self, start: Any, end: Any) -> float:
        """From the device's own clock; where a stamp is a read's, from the host's, on which events are placed."""
        if isinstance(start, float) or isinstance(end, float):
            return self._on_host_clock(end) - self._on_host_clock(start)
        start.synchronize()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def training(self) -> AbstractContextManager[None]:
        """The caching allocator needs not be told."""
        return nullcontext()

    def start_measuring(self, libraries: bool = True) -> None:
        """Empty the allocator's cache and begin a new peak of reserved bytes."""
        self._free_cached(libraries)
        self._module.reset_peak_memory_stats(self.torch_device)
        self._baseline = self._module.memory_reserved(self.torch_device)

    def originals_freed(self, n_bytes: int) -> None:
        """Host memory is not counted: the peak goes on."""

    def free_bytes(self) -> int | None:
        """What the driver says is free, and what torch's allocator has already."""
        ask = getattr(self._module, "mem_get_info", None)
        if ask is None:
            return None
        return int(ask(self.torch_device)[0]) + int(self._module.memory_reserved(self.torch_device))

    def peak_bytes(self) -> int:
        """Bytes that torch's allocator reserved at most, less those reserved at the start."""
        return max(0, int(self._module.max_memory_reserved(self.torch_device)) - self._baseline)

    def restart_peak(self) -> None:
        """New peak, same baseline."""
        self._module.reset_peak_memory_stats(self.torch_device)

    def keep_within(self, n_bytes: int) -> Callable[[], None]:
        """The caching allocator gives back what it can before it fails."""
        return nothing_to_do

    @contextmanager
    def limit(self, budget_bytes: int | None) -> Iterator[None]:
        """The allocator refuses to reserve more than what is in use now plus the budget; or a lower limit of others."""
        setter = getattr(self._module, "set_per_process_memory_fraction", None)
        if budget_bytes is None or setter is None:
            yield
            return
        getter = getattr(self._module, "get_per_process_memory_fraction", None)
        before = 1.0 if getter is None else float(getter(self.torch_device))
        self._free_cached(libraries=True)  # what earlier work left cached would be budget else
        held = self._module.memory_reserved(self.torch_device)
        setter(min(before, (held + budget_bytes) / self.info.memory_bytes), self.torch_device)
        try:
            yield
        finally:
            setter(before, self.torch_device)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """torch's own exception for it, or what the accelerator's libraries say."""
        if isinstance(error, torch.OutOfMemoryError):
            return True
        return isinstance(error, RuntimeError) and any(said in str(error) for said in ALLOCATION_FAILED)

    def is_fatal(self, error: BaseException) -> bool:
        """An error of the runtime itself, which it reports to every later call too."""
        if self.is_out_of_memory(error) or str(error).startswith(LIBRARIES):
            return False
        runtime = getattr(torch, "AcceleratorError", ())
        return isinstance(error, runtime) or (
            type(error) is RuntimeError and str(error).startswith(("CUDA error", "HIP error", "XPU error"))
        )

    def close(self) -> None:
        """Wait for jobs, reads and copies in flight: their memory may be freed next."""
        self._host.close()
        self._reader.close()
        self.synchronize()

    def _free_cached(self, libraries: bool) -> None:
        """Once nothing is under way: what torch's allocator keeps, and of `libraries` cuBLAS's workspaces.

        These come with a thread's first product on a stream, 32 MiB and more on a recent GPU, and stay; so whoever
        measures takes them anew. CUDA graphs that somebody captured hold theirs.
        """
        self.synchronize()
        clear_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if libraries and clear_workspaces is not None and self.torch_device.type == "cuda":
            clear_workspaces()
        self._module.empty_cache()

    def _issue(self, asked: AskedCopy) -> None:
        """Put a copy on the copy stream once its source is there."""
        self._put(asked.copied, self._copies, asked.runs, asked.after, asked.source)

    def _put(
        self,
        copied: StreamCopy,
        stream: Any,
        runs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        after: Any,
        once: CopyEvent | None = None,
    ) -> None:
        """Put a copy on a stream. What goes wrong is for its waiter to raise; Ctrl-C is raised here, too."""
        try:
            if once is not None:
                once.wait()  # it is over: raises its error
            if after is not None:
                stream.wait_event(after)
            with self._module.stream(stream):
                copied.times.began = self._timing_event()
                for target, source in runs:
                    target.copy_(source, non_blocking=True)
                copied.times.ended = self._timing_event()
        except BaseException as error:
            copied.error = error
            if not isinstance(error, Exception):
                raise
        finally:
            copied.set_issued()

    def _timing_event(self) -> Any:
        """Recorded on the stream that is current now."""
        event = self._module.Event(enable_timing=True, **self._event_options)
        event.record(self._module.current_stream(self.torch_device))
        return event

    def _on_host_clock(self, stamp: Any) -> float:
        """Seconds of `time.perf_counter`, by an event of which the time on both clocks is known."""
        if isinstance(stamp, float):
            return stamp
        if self._anchor is None:  # a new one after each `synchronize`: what is read of the clock is not far from it
            self._anchor = min((self._both_clocks() for _ in range(4)), key=lambda anchor: anchor[2])
        event, host_s, self.clock_error_s = self._anchor
        return host_s - float(stamp.elapsed_time(event)) / 1e3

    def _both_clocks(self) -> tuple[Any, float, float]:
        """An event, the host's time of it and how far off that may be: the event lay between two reads of the clock."""
        begin_s = time.perf_counter()
        event = self._timing_event()
        event.synchronize()
        end_s = time.perf_counter()
        return event, (begin_s + end_s) / 2, (end_s - begin_s) / 2

    def _can_read_host(self) -> bool:
        """Tried once, on a page: CUDA and ROCm can where host and device share one address space."""
        if self.torch_device.type != "cuda":
            return False
        page = pages.anonymous(4096)
        page.fill_(1)
        with suppress(RuntimeError, TypeError, AssertionError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if pages.pin(page, self.torch_device):
                return bool(torch.as_tensor(_HostBytes(page), device=self.torch_device).sum(dtype=torch.int64) == 4096)
        return False

    def _describe(self) -> DeviceInfo:
        properties = self._module.get_device_properties(self.torch_device)
        total = int(properties.total_memory)
        text = f"{properties.name}|{total >> 28}|{torch.__version__}"
        return DeviceInfo(
            kind=self.torch_device.type,
            name=str(properties.name),
            slow_tier=Tier.HOST,
            memory_bytes=total,
            torch_version=str(torch.__version__),
            fingerprint=hashlib.sha256(text.encode()).hexdigest()[:16],
        )
