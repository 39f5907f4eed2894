"""The heap of a process that has freed much: no hole of it is used while a peak is measured, and none takes memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count

import pytest
import torch

from autosp.devices import CpuDevice, heap
from autosp.devices.heap import MOST_PLUGS, PATIENCE, PLUG_SIZES, Plugs, Tidy, trim_heap
from autosp.devices.memory import anonymous_bytes
from processes import start

KIB, MIB = 2**10, 2**20
PIECE_BYTES = 512 * KIB


def piece(n_bytes: int = PIECE_BYTES) -> torch.Tensor:
    return torch.ones(n_bytes, dtype=torch.uint8)


def pieces_that_fit(count: int) -> list[torch.Tensor]:
    """With room for their alignment where one of the others was."""
    return [piece(PIECE_BYTES - 4 * KIB) for _ in range(count)]


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
    new = pieces_that_fit(32)
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


IN_ANOTHER_THREAD = """
import threading
import test_heap

def check():
    test_heap.test_no_hole_is_used_while_a_peak_is_measured()
    done.append(True)

done = []
thread = threading.Thread(target=check)
thread.start()
thread.join()
assert done
"""

AFTER_A_FAILED_ALLOCATION = """
import pytest
import torch
import test_heap

with pytest.raises(RuntimeError, match="memory"):
    torch.empty(2**60, dtype=torch.uint8)
test_heap.test_no_hole_is_used_while_a_peak_is_measured()
"""

MAPPED_BEHIND = """
import ctypes
import test_heap

