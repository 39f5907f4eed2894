"""Extents packed one after another, and their tensors wherever the packed bytes are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autosp.partition.tensors import EXTENT_ALIGNMENT, LAYER_ALIGNMENT, Extent, NamedTensor, align


@dataclass(frozen=True)
class Placed:
    """An extent's place in the packed bytes it travels in."""

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

    def is_in(self, base: torch.Tensor) -> bool:
        """Whether its tensors are views of that memory now."""
        return self.extent.tensors[0].tensor.data.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


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
    """The tensors of packed extents, in packed order."""
    return [named for place in placed for named in place.extent.tensors]


def views_on(placed: Sequence[Placed], base: torch.Tensor) -> list[torch.Tensor]:
    """Each tensor of `tensors_of(placed)` as a view of the packed bytes in `base`."""
    with torch.inference_mode(False):
        return [named.on(base, place.offset + named.offset) for place in placed for named in place.extent.tensors]


def copy_to(placed: Sequence[Placed], base: torch.Tensor) -> None:
    """Write the extents' bytes, as they are now, to their places in `base` (uint8)."""
    with torch.inference_mode(False), torch.no_grad():
        for place in placed:
            base[place.offset : place.offset + place.extent.n_bytes].copy_(place.current_bytes())


def settle(placed: Sequence[Placed], base: torch.Tensor) -> None:
    """Point the tensors of packed extents at the packed bytes in `base`, and let go of the memory they were in."""
    for named, view in zip(tensors_of(placed), views_on(placed, base), strict=True):
        named.tensor.data = view
    for place in placed:
        place.extent.release()


def move_out(placed: Sequence[Placed]) -> None:
    """Copy every extent's bytes, as they are now, to ordinary memory of its own; what was shared stays shared."""
    for place in placed:
        with torch.inference_mode(False):
            memory = torch.empty(place.extent.n_bytes, dtype=torch.uint8)
        alone = (Placed(place.extent, 0),)
        copy_to(alone, memory)
        settle(alone, memory)
