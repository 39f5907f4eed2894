"""The records that travel between the rooms. Frozen, versioned where they are saved, and free of torch.

Units are in the names: `_bytes`, `_s` (seconds), `_bytes_per_s`. A GB is 10^9 bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autosp.errors import PlanFormatError
from autosp.files import write_atomically

PLAN_SCHEMA_VERSION = 4
"""1: before lookup tables; 2: before `Layer.weight_bytes`, and layers on disk behind the host; 3: before training; all
still read."""

Mode = Literal["inference", "training"]


class Record(BaseModel):
    """Immutable, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Tier(StrEnum):
    """Where bytes live. Compute reads DEVICE only."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class DeviceInfo(Record):
    """The machine a figure was measured on. `kind` is "cpu" or the torch device type."""

    kind: str
    name: str
    slow_tier: Tier
    memory_bytes: int
    torch_version: str
    fingerprint: str


class Layer(Record):
    """The unit that moves: the tensors of one module, in one piece of memory."""

    index: int
    name: str = Field(description="dotted path of the module")
    tensors: tuple[str, ...] = Field(description="canonical names of the parameters and buffers that travel")
    n_bytes: int = Field(description="bytes of one transfer, alignment included, where the plan was made")
    weight_bytes: int | None = Field(
        default=None, description="bytes of the tensors themselves; None in a plan older than schema 3"
    )
    gradient_bytes: int = Field(default=0, description="bytes of the gradients that a training pass gives")


class Partition(Record):
    """A model as ordered layers. Every tensor is in one layer, or a lookup table, or among the resident tensors."""

    layers: tuple[Layer, ...]
    resident_tensors: tuple[str, ...] = Field(description="tied, mutated or parent-owned tensors: never streamed")
    resident_bytes: int
    visits: tuple[int, ...] = Field(description="layer index per call, in the order of one period of execution")
    repeats: int = Field(description="periods per pass; more than one where the step calls the model again and again")
    backward: tuple[int, ...] = Field(
        default=(), description="layers whose weights a training pass's backward needs, in the order of need"
    )
    lookups: Layer | None = Field(
        default=None, description="tables of which a pass reads a few rows: they stay on the slow tier"
    )

    @property
    def streamable_bytes(self) -> int:
        """Bytes of all layers together."""
        return sum(layer.n_bytes for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights: layers, resident tensors, lookup tables."""
        return self.streamable_bytes + self.resident_bytes + (self.lookups.n_bytes if self.lookups else 0)


class LayerProfile(Record):
    """One visit of one layer, observed under the least-memory plan (medians over passes)."""

    layer: int
    before_s: float = Field(description="compute between the previous visit's end and this visit")
    forward_s: float
    peak_bytes: int = Field(description="most memory beyond the plan's own buffers during the visit")
    output_bytes: int


class LinkPoint(Record):
    """One point of a link's sweep: the median time of one transfer of `n_bytes`."""

    n_bytes: int
    seconds: float


class LinkProfile(Record):
    """One direction between two tiers: a transfer of b bytes takes `latency_s + b / bytes_per_s`."""

    source: Tier
    target: Tier
    latency_s: float
    bytes_per_s: float
    link_slowdown: float = Field(ge=1, description="a transfer takes this many times longer while computing")
    compute_slowdown: float = Field(ge=1, description="compute takes this many times longer during a transfer")
    points: tuple[LinkPoint, ...]


class Candidate(Record):
    """A setting: `k` layers on the device at once, `k_prime` of them moved per transfer.

    `residents` never leave; the other `k - len(residents)` layers are the ring that streamed layers share. Layers
    `on_disk` rest behind the host: they are read into a ring of `read_ahead` groups in host memory, and loaded from it.
    In training, of layers to `recompute` only the inputs are kept for the backward pass.
    """

    k: int = Field(ge=0)
    k_prime: int = Field(ge=1)
    residents: tuple[int, ...] = ()
    on_disk: tuple[int, ...] = ()
    read_ahead: int = Field(default=0, ge=0, description="groups in the host's ring; 0 if nothing rests on disk")
    recompute: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _what_rests_on_disk_is_streamed(self) -> Candidate:
        if bool(self.on_disk) != bool(self.read_ahead):
            raise ValueError(f"{len(self.on_disk)} layers rest on disk, and {self.read_ahead} groups are read ahead")
        if self.on_disk and not set(self.on_disk).isdisjoint(self.residents):
            raise ValueError("a layer is resident and on disk")
        return self

    @property
    def ring(self) -> int:
        """Layers in the ring."""
        return self.k - len(self.residents)

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
        return f"k={self.k} k'={self.k_prime} residents={len(self.residents)}{disk}{again}"


class Prediction(Record):
    """What the cost model says of a candidate."""

    candidate: Candidate
    latency_s: float = Field(description="one pass in the steady state")
    cold_latency_s: float | None = Field(default=None, description="the first pass, with empty buffers")
    stall_s: float = Field(description="time per steady pass in which compute waits for a transfer")
    moved_bytes: int = Field(description="bytes over the link to the device per steady pass")
    peak_bytes: int = Field(description="device memory: residents, ring, activations and workspace")
    read_bytes: int = Field(default=0, description="bytes from disk to host per steady pass")
    host_bytes: int = Field(default=0, description="host memory: what rests there, and the ring that disk is read into")


