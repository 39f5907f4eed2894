"""The heap of a process that has freed much: no hole of it is used while a peak is measured, and none takes memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from autosp.devices import CpuDevice
from autosp.devices.heap import trim_heap
from autosp.devices.memory import anonymous_bytes

KIB, MIB = 2**10, 2**20
PIECE_BYTES = 512 * KIB


def piece() -> torch.Tensor:
    return torch.ones(PIECE_BYTES, dtype=torch.uint8)


def with_holes() -> tuple[list[torch.Tensor], list[int]]:
    """Pieces of the heap between which as large ones were freed, and where those began."""
    pieces = [piece() for _ in range(64)]
    return pieces[1::2], [freed.data_ptr() for freed in pieces[::2]]


def are_used(holes: list[int], pieces: list[torch.Tensor]) -> bool:
    return any(abs(one.data_ptr() - hole) < PIECE_BYTES for one in pieces for hole in holes)


def test_no_hole_is_used_while_a_peak_is_measured() -> None:
    device = CpuDevice()
    device.start_measuring()
    kept, holes = with_holes()
    device.start_measuring()
    new = [piece() for _ in range(32)]
    assert not are_used(holes, new)
    assert device.peak_bytes() > 15 * MIB  # none of them was there already
    assert len(kept) == 32
    device.close()


def test_holes_are_closed_without_taking_memory() -> None:
    device = CpuDevice()
    device.start_measuring()
    kept, _ = with_holes()
    trim_heap()
    held = anonymous_bytes()
    device.start_measuring()
    assert anonymous_bytes() < held + MIB
    assert len(kept) == 32
    device.close()


@pytest.mark.parametrize("end", [CpuDevice.close, lambda device: None])
def test_holes_are_free_again_with_the_device(end: Callable[[CpuDevice], None]) -> None:
    device = CpuDevice()
    device.start_measuring()
    kept, holes = with_holes()
    device.start_measuring()
    end(device)
    del device
    assert are_used(holes, [piece() for _ in range(64)])
    assert len(kept) == 32
