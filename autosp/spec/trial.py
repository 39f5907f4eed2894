"""A setting: what is predicted of it, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from pydantic import Field, model_validator

from autosp.spec.record import Record


class Candidate(Record):
    """A setting: `k` layers on the device at once, `k_prime` of them moved per transfer.

    `residents` never leave; the other `k - len(residents)` layers are the ring that streamed layers share. Layers
    `on_disk` rest behind the host: they are read into a ring of `read_ahead` groups in host memory, and loaded from it.
    In training, of layers to `recompute` only the inputs are kept for the backward pass, and of a block all of whose
    layers are among them only the block's; what autograd saves of layers to `offload` is in host memory until then. A
    pass serves `group` microbatches: what a transfer brings is used by all of them before it leaves.
    """

    k: int = Field(ge=0)
    k_prime: int = Field(ge=1)
    residents: tuple[int, ...] = ()
    on_disk: tuple[int, ...] = ()
    read_ahead: int = Field(default=0, ge=0, description="groups in the host's ring; 0 if nothing rests on disk")
    recompute: tuple[int, ...] = ()
    offload: tuple[int, ...] = ()
    group: int = Field(default=1, ge=1, description="microbatches that share a pass")

    @model_validator(mode="after")
    def _what_rests_on_disk_is_streamed(self) -> Candidate:
        if bool(self.on_disk) != bool(self.read_ahead):
            raise ValueError(f"{len(self.on_disk)} layers rest on disk, and {self.read_ahead} groups are read ahead")
        if self.on_disk and not set(self.on_disk).isdisjoint(self.residents):
            raise ValueError("a layer is resident and on disk")
        if self.offload and not set(self.offload).isdisjoint([*self.recompute, *self.residents]):
            raise ValueError("activations are offloaded of a layer that is resident, or computes them again")
        return self

    @property
    def ring(self) -> int:
        """Layers in the ring."""
        return self.k - len(self.residents)

    @property
    def depth(self) -> int:
        """Neighbouring groups that the ring has room for."""
        return max(1, self.ring // self.k_prime)

    def groups(self, visits: Sequence[int]) -> list[tuple[int, ...]]:
        """The streamed layers that travel together: `k_prime` of them, in the order of their first visit."""
        residents = frozenset(self.residents)
        streamed = [layer for layer in dict.fromkeys(visits) if layer not in residents]
        return [tuple(streamed[start : start + self.k_prime]) for start in range(0, len(streamed), self.k_prime)]

    def split_groups(self, visits: Sequence[int]) -> list[tuple[int, ...]]:
        """Groups of which some layers rest on disk and others do not: none, for a transfer has one source."""
        on_disk = frozenset(self.on_disk)
        return [group for group in self.groups(visits) if on_disk and len(on_disk.intersection(group)) % len(group)]

    def label(self) -> str:
        """Short name for tables."""
        disk = f" on disk={len(self.on_disk)} read-ahead={self.read_ahead}" if self.on_disk else ""
        again = f" recompute={len(self.recompute)}" if self.recompute else ""
        away = f" offload={len(self.offload)}" if self.offload else ""
        group = f" group={self.group}" if self.group > 1 else ""
        return f"k={self.k} k'={self.k_prime} residents={len(self.residents)}{disk}{again}{away}{group}"


class Prediction(Record):
    """What the cost model says of a candidate: of a pass, with all microbatches of its group."""

    candidate: Candidate
    latency_s: float = Field(description="one pass in the steady state")
    cold_latency_s: float | None = Field(default=None, description="the first pass, with empty buffers")
    stall_s: float = Field(description="time per steady pass in which compute waits for a transfer")
    moved_bytes: int = Field(description="bytes of weights over the link to the device per steady pass")
    peak_bytes: int = Field(description="device memory: residents, ring, activations and workspace")
    read_bytes: int = Field(default=0, description="bytes from disk to host per steady pass")
    host_bytes: int = Field(
        default=0, description="host memory: what rests there, the ring that disk is read into, offloaded activations"
    )
    offloaded_bytes: int = Field(default=0, description="activations to the host per pass, and as many back")


class Outcome(StrEnum):
    """How a trial ended."""

    FITS = "fits"
    OVER_BUDGET = "over budget"
    OUT_OF_MEMORY = "out of memory"
    """The device's."""
    HOST_OUT_OF_MEMORY = "out of host memory"
    OUTPUT_DIFFERS = "output differs"
    KILLED = "killed"
    CRASHED = "crashed"
    TIMED_OUT = "timed out"
    DEVICE_ERROR = "device error"

    @property
    def cut_short(self) -> bool:
        """Whether nothing was measured: the trial ended with the process of its own that it ran in, or for the host."""
        return self in (
            Outcome.HOST_OUT_OF_MEMORY,
            Outcome.KILLED,
            Outcome.CRASHED,
            Outcome.TIMED_OUT,
            Outcome.DEVICE_ERROR,
        )

    @property
    def is_timed(self) -> bool:
        """Whether the trial went to its end, with the plain model's output: its time and its peak count."""
        return self in (Outcome.FITS, Outcome.OVER_BUDGET)


class Usage(Record):
    """What link, disk and compute did in a measured pass. Medians over passes."""

    stall_s: float = Field(description="time in which compute waited for weights: the rest of the pass was compute")
    stalls: float = Field(description="visits that waited long enough to be seen")
    link_s: float = Field(description="time in which the link to the device was busy")
    loads: float
    disk_s: float = Field(default=0.0, description="time in which the disk behind the host was read")
    reads: float = 0.0
    read_bytes: float = 0.0


class Measurement(Record):
    """What the device said of a candidate: of passes, each with all microbatches of its group."""

    outcome: Outcome
    latency_s: float = Field(description="median of `samples_s`; 0 when the trial did not get so far")
    samples_s: tuple[float, ...]
    cold_latency_s: float
    peak_bytes: int = Field(description="0 when the trial was cut short")
    moved_bytes: int
    misses: int
    rounds: int = Field(default=1, description="in which `samples_s` were taken, with other plans' between them")
    usage: Usage | None = Field(default=None, description="None in what was measured before it was recorded")
    taken_s: float = Field(default=0.0, description="by the clock, with set-up; 0 where the study did not measure it")


class Trial(Record):
    """One validated candidate of a study."""

    number: int
    prediction: Prediction
    measurement: Measurement
