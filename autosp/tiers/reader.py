"""Reads runs of a file into memory, past the page cache where the filesystem lets it; retries what may pass."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from autosp.errors import ReadError
from autosp.partition.tensors import LAYER_ALIGNMENT, align
from autosp.tiers.direct import DIRECT, bypass_cache, bypasses_cache
from autosp.tiers.page_cache import is_cached
from autosp.tiers.readers import Open, Readers

CLOSED = -1
"""In place of a descriptor."""

RETRIES = 2
"""Times that a read which failed with EIO is repeated before it is an error."""


class WeightFile:
    """One file, opened once: whoever replaces it at its path leaves us the old one. EINTR is Python's to repeat."""

    def __init__(self, path: Path, readers: Readers, *, direct: bool = True) -> None:
        """`direct`: bypass the page cache, for offsets and memory at multiples of 4096. Raises: OSError."""
        self.path = path
        self._readers = readers
        self.descriptor = _open(path, direct, readers.open)
        self._opened = os.fstat(self.descriptor)
        self._direct = bypasses_cache(self.descriptor)
        self._buffered = _open_again(self.descriptor) if self._direct else self.descriptor

    @property
    def identity(self) -> tuple[Path, int, int]:
        """Path, device and inode."""
        return self.path, self._opened.st_dev, self._opened.st_ino

    def read_into(self, target: memoryview, offset: int, name: str, needed_bytes: int | None = None) -> None:
        """Fill `target` from `offset`, block by block.

        The file may end behind the first `needed_bytes` (default: all), since its last block is seldom whole.

        Raises: ReadError naming the file and the layer if the file ends too early or cannot be read.
        """
        needed = len(target) if needed_bytes is None else needed_bytes

        def read_block(begin: int, end: int) -> None:
            least = min(end, needed) - begin
            descriptor = self._descriptor_for(offset + begin, least)
            self._read_block(descriptor, target[begin:end], offset + begin, name, least)

        self._readers.each_block(min(align(needed, LAYER_ALIGNMENT), len(target)), read_block)

    def cached_bytes_per_s(self, target: memoryview, offset: int) -> float | None:
        """What the page cache gives, once it has these bytes; None where it does not keep them, or does not tell.

        Raises: ReadError.
        """
        for _ in range(2):  # the first time brings them there
            begin = time.perf_counter()
            cached = is_cached(self._buffered, offset, len(target))
            self._read_block(self._buffered, target, offset, "(link measurement)", len(target))
            seconds = time.perf_counter() - begin
        return len(target) / seconds if cached else None

    def _read_block(self, descriptor: int, target: memoryview, offset: int, name: str, needed: int) -> None:
        """The first `needed` bytes of `target` at least. Short reads are continued."""
        done = 0
        failures = 0
        while done < needed:
            direct = self._direct
            try:
                count = self._readers.read(descriptor, [target[done:]], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    self._read_through_cache()
                    continue
                failures += 1
                if error.errno == errno.EIO and failures <= RETRIES:
                    continue
                raise ReadError(
                    f"{self.path}: reading layer {name} failed at byte {offset + done}: {error.strerror}"
                ) from error
            whole = count if done + count >= needed else count // LAYER_ALIGNMENT * LAYER_ALIGNMENT
            if whole == 0:  # the file's end; O_DIRECT cannot continue within a block
                end = min(offset + done + count, os.fstat(self.descriptor).st_size)
                raise ReadError(
                    f"{self.path} ends at byte {end}, before or inside layer {name} ({offset + needed - end} bytes are "
                    "missing): the file was truncated"
                )
            done += whole
            failures = 0

    def _descriptor_for(self, offset: int, n_bytes: int) -> int:
        """The page cache's if the plan says so and all of the block is there, else the disk's."""
        if self._readers.reading.from_cache and is_cached(self._buffered, offset, n_bytes):
            return self._buffered
        return self.descriptor

    def check(self, name: str) -> None:
        """Raises: ReadError if the file is not what it was when it was opened.

        Call it after reading, for the kernel notes a change before it makes it. Being unlinked, replaced or renamed
        changes the time of change, with the link count or without, but not a byte.
        """
        now, then = os.fstat(self.descriptor), self._opened
        if (
            now.st_size != then.st_size
            or now.st_mtime_ns != then.st_mtime_ns
            or (now.st_ctime_ns != then.st_ctime_ns and now.st_nlink == then.st_nlink and self._is_at_its_path(now))
        ):
            what = (
                f"has {now.st_size} bytes instead of {then.st_size}" if now.st_size != then.st_size else "was written"
            )
            raise ReadError(
                f"{self.path} {what} since a plan was applied to the model that is mapped from it, so layer {name} "
                "cannot be trusted: call remove() on the streamed model, and load it again from a file that stays as "
                "it is"
            )

    def _is_at_its_path(self, opened: os.stat_result) -> bool:
        try:
            return os.path.samestat(self.path.stat(), opened)
        except OSError:
            return False

    def close(self) -> None:
        """Let go of the file. Twice is harmless."""
        descriptors = {self.descriptor, self._buffered} - {CLOSED}
        self.descriptor = self._buffered = CLOSED
        for descriptor in descriptors:
            os.close(descriptor)

    def _read_through_cache(self) -> None:
        """Some filesystems take O_DIRECT at opening and refuse it at reading, to every reader that is reading.

        Whoever is refused goes on as long as `_direct` says so: until it cannot happen any more.
        """
        bypass_cache(self.descriptor, False)
        self._direct = False


def _open(path: Path, direct: bool, open_file: Open) -> int:
    """Without O_DIRECT where the filesystem refuses it. Raises: OSError."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        return open_file(path, flags | (DIRECT if direct else 0))
    except OSError as error:
        if error.errno != errno.EINVAL or not direct:
            raise
        return open_file(path, flags)


def _open_again(descriptor: int) -> int:
    """The same file, whatever is at its path now, for reads through the page cache; itself where that cannot be had.

    Without read-ahead: what is not cached is read past the cache, and would be read twice.
    """
    try:
        again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return descriptor
    os.posix_fadvise(again, 0, 0, os.POSIX_FADV_RANDOM)
    return again
