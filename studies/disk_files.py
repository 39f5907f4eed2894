"""Files on the disk as a study sees them: what of them is in the page cache, and how fast they can be read past it.

[Note: cold and warm] POSIX_FADV_DONTNEED drops clean pages of a file that no process has mapped in. So a cold pass is
one before which the files were dropped in a process that never touched them through a mapping; how much stayed is
counted with mincore(2) rather than assumed. Files that were unlinked while open are reached through /proc/self/fd.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from autosp.devices.memory import anonymous, memory_of

WARMING_BYTES = 8 * 2**20

PROBE_BLOCK_BYTES = 16 * 2**20
"""Of one read while the disk is measured: beyond it reads were not seen to get faster."""

PROBE_PIECES = 4
"""Rates of one measurement of the disk."""

_mincore = ctypes.CDLL(None, use_errno=True).mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def unlinked_files(folder: Path) -> list[Path]:
    """Files below `folder` that this process has open and that have no name any more."""
    found: dict[tuple[int, int], Path] = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
            status = link.stat()
        except FileNotFoundError:  # the descriptor with which the folder itself is listed
            continue
        if target.startswith(f"{folder}/") and target.endswith(" (deleted)"):
            found[status.st_dev, status.st_ino] = link
    return list(found.values())


def warm(files: Sequence[Path]) -> None:
    """Read the files through the page cache."""
    buffer = bytearray(WARMING_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cached_bytes(files: Sequence[Path]) -> int:
    """How much of the files is in the page cache."""
    return sum(_cached_bytes(path) for path in files)


def _cached_bytes(path: Path) -> int:
    size = path.stat().st_size
    if size == 0:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as view:
        pages = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
        begin = (ctypes.c_char * size).from_buffer(view)
        failed = _mincore(ctypes.addressof(begin), size, pages.ctypes.data)
        del begin
    if failed:
        raise OSError(ctypes.get_errno(), "mincore failed", str(path))
    return int((pages & 1).sum()) * mmap.PAGESIZE


def disk_rates(files: Sequence[Path], n_bytes: int) -> list[float]:
    """Bytes per second of reads past the page cache, one thread, for each of a few pieces of `n_bytes` together.

    It is no code of autosp's that reads. Files follow one another, again and again if they are shorter. Where the
    filesystem has no O_DIRECT the page cache is in the way: nothing is measured, and the list is empty.
    """
    block_bytes = min(PROBE_BLOCK_BYTES, n_bytes // PROBE_PIECES)
    target = memory_of(memory := anonymous(block_bytes))
    memory.zero_()
    places = [(path, at) for path in files for at in range(0, path.stat().st_size - block_bytes + 1, block_bytes)]
    places = places or [(path, 0) for path in files]
    try:
        descriptors = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in files}
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return []
    rates = []
    try:
        turn = 0
        for _ in range(PROBE_PIECES):
            done = 0
            begin = time.perf_counter()
            while done < n_bytes // PROBE_PIECES:
                path, at = places[turn % len(places)]
                done += os.preadv(descriptors[path], [target], at)
                turn += 1
            rates.append(done / (time.perf_counter() - begin))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return rates


def read_bytes() -> int:
    """What this process has had the disk read so far, however it asked (proc(5), io)."""
    for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise OSError("/proc/self/io has no read_bytes")
