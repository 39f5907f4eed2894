"""Layers on disk: in the file that their tensors are mapped from, or, what is in none, in one packed file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate
from pathlib import Path

import torch

from autosp.partition import BoundLayer, at_rest
from autosp.partition.placed import move_out, settle
from autosp.partition.tensors import LAYER_ALIGNMENT
from autosp.tiers.inplace import InPlaceRegion, OriginalFiles
from autosp.tiers.packed import PackedFile, PackedRegion
from autosp.tiers.reader import WeightFile
from autosp.tiers.readers import Readers


class Originals(Enum):
    """What happens to the memory that weights were in when they were packed. What is read in place is not packed."""

    KEPT = auto()
    """It stays, and the model goes on using it outside a pass: for trials, which end soon."""
    FREED = auto()
    """It is freed: outside a pass the weights rest in the packed file, until the store is closed."""


@dataclass(frozen=True)
class Padding:
    """Bytes that nobody uses: see [Note: in place]."""

    n_bytes: int
    host: None = None

    def read_into(self, target: memoryview) -> None:
        """Leave them as they are."""


DiskRegion = InPlaceRegion | PackedRegion | Padding


@dataclass(frozen=True)
class Window:
    """Bytes of the store's files, whatever they are: (file, offset, bytes, how many of them the file must have)."""

    pieces: tuple[tuple[WeightFile, int, int, int], ...]
    host: None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(n_bytes for _, _, n_bytes, _ in self.pieces)

    def read_into(self, target: memoryview) -> None:
        """Read them as layers are read, and look at nothing. Raises: ReadError."""
        done = 0
        for file, offset, n_bytes, needed_bytes in self.pieces:
            file.read_into(target[done : done + n_bytes], offset, "(link measurement)", needed_bytes)
            done += n_bytes

    def cached_bytes_per_s(self, target: memoryview) -> float | None:
        """What the page cache gives of its largest piece; None where it does not keep it, or does not tell.

        Raises: ReadError.
        """
        file, offset, _, needed_bytes = max(self.pieces, key=lambda piece: piece[-1])
        return file.cached_bytes_per_s(target[:needed_bytes], offset)


class DiskStore:
    """Reads in place what can be; writes the rest to a packed file, of which there is none if there is no rest."""

    def __init__(
        self, layers: Sequence[BoundLayer], cache_dir: Path, originals: Originals, readers: Readers | None = None
    ) -> None:
        """`readers` stay the caller's, default: one. Raises: DiskFullError, TierError; ReadError if a mapped file was
        replaced."""
        readers = readers or Readers()
        packed = [bound for bound in layers if bound.disk_layout.packed]
        self._originals = OriginalFiles((run for bound in layers for run in bound.disk_layout.runs), readers)
        self._packed: PackedFile | None = None
        if packed:
            try:
                self._packed = PackedFile(layers, cache_dir, readers)
            except BaseException:
                self._originals.close()
                raise
        self._regions = {bound.layer.index: self._regions_of(bound) for bound in layers}
        self._all: list[InPlaceRegion | PackedRegion] = [
            r for regions in self._regions.values() for r in regions if not isinstance(r, Padding)
        ]
        self._begins = [0, *accumulate(region.n_bytes for region in self._all)]
        self._moved = at_rest(packed) if originals is Originals.FREED else []
        for resting in self._moved:
            settle(resting.packed, self.rest(resting.layers[0].layer.index))

    def regions(self, layers: Sequence[int]) -> tuple[DiskRegion, ...]:
        """Adjacent packed layers are one region."""
        regions: list[DiskRegion] = []
        for region in (region for layer in layers for region in self._regions[layer]):
            last = regions[-1] if regions else None
            if isinstance(region, PackedRegion) and isinstance(last, PackedRegion) and region.follows(last):
                regions[-1] = PackedRegion(region.pack, (*last.layers, *region.layers))
            else:
                regions.append(region)
        return tuple(regions)

    def window(self, offset: int, n_bytes: int) -> Window:
        """A run of all regions' bytes, as if they were one file that begins anew where it ends."""
        at = offset // LAYER_ALIGNMENT * LAYER_ALIGNMENT % self._begins[-1]
        pieces = []
        while n_bytes > 0:
            index = bisect_right(self._begins, at) - 1
            region, skip = self._all[index], at - self._begins[index]
            count = min(n_bytes, region.n_bytes - skip)
            if isinstance(region, InPlaceRegion):
                needed = min(count, region.run.needed_bytes - skip)
                pieces.append((region.file, region.run.offset + skip, count, needed))
            else:
                pieces.append((region.pack.file, region.offset + skip, count, count))
            n_bytes -= count
            at = (at + count) % self._begins[-1]
        return Window(tuple(pieces))

    def rest(self, layer: int) -> torch.Tensor:
        """The packed part of a layer, as a view of the memory-mapped packed file."""
        return self._packed.rest(layer) if self._packed else torch.empty(0, dtype=torch.uint8)

    def check(self) -> None:
        """Raises: ReadError if a file that weights are mapped from has changed."""
        self._originals.check()

    def close(self) -> None:
        """Give what moved into the packed file memory of its own again. What is in place is where it always was."""
        if self._packed is not None:
            for resting in self._moved:
                move_out([place for place in resting.packed if place.is_in(self._packed.bytes)])
            self._packed.close()
        self._moved = []
        self._originals.close()
        self._regions = {}
        self._all = []

    def _regions_of(self, bound: BoundLayer) -> tuple[DiskRegion, ...]:
        """In the order of its layout."""
        layout = bound.disk_layout
        in_place = [self._originals.region(run, bound.layer.name) for run in layout.runs]
        padding = [Padding(layout.padding_bytes)] if layout.padding_bytes else []
        if self._packed is None or not layout.packed:
            return *in_place, *padding
        return *in_place, self._packed.region(bound.layer.index), *padding
