"""Runs of bytes arrive in a file with their gaps and checksums, whatever the filesystem makes of O_DIRECT."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from autosp.tiers import Readers, packed, packing
from autosp.tiers.packed import PackedFile
from autosp.tiers.packing import Run, write_runs

BLOCK = 4096


@pytest.fixture
def blocks_of_4_kib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of several blocks, without megabytes."""
    monkeypatch.setattr(packing, "WRITE_BYTES", 2 * BLOCK)


def some_bytes(n_bytes: int) -> torch.Tensor:
    return torch.arange(n_bytes).remainder(251).to(torch.uint8) + 1


def laid_out(run: Run) -> bytes:
    """What the file has to hold there."""
    found = torch.zeros(run.n_bytes, dtype=torch.uint8)
    for offset, part in run.parts:
        found[offset : offset + part.numel()] = part
    return found.numpy().tobytes()


RUNS = [
    Run(0, BLOCK, [(0, some_bytes(10))]),
    Run(BLOCK, 5 * BLOCK, [(100, some_bytes(2 * BLOCK)), (2 * BLOCK + 300, some_bytes(2 * BLOCK + 7))]),
    Run(6 * BLOCK, 4 * BLOCK, [(0, some_bytes(4 * BLOCK))]),
    Run(10 * BLOCK, 3 * BLOCK, [(0, some_bytes(50)), (256, some_bytes(9)), (2 * BLOCK + 1, some_bytes(3))]),
]


def refuses_direct(descriptor: int, block: memoryview, offset: int) -> int:
    """A filesystem that takes O_DIRECT as a flag, and no write under it."""
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return os.pwrite(descriptor, block, offset)


def writes_little(descriptor: int, block: memoryview, offset: int) -> int:
    """Less than was asked for, and never a whole block."""
    return os.pwrite(descriptor, block[:1000], offset) if len(block) > 1000 else os.pwrite(descriptor, block, offset)


@pytest.mark.parametrize("write", [os.pwrite, refuses_direct, writes_little])
def test_what_is_written_is_there_with_its_checksum(
    blocks_of_4_kib: None, write: Callable[[int, memoryview, int], int], tmp_path: Path
) -> None:
    path = tmp_path / "packed"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(descriptor, b"\xff" * 13 * BLOCK, 0)  # gaps are written, too
    os.fsync(descriptor)
    checksums = write_runs(descriptor, RUNS, write)
    os.fsync(descriptor)
    os.close(descriptor)
    expected = [laid_out(run) for run in RUNS]
    assert path.read_bytes() == b"".join(expected)
    assert checksums == [zlib.crc32(data) for data in expected]


def test_an_error_ends_both_writers(blocks_of_4_kib: None, tmp_path: Path) -> None:
    asked: list[int] = []

    def fails(descriptor: int, block: memoryview, offset: int) -> int:
        asked.append(offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    descriptor = os.open(tmp_path / "packed", os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_runs(descriptor, RUNS, fails)
    os.close(descriptor)
    assert len(asked) <= packing.WRITERS


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def interrupt(*_: object, **__: object) -> Any:
    """Ctrl-C."""
    raise KeyboardInterrupt


class Impatient(ThreadPoolExecutor):
    """Ctrl-C while the writers are waited for, once one writes, and again while they are joined."""

    writing = threading.Event()
    left: ThreadPoolExecutor

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(*args, **kwargs)
        future.result = lambda timeout=None: interrupt(self.writing.wait(60))  # type: ignore[method-assign]
        return future

    def __exit__(self, *_: object) -> None:
        Impatient.left = self
        interrupt()


def test_writers_that_ctrl_c_leaves_alone_end_soon_and_write_to_no_other_file(
    blocks_of_4_kib: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "ThreadPoolExecutor", Impatient)
    go_on = threading.Event()
    begun: list[int] = []

    def waits(descriptor: int, block: memoryview, offset: int) -> int:
        Impatient.writing.set()
        go_on.wait(60)
        begun.append(offset)
        return os.pwrite(descriptor, block, offset)

    before = open_files()
    descriptor = os.open(tmp_path / "packed", os.O_RDWR | os.O_CREAT)
    with pytest.raises(KeyboardInterrupt):
        write_runs(descriptor, RUNS, waits)
    os.close(descriptor)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    assert other == descriptor
    go_on.set()
    Impatient.left.shutdown()
    os.close(other)
    assert (tmp_path / "other").stat().st_size == 0
    assert begun
    assert set(begun) <= {0, *range(BLOCK, 6 * BLOCK, BLOCK)}, "none but the runs that each of them had begun"
    assert open_files() == before


@pytest.mark.parametrize(("where", "called"), [(os, "posix_fallocate"), (packed, "write_runs")])
def test_ctrl_c_leaves_no_file_open(
    where: object, called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    monkeypatch.setattr(where, called, interrupt)
    with pytest.raises(KeyboardInterrupt):
        PackedFile([], tmp_path, Readers())
    assert open_files() == before
    assert list(tmp_path.iterdir()) == []
