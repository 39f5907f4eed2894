"""The records that travel between the rooms. Frozen, versioned where they are saved, and free of torch.

Units are in the names: `_bytes`, `_s` (seconds), `_bytes_per_s`. A GB is 10^9 bytes.
"""

from autosp.spec.layers import Block, Layer, Leaf, Partition
from autosp.spec.plan import PLAN_SCHEMA_VERSION, Plan
from autosp.spec.profile import (
    PROFILE_SCHEMA_VERSION,
    BackwardProfile,
    LayerProfile,
    LinkPoint,
    LinkProfile,
    Profile,
    Reading,
)
from autosp.spec.record import DeviceInfo, Mode, Record, Tier
from autosp.spec.study import StudyKey, StudySummary
from autosp.spec.trial import Candidate, Measurement, Outcome, Prediction, Trial, Usage

__all__ = [
    "PLAN_SCHEMA_VERSION",
    "PROFILE_SCHEMA_VERSION",
    "BackwardProfile",
    "Block",
    "Candidate",
    "DeviceInfo",
    "Layer",
    "LayerProfile",
    "Leaf",
    "LinkPoint",
    "LinkProfile",
    "Measurement",
    "Mode",
    "Outcome",
    "Partition",
    "Plan",
    "Prediction",
    "Profile",
    "Reading",
    "Record",
    "StudyKey",
    "StudySummary",
    "Tier",
    "Trial",
    "Usage",
]
