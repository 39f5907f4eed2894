"""How the disk is read best: few readers, and large blocks, that give what it has."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from autosp.devices.memory import anonymous, memory_of
from autosp.runtime.bench import Bench
from autosp.spec import Reading
from autosp.tiers import DiskStore
from autosp.tiers.readers import blocks_of

READERS = (1, 2, 4)
BLOCK_BYTES = (32 * 2**20, 8 * 2**20, 2 * 2**20)

MOST_BYTES = 64 * 2**20
"""Of one read: enough blocks for all readers, and little memory."""

NEAR = 0.97
"""Of the best rate: more readers take time from compute, and what is nearer than this may be chance."""

PATIENCE_S = 0.5
"""For rounds over all pairs. A slow disk is asked for some of them only, those with one reader first."""

MOST_ROUNDS = 8
"""Of short reads these are enough."""


class FileReads(NamedTuple):
    """What a link from disk is measured, and planned, with."""

    reading: Reading
    cached_bytes_per_s: float | None
    """What the page cache gives; None where a plan cannot ask what is in it."""


def measure_reading(bench: Bench, progress: Callable[[str], None]) -> FileReads | None:
    """Find it out on the bench's own files, which its readers read so from now on. None if it has none.

    Nothing else may run meanwhile. Raises: ReadError.
    """
    store, partition = bench.store, bench.partition
    if not isinstance(store, DiskStore):
        return None
    largest = max(layer.n_bytes for layer in partition.layers)
    n_bytes = min(MOST_BYTES, largest)
    target = anonymous(n_bytes)
    target.zero_()
    memory = memory_of(target)
    offset = 0

    def read_s(reading: Reading) -> float:
        nonlocal offset
        bench.readers.use(reading)
        window = store.window(offset, n_bytes)
        offset = offset + n_bytes if offset + 2 * n_bytes <= partition.streamable_bytes else 0
        begin = time.perf_counter()
        window.read_into(memory)
        return time.perf_counter() - begin

    progress("readers and blocks")
    reading = choose_reading(n_bytes, read_s)
    bench.readers.use(reading)
    return FileReads(reading, store.window(0, n_bytes).cached_bytes_per_s(memory))


def choose_reading(
    n_bytes: int, read_s: Callable[[Reading], float], clock: Callable[[], float] = time.perf_counter
) -> Reading:
    """The fewest readers, and of these the largest block, whose best time for so many bytes is near the best median."""
    times: dict[Reading, list[float]] = {reading: [] for reading in _distinct(n_bytes)}
    if len(times) == 1:
        return next(iter(times))
    read_s(next(iter(times)))  # the first read of a file finds out where its blocks are
    begin = clock()
    for _ in range(MOST_ROUNDS):
        for reading, taken in times.items():
            if clock() - begin < PATIENCE_S:
                taken.append(read_s(reading))
    least_s = min(median(taken) for taken in times.values() if taken)
    return next(reading for reading, taken in times.items() if min(taken) * NEAR <= least_s)


def _distinct(n_bytes: int) -> list[Reading]:
    """Fewest readers first, then largest blocks; without those that would part these bytes as an earlier one does."""
    found: dict[tuple[int, int], Reading] = {}
    for readers in READERS:
        for block_bytes in BLOCK_BYTES:
            reading = Reading(readers=readers, block_bytes=block_bytes)
            blocks = blocks_of(n_bytes, reading)
            found.setdefault((min(readers, len(blocks)), len(blocks)), reading)
    return list(found.values())
