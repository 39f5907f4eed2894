"""The least time any schedule can take under a budget: every plan is judged by its ratio to it."""

from __future__ import annotations

from autosp.spec import Profile


def floor_s(profile: Profile, budget_bytes: int) -> float:
    """`max(C, (W - R_max) / B)` per period, times the periods of a pass, plus nothing else.

    C is the compute of a pass (each visit at the fastest it was seen), W the bytes of all visited layers, B the link's
    bandwidth measured alone, and R_max = budget - workspace - always-resident bytes, all of it filled with resident
    layers and no ring at all: a bound that no real plan reaches exactly.
    """
    partition = profile.partition
    visited = sum(partition.layers[index].n_bytes for index in set(partition.visits))
    residents = max(0, budget_bytes - profile.workspace_bytes - partition.resident_bytes)
    transfer_s = max(0, visited - residents) / profile.link.bytes_per_s * partition.repeats
    return max(profile.least_compute_s, transfer_s)
