"""Addresses in memory that a queue of groups shares: the device's arena, and the host's staging ring."""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Sequence
from functools import lru_cache
from operator import add

FAR = 8
"""Groups in a window that is loaded far enough ahead as it is: to spread them takes longer the more there are."""

PLACED = 512
"""How many are remembered: candidates that differ in what they compute again have their groups in the same places."""


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
    least = arena_bytes(sizes, window)
    in_order = _in_order(sizes, window, least)
    most = _end(in_order, sizes)
    if most == least:
        return in_order
    largest_first = _largest_first(sizes, window)
    return largest_first if _end(largest_first, sizes) < most else in_order


def place_spread(sizes: Sequence[int], window: int) -> Sequence[int]:
    """As `place`, in the same arena, each group free of as many more of those before it as there is room for.

    The arena is as large as the largest neighbours need; smaller ones are spread over all of it, so that more of them
    than the window has are there at once, and each can be loaded the earlier. Not so with one group in the window,
    where no load overlaps compute, and in windows wider than `FAR`.
    """
    return _placed_spread(tuple(sizes), window) if 1 < window <= FAR else place(sizes, window)


def _end(offsets: Sequence[int], sizes: Sequence[int]) -> int:
    return max(map(add, offsets, sizes), default=0)


def _in_order(sizes: Sequence[int], window: int, capacity: int) -> list[int]:
    """The bottom of the arena is tried first, then its top, then the gaps between; without one it grows."""
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
        taken = sorted((offsets[other], offsets[other] + sizes[other]) for other in near if offsets[other] >= 0)
        offsets[index] = _lowest(taken, sizes[index])
    return offsets


@lru_cache(maxsize=PLACED)
def _placed_spread(sizes: tuple[int, ...], window: int) -> Sequence[int]:
    return _spread(place(sizes, window), sizes, window)


def _spread(offsets: Sequence[int], sizes: Sequence[int], window: int) -> list[int]:
    """The same arena, with each group where those that it overwrites were placed the longest ago."""
    capacity = _end(offsets, sizes)
    found = list(offsets)
    for index, size in enumerate(sizes):
        near = (*range(max(0, index - window + 1), index), *range(index + 1, min(len(sizes), index + window)))
        taken = sorted((found[other], found[other] + sizes[other]) for other in near)
        lowest, older = _lowest(taken, size), index - window
        while lowest + size <= capacity:
            found[index] = lowest
            if older < 0:
                break
            insort(taken, (found[older], found[older] + sizes[older]))
            lowest, older = _lowest(taken, size), older - 1
    return found


def _lowest(taken: Sequence[tuple[int, int]], size: int) -> int:
    """The lowest offset at which `size` bytes lie beside the sorted ranges, which may overlap each other."""
    lowest = 0
    for begin, end in taken:
        if begin - lowest >= size:
            break
        lowest = max(lowest, end)
    return lowest


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
