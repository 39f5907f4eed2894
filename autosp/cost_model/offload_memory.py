"""Device memory that offloaded activations leave to others, visit by visit.

What a visit forward saves is on the device until it must have left: before the visit that is held up for it. What none
is held up for is taken to stay. It is there again from when it may be issued to come back until its backward is over,
at whatever moment the ring's weights have that be.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from autosp.schedule.actions import Kind
from autosp.schedule.offload import restores, saves, saves_held_up
from autosp.schedule.visits import visits_of
from autosp.spec import Candidate, Profile


def bytes_away(profile: Profile, candidate: Candidate) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Bytes that are not on the device during each visit, of what would be there without offload. [F + B + 1]

    As in a curve of `TrainingMemory`: the visits of a block that is computed again are part of the backward visit after
    them, and last comes the end of the pass. Where the device counts host memory as its own, nothing is ever away.
    """
    partition = profile.partition
    count = len(partition.visits) + len(partition.backward) + 1
    if not candidate.offload or profile.device.counts_host_memory:
        return np.zeros(count, np.int64)
    sent = saves(candidate, partition)
    sizes = {visit: min(n_bytes, candidate.group * profile.visits[visit].kept_bytes) for visit, n_bytes in sent.items()}
    at = np.cumsum([0, *(visit.kind is not Kind.RECOMPUTE for visit in visits_of(candidate, partition))])
    gone_after: dict[int, int] = {}
    queue = deque(sorted(sizes))
    for visit, latest in sorted(saves_held_up(candidate, partition).items()):
        while queue and queue[0] <= latest:
            gone_after[queue.popleft()] = visit
    change = np.zeros(count + 1, np.int64)
    for restore in restores(candidate, partition):
        for visit in restore.saved:
            if visit in gone_after and gone_after[visit] < restore.after:
                change[gone_after[visit] + 1] += sizes[visit]
                change[at[restore.after + 1]] -= sizes[visit]
    return np.asarray(np.cumsum(change[:-1]))


def offloadable_bytes(profile: Profile) -> int:
    """What all layers whose backward is seen could send, where that frees memory."""
    if profile.device.counts_host_memory:
        return 0
    every = Candidate(k=1, k_prime=1, offload=tuple(sorted(set(profile.partition.backward))))
    return offloaded_bytes(profile, every)


def offloaded_bytes(profile: Profile, candidate: Candidate) -> int:
    """What a pass sends to the host, and brings back."""
    return sum(saves(candidate, profile.partition).values())
