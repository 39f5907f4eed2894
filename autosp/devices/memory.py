"""Host memory in whole pages: taken, looked at, and pinned for an accelerator."""

from __future__ import annotations

import ctypes
import mmap
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary, finalize, ref

import torch

from autosp.devices.base import Region

HUGE_PAGE_BYTES = 2 * 2**20

PORTABLE_AND_MAPPED = 3
"""cudaHostRegisterPortable | cudaHostRegisterMapped: for every context, and readable by kernels."""


_memmove = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)
_LIBC = ctypes.CDLL(None)
_madvise = _LIBC.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Pages(mmap.mmap):
    """Anonymous pages, which are unpinned before the kernel takes them back."""

    unpin: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.unpin is not None:
            with suppress(RuntimeError):  # at the interpreter's exit the accelerator's runtime may be gone
                self.unpin()


_PAGES: WeakValueDictionary[int, Pages] = WeakValueDictionary()
"""By address: a tensor does not say which pages it lives in."""


def anonymous(n_bytes: int) -> torch.Tensor:
    """Zero pages, huge where the kernel grants them, each taking RAM once it is written to. uint8."""
    with torch.inference_mode(False):
        if n_bytes == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        pages = Pages(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if n_bytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(pages, dtype=torch.uint8)
    _PAGES[memory.data_ptr()] = pages
    return memory


def lying_as(value: torch.Tensor, memory: torch.Tensor, begin: int = 0) -> torch.Tensor:
    """A tensor that lies in `memory` (uint8), from that byte of its storage on, as `value` does in its own."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(0, dtype=value.dtype, device=memory.device).set_(
            memory.untyped_storage(), begin // value.element_size(), value.size(), value.stride()
        )


def bytes_of(value: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor without gaps."""
    size = value.element_size()
    with torch.no_grad():
        return torch.empty(0, dtype=torch.uint8, device=value.device).set_(
            value.untyped_storage(), value.storage_offset() * size, (value.numel() * size,), (1,)
        )


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable. The caller keeps the tensor alive."""
    return memory_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def memory_at(address: int, n_bytes: int) -> memoryview:
    """Bytes of the process, writable. The caller keeps alive what they belong to."""
    if n_bytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * n_bytes).from_address(address)).cast("B")


def copy_bytes(source: torch.Tensor, target: memoryview) -> None:
    """A plain copy of a uint8 tensor; the GIL is free meanwhile."""
    if len(target):
        _memmove(ctypes.addressof(ctypes.c_char.from_buffer(target)), source.data_ptr(), len(target))


def read_regions(regions: Sequence[Region], target: torch.Tensor) -> int:
    """Fill the beginning of `target` with the regions, one after another. The bytes that it took."""
    view = memory_of(target)
    done = 0
    for region in regions:
        region.read_into(view[done : done + region.n_bytes])
        done += region.n_bytes
    return done


def pin(memory: torch.Tensor, device: torch.device) -> bool:
    """Pin the pages of a tensor from `anonymous` for CUDA or ROCm, in place. False, and a warning, where it fails.

    The runtime registers them with the device that is current, and makes a context there: so that is this one.
    """
    pages = _PAGES[memory.data_ptr()]
    address = memory.data_ptr()
    try:
        runtime = torch.cuda.cudart()
        with torch.cuda.device(device):
            torch.cuda.check_error(runtime.cudaHostRegister(address, memory.numel(), PORTABLE_AND_MAPPED))
    except (RuntimeError, AssertionError) as error:
        _clear_error(device)
        warnings.warn(
            f"could not pin {memory.numel() / 1e9:.2f} GB of host memory ({error}): copies will come from pageable "
            "memory, which is slower and makes the host wait; raise the limit of locked memory (ulimit -l) or free RAM",
            stacklevel=3,
        )
        return False
    pages.unpin = lambda: runtime.cudaHostUnregister(address)
    return True


def is_pinned(memory: torch.Tensor) -> bool:
    """Whether `pin` has pinned it, or what it is a run of, and nothing undone that."""
    begin = memory.data_ptr()
    end = begin + memory.numel()
    return any(
        pages.unpin is not None and address <= begin and end <= address + len(pages)
        for address, pages in _PAGES.items()
    )


def unpin(memory: torch.Tensor) -> None:
    """Undo `pin`, so that parts of it can go. Harmless on memory that is not pinned."""
    pages = _PAGES.get(memory.data_ptr())
    if pages is not None and pages.unpin is not None:
        pages.unpin()
        pages.unpin = None


def part(memory: torch.Tensor, begin: int, n_bytes: int) -> torch.Tensor:
    """A run of `anonymous` memory as a tensor with a storage of its own.

    When the last view of that storage goes, whole pages of the run go back to the kernel, whatever else of `memory` is
    in use. So the run must not be pinned by then, and must not be read through `memory` afterwards.
    """
    with torch.inference_mode(False):
        if n_bytes == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        run = (ctypes.c_char * n_bytes).from_buffer(_PAGES[memory.data_ptr()], begin)
        finalize(run, drop_pages, memory.data_ptr() + begin, n_bytes).atexit = False
        return torch.frombuffer(run, dtype=torch.uint8)


def lend(memory: torch.Tensor, begin: int, n_bytes: int) -> tuple[torch.Tensor, ref[Any]]:
    """A run of `anonymous` memory with a storage of its own, and a reference that dies with its last view."""
    with torch.inference_mode(False):
        run = (ctypes.c_char * n_bytes).from_buffer(_PAGES[memory.data_ptr()], begin)
        return torch.frombuffer(run, dtype=torch.uint8), ref(run)


def drop_pages(address: int, n_bytes: int) -> None:
    """Give back the whole pages of a run of memory: they read as zeros then, or as the file that they are mapped from.

    What was written to them is lost.
    """
    _advise(address, n_bytes, mmap.MADV_DONTNEED)


def expect_scattered_reads(address: int, n_bytes: int) -> None:
    """Whole pages of this run of mapped files come one by one: no read-ahead."""
    _advise(address, n_bytes, mmap.MADV_RANDOM)


def expect_ordinary_reads(address: int, n_bytes: int) -> None:
    """With read-ahead again."""
    _advise(address, n_bytes, mmap.MADV_NORMAL)


def _advise(address: int, n_bytes: int, advice: int) -> None:
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (address + n_bytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    if whole > 0:
        _madvise(begin, whole, advice)


def anonymous_bytes() -> int:
    """The process's resident memory that no file backs."""
    return status_bytes("RssAnon")


def status_bytes(field: str) -> int:
    """A figure of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _clear_error(device: torch.device) -> None:
    """Have the runtime report the failure here, or the next kernel's launch would be blamed for it."""
    with suppress(RuntimeError, AssertionError):
        torch.zeros(1, device=device).add_(1)
