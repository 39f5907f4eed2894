"""The answer, as it is saved."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from autosp.errors import PlanFormatError
from autosp.files import write_atomically
from autosp.spec.layers import Partition
from autosp.spec.profile import Reading
from autosp.spec.record import DeviceInfo, Mode, Record, Tier
from autosp.spec.trial import Candidate, Measurement, Prediction

PLAN_SCHEMA_VERSION = 7
"""Also read: 1, before lookup tables; 2, before `Layer.weight_bytes` and disks behind the host; 3, before `Leaf` and
`reading`; 4, before training; 5, before `Layer.disk_bytes`; 6, before `Candidate.group`, `Candidate.offload`
and blocks: each layer is computed again by itself."""


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
    reading: Reading = Reading()
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
        if not {*backward} <= {*visits} or not {*candidate.recompute, *candidate.offload} <= {*backward}:
            raise ValueError("only what a pass visits goes backward, and only that is recomputed, or offloaded")
        once = {*candidate.recompute} & ({*self.partition.stateful} - self.partition.in_blocks)
        if once:
            raise ValueError(f"layer {min(once)} is called with what may change: it cannot be computed again")
        parted = self.partition.parted_blocks(candidate.recompute)
        for block in self.partition.blocks:
            if not {*block.layers} <= {*backward} or block in parted:
                raise ValueError(f"block {block.path} goes backward, and is computed again, as a whole or not at all")
        if self.mode == "training" and (candidate.on_disk or self.device.slow_tier is Tier.DISK):
            raise ValueError("layers rest on disk: in training, weights rest in host memory")
        if self.mode == "training" and self.partition.leaves:
            raise ValueError("a weight is cut into runs of rows: in training, it travels as a whole")
        split = candidate.split_groups(visits)
        if split:
            raise ValueError(f"layers {split[0]} travel together, and only some of them rest on disk")
        if self.partition.whole(candidate.on_disk).difference(candidate.on_disk, candidate.residents):
            raise ValueError("some rows of a weight rest on disk, and others do not")
        return self

    @property
    def usual_bytes(self) -> int | None:
        """What its passes were seen to take, and the objects that run it. None if it was not measured."""
        if self.measurement is None:
            return None
        return self.measurement.peak_bytes + self.partition.bookkeeping_bytes

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
