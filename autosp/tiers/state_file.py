"""A file in which tensors rest that change: mapped for whoever looks at them, read and written past the map.

[Note: past the map] A tensor at rest is a view of a shared map of the file. What changes it all, again and again, reads
it into memory of its own and writes it back, both with O_DIRECT: through the map every page would be a fault, would be
in RAM until the kernel chooses to write it, and would take its time from compute then. The kernel keeps the two ways in
step: before a direct read or write it writes what was changed through the map, and after a direct write it drops the
pages that the map has of it. Only at the same time, on the same bytes, one may miss what the other does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import torch

from autosp.devices.memory import drop_pages
from autosp.files import cache_error
from autosp.tiers.direct import Write, bypass_cache, bypasses_cache, write_all
from autosp.tiers.page_cache import cached_bytes
from autosp.tiers.reader import CLOSED
from autosp.tiers.readers import Readers
from autosp.tiers.unnamed import create_unnamed

RESTING = "the optimizer's state"

WRITE_BYTES = 32 * 2**20
"""Bytes that are written at a time."""


class StateFile:
    """One file in `cache_dir`, of this process alone. It lasts until it is closed and the last tensor in it is gone."""

    def __init__(
        self, n_bytes: int, cache_dir: Path, readers: Readers | None = None, *, write: Write = os.pwrite
    ) -> None:
        """All its blocks are reserved. `n_bytes` is a multiple of 4096. Raises: DiskFullError, TierError."""
        self._cache_dir = cache_dir
        self._write = write
        self._readers = readers or Readers()
        self._descriptor, self._file = create_unnamed(cache_dir, n_bytes, self._readers, "state", RESTING)
        self._n_bytes = n_bytes
        try:
            bypass_cache(self._descriptor, True)
            self._map = mmap.mmap(self._descriptor, n_bytes, mmap.MAP_SHARED)
        except OSError as error:
            self._close()
            raise cache_error(error, RESTING, n_bytes, cache_dir) from error
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def view(self, offset: int, n_bytes: int) -> torch.Tensor:
        """A run of the map as uint8, in a storage of its own: to save a tensor in it saves no other's bytes."""
        with torch.inference_mode(False):
            return torch.frombuffer((ctypes.c_char * n_bytes).from_buffer(self._map, offset), dtype=torch.uint8)

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where in the file a tensor's bytes begin; None if they are somewhere else."""
        offset = tensor.data_ptr() - self._address
        return offset if 0 <= offset < self._n_bytes else None

    def read(self, target: memoryview, offset: int, name: str) -> None:
        """Fill `target`, whole pages, with what rests there. Raises: ReadError naming the layer."""
        self._file.read_into(target, offset, name)
        if not bypasses_cache(self._descriptor):
            self._forget(offset, len(target))

    def write(self, source: memoryview, offset: int) -> None:
        """Write whole pages. They are on the disk, and not in the page cache, when this returns.

        Raises: TierError; the run's bytes may be old ones, new ones, or both, then.
        """
        try:
            for begin in range(0, len(source), WRITE_BYTES):
                write_all(self._descriptor, self._write, source[begin : begin + WRITE_BYTES], offset + begin)
            if not bypasses_cache(self._descriptor):
                os.fdatasync(self._descriptor)
                self._forget(offset, len(source))
        except OSError as error:
            raise cache_error(error, f"writing {RESTING}", len(source), self._cache_dir) from error

    def drop(self) -> None:
        """What was changed or read through the map leaves RAM; changes go to the disk before.

        Raises: TierError.
        """
        drop_pages(self._address, self._n_bytes)  # of a shared map: nothing is lost
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise cache_error(error, f"writing {RESTING}", self._n_bytes, self._cache_dir) from error
        self._forget(0, self._n_bytes)

    def cached_bytes(self) -> int:
        """Its bytes in the page cache, mapped or not; 0 where the kernel does not tell."""
        return cached_bytes(self._descriptor, 0, self._n_bytes) or 0

    def close(self) -> None:
        """End reading and writing. Tensors in it stay as they are, through the map. Twice is harmless."""
        self._close()
        vars(self).pop("_map", None)

    def _close(self) -> None:
        self._file.close()
        if self._descriptor != CLOSED:
            descriptor, self._descriptor = self._descriptor, CLOSED
            os.close(descriptor)
        self._readers.close()

    def _forget(self, offset: int, n_bytes: int) -> None:
        """Drop what the page cache has of it and the disk has, too."""
        os.posix_fadvise(self._descriptor, offset, n_bytes, os.POSIX_FADV_DONTNEED)
