"""What was measured of a model, a batch and a device."""

from __future__ import annotations

from pydantic import Field

from autosp.errors import SettingError
from autosp.spec.layers import Partition
from autosp.spec.record import DeviceInfo, Mode, Record, Tier
from autosp.spec.trial import Candidate, Trial

PROFILE_SCHEMA_VERSION = 5
"""Raised when a figure of a profile comes to mean something else: profiles of other versions are measured anew."""


class LayerProfile(Record):
    """One visit of one layer: times as if nothing was loaded meanwhile, memory under the least-memory plan."""

    layer: int
    before_s: float = Field(description="compute between the previous visit's end and this visit")
    forward_s: float
    peak_bytes: int = Field(description="most memory beyond the plan's own buffers during the visit")
    output_bytes: int
    kept_bytes: int = Field(
        default=0,
        description="activations kept for its backward, if none are computed again; in a block, until its next layer's",
    )
    input_bytes: int = Field(
        default=0,
        description="what is kept of it where its activations are computed again: of a block by its first layer only",
    )


class BackwardProfile(Record):
    """One visit of one layer in the backward of a training pass, as if nothing was loaded meanwhile."""

    layer: int
    before_s: float = Field(description="compute between the previous visit's end and this visit: the loss, before all")
    recompute_s: float = Field(
        description="its activations computed again, where they are: in a block, from the end of the layer before"
    )
    backward_s: float = Field(description="from there until the next visit")


class LinkPoint(Record):
    """One point of a link's sweep: the median time of one transfer of `n_bytes`."""

    n_bytes: int
    seconds: float


class Reading(Record):
    """How files are read: a transfer's blocks, one per system call, are spread over the readers."""

    readers: int = Field(default=1, ge=1)
    block_bytes: int = Field(default=32 * 2**20, ge=4096, multiple_of=4096, description="exceeded by up to an eighth")
    from_cache: bool = Field(default=False, description="copy what the page cache has, instead of reading the disk")


class LinkProfile(Record):
    """One direction between two tiers: a transfer of b bytes takes `latency_s + b / bytes_per_s`."""

    source: Tier
    target: Tier
    latency_s: float
    bytes_per_s: float
    link_slowdown: float = Field(ge=1, description="a transfer takes this many times longer while computing")
    compute_slowdown: float = Field(ge=1, description="compute takes this many times longer during a transfer")
    points: tuple[LinkPoint, ...]
    reading: Reading | None = Field(default=None, description="of a link from disk: how it was read")
    cached_bytes_per_s: float | None = Field(default=None, description="of a link from disk: what the page cache gives")


class Profile(Record):
    """Everything the cost model needs, measured once per model, batch and device: of passes of one microbatch."""

    schema_version: int = Field(default=1, description="1 where there is none: in databases of autosp 0.1.0")
    model_name: str
    model_fingerprint: str
    batch_signature: str
    mode: Mode
    device: DeviceInfo
    partition: Partition
    visits: tuple[LayerProfile, ...] = Field(description="one per entry of `partition.visits`")
    backward: tuple[BackwardProfile, ...] = Field(default=(), description="one per entry of `partition.backward`")
    tail_s: float = Field(description="compute after the last visit, until the pass returns")
    plain_s: float | None = Field(
        default=None, description="a pass without a plan, all weights in memory; None if none was seen"
    )
    least_compute_s: float = Field(
        description="compute of a pass with each visit at the fastest it was seen, or a pass without a plan"
    )
    links: tuple[LinkProfile, ...]
    workspace_bytes: int = Field(
        description="observed peak beyond the plan's own buffers: activations, workspace. In training, beyond what the "
        "cost model knows of activations and gradients, too"
    )
    heap_scatter_bytes: int = Field(
        default=0, description="how much more of it a plan may turn out to take, where activations live in a C heap"
    )
    waiting_bytes: int | None = Field(
        default=None,
        description="what each microbatch of a group holds, beyond what the cost model knows of activations, while "
        "another one computes; None if no group was observed",
    )
    observed: Trial = Field(description="the least-memory plan's own trial, on which the model is calibrated")
    overlapped: Trial | None = Field(
        default=None, description="the same of a ring that overlaps loads with compute; None if there was no room"
    )
    wake_s: float = Field(default=0.0, description="how much longer compute takes after it has waited for a transfer")

    @property
    def compute_s(self) -> float:
        """One pass with everything resident: the sum of all compute, `repeats` periods of it, nothing of it twice."""
        period = sum(visit.before_s + visit.forward_s for visit in self.visits)
        backward_s = sum(visit.before_s + visit.backward_s for visit in self.backward)
        return period * self.partition.repeats + backward_s + self.tail_s

    def compute_of(self, candidate: Candidate) -> float:
        """The same under a candidate: with what it computes again, for all microbatches of its group."""
        again = frozenset(candidate.recompute)
        recompute_s = sum(visit.recompute_s for visit in self.backward if visit.layer in again)
        return candidate.group * (self.compute_s + recompute_s)

    def workspace_of(self, group: int) -> int:
        """The workspace of one microbatch, and what the others of its group hold meanwhile.

        Raises: SettingError if the profile does not know the latter.
        """
        if group == 1:
            return self.workspace_bytes
        if self.waiting_bytes is None:
            raise SettingError(
                f"the profile is of one microbatch, and knows nothing of the memory of {group} that share a pass: make "
                f"it with group={group}"
            )
        return self.workspace_bytes + (group - 1) * self.waiting_bytes

    def planned_workspace_of(self, group: int) -> int:
        """What a prediction leaves for it: no plan is to turn out to take more. Raises: SettingError."""
        return self.workspace_of(group) + self.heap_scatter_bytes

    @property
    def link(self) -> LinkProfile:
        """The link that weights take to the device."""
        return self.links[0]

    @property
    def disk_link(self) -> LinkProfile | None:
        """The link from disk to the host, where layers may rest behind it; None if it was not measured."""
        return next((link for link in self.links[1:] if link.source is Tier.DISK), None)

    @property
    def return_link(self) -> LinkProfile | None:
        """The link that gradients take to the host; None if the profile is not of training."""
        return next((link for link in self.links if link.source is Tier.DEVICE), None)
