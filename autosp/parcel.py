"""A model and what belongs to it, sent to another process without a second copy of its weights in RAM.

[Note: parcels] The structure is pickled; the bytes of tensors are not in the pickle. A storage that is mapped from a
file is named by its place there, and mapped again. What is in no file is written to one without a name, of which only
the two processes know, and which the receiver maps: pages of it are copied where the receiver writes to them, come and
go with the page cache, and are seen by nobody else. A file without a name is no place that weights can be read from in
place, so the receiver's plans lay them out as the sender's do.

The pickle goes from one process of a program to another over a pipe of theirs. None is ever read from a file or taken
from anybody else.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autosp.devices.heap import trim_heap
from autosp.devices.memory import memory_at
from autosp.errors import NotPicklableError, ReadError
from autosp.files import cache_error
from autosp.partition.mapped import Source, locate
from autosp.partition.tensors import LAYER_ALIGNMENT, Extent, NamedTensor, align, collect

WRITTEN_AT_ONCE_BYTES = 2**26


@dataclass(frozen=True)
class Place:
    """Bytes of a storage in a file: the parcel's own if `path` is None."""

    path: Path | None
    offset: int
    n_bytes: int
    file: tuple[int, int] | None = None
    """Device and inode of the file at `path`."""


class Parcel:
    """`contents` packed for `open_parcel` in another process, which needs the descriptor too."""

    def __init__(self, contents: Any, cache_dir: Path) -> None:
        """Raises: NotPicklableError naming what cannot be sent; DiskFullError or TierError."""
        pickler = _Pickler()
        self.pickled = pickler.pickled(contents)
        self._storages = pickler.storages
        self._sources = _sources(self._storages)
        self.places: list[Place] = []
        self._size = 0
        for storage, source in zip(self._storages, self._sources, strict=True):
            if source is not None:
                place = Place(source.path, source.offset, source.n_bytes, (source.device, source.inode))
            else:
                place = Place(None, self._size, storage.nbytes())
                self._size += align(storage.nbytes(), LAYER_ALIGNMENT)
            self.places.append(place)
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=cache_dir)  # noqa: SIM115 - closed by `close`
            self._write()
        except OSError as error:
            raise cache_error(error, "sending weights to another process", self._size, cache_dir) from error

    @property
    def descriptor(self) -> int:
        """Of the file without a name."""
        return self._file.fileno()

    def close(self) -> None:
        """The file goes once no process maps it."""
        self._file.close()
        self._storages = []

    @contextmanager
    def moved(self, model: nn.Module) -> Iterator[None]:
        """As long as this is open, the tensors of `model` that were written lie in the file, and their RAM is free.

        Afterwards each has memory of its own again; tensors that shared memory share it.
        """
        written = {
            storage.data_ptr(): place
            for storage, place in zip(self._storages, self.places, strict=True)
            if place.path is None and place.n_bytes
        }
        moving = [
            (named, written[extent.storage.data_ptr()])
            for extent in collect(model).extents
            if extent.storage.data_ptr() in written
            for named in extent.tensors
        ]
        pages = _mapped(self.descriptor) if moving else None
        homes = {place: _storage(pages, place) for _, place in moving if pages is not None}
        for named, place in moving:
            _set_storage(named.tensor, homes[place])
        self._storages = []  # with them goes the memory
        trim_heap()
        try:
            yield
        finally:
            for place in list(homes):
                home = homes.pop(place)
                memory = torch.UntypedStorage(place.n_bytes)
                memory.copy_(home)
                del home
                for named in [named for named, its in moving if its is place]:
                    _set_storage(named.tensor, memory)

    def _write(self) -> None:
        for storage, place in zip(self._storages, self.places, strict=True):
            if place.path is not None:
                continue
            source = memory_at(storage.data_ptr(), place.n_bytes)
            done = 0
            while done < place.n_bytes:
                piece = source[done : done + WRITTEN_AT_ONCE_BYTES]
                done += os.pwrite(self.descriptor, piece, place.offset + done)


