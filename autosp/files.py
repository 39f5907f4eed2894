"""Files that are never half written, locks that end with their process, and disks that are full."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from autosp.errors import DiskFullError, TierError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk is full, a quota is used up, or the filesystem has no files that large."""


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file: whatever happens, it is either the old one or the whole new one.

    Raises: OSError if it cannot be written; nothing is left behind then.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One holder at a time, of all processes and threads of this machine that name the file.

    It is free after the block, whatever processes were forked inside. The kernel frees it if the holder dies: once
    those that were forked inside and run no other program have ended, too. The empty file stays: to remove it would
    let two hold a lock of one name. `waiting` is called once if another has it.

    Raises: OSError if the file cannot be made.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open_lock(path)
    holder = os.getpid()
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if os.getpid() == holder:  # a forked process shares the lock, and may leave the block, too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS) or not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # somebody else's: to lock it takes no more


def free_bytes(folder: Path) -> int:
    """Free on the disk where a folder is, or will be once it is made."""
    folder = folder.absolute()
    while not os.access(folder, os.F_OK):
        folder = folder.parent
    return shutil.disk_usage(folder).free


def cache_error(error: OSError, doing: str, n_bytes: int, folder: Path) -> TierError:
    """What to raise where a file of `n_bytes` in `folder`, of the cache, was not made: `doing` needs it."""
    if error.errno in NO_ROOM:
        return DiskFullError(
            error.errno,
            f"{doing} takes {n_bytes / 1e9:.3g} GB ({n_bytes} bytes) in {folder}, which has "
            f"{free_bytes(folder) / 1e9:.3g} GB free; set AUTOSP_CACHE_DIR to a larger disk",
        )
    return TierError(error.errno, f"{doing} in {folder} failed: {error.strerror}; set AUTOSP_CACHE_DIR to another disk")
