"""Layers in one flat host buffer, pinned where an accelerator copies from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from autosp.devices import Device
from autosp.devices.heap import trim_heap
from autosp.devices.memory import anonymous, anonymous_bytes, copy_bytes, memory_of, part, unpin
from autosp.errors import HostMemoryError
from autosp.partition import BoundLayer, Resting, at_rest
from autosp.partition.placed import Placed, copy_to, settle
from autosp.partition.tensors import LAYER_ALIGNMENT
from autosp.tiers.inplace import give_back, read_extent

CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""A container's memory limit and use: version 2, version 1. What the use consists of is in memory.stat beside it."""

CACHED, UNWRITTEN = ("inactive_file", "active_file"), ("file_dirty", "file_writeback", "dirty", "writeback")
"""Of memory.stat: the page cache, and what of it must be written to a disk before it can go, by both versions."""

TRIM_EVERY_BYTES = 16 * 2**20
"""Weights that were on the C heap go back to the kernel after so many: each time costs a walk over the heap, and what
waits for it is in RAM twice."""


@dataclass(frozen=True)
class HostRegion:
    """A run of bytes in RAM."""

    host: torch.Tensor
    n_bytes: int

    def read_into(self, target: memoryview) -> None:
        """A plain copy; the GIL is free meanwhile."""
        copy_bytes(self.host, target)


class HostStore:
    """One flat buffer, no larger than the layers it holds, pinned where an accelerator copies from it.

    The layers move into it, so that there is never a second copy of the weights in RAM, and out of it at the end. What
    is mapped from a file is read from that, without touching the map, and unless written to is a map again at the end.
    """

    def __init__(self, layers: Sequence[BoundLayer], device: Device) -> None:
        """Raises, before anything is moved: HostMemoryError if RAM has no room for what is in it twice meanwhile, the
        largest layer or `TRIM_EVERY_BYTES`; ReadError if a mapped file cannot be read, or was replaced."""
        self._resting = at_rest(layers)
        self._places: dict[int, tuple[int, int]] = {}
        offset = 0
        for bound in layers:
            self._places[bound.layer.index] = (offset, bound.layer.n_bytes)
            offset += bound.layer.n_bytes
        _check_room(self._resting, offset)
        self._buffer = anonymous(offset)
        self._rests: dict[int, torch.Tensor] = {}
        memories = [part(self._buffer, *self._place(resting)) for resting in self._resting]
        moving = [place for resting in self._resting for place in resting.placed]
        self._mapped = {
            place: [named.tensor.data for named in place.extent.tensors] for place in moving if place.source is not None
        }
        for resting, memory in zip(self._resting, memories, strict=True):
            _read(resting.placed, memory)
        moved_bytes = 0
        for resting, memory in zip(self._resting, memories, strict=True):
            begin = 0
            for bound in resting.layers:
                self._rests[bound.layer.index] = memory[begin : begin + bound.layer.n_bytes]
                begin += bound.layer.n_bytes
            copy_to([place for place in resting.placed if place not in self._mapped], memory)
            settle(resting.placed, memory)
            moved_bytes += memory.numel()
            if moved_bytes >= TRIM_EVERY_BYTES:
                trim_heap()
                moved_bytes = 0
        trim_heap()
        device.pin(self._buffer)

    def regions(self, layers: Sequence[int]) -> tuple[HostRegion, ...]:
        """Adjacent layers are one region."""
        runs: list[tuple[int, int]] = []
        for layer in layers:
            offset, n_bytes = self._places[layer]
            if runs and runs[-1][0] + runs[-1][1] == offset:
                runs[-1] = (runs[-1][0], runs[-1][1] + n_bytes)
            else:
                runs.append((offset, n_bytes))
        return tuple(HostRegion(self._buffer[offset : offset + n_bytes], n_bytes) for offset, n_bytes in runs)

    def window(self, offset: int, n_bytes: int) -> HostRegion:
        """A run of the buffer."""
        offset = offset // LAYER_ALIGNMENT * LAYER_ALIGNMENT
        return HostRegion(self._buffer[offset : offset + n_bytes], n_bytes)

    def rest(self, layer: int) -> torch.Tensor:
        """A part of the buffer, with a storage of its own, or one that the rows of a weight share."""
        return self._rests[layer]

    def check(self) -> None:
        """Nobody but the model changes it."""

    def close(self) -> None:
        """Bring every layer back to its map or to memory of its own, one by one; the buffer's part goes with its last
        view."""
        unpin(self._buffer)
        while self._resting:
            indices = [bound.layer.index for bound in self._resting[0].layers]
            for place in self._resting[0].placed:
                if place.is_in(self._rests[indices[0]]):
                    give_back(place, self._mapped.get(place, ()))
            del self._resting[0]
            for index in indices:
                del self._rests[index]
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._rests = {}
        self._places = {}
        self._mapped = {}

    def _place(self, resting: Resting) -> tuple[int, int]:
        """Offset and bytes of neighbours in the buffer."""
        places = [self._places[bound.layer.index] for bound in resting.layers]
        return places[0][0], sum(n_bytes for _, n_bytes in places)


def _read(placed: Sequence[Placed], memory: torch.Tensor) -> None:
    """What is in files. Raises: ReadError."""
    for place in placed:
        source = place.source
        if source is not None:
            target = memory[place.offset : place.offset + place.extent.n_bytes]
            read_extent(source, memory_of(target), place.extent.name)


def _check_room(moving: Sequence[Resting], n_bytes: int) -> None:
    """Memory of the process's own goes as it moves; mapped pages of files, which are not in it, take new RAM."""
    largest = max((sum(bound.layer.n_bytes for bound in resting.layers) for resting in moving), default=0)
    check_free(
        max(largest, min(n_bytes, TRIM_EVERY_BYTES), n_bytes - anonymous_bytes()),
        f"moving {n_bytes / 1e9:.2f} GB of weights to one buffer",
        "close other programs, or load the model in a smaller dtype",
    )


def check_free(n_bytes: int, purpose: str, advice: str) -> None:
    """Raises: HostMemoryError if so much host memory cannot be had."""
    available = available_bytes()
    if n_bytes > available:
        raise HostMemoryError(
            f"{purpose} takes {n_bytes / 1e9:.2f} GB of host memory, of which {available / 1e9:.2f} GB are free: "
            f"{advice}"
        )


def available_bytes() -> int:
    """Host memory that can still be had: the machine's, or what the container's limit leaves.

    Page cache that is on disk already goes as soon as memory is asked for: it takes none of it.
    """
    available = int(psutil.virtual_memory().available)
    for limit, used in CGROUP_FILES:
        try:
            limit_bytes, used_bytes = int(Path(limit).read_text()), int(Path(used).read_text())
        except (OSError, ValueError):  # no such controller, or "max": no limit
            continue
        taken = max(0, used_bytes - _reclaimable_bytes(Path(used).with_name("memory.stat")))
        available = min(available, limit_bytes - taken)
    return max(0, available)


def _reclaimable_bytes(stat: Path) -> int:
    """Page cache of a container, with those in it, that needs no writing. 0 where its figures cannot be read."""
    try:
        figures = {name: int(value) for name, value in map(str.split, stat.read_text().splitlines())}
    except (OSError, ValueError):
        return 0

    def total(names: Sequence[str]) -> int:
        """Version 1 has the whole of a figure, with the containers in this one, under another name."""
        return sum(figures.get(f"total_{name}", figures.get(name, 0)) for name in names)

    return max(0, total(CACHED) - total(UNWRITTEN))
