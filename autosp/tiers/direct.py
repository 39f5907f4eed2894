"""Reads and writes past the page cache: as long as the filesystem takes them."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable

DIRECT = getattr(os, "O_DIRECT", 0)

Write = Callable[[int, memoryview, int], int]
"""`os.pwrite`, or what stands for a disk or a filesystem that misbehaves: (descriptor, bytes, offset) -> bytes written.
"""


def bypasses_cache(descriptor: int) -> bool:
    """Whether reads and writes go past the page cache now. Another thread may change it at any moment."""
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT)


def bypass_cache(descriptor: int, bypass: bool) -> None:
    """Have them take that way, or not, unless the filesystem refuses it: `bypasses_cache` tells. Raises: OSError."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | DIRECT if bypass else flags & ~DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def write_all(descriptor: int, write: Write, block: memoryview, offset: int) -> None:
    """Short writes are continued: through the page cache, if O_DIRECT cannot continue there, or was refused at all.

    Some filesystems take O_DIRECT at opening and refuse it at writing. Raises: OSError.
    """
    done = 0
    while done < len(block):
        direct = bypasses_cache(descriptor)
        try:
            done += write(descriptor, block[done:], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            bypass_cache(descriptor, False)
