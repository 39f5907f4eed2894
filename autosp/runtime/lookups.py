"""Tables that stay on the slow tier: a pass looks up a few of their rows there."""

from __future__ import annotations

from autosp.devices import Device
from autosp.devices.memory import expect_ordinary_reads, expect_scattered_reads
from autosp.partition import BoundLayer
from autosp.partition.placed import settle, tensors_of
from autosp.tiers import Store


class Lookups:
    """The tables of one model, from the moment they are read at rest until `forget`.

    Rows of a mapped file are read page by page meanwhile. With the kernel's read-ahead 128 rows of a table of 0.26 GB
    were seen to bring all of it, through the page cache and past the reader.
    """

    def __init__(self, tables: BoundLayer, device: Device, store: Store) -> None:
        """Bind the tensors to the bytes at rest, unless those are what they have already."""
        if tables.layout.packed:
            settle(tables.layout.packed, device.host_view(store.rest(tables.layer.index)))
        data = [named.tensor.data for named in tensors_of(tables.placed)]
        self._runs = [(table.data_ptr(), table.numel() * table.element_size()) for table in data if table.is_cpu]
        for address, n_bytes in self._runs:
            expect_scattered_reads(address, n_bytes)

    def forget(self) -> None:
        """While the tensors still have the bytes that they were bound to."""
        for address, n_bytes in self._runs:
            expect_ordinary_reads(address, n_bytes)
        self._runs = []
