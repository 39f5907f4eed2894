"""The C library's heap, which a CPU's activations live in: brought to the same state in every process.

[Note: holes] Where a process has freed memory in the middle of its heap, as a model's weights are when a plan is
applied, activations are laid into the holes: each into the one that fits best, so that over a few passes they wander
through all of them, and every page that they touch stays. Of live activations of 1.8 MB a hole of 28 MB was seen to
make 10 MB; in a process without such holes they made 2.5 MB. And where small holes are resident, a pass takes memory
that no peak shows. So while a peak is measured no hole may be used: see `Plugs`.

What a pass itself leaves scattered stays so. For its alignment torch asks for a little more than it needs; what is cut
off goes to the thread's cache (tcache), and while it is there a freed activation does not join its neighbours, and is
too small for one of its own size. A pass with 14 MB alive took 15 to 33 MB, plan by plan and run by run; in a process
started with GLIBC_TUNABLES=glibc.malloc.tcache_count=0 and without fast bins (mallopt(3), M_MXFAST) 16 to 19 MB.
A plan that took 62 MB while it was tried took 108 in a process of its own. So what is scattered is given back to the
kernel where there is too much of it: see `Tidy`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import ClassVar
from weakref import finalize

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
TOP_PAD_BYTES = 128 * 2**10
"""glibc's default of what the heap grows by beyond what is asked for."""

INFERENCE_CHUNK_BYTES = 32 * 2**20
"""glibc's most for its dynamic threshold: larger pieces always have pages of their own."""

TRAINING_CHUNK_BYTES = 128 * 2**10
"""While a model is trained: glibc's own threshold before anything was freed. Gradients of 17 MB that come and go
between activations were seen to leave holes of three times what was alive; and with activations of 0.4 to 0.8 MB on the
heap, passes that needed 41 MB came to take 47 to 60 MB, more each time."""

PLUG_SIZES = tuple(INFERENCE_CHUNK_BYTES >> halvings for halvings in range(1, 15))
"""16 MiB to 2 KiB, in bytes. Below, pieces of a page come and go that hold little."""

MOST_PLUGS = 2**12
"""In a heap with 10^5 crumbs the smallest stay free: as many plugs take 30 ms already."""

PATIENCE = 2
"""So many new pieces of one size in a row, and no hole is so large: at the first, something else may have grown."""

HEADER_BYTES = 16
"""Between a piece of a plug's size and the one right behind it."""

_LIBC = ctypes.CDLL(None)
_QUICK = ctypes.PyDLL(None)
"""For calls of a microsecond, by the thousand: no other thread gets the interpreter meanwhile."""

_malloc, _free = _QUICK.malloc, _QUICK.free
_malloc.argtypes, _malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
_free.argtypes, _free.restype = (ctypes.c_void_p,), None


