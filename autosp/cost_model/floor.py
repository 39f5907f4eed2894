"""The least time any schedule can take under a budget: every plan is judged by its ratio to it."""

from __future__ import annotations

from autosp.cost_model.offload_memory import offloadable_bytes
from autosp.cost_model.training_memory import freed_bytes, seconds_per_freed_byte
from autosp.errors import SettingError
from autosp.spec import Profile

HALVINGS = 40
"""Of the range in which the bytes to offload are sought: to a part in 10^12."""


def floor_s(profile: Profile, budget_bytes: int, host_budget_bytes: int | None = None, group: int = 1) -> float:
    """The least time of a pass: `max(C, (W - R_max) / B, (W - R_max - H_max) / B_disk)` per period, and no more.

    C is the compute of a pass (each visit at the fastest it was seen, or a pass without a plan), W the bytes of all
    visited layers, B and B_disk the bandwidths of the links measured alone, R_max = budget - workspace -
    always-resident bytes, all of it filled with resident layers and no ring at all, and H_max the host's budget less
    the lookup tables, without a staging ring: a bound that no real plan reaches exactly. `host_budget_bytes` None: the
    host has room for all. A pass has all of its periods. Of a training pass it is `training_floor_s`. A pass of `group`
    microbatches computes as often, and moves what one needs; beside R_max there are the activations of one.

    Raises: SettingError if the bound needs the disk's bandwidth and the profile does not know it.
    """
    if profile.mode == "training":
        return training_floor_s(profile, budget_bytes, group)
    partition = profile.partition
    visited = sum(partition.layers[index].n_bytes for index in set(partition.visits))
    residents = max(0, budget_bytes - profile.workspace_bytes - partition.resident_bytes)
    moved = max(0, visited - residents)
    transfer_s = moved / profile.link.bytes_per_s * partition.repeats
    least_s = max(group * profile.least_compute_s, transfer_s)
    if host_budget_bytes is None:
        return least_s
    tables = partition.lookups.n_bytes if partition.lookups else 0
    read = max(0, moved - max(0, host_budget_bytes - tables))
    if not read:
        return least_s
    if profile.disk_link is None:
        raise unknown_disk()
    return max(least_s, read / profile.disk_link.bytes_per_s * partition.repeats)


def training_floor_s(profile: Profile, budget_bytes: int, group: int = 1) -> float:
    """The largest of `training_floors`."""
    return max(training_floors(profile, budget_bytes, group).values())


def training_floors(profile: Profile, budget_bytes: int, group: int = 1) -> dict[str, float]:
    """What each resource needs at least, in seconds, by its name: compute, weights in, gradients out.

    `max(C + recompute, (max(0, W - M) + max(0, V - M_turn) + A) / B, (max(0, G - M / 2) + A) / B_return)`, with the A
    for which that is least.

    C is the compute forward and backward, each visit at the fastest it was seen; recompute the least time that makes
    activations fit at the turn, from forward to backward, beside no weights at all. W and V are the bytes of the layers
    visited forward and backward, G those of their gradients. M = budget - workspace - always-resident bytes is what may
    be on the device when a pass begins, M_turn what is left of it at the turn beside the least activations: only that
    need not be loaded, which for weights all of which move is 2 W - turn. A resident's gradient, as large as itself,
    stays beside it. A are the bytes of activations that are offloaded: they are not there at the turn, and cross both
    links beside weights and gradients. The update is no part of the pass, so nor is the optimizer. A pass of `group`
    microbatches computes, and offloads, as often; activations are those of one, for microbatches may go backward one
    after another.
    """
    partition = profile.partition
    sizes = {layer.index: layer.n_bytes for layer in partition.layers}
    room = max(0, budget_bytes - profile.workspace_bytes - partition.resident_bytes)
    least_kept = sum(min(visit.kept_bytes, visit.input_bytes) for visit in profile.visits)
    forward = sum(sizes[index] for index in set(partition.visits))
    backward = sum(sizes[index] for index in set(partition.backward))
    gradients = max(0.0, sum(layer.gradient_bytes for layer in partition.layers) - room / 2)
    back = profile.return_link

    def floors(more_away: float, less_away: float) -> dict[str, float]:
        """Of compute where more is away, and of the links where less is."""
        there = max(0, room - max(0, least_kept - less_away))
        loaded = max(0, forward - room) + max(0, backward - there) + group * less_away
        return {
            "compute": group * (profile.least_compute_s + least_recompute_s(profile, room + more_away)),
            "weights in": loaded / profile.link.bytes_per_s,
            "gradients out": (gradients + group * less_away) / back.bytes_per_s if back else 0.0,
        }

    def compute_binds(away: float) -> bool:
        compute_s, *moving_s = floors(away, away).values()
        return compute_s > max(moving_s)

    low, high = 0.0, float(offloadable_bytes(profile))
    if not compute_binds(low):
        return floors(low, low)
    for _ in range(HALVINGS if high else 0):  # the more is away, the less is computed and the more is moved
        away = (low + high) / 2
        low, high = (away, high) if compute_binds(away) else (low, away)
    return floors(high, low)


def least_recompute_s(profile: Profile, room_bytes: float) -> float:
    """The least time that computing activations again may take for the rest to fit: of blocks or layers, and parts."""
    excess = sum(visit.kept_bytes for visit in profile.visits) - room_bytes
    freed, cost_of = freed_bytes(profile), seconds_per_freed_byte(profile)
    least_s = 0.0
    for layers in sorted(cost_of, key=cost_of.__getitem__):
        if excess <= 0:
            break
        least_s += cost_of[layers] * min(freed[layers], excess)
        excess -= freed[layers]
    return least_s


def unknown_disk() -> SettingError:
    """The error where a plan would need the disk, and the profile was made where none did."""
    return SettingError(
        "under this host budget some layers must rest on disk, and the profile has no measurement of the disk: make it "
        "with max_cpu_gb, or estimate without"
    )
