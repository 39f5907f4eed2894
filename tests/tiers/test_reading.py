"""Several readers, blocks of any size, and the page cache: the same bytes, and the same errors, as one reader's."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosp.errors import ReadError
from autosp.spec import Reading
from autosp.tiers import Readers, reader
from autosp.tiers.direct import bypass_cache
from autosp.tiers.page_cache import is_cached
from autosp.tiers.reader import WeightFile
from autosp.tiers.readers import blocks_of
from builders import quick

BLOCK = 4096
SIZE = 40 * BLOCK + 1000
PATIENCE_S = 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of random bytes, with an end that is no whole block."""
    made = tmp_path / "weights"
    made.write_bytes(os.urandom(SIZE))
    return made


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def content(file: WeightFile) -> bytes:
    """All of it, as a layer's transfer would get it."""
    memory = memoryview(mmap.mmap(-1, 41 * BLOCK))
    file.read_into(memory, 0, "blocks.3", SIZE)
    return bytes(memory[:SIZE])


@quick
@given(st.integers(1, 5), st.integers(1, 700), st.integers(1, 3000 * BLOCK))
def test_blocks_are_all_bytes_once(readers: int, block: int, n_bytes: int) -> None:
    ordered = blocks_of(n_bytes, Reading(readers=readers, block_bytes=block * BLOCK))
    assert [begin for begin, _ in ordered] == [0, *(end for _, end in ordered[:-1])]
    assert ordered[-1][1] == n_bytes
    assert all(begin % BLOCK == 0 and end - begin <= (block + block // 8) * BLOCK for begin, end in ordered)


def test_no_reader_is_left_without_work_by_whole_blocks() -> None:
    found = blocks_of(20 * 2**20, Reading(readers=2, block_bytes=8 * 2**20))
    assert [end - begin for begin, end in found] == [5 * 2**20] * 4


@pytest.mark.parametrize("readers", [1, 2])
def test_a_little_more_than_a_block_is_one_read(readers: int) -> None:
    asked = Reading(readers=readers, block_bytes=32 * 2**20)
    assert len(blocks_of(readers * 32 * 2**20 + BLOCK, asked)) == readers
    assert len(blocks_of(readers * 37 * 2**20, asked)) == 2 * readers


@pytest.mark.parametrize("blocks", [1, 3, 64])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_the_bytes_are_the_file_s(readers: int, blocks: int, path: Path) -> None:
    several = Readers(Reading(readers=readers, block_bytes=blocks * BLOCK))
    file = WeightFile(path, several)
    for _ in range(20):
        assert content(file) == path.read_bytes()
    file.close()
    several.close()


def test_readers_read_at_the_same_time_and_one_more_does_not(path: Path) -> None:
    together = threading.Barrier(3)
    seen: set[str] = set()

    def meet(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        seen.add(threading.current_thread().name)
        if offset < 3 * BLOCK:
            together.wait(PATIENCE_S)
        return os.preadv(descriptor, buffers, offset)

    several = Readers(Reading(readers=3, block_bytes=BLOCK), read=meet)
    file = WeightFile(path, several)
    assert content(file) == path.read_bytes()
    assert len(seen) == 3
    file.close()
    several.close()


def test_other_readings_for_the_same_file(path: Path) -> None:
    several = Readers()
    file = WeightFile(path, several)
    before = threading.active_count()
    for readers in (1, 3, 2):
        several.use(Reading(readers=readers, block_bytes=BLOCK))
        assert content(file) == path.read_bytes()
        assert threading.active_count() <= before + 2
    several.close()
    assert threading.active_count() == before
    file.close()


def test_an_error_is_the_layer_s_and_ends_the_read_before_it_is_raised(path: Path) -> None:
    reading: list[int] = []
    broken = True

    def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        reading.append(offset)
        try:
            if broken and offset == 5 * BLOCK:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            return os.preadv(descriptor, buffers, offset)
        finally:
            reading.remove(offset)

    several = Readers(Reading(readers=3, block_bytes=BLOCK), read=fail)
    file = WeightFile(path, several)
    for _ in range(10):
        with pytest.raises(ReadError, match=rf"weights: reading layer blocks\.3 failed at byte {5 * BLOCK}: No such"):
            content(file)
        assert reading == []
    broken = False
    assert content(file) == path.read_bytes()
    file.close()
    several.close()


def test_a_file_cut_short_is_told_whichever_block_is_read_first(path: Path) -> None:
    several = Readers(Reading(readers=3, block_bytes=BLOCK))
    file = WeightFile(path, several)
    os.truncate(path, 5 * BLOCK + 77)
    for _ in range(10):
        with pytest.raises(ReadError, match=rf"ends at byte {5 * BLOCK + 77}, before or inside layer blocks\.3 "):
            content(file)
    file.close()
    several.close()


def test_o_direct_that_is_refused_to_all_readers_at_once(path: Path) -> None:
    together = threading.Barrier(3)
    refused: list[int] = []

    def refuse(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        direct = is_direct(descriptor)
        if offset < 3 * BLOCK and offset not in refused:
            refused.append(offset)
            together.wait(PATIENCE_S)
        if direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.preadv(descriptor, buffers, offset)

    several = Readers(Reading(readers=3, block_bytes=BLOCK), read=refuse)
    file = WeightFile(path, several)
    for _ in range(2):
        assert content(file) == path.read_bytes()
    file.close()
    several.close()


def test_o_direct_that_is_refused_to_one_reader_while_another_one_turns_it_off(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.preadv(descriptor, buffers, offset)

    def turn_off(descriptor: int, bypass: bool) -> None:
        monkeypatch.undo()
        assert content(file) == path.read_bytes()
        bypass_cache(descriptor, bypass)

    monkeypatch.setattr(reader, "bypass_cache", turn_off)
    file = WeightFile(path, Readers(read=refuse))
    assert content(file) == path.read_bytes()
    file.close()


def evict(path: Path) -> None:
    """From the page cache, if the filesystem has its files anywhere else."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.mark.parametrize("from_cache", [True, False])
def test_what_the_page_cache_has_whole_is_copied_from_it_if_the_plan_says_so(from_cache: bool, path: Path) -> None:
    direct: dict[int, bool] = {}

    def look(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        direct[offset] = is_direct(descriptor)
        return os.preadv(descriptor, buffers, offset)

    readers = Readers(Reading(block_bytes=8 * BLOCK, from_cache=from_cache), read=look)
    file = WeightFile(path, readers)
    expected = path.read_bytes()
    evict(path)
    with path.open("rb") as cached:
        if is_cached(cached.fileno(), 0, SIZE) or not is_direct(file.descriptor):
            pytest.skip("this filesystem has its files in the page cache only")
        assert content(file) == expected
        assert set(direct.values()) == {True}
        os.preadv(cached.fileno(), [bytearray(SIZE)], 0)
        if not is_cached(cached.fileno(), 0, SIZE):
            pytest.skip("this kernel does not tell what the page cache has")
        direct.clear()
        assert content(file) == expected
        assert set(direct.values()) == {not from_cache}
        os.posix_fadvise(cached.fileno(), 10 * BLOCK, BLOCK, os.POSIX_FADV_DONTNEED)
        direct.clear()
        assert content(file) == expected
        block = next(offset for offset in sorted(direct, reverse=True) if offset <= 10 * BLOCK)
        assert [offset for offset in direct if direct[offset]] == ([block] if from_cache else list(direct))
    file.close()


def test_a_file_that_is_written_is_told_though_it_comes_from_the_page_cache(path: Path) -> None:
    file = WeightFile(path, Readers(Reading(from_cache=True)))
    path.read_bytes()
    content(file)
    file.check("blocks.3")
    with path.open("r+b") as other:
        other.write(b"other")
    content(file)
    with pytest.raises(ReadError, match=r"weights was written .* layer blocks\.3 cannot be trusted"):
        file.check("blocks.3")
    file.close()


@pytest.mark.parametrize("another", [True, False])
def test_a_file_that_is_moved_away_goes_on_being_read(another: bool, path: Path) -> None:
    file, expected = WeightFile(path, Readers()), path.read_bytes()
    old = path.rename(path.with_name("old"))
    os.utime(old, ns=(0, file._opened.st_mtime_ns))  # its time of change is another one, however soon this comes
    if another:
        path.write_bytes(b"another")
    file.check("blocks.3")
    assert content(file) == expected
    with old.open("r+b") as other:
        other.write(b"other")
    os.utime(old, (0, 0))
    with pytest.raises(ReadError, match="weights was written"):
        file.check("blocks.3")
    file.close()


def test_bytes_that_nobody_can_have_are_not_cached(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    path.read_bytes()
    assert not is_cached(descriptor, SIZE + 2 * 65536, BLOCK)
    os.close(descriptor)
    assert not is_cached(descriptor, 0, BLOCK)
