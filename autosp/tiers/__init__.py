"""Where streamed weights rest: pinned host memory, the files they are mapped from, a packed file; or some here, some
there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

import torch

from autosp.devices import Device, Region
from autosp.partition import BoundLayer, at_rest
from autosp.spec import Tier
from autosp.tiers.disk import DiskStore, Originals
from autosp.tiers.host import HostStore
from autosp.tiers.inplace import forget_pages, give_back, read_chunks, read_extent
from autosp.tiers.readers import Readers
from autosp.tiers.tiered import TieredStore

__all__ = [
    "DiskStore",
    "HostStore",
    "Originals",
    "Readers",
    "Store",
    "TieredStore",
    "forget_pages",
    "give_back",
    "open_store",
    "read_chunks",
    "read_extent",
]


class Store(Protocol):
    """Layers on the slow tier. Neighbours in `layers` are neighbours in the store, but for what is read in place."""

    def regions(self, layers: Sequence[int]) -> tuple[Region, ...]:
        """What to fetch, in order, to have these layers one after another; adjacent layers are one region.

        From disk they come as their `disk_layout` says, from the host as their `layout`.
        """

    def window(self, offset: int, n_bytes: int) -> Region:
        """Any run of the store's bytes, for measuring the link. `offset` is rounded down to 4096 bytes."""

    def rest(self, layer: int) -> torch.Tensor:
        """Where the bytes that are in no file rest, as a uint8 CPU tensor: readable, writable, seen by later loads."""

    def check(self) -> None:
        """Before a pass that may read weights where they rest. Raises: ReadError if they are not what they were."""

    def close(self) -> None:
        """Bring moved layers to the map that has their values, or to memory of their own; then free the store's.

        Views from `rest` end with it. Where Ctrl-C came in the middle, another call goes on; else twice is harmless.
        """


def open_store(
    device: Device,
    layers: Sequence[BoundLayer],
    cache_dir: Path,
    originals: Originals,
    on_disk: Collection[int] = (),
    readers: Readers | None = None,
) -> Store:
    """Put the layers' bytes on the device's slow tier, in this order, unless they can be read where they are; those
    `on_disk` on disk in any case.

    To host memory they are moved whatever `originals` says: a second copy of the weights is what RAM has no room for.
    What goes to disk goes first, so that its memory is there for the others. `readers` read it; default: one.

    Raises: DiskFullError or HostMemoryError if there is no room for them, ReadError if a file that they are mapped from
    was replaced; the model is as before then.
    """
    if device.info.slow_tier is Tier.DISK:
        return DiskStore(layers, cache_dir, originals, readers)
    if not on_disk:
        return HostStore(layers, device)
    on_disk = {
        bound.layer.index
        for resting in at_rest(layers)
        if any(bound.layer.index in on_disk for bound in resting.layers)
        for bound in resting.layers
    }
    disk = DiskStore([bound for bound in layers if bound.layer.index in on_disk], cache_dir, originals, readers)
    try:
        host = HostStore([bound for bound in layers if bound.layer.index not in on_disk], device)
    except BaseException:
        disk.close()
        raise
    return TieredStore(host, disk, on_disk)
