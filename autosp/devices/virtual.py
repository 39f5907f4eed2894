"""A device with a clock of its own, so that a test can say exactly when everything must happen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from autosp.devices.base import Piece, Region, nothing_to_do
from autosp.devices.memory import read_regions
from autosp.errors import AutospError
from autosp.spec import DeviceInfo, Tier


@dataclass(frozen=True)
class VirtualCopy:
    """Start and end of a copy, a read or a job on the virtual clock, and what it raised."""

    began: float
    ended: float
    error: Exception | None = None

    @property
    def times(self) -> VirtualCopy:
        """Known as soon as it is issued."""
        return self

    def settle(self) -> None:
        """What it does was done when it was issued."""


class VirtualDevice:
    """Copies and reads move real bytes at once but take virtual time; compute takes the time that `spend` is told.

    Events and stamps are seconds of the virtual clock.
    """

    reads_host = True
    is_host = False

    def __init__(
        self,
        *,
        bytes_per_s: float,
        latency_s: float = 0.0,
        disk_bytes_per_s: float = math.inf,
        disk_latency_s: float = 0.0,
        job_s: float = 0.0,
    ) -> None:
        self.torch_device = torch.device("cpu")
        self.info = DeviceInfo(
            kind="virtual",
            name="virtual clock",
            slow_tier=Tier.HOST,
            memory_bytes=2**40,
            torch_version=str(torch.__version__),
            fingerprint=f"virtual-{bytes_per_s}-{latency_s}-{disk_bytes_per_s}-{disk_latency_s}",
        )
        self.now_s = 0.0
        self.copies: list[tuple[float, float, int]] = []
        """Every copy so far: its start, its end, its bytes."""
        self.reads: list[tuple[float, float, int]] = []
        """Every read so far, likewise."""
        self.sends: list[tuple[float, float, int]] = []
        """Every copy to the host so far, likewise."""
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._link_free_s = 0.0
        self._disk_bytes_per_s = disk_bytes_per_s
        self._disk_latency_s = disk_latency_s
        self._disk_free_s = 0.0
        self._return_free_s = 0.0
        self._job_s = job_s
        self._host_free_s = 0.0

    def spend(self, seconds: float) -> None:
        """Compute for that long."""
        self.now_s += seconds

    def allocate(self, n_bytes: int) -> torch.Tensor:
        """Plain memory, filled with bytes that make a missing copy visible."""
        return torch.full((n_bytes,), 0xFF, dtype=torch.uint8, device=self.torch_device)

    def pin(self, memory: torch.Tensor) -> None:
        """All memory is as fast."""

    def host_view(self, memory: torch.Tensor) -> torch.Tensor:
        """Itself."""
        return memory

    def copy(
        self,
        regions: Sequence[Region],
        target: torch.Tensor,
        after: float | None = None,
        written: VirtualCopy | None = None,
    ) -> VirtualCopy:
        """After the copies before it, after `after` and `written`, and not before it is issued."""
        if written is not None and written.error is not None:
            return written
        return self._moved(read_regions(regions, target), max(after or 0.0, written.ended if written else 0.0))

    def read(self, regions: Sequence[Region], staging: torch.Tensor, after: Sequence[VirtualCopy]) -> VirtualCopy:
        """After the reads before it, after the copies `after`, and not before it is issued."""
        start = max([self._disk_free_s, self.now_s, *(copied.ended for copied in after)])
        try:
            done = read_regions(regions, staging)
        except AutospError as error:
            return VirtualCopy(start, start, error)
        self._disk_free_s = start + self._disk_latency_s + done / self._disk_bytes_per_s
        self.reads.append((start, self._disk_free_s, done))
        return VirtualCopy(start, self._disk_free_s)

    def copy_staged(
        self,
        read: VirtualCopy,
        staging: torch.Tensor,
        pieces: Sequence[Piece],
        target: torch.Tensor,
        after: float | None = None,
    ) -> VirtualCopy:
        """As `copy`, and after its read."""
        if read.error is not None:
            return read
        for piece in pieces:
            source = staging[piece.source : piece.source + piece.n_bytes]
            target[piece.target : piece.target + piece.n_bytes].copy_(source)
        return self._moved(sum(piece.n_bytes for piece in pieces), max(after or 0.0, read.ended))

    def send(self, source: torch.Tensor, target: torch.Tensor, after: float | None = None) -> VirtualCopy:
        """After those before it, after `after`, and not before it is issued: at the link's pace, the other way."""
        target.copy_(source)
        start = max(self._return_free_s, self.now_s, after or 0.0)
        self._return_free_s = start + self._latency_s + target.numel() / self._bytes_per_s
        self.sends.append((start, self._return_free_s, target.numel()))
        return VirtualCopy(start, self._return_free_s)

    def work(self, job: Callable[[], object]) -> VirtualCopy:
        """After the jobs before it, and not before it is asked for; it takes `job_s`."""
        start = max(self._host_free_s, self.now_s)
        self._host_free_s = start + self._job_s
        try:
            job()
        except Exception as error:  # noqa: BLE001 - for its waiter, as on another thread
            return VirtualCopy(start, self._host_free_s, error)
        return VirtualCopy(start, self._host_free_s)

    def settle(self, copied: VirtualCopy | None) -> None:
        """As `wait`: the clock of the host is the clock of compute."""
        self.wait(copied)

    def join(self) -> None:
        """There is one order of compute."""

    def record(self) -> float:
        """Now."""
        return self.now_s

    def wait(self, copied: VirtualCopy | None) -> None:
        """Compute stands still until its end."""
        if copied is not None:
            if copied.error is not None:
                raise copied.error
            self.now_s = max(self.now_s, copied.ended)

    def finished(self, copied: VirtualCopy | None) -> bool:
        """Whether the clock has passed its end."""
        return copied is None or copied.ended <= self.now_s

    def finish_compute(self) -> None:
        """The clock of the host is the clock of compute."""

    def synchronize(self) -> None:
        """The clock of the host is the clock of compute."""

    def stamp(self) -> float:
        """Now."""
        return self.now_s

    def seconds(self, start: float, end: float) -> float:
        """Plain difference."""
        return end - start

    def training(self) -> AbstractContextManager[None]:
        """Memory is not simulated."""
        return nullcontext()

    def start_measuring(self, libraries: bool = True) -> None:
        """Memory is not simulated."""

    def originals_freed(self, n_bytes: int) -> None:
        """Host memory is not counted."""

    def free_bytes(self) -> None:
        """Nothing is ever used up."""

    def peak_bytes(self) -> int:
        """Memory is not simulated."""
        return 0

    def restart_peak(self) -> None:
        """Memory is not simulated."""

    def keep_within(self, n_bytes: int) -> Callable[[], None]:
        """Memory is not simulated."""
        return nothing_to_do

    @contextmanager
    def limit(self, budget_bytes: int | None) -> Iterator[None]:
        """Memory is not simulated."""
        yield

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Only a test's own MemoryError."""
        return isinstance(error, MemoryError)

    def is_fatal(self, error: BaseException) -> bool:
        """Never."""
        return False

    def close(self) -> None:
        """Nothing is held."""

    def _moved(self, n_bytes: int, after_s: float) -> VirtualCopy:
        start = max(self._link_free_s, self.now_s, after_s)
        self._link_free_s = start + self._latency_s + n_bytes / self._bytes_per_s
        self.copies.append((start, self._link_free_s, n_bytes))
        return VirtualCopy(start, self._link_free_s)
