"""What all records have in common, and where memory is."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict

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

    @property
    def counts_host_memory(self) -> bool:
        """Whether host memory is this device's own: what is moved there is not gone."""
        return self.kind == "cpu"
