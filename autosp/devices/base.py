"""What the executor and the profiler ask of the hardware. One implementation per file; one conformance suite for all.

[Note: two orders] A device has a compute order (what the model runs) and a copy order (what `copy` starts). Nothing
relates the two but events: a copy starts after `after`, compute that follows `wait(event)` starts after that copy.

[Note: no read waits for a later call] Where weights rest on disk there is a third order, of reads. A read waits for
the copies that empty its memory, a staged copy for its read, and both queues go in the order of the calls. Each job
waits only for jobs asked for before it, in its own queue or in the other, or for compute launched before it: so the
earliest job that is not over can always go on, and there is no deadlock, whatever is called when. The host may ask for
more, raise, or wait for any of them at any time; a job that fails is over, and says so to who waits for it. Jobs of
the host's own (`work`) wait for nothing of the device's.

[Note: nothing small on the heap] A lock or another small piece of the C heap that is kept over passes pins the free
memory below it, so that activations cannot be laid where earlier ones were: eight passes' events once doubled the peak
of a small model on a CPU. Python objects have arenas of their own and do no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from autosp.spec import DeviceInfo

Event = Any
"""A point in the compute order. Opaque; belongs to the device that made it."""

Stamp = Any
"""A point in the compute order whose time can be read once the device is synchronised."""


def nothing_to_do() -> None:
    """What a device without such a thing does about it."""


@runtime_checkable
class Region(Protocol):
    """Bytes of the slow tier that one read or copy fetches."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the run."""

    @property
    def host(self) -> torch.Tensor | None:
        """The bytes in RAM (uint8), or None if they are on disk."""

    def read_into(self, target: memoryview) -> None:
        """Fill `target` (as many bytes). Called off the main thread. Raises ReadError."""


class CopyTimes(Protocol):
    """When a copy began and when it ended, once it is over."""

    @property
    def began(self) -> Stamp:
        """Its first byte was asked for."""

    @property
    def ended(self) -> Stamp:
        """Its last byte was there."""


class Copied(Protocol):
    """A copy that was started."""

    @property
    def times(self) -> CopyTimes:
        """What may be kept of it for long: [Note: nothing small on the heap]."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of bytes that a staged copy moves: where it begins in staging, where on the device, and its length."""

    source: int
    target: int
    n_bytes: int


class Device(Protocol):
    """One device tier with its copy engine."""

    info: DeviceInfo
    torch_device: torch.device
    reads_host: bool
    """Whether its kernels can read the slow tier's memory where it is."""
    is_host: bool
    """Whether its tensors are host tensors, so that one can be added to the other."""

    def allocate(self, n_bytes: int) -> torch.Tensor:
        """Uninitialised device memory, uint8, aligned to 4096 bytes; freed when the last view of it goes."""

    def pin(self, memory: torch.Tensor) -> None:
        """Let copies come from `anonymous` memory at the link's full speed, without the host; announced if it fails."""

    def host_view(self, memory: torch.Tensor) -> torch.Tensor:
        """The same bytes as a tensor of this device, where `reads_host`: for a few rows of a large table.

        Raises: TierError if the memory could not be pinned.
        """

    def copy(self, regions: Sequence[Region], target: torch.Tensor, after: Event | None, written: Any = None) -> Copied:
        """Start filling `target` with the regions, one after another, once `after` is over. Does not block.

        Nor before its own job `written` is over, which writes to the regions; if that fails, so does the copy.
        """

    def read(self, regions: Sequence[Region], staging: torch.Tensor, after: Sequence[Any]) -> Any:
        """Start filling host memory with the regions, one after another, once its own copies `after` are over.

        `staging` is a run of `anonymous` memory that was pinned. Does not block: see [Note: no read waits for a later
        call]. What it gives is for `copy_staged`, and has `times` as a copy has.
        """

    def copy_staged(
        self, read: Any, staging: torch.Tensor, pieces: Sequence[Piece], target: torch.Tensor, after: Event | None
    ) -> Copied:
        """Start moving pieces of what one of its own reads brings, once that and `after` are over. Does not block.

        Copies go in the order of the calls, staged ones and others. If the read fails, so does the copy.
        """

    def send(self, source: torch.Tensor, target: torch.Tensor, after: Event | None) -> Copied:
        """Start copying device bytes to as many in host memory (both uint8), once `after` is over. Does not block.

        In an order of its own, beside that of `copy`. The caller keeps both alive until it is over.
        """

    def work(self, job: Callable[[], object]) -> Any:
        """Start a job of the host's, on a thread of its own, after those asked for before it. Does not block.

        What it gives is for `copy`; it has `times` as a copy has, and `settle()`, which blocks until the job is over,
        however it ended. A job must neither wait for anything of the device's nor start it.
        """

    def settle(self, copied: Any) -> None:
        """Block the host until one of its own copies is over. Raises what that raised."""

    def join(self) -> None:
        """Order further compute after what was launched by those who called this before, wherever they launched it."""

    def record(self) -> Event:
        """A point in the compute order: over when everything launched so far is."""

    def wait(self, copied: Any) -> None:
        """Order all further compute after one of its own copies. Raises what that, or its read, raised.

        Blocks the host no longer than until a staged copy's read is over, where copies are asynchronous.
        """

    def finished(self, copied: Any) -> bool:
        """Whether a copy is over. Does not block."""

    def finish_compute(self) -> None:
        """Block until the compute launched so far is over; copies go on."""

    def synchronize(self) -> None:
        """Block until compute, copies and reads are over."""

    def stamp(self) -> Stamp:
        """A timed point in the compute order."""

    def seconds(self, start: Stamp, end: Stamp) -> float:
        """Time between two stamps. Blocks until they are over; those of copies and reads are, after `synchronize`."""

    def training(self) -> AbstractContextManager[None]:
        """While it is open a model is trained, or microbatches share a pass: large pieces of memory come and go
        between others that stay."""

    def start_measuring(self, libraries: bool = True) -> None:
        """Give unused memory back and begin a new peak, counted from what is in use now.

        `libraries`: what they keep between calls is given back, too, and counts when a pass takes it anew.
        """

    def originals_freed(self, n_bytes: int) -> None:
        """Begin a new peak: the `n_bytes` of the plan's that are in use now count, nothing else does.

        Called when weights that were in host memory have been freed, after device memory replaced them.
        """

    def free_bytes(self) -> int | None:
        """What of its memory nothing else has now. None where it is the host's, or nothing says it."""

    def peak_bytes(self) -> int:
        """Most memory in use since `start_measuring`, beyond what was in use then."""

    def restart_peak(self) -> None:
        """Begin a new peak above the same beginning: for the peak of one layer within a pass."""

    def keep_within(self, n_bytes: int) -> Callable[[], None]:
        """What to call between layers, so that memory that nothing uses is given back where passes take more than
        `n_bytes`, counted as `peak_bytes` counts."""

    def limit(self, budget_bytes: int | None) -> AbstractContextManager[None]:
        """Where the platform can: make allocations beyond the budget fail while the context is open."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an exception says that this device's memory is exhausted."""

    def is_fatal(self, error: BaseException) -> bool:
        """Whether an exception says that this process cannot use the device any more."""

    def close(self) -> None:
        """Stop copies and free what the device object itself holds."""
