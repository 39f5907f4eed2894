"""Layers in one packed file: 4 KiB-aligned, in execution order, read with O_DIRECT where the filesystem takes it."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

import torch

from autosp.devices.memory import memory_of
from autosp.errors import DiskFullError, ReadError, TierError
from autosp.partition import BoundLayer
from autosp.partition.placed import move_out, settle
from autosp.partition.tensors import LAYER_ALIGNMENT

CHUNK_BYTES = 32 * 2**20
"""Bytes per read: large enough for the disk's full speed, small enough to share it."""

RETRIES = 2
"""Times that a read which failed with EIO is repeated before it is an error."""


class Originals(Enum):
    """What happens to the memory that weights were in when they were packed."""

    KEPT = auto()
    """It stays, and the model goes on using it outside a pass: for trials, which end soon."""
    FREED = auto()
    """It is freed: outside a pass the weights rest in the packed file, until the store is closed."""


@dataclass(frozen=True)
class FileRegion:
    """A run of bytes in a file."""

    path: Path
    descriptor: int
    offset: int
    n_bytes: int
    name: str
    host: None = None

    def read_into(self, target: memoryview) -> None:
        """Read all of it, in chunks. Short reads are continued.

        Raises: ReadError naming the file and the layer if the file ends too early or cannot be read.
        """
        done = 0
        failures = 0
        while done < self.n_bytes:
            stop = min(done + CHUNK_BYTES, self.n_bytes)
            try:
                count = os.preadv(self.descriptor, [target[done:stop]], self.offset + done)
            except OSError as error:
                failures += 1
                if error.errno == errno.EIO and failures <= RETRIES:
                    continue
                raise ReadError(
                    f"{self.path}: reading layer {self.name} failed at byte {self.offset + done}: {error.strerror}"
                ) from error
            whole = count if done + count == self.n_bytes else count // LAYER_ALIGNMENT * LAYER_ALIGNMENT
            if whole == 0:  # the file's end; O_DIRECT cannot continue within a block
                raise ReadError(
                    f"{self.path} ends at byte {self.offset + done}, inside layer {self.name} "
                    f"({self.n_bytes - done} bytes are missing): the file was truncated"
                )
            done += whole


class DiskStore:
    """One file in `cache_dir`, of this process alone, gone when closed or when the process ends.

    The file is unlinked as soon as it is open, so that no crash leaves it behind.
    """

    def __init__(self, layers: Sequence[BoundLayer], cache_dir: Path, originals: Originals) -> None:
        self._places: dict[int, tuple[int, int, str]] = {}
        size = 0
        for bound in layers:
            self._places[bound.layer.index] = (size, bound.layer.n_bytes, bound.layer.name)
            size += bound.layer.n_bytes
        size = max(size, LAYER_ALIGNMENT)  # an empty file cannot be mapped
        self._path, self._descriptor = _create(cache_dir, size)
        try:
            _pack(self._descriptor, layers, self._places)
            self._map = mmap.mmap(self._descriptor, size, mmap.MAP_SHARED)
            self._reader = _open_direct(self._path)
        except OSError as error:
            os.close(self._descriptor)
            raise _translate(error, cache_dir, size) from error
        finally:
            self._path.unlink(missing_ok=True)
        with torch.inference_mode(False):
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._moved = layers if originals is Originals.FREED else ()
        for bound in self._moved:
            settle(bound.placed, self.rest(bound.layer.index))

    def regions(self, layers: Sequence[int]) -> tuple[FileRegion, ...]:
        """Adjacent layers are one region."""
        runs: list[tuple[int, int, str]] = []
        for layer in layers:
            offset, n_bytes, name = self._places[layer]
            if runs and runs[-1][0] + runs[-1][1] == offset:
                runs[-1] = (runs[-1][0], runs[-1][1] + n_bytes, f"{runs[-1][2]}, {name}")
            else:
                runs.append((offset, n_bytes, name))
        return tuple(FileRegion(self._path, self._reader, offset, n_bytes, name) for offset, n_bytes, name in runs)

    def window(self, offset: int, n_bytes: int) -> FileRegion:
        """A run of the file."""
        offset = offset // LAYER_ALIGNMENT * LAYER_ALIGNMENT
        return FileRegion(self._path, self._reader, offset, n_bytes, "(link measurement)")

    def rest(self, layer: int) -> torch.Tensor:
        """A view of the memory-mapped file. Writes reach the file, and so every later load."""
        offset, n_bytes, _ = self._places[layer]
        return self._bytes[offset : offset + n_bytes]

    def close(self) -> None:
        """Give layers that moved in memory of their own again, and the disk space back once the last view is gone."""
        for bound in self._moved:
            move_out([place for place in bound.placed if place.is_in(self._bytes)])
        self._moved = ()
        os.close(self._reader)
        os.close(self._descriptor)
        self._bytes = torch.empty(0, dtype=torch.uint8)
        del self._map


def _create(cache_dir: Path, size: int) -> tuple[Path, int]:
    """A new file with all its blocks reserved, so that a full disk is known before anything is written."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=cache_dir, prefix="packed-", suffix=".autosp")
    except OSError as error:
        raise _translate(error, cache_dir, size) from error
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        os.close(descriptor)
        Path(name).unlink(missing_ok=True)
        raise _translate(error, cache_dir, size) from error
    return Path(name), descriptor


def _pack(descriptor: int, layers: Sequence[BoundLayer], places: dict[int, tuple[int, int, str]]) -> None:
    """Write every extent at its place, then empty the page cache of it: what was packed is not RAM any more."""
    for bound in layers:
        start = places[bound.layer.index][0]
        for placed in bound.placed:
            source = memory_of(placed.current_bytes())
            done = 0
            while done < len(source):
                done += os.pwrite(descriptor, source[done : done + CHUNK_BYTES], start + placed.offset + done)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _open_direct(path: Path) -> int:
    """A descriptor that bypasses the page cache, or an ordinary one where the filesystem refuses."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _translate(error: OSError, cache_dir: Path, size: int) -> TierError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(cache_dir).free
        return DiskFullError(
            error.errno,
            f"packing the weights takes {size / 1e9:.2f} GB in {cache_dir}, which has {free / 1e9:.2f} GB free; "
            "set AUTOSP_CACHE_DIR to a larger disk",
        )
    return TierError(error.errno, f"cannot write packed weights to {cache_dir}: {error.strerror}; set AUTOSP_CACHE_DIR")
