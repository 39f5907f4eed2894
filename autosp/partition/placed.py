"""How extents lie in the memory they travel in, and their tensors wherever those bytes are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autosp.partition.mapped import Source
from autosp.partition.tensors import EXTENT_ALIGNMENT, LAYER_ALIGNMENT, Extent, NamedTensor, align

JOIN_WITHIN_BYTES = 2 * LAYER_ALIGNMENT
"""Extents this near in a file are read as one run: two runs would read as much beyond their extents."""


@dataclass(frozen=True)
class Placed:
    """An extent's place in the bytes it travels in."""

    extent: Extent
    offset: int

    def current_bytes(self) -> torch.Tensor:
        """The extent's bytes where its tensors have them now, as a uint8 view."""
        named = self.extent.tensors[0]
        data = named.tensor.data
        begin = data.storage_offset() * data.element_size() - named.offset
        return torch.empty(0, dtype=torch.uint8, device=data.device).set_(
            data.untyped_storage(), begin, (self.extent.n_bytes,), (1,)
        )

    @property
    def source(self) -> Source | None:
        """Where a file has its bytes, as long as its tensors are in the map of that."""
        source, named = self.extent.source, self.extent.tensors[0]
        return source if source and named.tensor.data_ptr() - named.offset == source.address else None

    def is_in(self, base: torch.Tensor) -> bool:
        """Whether its tensors are views of that memory now."""
        return self.extent.tensors[0].tensor.data.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


@dataclass(frozen=True)
class FileRun:
    """Neighbouring extents of one file, which travel as they lie in it: in whole blocks, as O_DIRECT asks."""

    offset: int
    """In the file, a multiple of LAYER_ALIGNMENT."""
    n_bytes: int
    """Another multiple; the last block may be one that the file's end cuts short."""
    needed_bytes: int
    """From its beginning to the end of the last extent."""
    sources: tuple[Source, ...]
    """All its extents; those in one map as one."""


@dataclass(frozen=True)
class Layout:
    """How extents lie in the memory that they travel in: runs of files first, then what is in no file, packed.

    [Note: in place] In a run an extent keeps its address modulo 4096, so kernels that ask for alignment take the path
    that they take on the mapped original. How many blocks runs touch depends on where in a file they lie, and in how
    many files. Padding makes layers alike that have tensors alike: a ring of places of one size holds them, while sizes
    that differ by a block would take a place more.
    """

    placed: tuple[Placed, ...]
    runs: tuple[FileRun, ...]
    packed: tuple[Placed, ...]
    """Those of `placed` that are in no run; offsets from the end of the runs."""
    packed_bytes: int
    padding_bytes: int

    @property
    def run_bytes(self) -> int:
        """Bytes of all runs: where the packed extents begin."""
        return sum(run.n_bytes for run in self.runs)

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole, a multiple of LAYER_ALIGNMENT."""
        return self.run_bytes + self.packed_bytes + self.padding_bytes


def lay_out_packed(extents: Sequence[Extent]) -> Layout:
    """All extents packed, those of files in the order of their bytes there: what is read as one run moves as one."""
    located = [extent for members in _neighbours(extents) for extent, _ in members]
    placed = pack([*located, *(extent for extent in extents if extent.source is None)])
    return Layout(placed, (), placed, packed_bytes(extents), 0)


def lay_out(extents: Sequence[Extent]) -> Layout:
    """Extents that have a source in runs of its file, the others packed."""
    placed: list[Placed] = []
    runs: list[FileRun] = []
    begin = 0
    for members in _neighbours(extents):
        sources = _joined([source for _, source in members])
        offset = sources[0].offset // LAYER_ALIGNMENT * LAYER_ALIGNMENT
        needed = sources[-1].offset + sources[-1].n_bytes - offset
        runs.append(FileRun(offset, align(needed, LAYER_ALIGNMENT), needed, sources))
        placed += [Placed(extent, begin + source.offset - offset) for extent, source in members]
        begin += runs[-1].n_bytes
    others = [extent for extent in extents if extent.source is None]
    packed = pack(others)
    placed += [Placed(place.extent, begin + place.offset) for place in packed]
    # What the runs would take at most: every extent one of its own, as far apart as runs are joined.
    most = sum(
        align(extent.n_bytes, LAYER_ALIGNMENT) + JOIN_WITHIN_BYTES for extent in extents if extent.source is not None
    )
    return Layout(tuple(placed), tuple(runs), packed, packed_bytes(others), most - begin)


def _neighbours(extents: Sequence[Extent]) -> list[list[tuple[Extent, Source]]]:
    """Extents of files, in the order of their bytes, parted where reading on would cost more than beginning anew.

    Two maps of the same bytes stay apart: one of them may be written to.
    """
    located = [(extent, extent.source) for extent in extents if extent.source is not None]
    located.sort(key=lambda item: (item[1].file, item[1].offset))
    runs: list[list[tuple[Extent, Source]]] = []
    end = 0
    for extent, source in located:
        if runs and runs[-1][0][1].file == source.file and 0 <= source.offset - end <= JOIN_WITHIN_BYTES:
            runs[-1].append((extent, source))
        else:
            runs.append([(extent, source)])
        end = source.offset + source.n_bytes
    return runs


def _joined(sources: Sequence[Source]) -> tuple[Source, ...]:
    joined = [sources[0]]
    for source in sources[1:]:
        both = joined[-1].joined(source)
        joined[-1:] = [both] if both else [joined[-1], source]
    return tuple(joined)


def packed_bytes(extents: Sequence[Extent]) -> int:
    """Bytes of the extents packed together, alignment included."""
    return align(sum(align(extent.n_bytes, EXTENT_ALIGNMENT) for extent in extents), LAYER_ALIGNMENT)


def pack(extents: Sequence[Extent]) -> tuple[Placed, ...]:
    """Places one after another."""
    placed = []
    offset = 0
    for extent in extents:
        placed.append(Placed(extent, offset))
        offset += align(extent.n_bytes, EXTENT_ALIGNMENT)
    return tuple(placed)


def tensors_of(placed: Sequence[Placed]) -> list[NamedTensor]:
    """The tensors of placed extents, in their order."""
    return [named for place in placed for named in place.extent.tensors]


def views_on(placed: Sequence[Placed], base: torch.Tensor) -> list[torch.Tensor]:
    """Each tensor of `tensors_of(placed)` as a view of the bytes in `base`."""
    with torch.inference_mode(False):
        return [named.on(base, place.offset + named.offset) for place in placed for named in place.extent.tensors]


def copy_to(placed: Sequence[Placed], base: torch.Tensor) -> None:
    """Write the extents' bytes, as they are now, to their places in `base` (uint8)."""
    with torch.inference_mode(False), torch.no_grad():
        for place in placed:
            base[place.offset : place.offset + place.extent.n_bytes].copy_(place.current_bytes())


def settle(placed: Sequence[Placed], base: torch.Tensor) -> None:
    """Point the tensors of placed extents at their bytes in `base`, and let go of the memory they were in."""
    for named, view in zip(tensors_of(placed), views_on(placed, base), strict=True):
        named.tensor.data = view
    for place in placed:
        place.extent.release()


def move_out(placed: Sequence[Placed]) -> None:
    """Copy every extent's bytes, as they are now, to ordinary memory of its own; what was shared stays shared."""
    for place in placed:
        with torch.inference_mode(False):
            memory = torch.empty(place.extent.n_bytes, dtype=torch.uint8, device="cpu")
        alone = (Placed(place.extent, 0),)
        copy_to(alone, memory)
        settle(alone, memory)