def open_parcel(pickled: bytes, places: list[Place], descriptor: int) -> Any:
    """What was packed. The descriptor can be closed afterwards.

    Raises: ReadError if a file that weights are mapped from was replaced; what unpickling raises.
    """
    maps: dict[Path | None, mmap.mmap] = {}
    storages = []
    for place in places:
        if place.n_bytes and place.path not in maps:
            maps[place.path] = _opened(place, descriptor)
        storages.append(_storage(maps[place.path], place) if place.n_bytes else torch.UntypedStorage())
    return _Unpickler(io.BytesIO(pickled), storages).load()


class _Pickler(pickle.Pickler):
    """Gives every storage a number; tensors that shared one share it afterwards."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        super().__init__(self._buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self._numbers: dict[tuple[int, int], int] = {}
        self.storages: list[torch.UntypedStorage] = []
        """They are kept, so that no other one comes to lie where one lay."""

    def pickled(self, contents: Any) -> bytes:
        """Raises: NotPicklableError."""
        try:
            self.dump(contents)
        except (pickle.PicklingError, AttributeError, TypeError, NotImplementedError, RecursionError) as error:
            raise NotPicklableError(
                f"isolate=True sends model, batch and step to another process, and something in them cannot be "
                f"pickled ({error}): define its classes and functions at the top of a module, not in a function, and "
                "remove hooks that are lambdas; or leave out isolate=True"
            ) from error
        return self._buffer.getvalue()

    def persistent_id(self, value: Any) -> tuple[int, torch.dtype | None] | None:
        """The number of a storage, and the dtype it is seen with. Other objects are pickled as usual."""
        if isinstance(value, torch.storage.TypedStorage):
            return self._number(value._untyped_storage), value.dtype
        if isinstance(value, torch.UntypedStorage):
            return self._number(value), None
        return None

    def _number(self, storage: torch.UntypedStorage) -> int:
        if storage.device.type != "cpu":
            raise pickle.PicklingError(f"a tensor is on {storage.device}")
        key = storage.data_ptr(), storage.nbytes()
        if key not in self._numbers:
            self._numbers[key] = len(self.storages)
            self.storages.append(storage)
        return self._numbers[key]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, storages: list[torch.UntypedStorage]) -> None:
        super().__init__(file)
        self._storages = storages

    def persistent_load(self, identity: tuple[int, torch.dtype | None]) -> Any:
        number, dtype = identity
        storage = self._storages[number]
        if dtype is None:
            return storage
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _sources(storages: list[torch.UntypedStorage]) -> list[Source | None]:
    """Where the storages lie in files, of those that are mapped from one and were never written to."""
    extents = []
    for number, storage in enumerate(storages):
        whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
        named = NamedTensor(whole, [f"storage {number} of the model"], False)
        extents.append(Extent(storage, 0, storage.nbytes(), [named]))
    locate(extent for extent in extents if extent.n_bytes)
    return [extent.source for extent in extents]


def _opened(place: Place, descriptor: int) -> mmap.mmap:
    if place.path is None:
        return _mapped(descriptor)
    with place.path.open("rb") as file:
        found = os.fstat(file.fileno())
        if (found.st_dev, found.st_ino) != place.file or found.st_size < place.offset + place.n_bytes:
            raise ReadError(f"{place.path} was replaced since weights were mapped from it: load the model again")
        return _mapped(file.fileno())


def _mapped(descriptor: int) -> mmap.mmap:
    """A private map of a whole file."""
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _storage(pages: mmap.mmap, place: Place) -> torch.UntypedStorage:
    """A run of the map, which lives as long as the storage."""
    with torch.inference_mode(False):
        return torch.frombuffer(pages, dtype=torch.uint8, offset=place.offset, count=place.n_bytes).untyped_storage()


def _set_storage(tensor: torch.Tensor, storage: torch.UntypedStorage) -> None:
    with torch.inference_mode(False), torch.no_grad():
        tensor.data = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(
            storage, tensor.storage_offset(), tensor.size(), tensor.stride()
        )
