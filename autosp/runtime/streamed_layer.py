"""A layer's tensors and where their data is: at rest, or on the device."""

from __future__ import annotations

from operator import attrgetter
from zlib import crc32

import torch

from autosp.devices import Piece
from autosp.devices.memory import memory_of
from autosp.errors import ModelChangedError
from autosp.partition import BoundLayer
from autosp.partition.placed import Placed, tensors_of, views_on

SAMPLE_BYTES = 4096
"""Of a tensor's beginning and middle: enough to show a merged adapter, which rounding may hide in most elements."""


address_of = torch.Tensor.data_ptr
version_of = attrgetter("_version")
"""Grows with every in-place write to a tensor that autograd knows of."""


class StreamedLayer:
    """A layer that moves. Its tensor objects never change, their `.data` does: at rest, or on the device.

    [Note: what a call costs] Every call binds and unbinds all of a layer's tensors, while compute waits: what is done
    per tensor is a call into torch each, without Python around it.
    """

    def __init__(self, bound: BoundLayer) -> None:
        """What its tensors are now is how they rest."""
        self.layer = bound.layer
        self.index = bound.layer.index
        self.module = bound.module
        self.pieces = _pieces(bound)
        """What a load copies from where the layer was read to: see [Note: two layouts]."""
        self._placed = bound.placed
        self._named = tensors_of(bound.placed)
        self.tensors = tuple(named.tensor for named in self._named)
        self._at_rest = tuple((tensor, tensor.data) for tensor in self.tensors)
        self._addresses = [address_of(data) for _, data in self._at_rest]
        self._mapped = [place for place in bound.placed if place.source is not None]
        self._sampled = [view for place in bound.placed if place.source is None for view in _samples(place)]
        """Of memory that `_at_rest` keeps."""
        self._on_device: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
        self._versions: list[int] = []
        self.running = 0
        """Calls of the layer that are under way: more than one only if it calls itself."""

    def place(self, base: torch.Tensor) -> None:
        """Fix the layer's device address: `base` holds its packed bytes (uint8)."""
        self._on_device = tuple(zip(self.tensors, views_on(self._placed, base), strict=True))

    def leave(self) -> None:
        """Let go of the device address."""
        self._on_device = ()

    def check(self) -> None:
        """Raises: ModelChangedError if a tensor's data at rest is not the data that was streamed."""
        addresses = list(map(address_of, self.tensors))
        if addresses == self._addresses:
            return
        name = next(
            named.name for named, now, then in zip(self._named, addresses, self._addresses, strict=True) if now != then
        )
        raise ModelChangedError(
            f"the data of {name} was replaced while a plan was applied; "
            "call remove() on the streamed model, change the weights, then apply the plan again"
        )

    def bind_device(self) -> None:
        """Compute sees the device's bytes. Raises: as `check`; all tensors are where they were then."""
        self.check()
        self._versions = list(map(version_of, self.tensors))
        for tensor, data in self._on_device:
            tensor.data = data

    def is_bound(self) -> bool:
        """Whether compute sees any of the device's bytes: binding may have been interrupted."""
        return any(address_of(tensor) == address_of(data) != 0 for tensor, data in self._on_device)

    def bind_rest(self) -> None:
        """Everybody sees the bytes at rest. What the layer wrote to is copied back."""
        versions = list(map(version_of, self.tensors))
        try:
            if versions != self._versions:
                self._copy_back(versions)
        finally:
            for tensor, data in self._at_rest:
                tensor.data = data

    def sample(self) -> int:
        """A checksum of some of each tensor's bytes at rest: it tells of writes that no version counter sees.

        Of a tensor mapped from a file only what was written to is looked at, see [Note: private maps]: a first write to
        a page is always told, and no page of the file is touched.
        """
        checksum = 0
        for view in self._sampled:
            checksum = crc32(view, checksum)
        for place in self._mapped:
            checksum = sample(place, checksum)
        return checksum

    def _copy_back(self, versions: list[int]) -> None:
        places = zip(self._at_rest, self._on_device, versions, self._versions, strict=True)
        for (_, rest), (_, device), now, then in places:
            if now != then:
                rest.copy_(device)


def _pieces(bound: BoundLayer) -> tuple[Piece, ...]:
    """In the order of their places on the device."""
    if bound.disk_layout is bound.layout:
        return (Piece(0, 0, bound.layout.n_bytes),)
    read = {place.extent: place.offset for place in bound.disk_layout.placed}
    return tuple(Piece(read[place.extent], place.offset, place.extent.n_bytes) for place in bound.placed)


def sample(place: Placed, checksum: int = 0) -> int:
    """An extent's part of `StreamedLayer.sample`, which goes on from `checksum`."""
    source = place.source
    for begin, end in [(0, place.extent.n_bytes)] if source is None else source.written():
        checksum = crc32(b"%d %d" % (begin, end), checksum)
        for view in _samples(place, begin, end):
            checksum = crc32(view, checksum)
    return checksum


def _samples(place: Placed, begin: int = 0, end: int | None = None) -> list[memoryview]:
    """Of the beginning and the middle of that part of an extent, where it is now."""
    data = memory_of(place.current_bytes())[begin:end]
    return [data[start : start + SAMPLE_BYTES] for start in (0, len(data) // 2)]
