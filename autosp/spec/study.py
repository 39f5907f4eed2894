"""What a search was made for."""

from __future__ import annotations

import hashlib

from pydantic import Field

from autosp.spec.record import Mode, Record


class StudyKey(Record):
    """What a study was made for. Two calls of `tune` with equal keys ask the same question."""

    model_name: str
    model_fingerprint: str
    device_fingerprint: str
    batch_signature: str
    step: str = Field(description="what runs a pass: `call`, or the qualified name and code hash of `step`")
    behaviour: str | None = Field(
        default=None, description="hash of modules' code, sizes, flags and configs, and of train() or eval()"
    )
    mode: Mode
    trained: str | None = Field(default=None, description="in training: which parameters get gradients")
    group: int = Field(default=1, description="microbatches that share a pass")
    budget_bytes: int
    host_budget_bytes: int | None = Field(default=None, description="None: as much as the machine has")
    slack: float | None = Field(
        default=None, description="how much slower than the fastest a plan of less memory may be"
    )

    @property
    def fingerprint(self) -> str:
        """Hash of all the fields that say something: a field that an older database does not know changes nothing."""
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()[:32]

    def is_of_the_same_work(self, other: StudyKey) -> bool:
        """Whether the two differ in no more than what they allow a plan, and how many microbatches it serves."""
        return self.differences(other).keys() <= {"group", "budget_bytes", "host_budget_bytes", "slack"}

    def differences(self, other: StudyKey) -> dict[str, tuple[object, object]]:
        """Field name -> (mine, theirs) for every field that differs. A behaviour that one does not know is no other."""
        mine, theirs = self.model_dump(), other.model_dump()
        unknown = {"behaviour"} if None in (self.behaviour, other.behaviour) else set()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name] and name not in unknown}


class StudySummary(Record):
    """One line of `autosp studies`."""

    name: str
    key: StudyKey
    created_at: str
    trials: int
    best_latency_s: float | None
    peak_bytes: int | None
    finished: bool