class Outcome(StrEnum):
    """How a trial ended."""

    FITS = "fits"
    OVER_BUDGET = "over budget"
    OUT_OF_MEMORY = "out of memory"
    OUTPUT_DIFFERS = "output differs"


class Measurement(Record):
    """What the device said of a candidate."""

    outcome: Outcome
    latency_s: float = Field(description="median of `samples_s`; 0 when the trial ran out of memory")
    samples_s: tuple[float, ...]
    cold_latency_s: float
    peak_bytes: int
    moved_bytes: int
    misses: int


class Trial(Record):
    """One validated candidate of a study."""

    number: int
    prediction: Prediction
    measurement: Measurement


class Profile(Record):
    """Everything the cost model needs, measured once per model, batch and device."""

    model_name: str
    model_fingerprint: str
    batch_signature: str
    mode: Mode
    device: DeviceInfo
    partition: Partition
    visits: tuple[LayerProfile, ...] = Field(description="one per entry of `partition.visits`")
    tail_s: float = Field(description="compute after the last visit, until the pass returns")
    least_compute_s: float = Field(description="compute of a pass with each visit at the fastest it was seen")
    links: tuple[LinkProfile, ...]
    workspace_bytes: int = Field(description="observed peak beyond the plan's own buffers: activations, workspace")
    observed: Trial = Field(description="the least-memory plan's own trial, on which the model is calibrated")

    @property
    def compute_s(self) -> float:
        """One pass with everything resident: the sum of all compute, `repeats` periods of it."""
        period = sum(visit.before_s + visit.forward_s for visit in self.visits)
        return period * self.partition.repeats + self.tail_s

    @property
    def link(self) -> LinkProfile:
        """The link that weights take to the device."""
        return self.links[0]

    @property
    def disk_link(self) -> LinkProfile | None:
        """The link from disk to the host, where layers may rest behind it; None if it was not measured."""
        return next((link for link in self.links[1:] if link.source is Tier.DISK), None)


class StudyKey(Record):
    """What a study was made for. Two calls of `tune` with equal keys ask the same question."""

    model_name: str
    model_fingerprint: str
    device_fingerprint: str
    batch_signature: str
    step: str = Field(description="what runs a pass: `call`, or the qualified name and code hash of `step`")
    mode: Mode
    budget_bytes: int
    host_budget_bytes: int | None = Field(default=None, description="None: as much as the machine has")

    @property
    def fingerprint(self) -> str:
        """Hash of all the fields that say something: a field that an older database does not know changes nothing."""
        return hashlib.sha256(self.model_dump_json(exclude_none=True).encode()).hexdigest()[:32]

    def differences(self, other: StudyKey) -> dict[str, tuple[object, object]]:
        """Field name -> (mine, theirs) for every field that differs."""
        mine, theirs = self.model_dump(), other.model_dump()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


class StudySummary(Record):
    """One line of `autosp studies`."""

    name: str
    key: StudyKey
    created_at: str
    trials: int
    best_latency_s: float | None
    peak_bytes: int | None
    finished: bool


class Plan(Record):
    """The answer: a setting, what was predicted of it, what was measured, and for what it holds."""

    schema_version: int = PLAN_SCHEMA_VERSION
    autosp_version: str
    torch_version: str
    created_at: str = Field(description="UTC, ISO 8601")
    study_name: str | None = None
    mode: Mode
    model_name: str
    model_fingerprint: str
    batch_signature: str
    device: DeviceInfo
    budget_bytes: int | None = Field(default=None, description="None for a plan whose k and k' the user set")
    host_budget_bytes: int | None = Field(default=None, description="None if all streamed layers may rest on the host")
    partition: Partition
    candidate: Candidate
    prediction: Prediction | None = None
    measurement: Measurement | None = None
    floor_s: float | None = None
    why: str = ""

    @model_validator(mode="after")
    def _indices_name_layers(self) -> Plan:
        count = len(self.partition.layers)
        visits, candidate = self.partition.visits, self.candidate
        backward = self.partition.backward
        if any(not 0 <= index < count for index in (*visits, *backward, *candidate.residents, *candidate.on_disk)):
            raise ValueError(f"a visit, a resident or a layer on disk is none of the {count} layers")
        if not {*backward} <= {*visits} or not {*candidate.recompute} <= {*backward}:
            raise ValueError("only what a pass visits goes backward, and only that is recomputed")
        if candidate.on_disk and self.mode == "training":
            raise ValueError("layers rest on disk: in training, weights rest in host memory")
        split = candidate.split_groups(visits)
        if split:
            raise ValueError(f"layers {split[0]} travel together, and only some of them rest on disk")
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically: the file is either the old one or the whole new one."""
        write_atomically(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan.

        Raises: PlanFormatError if the file is not a plan, or one of a newer schema. FileNotFoundError as usual.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise PlanFormatError(
                f"{path} is not JSON ({error}); export the plan again with `autosp export`"
            ) from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        if type(version) is not int or version < 1:
            raise PlanFormatError(f"{path} has no schema_version: it is not an autosp plan")
        if version > PLAN_SCHEMA_VERSION:
            raise PlanFormatError(
                f"{path} has plan schema {version}, this autosp reads up to {PLAN_SCHEMA_VERSION}; upgrade autosp"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PlanFormatError(f"{path} is damaged at {where or 'its top'}: {first['msg']}") from error
