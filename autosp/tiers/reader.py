"""Reads runs of a file into memory, past the page cache where the filesystem lets it; retries what may pass."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from autosp.errors import ReadError
from autosp.partition.tensors import LAYER_ALIGNMENT

CHUNK_BYTES = 32 * 2**20
"""Bytes per read: large enough for the disk's full speed, small enough to share it."""

RETRIES = 2
"""Times that a read which failed with EIO is repeated before it is an error."""

DIRECT = getattr(os, "O_DIRECT", 0)

Read = Callable[[int, list[memoryview], int], int]
"""`os.preadv`, or what stands for a disk that misbehaves: (descriptor, buffers, offset) -> bytes read."""


class WeightFile:
    """One file, opened once: whoever replaces it at its path leaves us the old one. EINTR is Python's to repeat."""

    def __init__(self, path: Path, *, direct: bool = True, read: Read = os.preadv) -> None:
        """`direct`: bypass the page cache, for offsets and memory at multiples of 4096. Raises: OSError."""
        self.path = path
        self._read = read
        self.descriptor = _open(path, direct)
        self._opened = os.fstat(self.descriptor)

    @property
    def identity(self) -> tuple[Path, int, int]:
        """Path, device and inode."""
        return self.path, self._opened.st_dev, self._opened.st_ino

    def read_into(self, target: memoryview, offset: int, name: str, needed_bytes: int | None = None) -> None:
        """Fill `target` from `offset`, in chunks. Short reads are continued.

        The file may end behind the first `needed_bytes` (default: all), since its last block is seldom whole.

        Raises: ReadError naming the file and the layer if the file ends too early or cannot be read.
        """
        needed = len(target) if needed_bytes is None else needed_bytes
        done = 0
        failures = 0
        while done < needed:
            stop = min(done + CHUNK_BYTES, len(target))
            try:
                count = self._read(self.descriptor, [target[done:stop]], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and self._read_through_cache():
                    continue
                failures += 1
                if error.errno == errno.EIO and failures <= RETRIES:
                    continue
                raise ReadError(
                    f"{self.path}: reading layer {name} failed at byte {offset + done}: {error.strerror}"
                ) from error
            whole = count if done + count >= needed else count // LAYER_ALIGNMENT * LAYER_ALIGNMENT
            if whole == 0:  # the file's end; O_DIRECT cannot continue within a block
                raise ReadError(
                    f"{self.path} ends at byte {offset + done + count}, inside layer {name} "
                    f"({needed - done - count} bytes are missing): the file was truncated"
                )
            done += whole
            failures = 0

    def check(self, name: str) -> None:
        """Raises: ReadError if the file is not what it was when it was opened.

        Call it after reading, for the kernel notes a change before it makes it. Being unlinked or replaced changes the
        link count and with it the time of change, but not a byte.
        """
        now, then = os.fstat(self.descriptor), self._opened
        relinked = now.st_nlink != then.st_nlink
        if (
            now.st_size != then.st_size
            or now.st_mtime_ns != then.st_mtime_ns
            or (now.st_ctime_ns != then.st_ctime_ns and not relinked)
        ):
            what = (
                f"has {now.st_size} bytes instead of {then.st_size}" if now.st_size != then.st_size else "was written"
            )
            raise ReadError(
                f"{self.path} {what} since a plan was applied to the model that is mapped from it, so layer {name} "
                "cannot be trusted: call remove() on the streamed model, and load it again from a file that stays as "
                "it is"
            )

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.descriptor)

    def _read_through_cache(self) -> bool:
        """Some filesystems take O_DIRECT at opening and refuse it at reading. False: it is off already."""
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        if not flags & DIRECT:
            return False
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~DIRECT)
        return True


def _open(path: Path, direct: bool) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | (DIRECT if direct else 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags)
