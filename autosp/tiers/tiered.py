"""Two stores as one: some layers rest in host memory, the others on disk behind it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from autosp.devices import Region

if TYPE_CHECKING:
    from autosp.tiers import Store


class TieredStore:
    """Asks the one or the other. It owns neither unless it is closed."""

    def __init__(self, host: Store, disk: Store, on_disk: Collection[int]) -> None:
        self._host = host
        self._disk = disk
        self._on_disk = frozenset(on_disk)

    def regions(self, layers: Sequence[int]) -> tuple[Region, ...]:
        """Adjacent layers of one store are one region."""
        runs = groupby(layers, self._store_of)
        return tuple(region for store, run in runs for region in store.regions(list(run)))

    def window(self, offset: int, n_bytes: int) -> Region:
        """A run of what rests on the host: the link to the device begins there."""
        return self._host.window(offset, n_bytes)

    def rest(self, layer: int) -> torch.Tensor:
        """Where it rests."""
        return self._store_of(layer).rest(layer)

    def check(self) -> None:
        """Both."""
        self._host.check()
        self._disk.check()

    def close(self) -> None:
        """Both."""
        self._host.close()
        self._disk.close()

    def _store_of(self, layer: int) -> Store:
        return self._disk if layer in self._on_disk else self._host
