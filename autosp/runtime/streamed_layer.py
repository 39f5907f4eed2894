"""A layer's tensors and where their data is: at rest, or on the device."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from autosp.devices import Piece
from autosp.devices.memory import memory_of
from autosp.errors import ModelChangedError
from autosp.partition import BoundLayer, NamedTensor
from autosp.partition.placed import Placed, tensors_of, views_on

SAMPLE_BYTES = 4096
"""Of a tensor's beginning and middle: enough to show a merged adapter, which rounding may hide in most elements."""


@dataclass(slots=True)
class Binding:
    """One tensor object with its data in both places. The object never changes, its `.data` does."""

    named: NamedTensor
    rest: torch.Tensor
    device: torch.Tensor
    rest_address: int

    def check(self) -> None:
        """Raises: ModelChangedError if the tensor's data at rest is not the data that was streamed."""
        if self.named.tensor.data_ptr() != self.rest_address:
            raise ModelChangedError(
                f"the data of {self.named.name} was replaced while a plan was applied; "
                "call remove() on the streamed model, change the weights, then apply the plan again"
            )

    def to_device(self) -> None:
        """Compute sees the device's bytes."""
        self.named.tensor.data = self.device

    def to_rest(self) -> None:
        """Everybody sees the bytes at rest."""
        self.named.tensor.data = self.rest


class StreamedLayer:
    """A layer that moves. `version()` changes when its weights at rest are written to."""

    def __init__(self, bound: BoundLayer) -> None:
        """What its tensors are now is how they rest."""
        self.layer = bound.layer
        self.module = bound.module
        self.pieces = _pieces(bound)
        """What a load copies from where the layer was read to: see [Note: two layouts]."""
        self._placed = bound.placed
        self._tensors = tensors_of(bound.placed)
        self._rest = [named.tensor.data for named in self._tensors]
        self._bindings: list[Binding] = []
        self._versions: list[int] = []
        self.running = 0
        """Calls of the layer that are under way: more than one only if it calls itself."""

    def place(self, base: torch.Tensor) -> None:
        """Fix the layer's device address: `base` holds its packed bytes (uint8)."""
        views = views_on(self._placed, base)
        self._bindings = [
            Binding(named, rest, device, rest.data_ptr())
            for named, rest, device in zip(self._tensors, self._rest, views, strict=True)
        ]

    def leave(self) -> None:
        """Let go of the device address."""
        self._bindings = []

    def bind_device(self) -> None:
        """Compute sees the device's bytes.

        Raises: ModelChangedError if a tensor's data at rest is not the data that was streamed.
        """
        for binding in self._bindings:  # all of them first: one that is refused leaves the others where they are
            binding.check()
        for binding in self._bindings:
            binding.to_device()
        self._versions = [binding.named.tensor._version for binding in self._bindings]

    def bind_rest(self) -> None:
        """Everybody sees the bytes at rest. What the layer wrote to is copied back."""
        for binding, version in zip(self._bindings, self._versions, strict=True):
            if binding.named.tensor._version != version:
                binding.rest.copy_(binding.device)
        for binding in self._bindings:
            binding.to_rest()

    def version(self) -> int:
        """Sum of the tensors' version counters: grows with every in-place write that autograd knows of."""
        return sum(named.tensor._version for named in self._tensors)

    def sample(self) -> int:
        """A checksum of some of each tensor's bytes at rest: it tells of writes that no version counter sees.

        Of a tensor mapped from a file only what was written to is looked at, see [Note: private maps]: a first write to
        a page is always told, and no page of the file is touched.
        """
        checksum = 0
        for place in self._placed:
            checksum = sample(place, checksum)
        return checksum


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
        checksum = zlib.crc32(b"%d %d" % (begin, end), checksum)
        data = memory_of(place.current_bytes())[begin:end]
        for start in (0, len(data) // 2):
            checksum = zlib.crc32(data[start : start + SAMPLE_BYTES], checksum)
    return checksum
