"""Writes a checkpoint anew as one safetensors file, a chunk at a time, resumably.

The order is the source's, except that wider dtypes come first: the format allows no gaps, and an element must begin at
a multiple of its size. What is on the disk for certain is in a journal beside the file: a line for each `CHUNK_BYTES`,
written once they are fsynced. A killed conversion goes on behind the last line.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from autosp.checkpoint.header import Entry, make_header
from autosp.devices.memory import memory_of

CHUNK_BYTES = 64 * 2**20
"""Most bytes that are converted at once, and that a kill can cost. A tensor that is not contiguous is taken whole."""

CASTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Numbers. An 8-bit float is the code of a quantised weight, and means nothing without its scale."""

Show = Callable[[int], object]
"""Told of bytes, as they are written."""


@dataclass(frozen=True)
class Layout:
    """The file to write."""

    tensors: dict[str, torch.Tensor]
    """Sources, in the order of the file."""
    dtypes: dict[str, torch.dtype]
    """What each is written as."""
    entries: dict[str, Entry]
    header: bytes

    @property
    def n_bytes(self) -> int:
        """Of the whole file."""
        return len(self.header) + max((entry.end for entry in self.entries.values()), default=0)


@dataclass
class Progress:
    """What is on the disk."""

    done_bytes: int = 0
    """Of the data."""
    crc32: dict[str, int] = field(default_factory=dict)
    """Of the part of each tensor that is."""


def lay_out(tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]) -> Layout:
    """Where each tensor goes, in the dtype that `dtypes` gives it, or its own.

    Raises: CheckpointError for a dtype that safetensors does not have.
    """
    written = {name: dtypes.get(name, tensor.dtype) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: -written[name].itemsize)
    header, entries = make_header((name, written[name], tensors[name].shape) for name in order)
    return Layout({name: tensors[name] for name in order}, written, entries, header)


def write(layout: Layout, path: Path, journal: Path, show: Show) -> dict[str, int]:
    """Write the file, or what is missing of it, and give the CRC-32 of every tensor. `path` is not yet to be trusted
    before this returns; if anything stops it, `path` and `journal` stay, to go on from.

    Raises: OSError; with ENOSPC before anything is written if the disk has no room for all of it.
    """
    progress = _resume(layout, path, journal)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, layout.n_bytes)
        with journal.open("a", encoding="utf-8") as lines:
            if journal.stat().st_size == 0:
                _pwrite(descriptor, memoryview(layout.header), 0)
                os.fsync(descriptor)
                print(json.dumps({"header_crc32": zlib.crc32(layout.header)}), file=lines, flush=True)
            show(progress.done_bytes)
            _write_data(layout, descriptor, progress, lambda line: print(line, file=lines, flush=True), show)
        os.ftruncate(descriptor, layout.n_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return progress.crc32


def _write_data(
    layout: Layout,
    descriptor: int,
    progress: Progress,
    note: Callable[[str], None],
    show: Show,
) -> None:
    fresh: dict[str, int] = {}
    noted_bytes = progress.done_bytes

    for name, tensor in layout.tensors.items():
        entry = layout.entries[name]
        progress.crc32.setdefault(name, 0)
        if progress.done_bytes >= entry.end:
            continue
        for chunk in _chunks(tensor, layout.dtypes[name], progress.done_bytes - entry.begin):
            memory = memory_of(chunk)
            _pwrite(descriptor, memory, len(layout.header) + progress.done_bytes)
            progress.crc32[name] = fresh[name] = zlib.crc32(memory, progress.crc32[name])
            progress.done_bytes += len(memory)
            show(len(memory))
            if progress.done_bytes - noted_bytes >= CHUNK_BYTES:
                os.fdatasync(descriptor)
                note(json.dumps({"done_bytes": progress.done_bytes, "crc32": fresh}))
                fresh, noted_bytes = {}, progress.done_bytes
            del chunk, memory  # before the next one is made


def _chunks(tensor: torch.Tensor, dtype: torch.dtype, skip_bytes: int) -> Iterator[torch.Tensor]:
    """The tensor's elements as `dtype`, from `skip_bytes` of the result on."""
    elements = tensor.contiguous().view(-1)
    step = CHUNK_BYTES // max(tensor.dtype.itemsize, dtype.itemsize)
    for begin in range(skip_bytes // dtype.itemsize, elements.numel(), step):
        yield elements[begin : begin + step].to(dtype)


def _pwrite(descriptor: int, source: memoryview, offset: int) -> None:
    done = 0
    while done < len(source):
        done += os.pwrite(descriptor, source[done:], offset + done)


def _resume(layout: Layout, path: Path, journal: Path) -> Progress:
    """What an earlier conversion to the same layout has written; otherwise both files are removed."""
    progress = Progress()
    try:
        lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
        reserved = path.stat().st_size == layout.n_bytes
        if reserved and whole and json.loads(whole[0]) == {"header_crc32": zlib.crc32(layout.header)}:
            for line in whole[1:]:
                record = json.loads(line)
                progress.done_bytes = record["done_bytes"]
                progress.crc32 |= record["crc32"]
            if len(whole) < len(lines):
                journal.write_text("".join(whole), encoding="utf-8")
            return progress
    except (FileNotFoundError, ValueError, KeyError):
        progress = Progress()
    path.unlink(missing_ok=True)
    journal.unlink(missing_ok=True)
    return progress


def is_as_written(path: Path, layout: Layout, crc32: Mapping[str, int]) -> bool:
    """Whether a written file still has its header, and every tensor its CRC-32. Reads all of it."""
    with path.open("rb") as file:
        if file.read(len(layout.header)) != layout.header:
            return False
        for name, entry in layout.entries.items():
            found = 0
            for begin in range(entry.begin, entry.end, CHUNK_BYTES):
                found = zlib.crc32(file.read(min(CHUNK_BYTES, entry.end - begin)), found)
            if crc32.get(name) != found:
                return False
    return True
