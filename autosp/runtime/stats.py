"""What a streamed model has done, for its user."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from statistics import median

from autosp.runtime.disk_state import StateBytes
from autosp.runtime.loader import Counters
from autosp.runtime.recorder import Recorder
from autosp.spec import Tier


@dataclass(frozen=True)
class Stats:
    """What a streamed model has done so far."""

    passes: int
    visits: int
    loads: int
    moved_bytes: int
    misses: int
    waits: int
    temporary_loads: int
    peak_bytes: int
    """Most device memory in use since the plan was applied, beyond what was in use before."""
    reads: int
    read_bytes: int
    """From disk to host, where layers rest behind it."""
    gradient_bytes: int
    """From device to host, while training."""
    offloaded_bytes: int
    """Activations from device to host, of layers that offload them."""
    restored_bytes: int
    """And back: less, where a backward came before they had left."""
    restore_misses: int
    """Activations that backward needed before they were asked for."""
    offload_buffers: int
    """Runs of host memory that were taken for activations: a steady state takes no more."""
    link_bytes: dict[str, int]
    """Bytes moved over each link, such as "host->device"."""
    pass_s: tuple[float, ...]
    """The last passes, oldest first; a group of batches is one."""
    stall_s: dict[str, float]
    """Layer -> how long compute waited for its weights: mean per pass of the last passes. Zeros are left out."""
    over_floor: float | None
    """The median of `pass_s` over the least time that the plan's budget allows; None if the plan does not know it."""


def stats_of(
    counters: Counters,
    recorder: Recorder,
    peak_bytes: int,
    names: Mapping[int, str],
    slow_tier: Tier,
    on_disk: Collection[int],
    floor_s: float | None,
    state_bytes: StateBytes | None = None,
) -> Stats:
    """The counters with what was recorded of the last passes. Waits for their compute.

    `names`: of layers by their index. `on_disk`: those behind the slow tier. `floor_s`: of a pass, if it is known.
    `state_bytes`: of the optimizer's state, where some of it is on disk.
    """
    pass_s = tuple(recorder.pass_s())
    link_bytes = {f"{slow_tier}->{Tier.DEVICE}": counters.moved_bytes + counters.restored_bytes}
    if returned := counters.gradient_bytes + counters.offloaded_bytes:
        link_bytes[f"{Tier.DEVICE}->{slow_tier}"] = returned
    if on_disk:
        link_bytes[f"{Tier.DISK}->{Tier.HOST}"] = counters.read_bytes
    if state_bytes is not None:
        link_bytes |= {f"{Tier.DISK}->{Tier.HOST}": state_bytes.read, f"{Tier.HOST}->{Tier.DISK}": state_bytes.written}
    return Stats(
        **asdict(counters),
        peak_bytes=peak_bytes,
        link_bytes=link_bytes,
        pass_s=pass_s,
        stall_s={names[layer]: seconds for layer, seconds in recorder.stall_s().items() if seconds > 0},
        over_floor=median(pass_s) / floor_s if pass_s and floor_s else None,
    )
