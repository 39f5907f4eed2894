"""Valid records to store, small but with every field in use."""

from __future__ import annotations

import builders
from autosp.spec import (
    Candidate,
    DeviceInfo,
    Layer,
    LayerProfile,
    LinkPoint,
    LinkProfile,
    Measurement,
    Outcome,
    Partition,
    Plan,
    Prediction,
    Profile,
    StudyKey,
    Tier,
    Trial,
)

DEVICE = DeviceInfo(
    kind="cpu", name="a CPU", slow_tier=Tier.DISK, memory_bytes=8 * 10**9, torch_version="2.13.0", fingerprint="d" * 32
)
PARTITION = Partition(
    layers=(
        Layer(index=0, name="blocks.0", tensors=("blocks.0.weight", "blocks.0.bias"), n_bytes=4096),
        Layer(index=1, name="blocks.1", tensors=("blocks.1.weight",), n_bytes=5_000_000_000),
    ),
    resident_tensors=("embedding.weight",),
    resident_bytes=1024,
    visits=(0, 1),
    repeats=1,
)


def study_key(budget_bytes: int = 2_000_000_000) -> StudyKey:
    """What a study was made for; another budget is another key."""
    return builders.study_key(batch_signature="float32[1, 8]", budget_bytes=budget_bytes)


def trial(number: int = 0, latency_s: float = 0.1, outcome: Outcome = Outcome.FITS) -> Trial:
    """A validated candidate."""
    candidate = Candidate(k=2, k_prime=1, residents=(1,))
    return Trial(
        number=number,
        prediction=Prediction(
            candidate=candidate,
            latency_s=latency_s * 1.1,
            cold_latency_s=0.3,
            stall_s=0.0,
            moved_bytes=4096,
            peak_bytes=5_000_005_120,
        ),
        measurement=Measurement(
            outcome=outcome,
            latency_s=latency_s,
            samples_s=(latency_s, 0.1 + 0.2),
            cold_latency_s=0.31,
            peak_bytes=5_000_006_000 + number,
            moved_bytes=4096,
            misses=0,
        ),
    )


def profile() -> Profile:
    """What was measured before the search."""
    visits = tuple(
        LayerProfile(layer=layer, before_s=1e-7, forward_s=0.05, peak_bytes=77, output_bytes=32) for layer in (0, 1)
    )
    link = LinkProfile(
        source=Tier.DISK,
        target=Tier.DEVICE,
        latency_s=1e-4,
        bytes_per_s=2.6e9,
        link_slowdown=1.05,
        compute_slowdown=1.27,
        points=(LinkPoint(n_bytes=4096, seconds=1.1e-4),),
    )
    return Profile(
        model_name="Tiny",
        model_fingerprint="m" * 32,
        batch_signature="float32[1, 8]",
        mode="inference",
        device=DEVICE,
        partition=PARTITION,
        visits=visits,
        tail_s=0.001,
        least_compute_s=0.001,
        links=(link,),
        workspace_bytes=77,
        observed=trial(),
    )


def plan(why: str = "the fastest that fits") -> Plan:
    """An answer."""
    chosen = trial()
    return Plan(
        autosp_version="0.1.0",
        torch_version="2.13.0",
        created_at="2025-01-01T00:00:00+00:00",
        study_name="tiny",
        mode="inference",
        model_name="Tiny",
        model_fingerprint="m" * 32,
        batch_signature="float32[1, 8]",
        device=DEVICE,
        budget_bytes=2_000_000_000,
        partition=PARTITION,
        candidate=chosen.prediction.candidate,
        prediction=chosen.prediction,
        measurement=chosen.measurement,
        floor_s=0.09,
        why=why,
    )