libc = ctypes.CDLL(None)
libc.sbrk.argtypes, libc.sbrk.restype = (ctypes.c_ssize_t,), ctypes.c_size_t
libc.mmap.argtypes = (ctypes.c_size_t, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
libc.mmap.restype = ctypes.c_size_t
behind = libc.sbrk(0) // 4096 * 4096 + 16 * 4096
assert libc.mmap(behind, 4096, 0, 0x100022, -1, 0) == behind  # private, anonymous, and only there
pieces, _ = test_heap.with_holes()
assert pieces[-1].data_ptr() > behind
del pieces
test_heap.test_no_hole_is_used_while_a_peak_is_measured()
"""


@pytest.mark.parametrize("code", [MAPPED_BEHIND, IN_ANOTHER_THREAD, AFTER_A_FAILED_ALLOCATION])
def test_a_heap_that_is_not_one_piece_at_the_end_of_the_data(code: str) -> None:
    start(code).says()


THE_END_STAYS = """
import ctypes
import torch
import test_heap
from autosp.devices.heap import PLUG_SIZES, Plugs, settle_heap, trim_heap

libc = ctypes.CDLL(None)
libc.sbrk.argtypes, libc.sbrk.restype = (ctypes.c_ssize_t,), ctypes.c_size_t
kept = [torch.ones(n_bytes, dtype=torch.uint8) for n_bytes in PLUG_SIZES for _ in range(40) if n_bytes < 2**19]
del kept[::2]
settle_heap()
plugs = Plugs()
trim_heap()
end = libc.sbrk(0)
for _ in range(2):
    plugs.fill()
    assert abs(libc.sbrk(0) - end) <= 2**16, libc.sbrk(0) - end
"""


def test_the_heap_ends_where_it_did() -> None:
    """What was tried and found to be no hole is gone: nothing else was laid behind it."""
    start(THE_END_STAYS).says()


def test_crumbs_are_left_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    malloc, calls = heap._malloc, count()

    def counted(n_bytes: int) -> int | None:
        next(calls)
        return malloc(n_bytes)

    n_bytes = PLUG_SIZES[-1]
    crumbs = [malloc(n_bytes) for _ in range(5 * MOST_PLUGS)]
    kept = [crumbs.pop(at) for at in range(len(crumbs) - 1, 0, -2)]
    for crumb in crumbs:
        heap._free(crumb)
    monkeypatch.setattr(heap, "_malloc", counted)
    plugs = Plugs()
    plugs.fill()
    assert MOST_PLUGS <= next(calls) <= MOST_PLUGS + (PATIENCE + 2) * len(PLUG_SIZES)
    plugs.release()
    for piece in kept:
        heap._free(piece)


def freed_at_once() -> bool:
    """Whether pieces of which a later one stays give their memory back."""
    pieces = [piece(4 * MIB) for _ in range(9)]
    held = anonymous_bytes()
    del pieces[:-1]
    return anonymous_bytes() < held - 30 * MIB


def test_large_pieces_are_freed_at_once_while_a_model_is_trained() -> None:
    device, other = CpuDevice(), CpuDevice()
    device.start_measuring()
    assert not freed_at_once()
    with ExitStack() as training:
        training.enter_context(device.training())
        with other.training():
            other.start_measuring()
            assert freed_at_once()
        assert freed_at_once()  # one of the two goes on
    assert not freed_at_once()
    device.close()
    other.close()


@pytest.mark.parametrize("end", [CpuDevice.close, lambda device: None])
def test_holes_are_free_again_with_the_device(end: Callable[[CpuDevice], None]) -> None:
    device = CpuDevice()
    device.start_measuring()
    kept, holes = with_holes()
    device.start_measuring()
    end(device)
    del device
    assert are_used(holes, pieces_that_fit(64))
    assert len(kept) == 32


def test_a_device_that_is_collected_opens_no_holes_that_another_has_closed() -> None:
    first, second = CpuDevice(), CpuDevice()
    first.start_measuring()
    kept, holes = with_holes()
    second.start_measuring()
    del first
    gc.collect()
    assert not are_used(holes, pieces_that_fit(32))
    assert len(kept) == 32
    second.close()


def test_unused_pages_are_given_back_where_there_is_more_than_there_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    trims = count()

    def counted() -> None:
        next(trims)
        trim_heap()

    monkeypatch.setattr(heap, "trim_heap", counted)
    device = CpuDevice()
    device.start_measuring()
    next(trims)  # one of its own
    tidy, roomy = device.keep_within(24 * MIB), device.keep_within(64 * MIB)
    kept, _ = with_holes()
    held = anonymous_bytes()
    roomy()
    assert anonymous_bytes() > held - MIB
    tidy()
    assert anonymous_bytes() < held - 15 * MIB
    more = [piece() for _ in range(40)]
    for _ in range(3):
        tidy()  # what is in use stays, and is not asked for again
    more += [piece() for _ in range(40)]
    tidy()
    device.close()
    assert len(kept) + len(more) == 112
    assert next(trims) == 5  # this call, of five


def test_what_counts_is_what_a_plan_takes() -> None:
    taken = [0]
    tidy = Tidy(MIB, lambda: anonymous_bytes() - taken[0])
    kept, _ = with_holes()
    held = anonymous_bytes()
    tidy()
    assert anonymous_bytes() > held - MIB
    taken[0] = 2 * MIB
    tidy()
    assert anonymous_bytes() < held - 15 * MIB
    assert len(kept) == 32


FORKED = """
import os
import test_heap
import torch
from autosp.devices import CpuDevice

torch.set_num_threads(1)  # a fork has no other threads, and would wait for them
device = CpuDevice()
device.start_measuring()
child = os.fork()
if child == 0:
    kept = test_heap.with_holes()
    device.start_measuring()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
device.close()
"""


def test_a_forked_process_has_its_own() -> None:
    start(FORKED).says()


WHAT_KERNELS_TAKE = """
import torch
from autosp.devices import CpuDevice

torch.set_num_threads(2)
ones, product, device = torch.ones(512, 512), torch.ones(512, 512), CpuDevice()

def taken():
    device.start_measuring()
    torch.mm(ones, ones, out=product)
    return device.peak_bytes()

of_a_new_process = taken()
for _ in range(3):
    assert abs(taken() - of_a_new_process) < 2**17, of_a_new_process
"""


def test_what_kernels_keep_for_each_thread_is_seen_every_time() -> None:
    """A plan's own process takes it anew, and so must each trial of it."""
    start(WHAT_KERNELS_TAKE).says()
