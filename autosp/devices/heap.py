"""The C library's heap, which a CPU's activations live in: brought to the same state in every process.

[Note: holes] Where a process has freed memory in the middle of its heap, as a model's weights are when a plan is
applied, activations are laid into the holes: each into the one that fits best, so that over a few passes they wander
through all of them, and every page that they touch stays. Of live activations of 1.8 MB a hole of 28 MB was seen to
make 10 MB; in a process without such holes they made 2.5 MB. And where small holes are resident, a pass takes memory
that no peak shows. So while a peak is measured no hole may be used: see `Plugs`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from weakref import finalize

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
HEAP_CHUNK_BYTES = 32 * 2**20
"""glibc's most for its dynamic threshold: larger pieces always have pages of their own."""

TRAINING_CHUNK_BYTES = 2**20
"""While a model is trained: gradients of 17 MB that come and go between activations were seen to
leave holes of three times what was alive. Pages of their own cost a few percent of such a pass."""

LARGEST_PLUG_BYTES, SMALLEST_PLUG_BYTES = HEAP_CHUNK_BYTES // 2, 2 * 2**10
"""Below the smallest, pieces of a page come and go that hold little."""

_LIBC = ctypes.CDLL(None)
_malloc, _free = _LIBC.malloc, _LIBC.free
_malloc.argtypes, _malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
_free.argtypes, _free.restype = (ctypes.c_void_p,), None


class _HeapFigures(ctypes.Structure):
    """struct mallinfo2 (mallinfo(3)): what all arenas and mapped pieces took from the kernel, and what of it is free.

    `free_end` is the end of the main arena alone: the one that the kernel takes back.
    """

    _fields_ = (
        ("arenas", ctypes.c_size_t),
        ("_counts", ctypes.c_size_t * 3),
        ("mapped", ctypes.c_size_t),
        ("_more", ctypes.c_size_t * 3),
        ("free", ctypes.c_size_t),
        ("free_end", ctypes.c_size_t),
    )

    @property
    def edges(self) -> tuple[int, int, int]:
        """What no piece changes that fits into a hole."""
        return self.arenas, self.mapped, self.free_end


class Plugs:
    """Pieces of the heap that fill its holes and are never written to: they take addresses, and no memory.

    What is allocated meanwhile goes to the heap's end, as it does in a process that has freed nothing. The heap is the
    calling thread's arena. That is not the main one in another thread than the process's first, nor in any
    thread that once asked for more than there was (arena_get_retry in glibc's malloc/arena.c).
    """

    def __init__(self) -> None:
        self._pieces: list[int] = []
        finalize(self, _release, self._pieces).atexit = False

    def fill(self) -> None:
        """Let no free piece of the heap remain but its end, and crumbs. Does nothing where the C library is no glibc.

        For a heap that was just trimmed: then the holes have no memory.
        """
        figures = getattr(_LIBC, "mallinfo2", None)
        if figures is None:
            return
        figures.restype = _HeapFigures
        n_bytes = LARGEST_PLUG_BYTES
        while n_bytes >= SMALLEST_PLUG_BYTES:
            self._fill_with(n_bytes, figures)
            n_bytes //= 2
        trim_heap()

    def _fill_with(self, n_bytes: int, figures: Callable[[], _HeapFigures]) -> None:
        """Let no hole of `n_bytes` remain, asking for the figures, which walk all that is free, log(holes) times."""
        count, most = 1, True
        while count:
            before = figures()
            pieces = [_malloc(n_bytes) for _ in range(min(count, before.free // n_bytes))]
            if pieces and figures().edges == before.edges:
                self._pieces += pieces
                count = 2 * count if most else count // 2
            else:  # fewer holes than that are so large: the rest was new, and goes back
                _release(pieces)
                count, most = count // 2, False

    def release(self) -> None:
        """Give the holes back to the heap."""
        _release(self._pieces)


def _release(pieces: list[int]) -> None:
    while pieces:
        _free(pieces.pop())


def settle_heap(chunk_bytes: int) -> None:
    """Let the C library keep freed memory the same way in every process: pieces from `chunk_bytes` on never.

    Left alone, glibc raises its two thresholds to what is freed, up to `HEAP_CHUNK_BYTES` (mallopt(3)), and takes more
    of the heap the higher they are. Weights are freed when a plan is applied but not while plans are tried: at
    different thresholds the two would have different peaks.
    """
    mallopt = getattr(_LIBC, "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, chunk_bytes)
        mallopt(M_TRIM_THRESHOLD, 2 * chunk_bytes)


def trim_heap() -> None:
    """Return freed heap to the kernel, where the C library can."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_kernel_buffers() -> None:
    """Free what MKL keeps between its calls, where torch has MKL: tens of MB that a pass in a new process takes anew.

    The name is what MKL's own `mkl_free_buffers` calls; the build of torch exports no other.
    """
    _call_torch("mkl_serv_free_buffers")


def free_thread_buffers() -> None:
    """Free what MKL keeps for the calling thread, some MB: for one that ends, which MKL does not notice."""
    _call_torch("mkl_serv_thread_free_buffers")


def _call_torch(function: str) -> None:
    with suppress(OSError, AttributeError):
        getattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")), function)()
