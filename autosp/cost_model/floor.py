"""The least time any schedule can take under a budget: every plan is judged by its ratio to it."""

from __future__ import annotations

from autosp.errors import SettingError
from autosp.spec import Profile


def floor_s(profile: Profile, budget_bytes: int, host_budget_bytes: int | None = None) -> float:
    """`max(C, (W - R_max) / B, (W - R_max - H_max) / B_disk)` per period, times the periods of a pass, and no more.

    C is the compute of a pass (each visit at the fastest it was seen), W the bytes of all visited layers, B and B_disk
    the bandwidths of the links measured alone, R_max = budget - workspace - always-resident bytes, all of it filled
    with resident layers and no ring at all, and H_max the host's budget less the lookup tables, without a staging ring:
    a bound that no real plan reaches exactly. `host_budget_bytes` None: the host has room for all.

    Raises: SettingError if the bound needs the disk's bandwidth and the profile does not know it.
    """
    partition = profile.partition
    visited = sum(partition.layers[index].n_bytes for index in set(partition.visits))
    residents = max(0, budget_bytes - profile.workspace_bytes - partition.resident_bytes)
    moved = max(0, visited - residents)
    transfer_s = moved / profile.link.bytes_per_s * partition.repeats
    least_s = max(profile.least_compute_s, transfer_s)
    if host_budget_bytes is None:
        return least_s
    tables = partition.lookups.n_bytes if partition.lookups else 0
    read = max(0, moved - max(0, host_budget_bytes - tables))
    if not read:
        return least_s
    if profile.disk_link is None:
        raise unknown_disk()
    return max(least_s, read / profile.disk_link.bytes_per_s * partition.repeats)


def unknown_disk() -> SettingError:
    """The error where a plan would need the disk, and the profile was made where none did."""
    return SettingError(
        "under this host budget some layers must rest on disk, and the profile has no measurement of the disk: make it "
        "with max_cpu_gb, or estimate without"
    )
