"""Threads that read the blocks of one transfer, as many and as large as a plan says."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

from autosp.devices.worker import Worker
from autosp.partition.tensors import LAYER_ALIGNMENT, align
from autosp.spec import Reading

LEAST_BYTES = 2**20
"""What is not worth parting for the sake of another reader."""

Read = Callable[[int, list[memoryview], int], int]
"""`os.preadv`, or what stands for a disk that misbehaves: (descriptor, buffers, offset) -> bytes read."""

Open = Callable[[Path, int], int]
"""`os.open`, or what stands for a filesystem that refuses: (path, flags) -> descriptor."""

ReadBlock = Callable[[int, int], None]
"""Reads the bytes from one to the other."""


class Readers:
    """The readers of one store. The thread that asks is the first of them, so one reader needs no thread.

    For one asking thread at a time: whoever reads a store's layers.
    """

    def __init__(self, reading: Reading | None = None, *, open: Open = os.open, read: Read = os.preadv) -> None:
        """`open` opens each file once; `read` reads one block, or as much of it as comes."""
        self.open = open
        self.read = read
        self._others: list[Worker] = []
        self.use(reading or Reading())

    def use(self, reading: Reading) -> None:
        """From the next transfer on. Nothing may be under way."""
        self.reading = reading
        missing = range(len(self._others) + 2, reading.readers + 1)
        self._others += [Worker(f"autosp-reader-{number}") for number in missing]

    def each_block(self, n_bytes: int, read_block: ReadBlock) -> None:
        """Call it for every block of a run. Returns, or raises what one of them raised, when none is under way.

        After an error no other block is begun.
        """
        left = deque(blocks_of(n_bytes, self.reading))
        others = self._others[: min(self.reading.readers, len(left)) - 1]
        asked = [other.start(partial(_read_what_is_left, left, read_block)) for other in others]
        try:
            _read_what_is_left(left, read_block)
        finally:
            for one in asked:
                one.settle()
        for one in asked:
            one.wait()

    def close(self) -> None:
        """End the threads."""
        for other in self._others:
            other.close()
        self._others = []


def blocks_of(n_bytes: int, reading: Reading) -> list[tuple[int, int]]:
    """Where the blocks of a run begin and end: of one size, so that all readers are busy until the end.

    Up to an eighth larger than asked for where one read less is enough then: two reads of 16 MiB were 3 % slower than
    one of 32 MiB and a page.
    """
    readers, most = reading.readers, reading.block_bytes
    excess = most // 8 // LAYER_ALIGNMENT * LAYER_ALIGNMENT
    rounds = max(1, -(-(n_bytes - excess * readers) // (most * readers)))
    even = -(-n_bytes // (rounds * readers))
    size = align(max(even, min(LEAST_BYTES, most)), LAYER_ALIGNMENT)
    return [(begin, min(begin + size, n_bytes)) for begin in range(0, n_bytes, size)]


def _read_what_is_left(left: deque[tuple[int, int]], read_block: ReadBlock) -> None:
    while True:
        try:
            begin, end = left.popleft()
        except IndexError:
            return
        try:
            read_block(begin, end)
        except BaseException:
            left.clear()
            raise
