"""One measurement of training: plain, or under a plan that was tuned for a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from kept_rows import Results, Row, answering
from training_models import build

import autosp
from autosp.batch import backward, call, equal
from autosp.cost_model.floor import training_floors
from autosp.devices import CpuDevice
from autosp.runtime.bench import Bench, timed_pass
from autosp.search.lean import study_of
from autosp.settings import settings
from autosp.spec import Plan, Tier
from autosp.store import Repository
from autosp.workload import Workload

LEAST_PASSES, ENOUGH_S, MOST_PASSES = 3, 5.0, 12


@dataclass(frozen=True)
class Case:
    """What is measured: plain training, or a plan under so many percent of its peak; of so many microbatches."""

    model: str
    scale: str
    paced_gb_per_s: float
    repeat: int = 0
    percent: float | None = None
    microbatches: int = 1


@dataclass(frozen=True)
class Job:
    """What a process is given."""

    case: Case
    scratch: str
    budget_bytes: int | None = None

    @classmethod
    def beside(cls, plain: TrainingRow, case: Case, scratch: Path) -> Job:
        """Of a case with a budget, of which its plain training is known."""
        assert case.percent is not None
        return cls(case, str(scratch), round(plain.figures["peak_bytes"] * case.percent / 100))

    @property
    def storage(self) -> Path:
        """The database of the case's model, pace and repeat: all its budgets and groups share a profile."""
        case = self.case
        return Path(self.scratch) / f"training-{case.model}-{case.scale}-{case.paced_gb_per_s:g}-{case.repeat}.db"


@dataclass(frozen=True)
class TrainingRow(Row):
    """One line of the raw results."""

    case_type: ClassVar[type] = Case

    def said(self) -> str:
        """What came of it, in a line."""
        if not self.ok:
            return super().said()
        over = f", {self.figures['over_floor']:.2f} × floor" if "over_floor" in self.figures else ""
        return f"{self.figures['pass_s']:.4f} s{over}, peak {self.figures['peak_bytes'] / 1e9:.4f} GB"


@dataclass(frozen=True)
class Run:
    """What the command line asks for. No models: those of the study."""

    scale: str
    models: list[str]
    budgets: list[float]
    microbatches: list[int]
    repeats: int
    paced_gb_per_s: float
    scratch: Path
    results: Results[TrainingRow]


def run_job(job: Job, answer: str) -> None:
    """Measure, and write the row to the file `answer`."""
    answering(measure, job, answer)


def measure(job: Job) -> dict[str, Any]:
    """Plain training; or a plan, tuned under the budget, beside the gradients that plain training gives."""
    case = job.case
    device = CpuDevice(slow_tier=Tier.HOST, paced_bytes_per_s=case.paced_gb_per_s * 1e9)
    made = build(case.model, case.scale)
    workload = Workload.of(made.model, made.batch, made.step, "training", device, group=case.microbatches)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in made.model.parameters())
    figures: dict[str, Any] = {"title": made.title, "weight_bytes": weights}
    if case.percent is None:
        return {"figures": figures | _plain(workload, device)}
    return {"figures": figures | _planned(workload, device, job)}


def _plain(workload: Workload, device: CpuDevice) -> dict[str, Any]:
    """The microbatches one after another: without a plan; and their peak, under one that keeps everything."""
    run = partial(_run_plainly, workload)
    unplanned = _unplanned(workload, device)
    options: dict[str, Any] = {"mode": "training", "step": workload.step, "device": device}
    planned = partial(autosp.plan, workload.model, workload.batch, **options)
    count = len(set(planned(k=1, k_prime=1).partition.visits))
    plan = planned(k=count, k_prime=1, residents=count)
    with Bench(workload.model, plan.partition, device, settings().cache_dir, mode="training") as bench:
        streamed = bench.apply(plan.candidate)
        with streamed:
            run()
            samples = _samples(device, run)
            peak_bytes = streamed.stats().peak_bytes
    return _figures(samples, peak_bytes) | {"unplanned_s": median(unplanned), "same_gradients": True}


def _planned(workload: Workload, device: CpuDevice, job: Job) -> dict[str, Any]:
    """Passes under the plan, whose loss and gradients are compared with those of plain training, bit by bit."""
    assert job.budget_bytes is not None
    plan = autosp.tune(
        workload.model,
        workload.batch,
        f"{job.budget_bytes}B",
        mode="training",
        step=workload.step,
        group=workload.group,
        device=device,
        storage=job.storage,
        progress=False,
    )
    assert plan.prediction is not None
    with workload.leaving_no_trace():
        plain = workload.run_seeded()
    with Repository(job.storage) as repository:
        profile, _ = study_of(repository, plan)
    unplanned = _unplanned(workload, device)
    figures = _under(workload, device, plan, plain)
    unplanned_s = median([*unplanned, *_unplanned(workload, device)])
    floors_s = training_floors(profile, job.budget_bytes, workload.group)
    floors_s["compute"] *= min(1.0, unplanned_s / (workload.group * profile.least_compute_s))
    figures |= {"budget_bytes": job.budget_bytes, "floors_s": floors_s, "plan": plan.candidate.label()}
    figures |= {"predicted_s": plan.prediction.latency_s, "profiled_compute_s": profile.least_compute_s}
    figures["unplanned_s"] = unplanned_s
    return figures | {"over_floor": figures["pass_s"] / max(floors_s.values())}


def _under(workload: Workload, device: CpuDevice, plan: Plan, plain: Any) -> dict[str, Any]:
    with Bench(workload.model, plan.partition, device, settings().cache_dir, mode="training") as bench:
        streamed = bench.apply(plan.candidate)
        with streamed:
            same = equal(workload.run_seeded(streamed), plain)
            run = partial(workload.run_under, streamed)
            run()
            samples = _samples(device, run)
            peak_bytes = streamed.stats().peak_bytes
    return _figures(samples, peak_bytes) | {"same_gradients": same}


def _run_plainly(workload: Workload) -> None:
    workload.model.zero_grad()
    for _ in range(workload.group):
        backward(workload.step or call, workload.model, workload.batch)


def _unplanned(workload: Workload, device: CpuDevice) -> list[float]:
    """Passes without a plan, after one that may be slower."""
    _run_plainly(workload)
    samples = _samples(device, partial(_run_plainly, workload))
    workload.model.zero_grad()
    return samples


def _samples(device: CpuDevice, run: Callable[[], Any]) -> list[float]:
    samples: list[float] = []
    while len(samples) < LEAST_PASSES or (sum(samples) < ENOUGH_S and len(samples) < MOST_PASSES):
        samples.append(timed_pass(device, run)[0])
    return samples


def _figures(samples: list[float], peak_bytes: int) -> dict[str, Any]:
    return {"pass_s": median(samples), "samples_s": samples, "peak_bytes": peak_bytes}


def plain_s(mine: list[dict[str, Any]], plain: list[dict[str, Any]]) -> float:
    """Of plain training, without a plan: as the plan's own processes saw it before and after. Old rows: as others did.

    How fast the machine is differs more from process to process than a plan from plain training.
    """
    here = [one["unplanned_s"] for one in mine if "unplanned_s" in one]
    return median(here or [one["unplanned_s"] for one in plain])


def binding(figures: dict[str, Any]) -> str:
    """The resource whose need is the floor."""
    floors_s: dict[str, float] = figures.get("floors_s", {})
    return max(floors_s, key=floors_s.__getitem__, default="")
