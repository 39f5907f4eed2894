"""The file of the optimizer's state: two ways to its bytes, no name, and what a disk may do."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch

from autosp.devices.memory import anonymous, memory_of
from autosp.errors import DiskFullError, ReadError, TierError
from autosp.tiers.readers import Readers
from autosp.tiers.state_file import StateFile
from processes import run

PAGE = 4096


def write_all(file: StateFile, offset: int, n_bytes: int, value: int) -> None:
    memory = anonymous(n_bytes)
    memory.fill_(value)
    file.write(memory_of(memory), offset)


def refusing(descriptor: int, source: memoryview, offset: int) -> int:
    """As a filesystem that takes O_DIRECT at opening only; and never more than a page at a time."""
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return os.pwrite(descriptor, source[:PAGE], offset)


@pytest.mark.parametrize("write", [os.pwrite, refusing])
def test_both_ways_show_the_same_bytes(write: object, tmp_path: Path) -> None:
    file = StateFile(4 * PAGE, tmp_path, write=write)  # type: ignore[arg-type]
    view = file.view(PAGE, 2 * PAGE)
    memory = anonymous(2 * PAGE)
    for round_number in range(3):
        assert view.sum() == 0 if round_number == 0 else view.unique().tolist() == [9, 10 * round_number]
        write_all(file, PAGE, 2 * PAGE, 10 * (round_number + 1))
        assert view.unique().tolist() == [10 * (round_number + 1)]
        view[5] = 9  # through the map
        file.read(memory_of(memory), PAGE, "a layer")
        assert memory.unique().tolist() == [9, 10 * (round_number + 1)]
    assert file.offset_of(view) == PAGE
    assert file.offset_of(memory) is None
    file.close()
    assert view.unique().tolist() == [9, 30]


def test_what_was_looked_at_can_be_dropped_from_memory(tmp_path: Path) -> None:
    file = StateFile(64 * PAGE, tmp_path)
    write_all(file, 0, 64 * PAGE, 1)
    view = file.view(0, 64 * PAGE)
    view.add_(1)
    if file.cached_bytes() != 64 * PAGE:
        pytest.skip("the kernel does not tell")
    file.drop()
    if file.cached_bytes():
        pytest.skip("the filesystem is in RAM")
    assert view.unique().tolist() == [2]
    write_all(file, 0, 64 * PAGE, 3)
    assert file.cached_bytes() == 0
    memory = anonymous(64 * PAGE)
    file.read(memory_of(memory), 0, "a layer")
    assert file.cached_bytes() == 0
    assert memory.unique().tolist() == [3]
    file.close()


def test_a_tensor_in_it_is_saved_alone(tmp_path: Path) -> None:
    file = StateFile(64 * PAGE, tmp_path / "cache")
    view = file.view(2 * PAGE, PAGE)
    assert view.untyped_storage().nbytes() == PAGE
    torch.save({"state": view}, tmp_path / "saved.pt")
    assert (tmp_path / "saved.pt").stat().st_size < 2 * PAGE
    assert not list((tmp_path / "cache").iterdir())
    file.close()


def test_a_full_disk_is_known_at_once(tmp_path: Path) -> None:
    said = run(
        """
        import resource, sys
        from pathlib import Path
        from autosp.errors import DiskFullError
        from autosp.tiers.state_file import StateFile
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        StateFile(2**20, Path(sys.argv[1])).close()
        try:
            StateFile(2**20 + 4096, Path(sys.argv[1]))
        except DiskFullError as error:
            print(error, list(Path(sys.argv[1]).iterdir()))
        """,
        tmp_path,
    )
    assert "the optimizer's state takes 0.00105 GB" in said
    assert said.strip().endswith("AUTOSP_CACHE_DIR to a larger disk []")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TierError, match="the optimizer's state in .* failed: .*AUTOSP_CACHE_DIR"):
        StateFile(PAGE, tmp_path / "file" / "folder")


def test_errors_of_the_disk_have_types(tmp_path: Path) -> None:
    def full(descriptor: int, source: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broken(descriptor: int, targets: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = StateFile(PAGE, tmp_path, Readers(read=broken), write=full)
    memory = anonymous(PAGE)
    with pytest.raises(DiskFullError, match="writing the optimizer's state takes"):
        write_all(file, 0, PAGE, 1)
    with pytest.raises(ReadError, match=r"reading layer blocks\.3 failed"):
        file.read(memory_of(memory), 0, "blocks.3")
    file.close()
