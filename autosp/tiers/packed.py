"""Weights that are in no file, written to one: 4 KiB-aligned, in execution order, with a checksum of every layer."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from autosp.errors import ReadError
from autosp.files import cache_error
from autosp.partition import BoundLayer
from autosp.partition.tensors import LAYER_ALIGNMENT
from autosp.tiers.packing import Run, write_runs
from autosp.tiers.readers import Readers
from autosp.tiers.unnamed import create_unnamed

PACKING = "packing the weights"

UNWRITTEN_NS = 10**9
"""The file's time of change once it is packed. A write through the map sets it to now, so it tells that weights were
written at rest, when a checksum means nothing any more. Corruption below the filesystem leaves it as it is."""


@dataclass(eq=False)
class PackedLayer:
    """A layer's place in the file."""

    name: str
    offset: int
    n_bytes: int
    checksum: int | None
    """crc32 of its bytes as they were packed; None once it was verified."""


@dataclass(frozen=True)
class PackedRegion:
    """Neighbouring layers of the file."""

    pack: PackedFile
    layers: tuple[PackedLayer, ...]
    host: None = None

    @property
    def offset(self) -> int:
        """In the file."""
        return self.layers[0].offset

    @property
    def n_bytes(self) -> int:
        """Bytes of all its layers."""
        return sum(layer.n_bytes for layer in self.layers)

    def follows(self, other: object) -> bool:
        """Whether `other` ends where this begins."""
        return (
            isinstance(other, PackedRegion) and other.pack is self.pack and other.offset + other.n_bytes == self.offset
        )

    def read_into(self, target: memoryview) -> None:
        """Read all of it, and verify what is read for the first time.

        crc32 takes a second per 4 GB on the machine this was written on, in the reader's thread and without the GIL:
        a first pass is at most that much longer, the others not at all.

        Raises: ReadError naming the file and the layer.
        """
        self.pack.file.read_into(target, self.offset, ", ".join(layer.name for layer in self.layers))
        for layer in self.layers:
            if layer.checksum is not None:
                begin = layer.offset - self.offset
                self.pack.verify(layer, target[begin : begin + layer.n_bytes])


class PackedFile:
    """One file in `cache_dir`, of this process alone, gone when closed or when the process ends.

    It has a name only until it is open: no crash leaves it behind, not even one in the middle of packing.
    """

    def __init__(self, layers: Sequence[BoundLayer], cache_dir: Path, readers: Readers) -> None:
        """Raises: DiskFullError, TierError."""
        self._places: dict[int, PackedLayer] = {}
        size = 0
        for bound in layers:
            index, n_bytes = bound.layer.index, bound.disk_layout.packed_bytes
            self._places[index] = PackedLayer(bound.layer.name, size, n_bytes, None)
            size += n_bytes
        # One block more, to try on it whether the filesystem tells of writes through a map.
        descriptor, self.file = create_unnamed(cache_dir, size + LAYER_ALIGNMENT, readers, "packed", PACKING)
        try:
            checksums = write_runs(descriptor, [self._run(bound) for bound in layers])
            for bound, checksum in zip(layers, checksums, strict=True):
                self._places[bound.layer.index].checksum = checksum
            os.fsync(descriptor)
            # What was packed is not RAM any more.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            pages = mmap.mmap(descriptor, size + LAYER_ALIGNMENT, mmap.MAP_SHARED)
            self._tells_writes = _tells_writes(descriptor, pages, size)
            with torch.inference_mode(False):
                self.bytes = torch.frombuffer(pages, dtype=torch.uint8)
        except BaseException as error:
            self.file.close()
            if isinstance(error, OSError):
                raise cache_error(error, PACKING, size, cache_dir) from error
            raise
        finally:
            os.close(descriptor)

    def _run(self, bound: BoundLayer) -> Run:
        place = self._places[bound.layer.index]
        parts = [(placed.offset, placed.current_bytes()) for placed in bound.disk_layout.packed]
        return Run(place.offset, place.n_bytes, parts)

    def region(self, layer: int) -> PackedRegion:
        """The layer as it is read."""
        return PackedRegion(self, (self._places[layer],))

    def rest(self, layer: int) -> torch.Tensor:
        """A view of the memory-mapped file. Writes reach the file, and so every later load."""
        place = self._places[layer]
        return self.bytes[place.offset : place.offset + place.n_bytes]

    def verify(self, layer: PackedLayer, data: memoryview) -> None:
        """Raises: ReadError if these are not the bytes that were packed, and nobody has written to any weight since."""
        if zlib.crc32(data) != layer.checksum and self._tells_writes and not self._was_written():
            raise ReadError(
                f"{self.file.path}: the checksum of layer {layer.name} (bytes {layer.offset} to "
                f"{layer.offset + layer.n_bytes}) is not that of the weights that were packed: the disk gave back "
                "other bytes than it was given; set AUTOSP_CACHE_DIR to another disk"
            )
        layer.checksum = None

    def close(self) -> None:
        """The disk space is free once the last view of the map is gone. Twice is harmless."""
        self.file.close()
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def _was_written(self) -> bool:
        return os.fstat(self.file.descriptor).st_mtime_ns != UNWRITTEN_NS


def _tells_writes(descriptor: int, pages: mmap.mmap, spare: int) -> bool:
    """Whether a first write to a page of the map shows in the file's time of change: not so where files are in RAM."""
    os.utime(descriptor, ns=(UNWRITTEN_NS, UNWRITTEN_NS))
    pages[spare] = 1
    tells = os.fstat(descriptor).st_mtime_ns != UNWRITTEN_NS
    os.utime(descriptor, ns=(UNWRITTEN_NS, UNWRITTEN_NS))
    return tells
