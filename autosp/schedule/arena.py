"""Addresses in memory that a queue of groups shares: the device's arena, and the host's staging ring."""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Sequence


def arena_bytes(group_bytes: Sequence[int], window: int) -> int:
    """The most bytes that any `window` neighbouring groups of one pass have together: no smaller arena holds them."""
    total = peak = sum(group_bytes[:window])
    for index in range(window, len(group_bytes)):
        total += group_bytes[index] - group_bytes[index - window]
        peak = max(peak, total)
    return peak


def place(sizes: Sequence[int], window: int) -> list[int]:
    """An offset for each group, free of the `window - 1` groups before it.

    The bottom of the arena is tried first, then its top, then the gaps between. So with two groups in the window the
    arena is never larger than its largest two neighbours, and with equal sizes never larger than `window` of them;
    otherwise it grows where no gap is wide enough.
    """
    capacity = arena_bytes(sizes, window)
    offsets: list[int] = []
    live: list[tuple[int, int]] = []  # (begin, end) of the groups before this one, sorted
    for index, size in enumerate(sizes):
        if index >= window:
            gone = index - window
            live.remove((offsets[gone], offsets[gone] + sizes[gone]))
        offset, capacity = _free_offset(live, size, capacity)
        offsets.append(offset)
        insort(live, (offset, offset + size))
    return offsets


def _free_offset(live: Sequence[tuple[int, int]], size: int, capacity: int) -> tuple[int, int]:
    """Where `size` bytes fit beside the sorted live ranges, and the capacity, which grows if they fit nowhere."""
    if not live or live[0][0] >= size:
        return 0, capacity
    if capacity - live[-1][1] >= size:
        return capacity - size, capacity
    for (_, low), (high, _) in itertools.pairwise(live):
        if high - low >= size:
            return low, capacity
    return live[-1][1], live[-1][1] + size
