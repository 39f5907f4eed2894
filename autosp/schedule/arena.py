"""Addresses in memory that a queue of groups shares: the device's arena, and the host's staging ring."""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Sequence
from operator import add


def arena_bytes(group_bytes: Sequence[int], window: int) -> int:
    """The most bytes that any `window` neighbouring groups of one pass have together: no smaller arena holds them."""
    total = peak = sum(group_bytes[:window])
    for index in range(window, len(group_bytes)):
        total += group_bytes[index] - group_bytes[index - window]
        peak = max(peak, total)
    return peak


def place(sizes: Sequence[int], window: int) -> list[int]:
    """An offset for each group, free of the `window - 1` groups before it.

    The arena is never smaller than `arena_bytes`. It is no larger with two groups in the window, or groups of equal
    sizes; where unlike sizes leave gaps, the smaller of two packings is taken: in the order of the groups, and the
    largest first.
    """
    in_order = _in_order(sizes, window)
    most = _end(in_order, sizes)
    if most == arena_bytes(sizes, window):
        return in_order
    largest_first = _largest_first(sizes, window)
    return largest_first if _end(largest_first, sizes) < most else in_order


def _end(offsets: Sequence[int], sizes: Sequence[int]) -> int:
    return max(map(add, offsets, sizes), default=0)


def _in_order(sizes: Sequence[int], window: int) -> list[int]:
    """The bottom of the arena is tried first, then its top, then the gaps between; without one it grows."""
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


def _largest_first(sizes: Sequence[int], window: int) -> list[int]:
    """Each group as low as its neighbours that are placed before it allow: small ones end up beside large ones."""
    offsets = [-1] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        near = range(max(0, index - window + 1), min(len(sizes), index + window))
        lowest = 0
        placed = sorted((offsets[other], offsets[other] + sizes[other]) for other in near if offsets[other] >= 0)
        for begin, end in placed:
            if begin - lowest >= sizes[index]:
                break
            lowest = max(lowest, end)
        offsets[index] = lowest
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
