"""Weights that are read from the file that the model's tensors are mapped from.

See [Note: private maps]: what was written to such a weight is in memory only, so it is laid over what the file says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from autosp.devices.memory import anonymous, drop_pages, memory_at, memory_of
from autosp.errors import ReadError
from autosp.partition.mapped import Source
from autosp.partition.placed import FileRun, Placed, move_out
from autosp.tiers.reader import WeightFile
from autosp.tiers.readers import Readers

CHUNK_BYTES = 32 * 2**20
"""Bytes that are read at a time for what is not read to its place."""


@dataclass(frozen=True)
class InPlaceRegion:
    """A run of a file, with what was written to it at rest since.

    Noticed: every write to a mapped weight by this process, and every change of the file that its size or times show.
    Not noticed: a change of the file that shows in neither (a device written to below its filesystem, bits that rot).
    """

    file: WeightFile
    run: FileRun
    name: str
    host: None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the run."""
        return self.run.n_bytes

    def read_into(self, target: memoryview) -> None:
        """Read all of it. Of the map, only pages that were written to are touched, which no file backs.

        Raises: ReadError naming the file and the layer if the file is not what it was, or cannot be read.
        """
        self.file.read_into(target, self.run.offset, self.name, self.run.needed_bytes)
        self.file.check(self.name)
        for source in self.run.sources:
            _lay_over(source, target[source.offset - self.run.offset :])


class OriginalFiles:
    """The files of some runs, each opened once."""

    def __init__(self, runs: Iterable[FileRun], readers: Readers) -> None:
        """Raises: ReadError if a file cannot be opened, or is another one than the weights are mapped from."""
        self._files: dict[tuple[Path, int, int], WeightFile] = {}
        try:
            for run in runs:
                source = run.sources[0]
                if source.file not in self._files:
                    self._files[source.file] = _open(source, readers)
        except ReadError:
            self.close()
            raise

    def region(self, run: FileRun, name: str) -> InPlaceRegion:
        """The run as it is read."""
        return InPlaceRegion(self._files[run.sources[0].file], run, name)

    def check(self) -> None:
        """Raises: ReadError if any of them has changed: what is mapped from it is wrong, or gone."""
        for file in self._files.values():
            file.check("of the model")

    def close(self) -> None:
        """Let go of them."""
        for file in self._files.values():
            file.close()
        self._files = {}


def read_extent(source: Source, target: memoryview, name: str) -> None:
    """An extent's bytes as they are now, without touching a page of the map that shows the file. Raises: ReadError."""
    file = _open(source, Readers(), direct=False)
    try:
        file.read_into(target, source.offset, name)
        file.check(name)
    finally:
        file.close()
    _lay_over(source, target)


def read_chunks(source: Source, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """The same, a chunk at a time with where it begins, in memory that the next one overwrites. Raises: ReadError."""
    memory = anonymous(min(CHUNK_BYTES, source.n_bytes))
    for begin in range(0, source.n_bytes, CHUNK_BYTES):
        chunk = memory[: source.n_bytes - begin]
        read_extent(source.part(begin, len(chunk)), memory_of(chunk), name)
        yield begin, chunk


def give_back(place: Placed, mapped: Sequence[torch.Tensor]) -> None:
    """Bring an extent's tensors to the map of the file that still has their values of now, or to ordinary memory.

    `mapped`: their data in the map; empty if they were in none.
    """
    source = place.extent.source
    if source and mapped and _shows(source, place.current_bytes()):
        for named, data in zip(place.extent.tensors, mapped, strict=True):
            named.tensor.data = data
    else:
        move_out([place])


def _shows(source: Source, memory: torch.Tensor) -> bool:
    """Whether the map has these very bytes. False where the file cannot be read as it was."""
    try:
        return all(
            torch.equal(chunk, memory[begin : begin + len(chunk)].cpu())
            for begin, chunk in read_chunks(source, source.path.name)
        )
    except ReadError:
        return False


def forget_pages(sources: Iterable[Source]) -> None:
    """Take the file's pages that earlier passes touched out of the process, so that its memory figures are the plan's.

    Pages that were written to stay. Nobody may write to the weights meanwhile.
    """
    for source in sources:
        begin = 0
        for written_begin, written_end in [*source.written(), (source.n_bytes, source.n_bytes)]:
            drop_pages(source.address + begin, written_begin - begin)
            begin = written_end


def _lay_over(source: Source, target: memoryview) -> None:
    for begin, end in source.written():
        target[begin:end] = memory_at(source.address + begin, end - begin)


def _open(source: Source, readers: Readers, *, direct: bool = True) -> WeightFile:
    """Raises: ReadError if it cannot be opened, or is another one than the weights are mapped from."""
    try:
        file = WeightFile(source.path, readers, direct=direct)
    except OSError as error:
        raise ReadError(f"cannot open {source.path}, which weights are mapped from: {error.strerror}") from error
    if file.identity != source.file:
        file.close()
        raise ReadError(f"{source.path} was replaced since the model was mapped from it: load the model again")
    return file
