"""What never leaves the device: its weights in one piece of device memory, given back at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from autosp.devices import Device, Region
from autosp.devices.memory import anonymous, memory_of, read_regions
from autosp.partition.placed import Placed, settle
from autosp.partition.tensors import EXTENT_ALIGNMENT, Extent, align
from autosp.spec import Tier
from autosp.tiers import give_back, read_chunks, read_extent


class Residents:
    """Extents that stay on the device from `move_in` until `give_back`."""

    def __init__(self, places: Sequence[Placed], device: Device) -> None:
        """Take the memory for them.

        Where layers travel as they lie in a file an extent of it keeps its address modulo 256: kernels that ask for
        alignment then give bitwise the output that they give on the map.
        """
        self._moved: list[tuple[Placed, list[torch.Tensor]]] = []
        self._targets: list[Placed] = []
        as_in_files = device.info.slow_tier is Tier.DISK
        size = 0
        for place in places:
            source = place.extent.source if as_in_files else None
            offset = size + (source.address % EXTENT_ALIGNMENT if source else 0)
            self._targets.append(Placed(place.extent, offset))
            size = align(offset + place.extent.n_bytes, EXTENT_ALIGNMENT)
        self.memory = device.allocate(size)

    def move_in(self, resting: Mapping[Extent, Sequence[Region]]) -> None:
        """Fill it, and bind the tensors there. But a run of a weight's rows is a copy only: the weight rests elsewhere.

        `resting`: of such runs, what a store has of them.

        Raises: ReadError if one cannot be read from its file.
        """
        for place in self._targets:
            target = self.memory[place.offset : place.offset + place.extent.n_bytes]
            regions = resting.get(place.extent, ())
            if place.source is None and any(region.host is None for region in regions):
                _read(regions, target)
            else:
                fill(target, place)
            if not place.extent.is_part:
                self._move_in(place, target)

    def place_of(self, extent: Extent) -> Placed:
        """Where it is in the memory."""
        return next(place for place in self._targets if place.extent is extent)

    @property
    def n_bytes(self) -> int:
        """Bytes of their memory."""
        return self.memory.numel()

    def give_back(self) -> None:
        """Bring them to ordinary memory with their values of now, or to the map of the file that still has those."""
        while self._moved:
            place, originals = self._moved[-1]
            give_back(place, originals if place.is_in(self.memory) else ())
            self._moved.pop()

    def forget(self) -> None:
        """Let go of their memory, once nothing of the model is in it."""
        self._moved, self._targets = [], []
        self.memory = torch.empty(0, dtype=torch.uint8)

    def _move_in(self, place: Placed, target: torch.Tensor) -> None:
        mapped = [named.tensor.data for named in place.extent.tensors] if place.source else []
        self._moved.append((place, mapped))
        settle([Placed(place.extent, 0)], target)


def _read(regions: Sequence[Region], target: torch.Tensor) -> None:
    """From the packed file, as it is read for every pass: verified, and no page of its map becomes the process's.

    Raises: ReadError.
    """
    memory = anonymous(sum(region.n_bytes for region in regions))
    read_regions(regions, memory)
    target.copy_(memory[: len(target)])


def fill(target: torch.Tensor, place: Placed) -> None:
    """Write an extent's bytes, as they are now, to device memory. Raises: ReadError."""
    source = place.source
    if source is not None and target.is_cpu:
        read_extent(source, memory_of(target), place.extent.name)
        return
    with torch.no_grad():
        chunks = [(0, place.current_bytes())] if source is None else read_chunks(source, place.extent.name)
        for begin, chunk in chunks:
            target[begin : begin + len(chunk)].copy_(chunk)
