"""Records of a model with unlike layers, predicted by the real cost model, without torch; and tables as text."""

from __future__ import annotations

import re

from rich.console import Console
from rich.table import Table

from autosp.cost_model.predict import predict
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
    StudySummary,
    Tier,
    Trial,
)
from builders import study_key

DEVICE = DeviceInfo(
    kind="cuda",
    name="a GPU",
    slow_tier=Tier.HOST,
    memory_bytes=24 * 10**9,
    torch_version="2.13.0",
    fingerprint="d" * 16,
)
BUDGET_BYTES = 4_000_000_000


def profile(layers: int = 12, repeats: int = 1) -> Profile:
    """Layers of 400 MB beside a larger last one; a link that is slower than compute."""
    sizes = [400_000_000] * (layers - 1) + [1_000_000_000]
    placeholder = Prediction(candidate=Candidate(k=1, k_prime=1), latency_s=1, stall_s=0, moved_bytes=0, peak_bytes=0)
    return Profile(
        model_name="Net",
        model_fingerprint="m" * 16,
        batch_signature="float32[1,8]",
        mode="inference",
        device=DEVICE,
        partition=Partition(
            layers=tuple(
                Layer(index=index, name=f"blocks.{index}", tensors=("a", "b"), n_bytes=n_bytes)
                for index, n_bytes in enumerate(sizes)
            ),
            resident_tensors=("norm",),
            resident_bytes=50_000_000,
            visits=tuple(range(layers)),
            repeats=repeats,
        ),
        visits=tuple(
            LayerProfile(layer=index, before_s=0.001, forward_s=0.02, peak_bytes=90_000_000, output_bytes=4096)
            for index in range(layers)
        ),
        tail_s=0.004,
        least_compute_s=0.021 * layers * repeats + 0.004,
        links=(
            LinkProfile(
                source=Tier.HOST,
                target=Tier.DEVICE,
                latency_s=2e-5,
                bytes_per_s=12.5e9,
                link_slowdown=1.05,
                compute_slowdown=1.02,
                points=(LinkPoint(n_bytes=65536, seconds=3e-5), LinkPoint(n_bytes=10**9, seconds=0.08)),
            ),
        ),
        workspace_bytes=90_000_000,
        observed=Trial(number=0, prediction=placeholder, measurement=measurement(1.0, 500_000_000)),
    )


def measurement(latency_s: float, peak_bytes: int, outcome: Outcome = Outcome.FITS) -> Measurement:
    """What a device said; no samples if it said "out of memory"."""
    timed = outcome in (Outcome.FITS, Outcome.OVER_BUDGET)
    return Measurement(
        outcome=outcome,
        latency_s=latency_s if timed else 0.0,
        samples_s=(latency_s,) if timed else (),
        cold_latency_s=2 * latency_s,
        peak_bytes=peak_bytes,
        moved_bytes=3_000_000_000,
        misses=0,
    )


EVERYTHING = Candidate(k=12, k_prime=1, residents=tuple(range(12)))
WINDOW = Candidate(k=4, k_prime=2)
MIXED = Candidate(k=6, k_prime=1, residents=(0, 3, 6, 9))


def trials() -> list[Trial]:
    """Both trivial plans and a better one; one that ran out of memory and one over the budget."""
    predictions = predict(profile(), [EVERYTHING, WINDOW, MIXED, MIXED.model_copy(update={"k": 9})])
    found = (
        measurement(0.0, BUDGET_BYTES + 1, Outcome.OUT_OF_MEMORY),
        measurement(0.5, 2_300_000_000),
        measurement(0.4, 3_200_000_000),
        measurement(0.3, 4_400_000_000, Outcome.OVER_BUDGET),
    )
    return [
        Trial(number=number, prediction=said, measurement=measured)
        for number, (said, measured) in enumerate(zip(predictions, found, strict=True))
    ]


def plan() -> Plan:
    """The answer that `trials` gives."""
    best = trials()[2]
    return Plan(
        autosp_version="0.1.0",
        torch_version="2.13.0",
        created_at="2026-01-02T03:04:05+00:00",
        study_name="net",
        mode="inference",
        model_name="Net",
        model_fingerprint="m" * 16,
        batch_signature="float32[1,8]",
        device=DEVICE,
        budget_bytes=BUDGET_BYTES,
        partition=profile().partition,
        candidate=best.prediction.candidate,
        prediction=best.prediction,
        measurement=best.measurement,
        floor_s=0.32,
        why="it was the fastest",
    )


def summary(name: str = "net", best_latency_s: float | None = 0.4) -> StudySummary:
    """A study, unfinished if it has no latency."""
    return StudySummary(
        name=name,
        key=study_key(model_name="Net", budget_bytes=BUDGET_BYTES),
        created_at="2026-01-02T03:04:05+00:00",
        trials=4,
        best_latency_s=best_latency_s,
        peak_bytes=None if best_latency_s is None else 3_200_000_000,
        finished=best_latency_s is not None,
    )


def lines(table: Table, width: int = 200) -> list[str]:
    """The table as a terminal without colours shows it, blanks folded."""
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [re.sub(r"\s+", " ", line).strip() for line in capture.get().splitlines() if line.strip()]


def line_with(table: Table, start: str) -> str:
    """The first line that begins so."""
    return next(line for line in lines(table) if line.startswith(start))
