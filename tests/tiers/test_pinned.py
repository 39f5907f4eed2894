"""Host memory that is pinned once and taken many times."""

from __future__ import annotations

import pytest

from autosp.devices import VirtualDevice
from autosp.errors import HostMemoryError
from autosp.tiers.pinned import KEPT_PASSES, PinnedPool, size_class


def test_a_run_is_taken_again_once_it_is_free() -> None:
    pool = PinnedPool(VirtualDevice(bytes_per_s=1.0))
    first, second = pool.take(10_000), pool.take(10_000)
    assert pool.runs_taken == 2
    address = second.data.data_ptr()
    assert first.data.data_ptr() != address
    del second
    third = pool.take(9_000)  # of the same size class
    assert third.data.data_ptr() == address
    assert (third.data.numel(), pool.runs_taken) == (9_000, 2)


def test_what_nobody_takes_for_long_is_let_go() -> None:
    pool = PinnedPool(VirtualDevice(bytes_per_s=1.0))
    pool.take(10_000)
    for _ in range(KEPT_PASSES):
        pool.begin_pass()
    held = pool.take(10_000)
    assert pool.runs_taken == 1
    pool.take(20_000)
    for _ in range(KEPT_PASSES + 1):
        pool.begin_pass()
    pool.take(20_000)
    del held
    pool.take(10_000)
    assert pool.runs_taken == 3  # what was in use is not let go


def test_after_its_end_nothing_is_kept() -> None:
    pool = PinnedPool(VirtualDevice(bytes_per_s=1.0))
    lease = pool.take(10_000)
    lease.data.fill_(7)
    pool.close()
    assert int(lease.data.sum()) == 70_000
    del lease
    pool.take(10_000)
    assert pool.runs_taken == 2


@pytest.mark.parametrize("n_bytes", [1, 4096, 4097, 65_537, 2**20 - 1, 2**20, 2**20 + 1, 10**9])
def test_size_classes_hold_what_they_are_asked_for(n_bytes: int) -> None:
    size = size_class(n_bytes)
    assert size % 4096 == 0
    assert n_bytes <= size <= max(n_bytes * 9 / 8, n_bytes + 4096)
    assert size_class(size) == size


def test_host_memory_that_is_not_there_is_not_taken() -> None:
    with pytest.raises(HostMemoryError, match="offload fewer layers"):
        PinnedPool(VirtualDevice(bytes_per_s=1.0)).take(2**50)