class _Pieces:
    """A list on pages of its own: it must not grow on the heap while that is filled.

    A forked process has a heap of its own, and so a list of its own.
    """

    def __init__(self) -> None:
        pages = mmap.mmap(-1, 8 * MOST_PLUGS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._addresses = memoryview(pages).cast("Q")
        self.count = 0

    def append(self, address: int) -> None:
        self._addresses[self.count] = address
        self.count += 1

    def free(self) -> None:
        while self.count:
            self.count -= 1
            _free(self._addresses[self.count])


class Plugs:
    """Pieces of the heap that fill its holes and are never written to: they take addresses, and no memory.

    What is allocated meanwhile goes to the heap's end, as it does in a process that has freed nothing. The heap is the
    calling thread's arena. That is not the main one in another thread than the process's first, nor in any
    thread that once asked for more than there was (arena_get_retry in glibc's malloc/arena.c).

    The heap is the process's, and so are its plugs: they stay until none wants them any more. One that is collected in
    the middle of another's pass would open holes that the pass then wanders through.
    """

    _pieces: ClassVar[_Pieces] = _Pieces()
    _wanted_by: ClassVar[set[int]] = set()
    _lock: ClassVar[threading.RLock] = threading.RLock()
    """Reentrant, for the collector may come while holes are filled."""

    def __init__(self) -> None:
        finalize(self, Plugs._let_go, id(self)).atexit = False

    def fill(self) -> None:
        """Let no free piece of the heap remain but its end, and crumbs: smaller than a plug, or beyond `MOST_PLUGS`.

        Free memory is given to the kernel first: then the holes have none. That is all where the C library is no glibc,
        or the kernel does not say what is mapped.
        """
        with self._lock:
            self._wanted_by.add(id(self))
            self._pieces.free()
            trim_heap()
            if not hasattr(_LIBC, "mallopt"):
                return
            with _mapped_pages() as mapped_pages, _grown_by_the_page() as grown:
                if mapped_pages():
                    for n_bytes in PLUG_SIZES:
                        self._fill_with(n_bytes, mapped_pages, *grown)

    def _fill_with(self, n_bytes: int, mapped_pages: Callable[[], int], new: list[int], ends: list[int]) -> None:
        """Let no hole of `n_bytes` remain: until a piece makes the heap grow, or is in what others made it grow by.

        glibc itself would have to walk over all that is free, which takes 0.1 s in a heap of 1 GB (mallinfo2).
        """
        patience, before = PATIENCE, mapped_pages()
        while patience and self._pieces.count < MOST_PLUGS:
            piece = _malloc(n_bytes)
            if piece is None:
                return
            now = mapped_pages()
            if now > before:
                patience -= 1
            if now > before or piece in ends:
                new.append(piece)
                ends.append(piece + n_bytes + HEADER_BYTES)
            else:
                self._pieces.append(piece)
                patience = PATIENCE
            before = now

    def release(self) -> None:
        """Give the holes back to the heap, unless others want them closed."""
        self._let_go(id(self))

    @classmethod
    def _let_go(cls, which: int) -> None:
        with cls._lock:
            cls._wanted_by.discard(which)
            if not cls._wanted_by:
                cls._pieces.free()


@contextmanager
def _mapped_pages() -> Iterator[Callable[[], int]]:
    """What says how many private pages the process may write to (proc(5), statm, `data`); 0 where nothing says it.

    Of such is what a heap grows by, in whatever arena, and a piece with pages of its own.
    """
    try:
        statm = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        yield lambda: 0
        return
    text = ctypes.create_string_buffer(128)
    read = partial(_QUICK.pread, statm, text, ctypes.c_size_t(len(text)), ctypes.c_long(0))

    def pages() -> int:
        read()
        return int(text.value.split(None, 6)[5])

    try:
        yield pages
    finally:
        os.close(statm)


@contextmanager
def _grown_by_the_page() -> Iterator[tuple[list[int], list[int]]]:
    """What the heap grows by while this is open, which is no more than it must: pieces, and where they end.

    They are kept until then, or smaller pieces would be laid where they were. At the end the heap is as it was.
    """
    new: list[int] = []
    _set(M_TOP_PAD, 0)
    try:
        yield new, []
    finally:
        with _given_back_at_once():
            while new:  # the last first, which joins the heap's end
                _free(new.pop())
            _set(M_TOP_PAD, TOP_PAD_BYTES)


_training = 0
"""How many models of this process are being trained."""


class Tidy:
    """Called between layers: gives the heap's unused pages to the kernel where the process takes more than it should.

    What it takes all the same, for whatever else it does, is no reason to try again before it is a good deal more.
    """

    def __init__(self, most_bytes: int, baseline: Callable[[], int]) -> None:
        """`most_bytes` of anonymous memory beyond the baseline."""
        self._most_bytes, self._more_bytes = most_bytes, most_bytes // 8
        self._baseline = baseline
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        finalize(self, os.close, self._statm).atexit = False

    def __call__(self) -> None:
        """Two microseconds where there is nothing to do; some milliseconds else."""
        if self._in_use_bytes() > self._most_bytes:
            trim_heap()
            self._most_bytes = max(self._most_bytes, self._in_use_bytes() + self._more_bytes)

    def _in_use_bytes(self) -> int:
        """As proc(5) has it, statm: resident pages less those of files."""
        _, resident, files, _ = os.pread(self._statm, 128, 0).split(None, 3)
        return mmap.PAGESIZE * (int(resident) - int(files)) - self._baseline()


@contextmanager
def heap_of_training() -> Iterator[None]:
    """While it is open pieces from `TRAINING_CHUNK_BYTES` on are never kept once they are freed."""
    global _training
    _training += 1
    settle_heap()
    try:
        yield
    finally:
        _training -= 1
        settle_heap()


def settle_heap() -> None:
    """Let the C library keep freed memory the same way in every process: large pieces never.

    Left alone, glibc raises its two thresholds to what is freed, up to `INFERENCE_CHUNK_BYTES` (mallopt(3)), and takes
    more of the heap the higher they are. Weights are freed when a plan is applied but not while plans are tried: at
    different thresholds the two would have different peaks.
    """
    chunk_bytes = TRAINING_CHUNK_BYTES if _training else INFERENCE_CHUNK_BYTES
    _set(M_MMAP_THRESHOLD, chunk_bytes)
    _set(M_TRIM_THRESHOLD, 2 * chunk_bytes)


@contextmanager
def _given_back_at_once() -> Iterator[None]:
    """Whatever a free leaves at the end of its arena goes to the kernel. Afterwards the heap is settled."""
    _set(M_TRIM_THRESHOLD, 0)
    try:
        yield
    finally:
        settle_heap()


def _set(parameter: int, value: int) -> None:
    """mallopt(3), where the C library has it."""
    mallopt = getattr(_LIBC, "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)


def trim_heap() -> None:
    """Return freed heap to the kernel, where the C library can."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_kernel_buffers() -> None:
    """Free what MKL keeps between its calls, where torch has MKL: tens of MB that a pass in a new process takes anew.

    The name is what MKL's own `mkl_free_buffers` calls; the build of torch exports no other. Those of a pool's other
    threads end their arenas, which `trim_heap` does not shorten: only a free that leaves more than the threshold does.
    """
    with _given_back_at_once():
        free_idle_buffers()


def free_idle_buffers() -> None:
    """The same, of all threads, but for ends of arenas: for a thread of many that begins to wait, or ends.

    MKL keeps some MB for each thread that computed, and for each worker of that thread's pool, and does not notice when
    one ends. Eight microbatches of a ViT that shared a pass took 321 MB, and 154 where those that wait keep none.
    """
    function = _mkl_free_buffers()
    if function is not None:
        function()


@cache
def _mkl_free_buffers() -> Callable[[], object] | None:
    with suppress(OSError, AttributeError):
        function: Callable[[], object] = ctypes.CDLL(
            str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
        ).mkl_serv_free_buffers
        return function
    return None
