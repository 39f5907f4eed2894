"""Training, measured: one command per table.

python studies/training.py floors [--paced 2]     time ÷ floor, budgets of 25, 50 and 75 % of plain training's peak

A machine without an accelerator stands in for one: device and host are both RAM, and each direction of the link
between them is paced to so many GB/s. A pass is forward and backward, without an optimizer. Every measurement is a
process of its own. Rows are appended to results/training_<study>_<scale>.jsonl one by one, and what is there already is
not measured again, unless with --again. The table and the picture are made beside the rows; --report makes them without
measuring.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from kept_rows import Results, Row, Study, add_arguments, answering, having, write_report
from panels import HOLLOW, figure, finish
from record import markdown
from training_models import MODELS, SCALES, build

import autosp
from autosp.batch import equal
from autosp.cost_model.floor import training_floors
from autosp.devices import CpuDevice
from autosp.profiler.layers import timed_pass
from autosp.runtime.bench import Bench
from autosp.search.lean import study_of
from autosp.settings import settings
from autosp.spec import Plan, Tier
from autosp.store import Repository
from autosp.workload import Workload

PLAIN = "plain"
LEAST_PASSES, ENOUGH_S, MOST_PASSES = 3, 5.0, 12


@dataclass(frozen=True)
class Case:
    """What is measured: plain training, or a plan under so many percent of its peak."""

    model: str
    scale: str
    paced_gb_per_s: float
    repeat: int = 0
    percent: float | None = None


@dataclass(frozen=True)
class Job:
    """What a process is given."""

    case: Case
    scratch: str
    budget_bytes: int | None = None


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
    """What the command line asks for."""

    scale: str
    models: list[str]
    budgets: list[float]
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
    workload = Workload.of(made.model, made.batch, made.step, "training", device)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in made.model.parameters())
    figures: dict[str, Any] = {"title": made.title, "weight_bytes": weights}
    if case.percent is None:
        planned = partial(autosp.plan, made.model, made.batch, mode="training", step=made.step, device=device)
        count = len(set(planned(k=1, k_prime=1).partition.visits))
        return {"figures": figures | timed(workload, device, planned(k=count, k_prime=1, residents=count))}
    options: dict[str, Any] = {"mode": "training", "step": made.step, "device": device, "progress": False}
    storage = Path(job.scratch) / f"training-{case.repeat}.db"
    plan = autosp.tune(made.model, made.batch, f"{job.budget_bytes}B", storage=storage, **options)
    assert plan.prediction is not None and plan.floor_s is not None
    with workload.leaving_no_trace():
        plain = workload.run_seeded()
    figures |= timed(workload, device, plan, plain)
    with Repository(storage) as repository:
        profile, _ = study_of(repository, plan)
    assert job.budget_bytes is not None
    floors_s = training_floors(profile, job.budget_bytes)
    figures |= {"budget_bytes": job.budget_bytes, "floor_s": plan.floor_s, "floors_s": floors_s}
    figures["plan"] = plan.candidate.label()
    figures |= {"predicted_s": plan.prediction.latency_s, "over_floor": figures["pass_s"] / plan.floor_s}
    return {"figures": figures}


def timed(workload: Workload, device: CpuDevice, plan: Plan, plain: Any = None) -> dict[str, Any]:
    """Passes under a plan over the paced link. `plain`: the loss and the gradients that its must equal, bit by bit."""
    samples: list[float] = []
    with Bench(workload.model, plan.partition, device, settings().cache_dir, mode="training") as bench:
        streamed = bench.apply(plan.candidate)
        with streamed:
            same = plain is None or equal(workload.run_seeded(), plain)
            workload.run()
            while len(samples) < LEAST_PASSES or (sum(samples) < ENOUGH_S and len(samples) < MOST_PASSES):
                samples.append(timed_pass(device, workload.run)[0])
            peak_bytes = streamed.stats().peak_bytes
    return {"pass_s": median(samples), "samples_s": samples, "peak_bytes": peak_bytes, "same_gradients": same}


def run_floors(run: Run) -> None:
    """Every missing row: plain training, then each budget, before the next repeat begins."""
    for model in run.models:
        for repeat in range(run.repeats):
            case = Case(model, run.scale, run.paced_gb_per_s, repeat)
            plain = run.results.measured(Job(case, str(run.scratch)))
            if not plain.ok:
                continue
            for percent in run.budgets:
                budget_bytes = round(plain.figures["peak_bytes"] * percent / 100)
                case = Case(model, run.scale, run.paced_gb_per_s, repeat, percent)
                run.results.measured(Job(case, str(run.scratch), budget_bytes))


def table(rows: list[TrainingRow]) -> str:
    """A table for each pace of the link."""
    parts = []
    for paced in dict.fromkeys(row.case.paced_gb_per_s for row in rows):
        mine = [row for row in rows if row.case.paced_gb_per_s == paced]
        parts.append(f"Each direction of the link: {paced:g} GB/s.\n\n{_table(mine)}")
    return "\n\n".join(parts)


def _table(rows: list[TrainingRow]) -> str:
    """Medians over repeats; T ÷ floor of each, and how often the budget was kept."""
    lines = []
    for model in dict.fromkeys(row.case.model for row in rows):
        for percent in dict.fromkeys(row.case.percent for row in rows):
            mine = having(rows, model=model, percent=percent)
            if not mine:
                notes = {row.note for row in rows if (row.case.model, row.case.percent) == (model, percent)}
                lines += [[model, _share(percent), *[""] * 7, note] for note in sorted(notes)]
                continue
            lines.append(_line(mine, having(rows, model=model, percent=None)))
    columns = ["model", "budget", "pass", "÷ plain", "÷ floor", "binds", "peak", "kept", "gradients", "plan"]
    return markdown(columns, lines)


def _line(mine: list[TrainingRow], plain: list[TrainingRow]) -> list[str]:
    figures = [row.figures for row in mine]
    first, case = figures[0], mine[0].case
    pass_s = median(one["pass_s"] for one in figures)
    floors = [one["over_floor"] for one in figures if "over_floor" in one]
    budgets = [one["peak_bytes"] <= one["budget_bytes"] for one in figures if "budget_bytes" in one]
    plain_s = median(row.figures["pass_s"] for row in plain)
    return [
        first["title"],
        _share(case.percent),
        f"{pass_s:.3g} s",
        f"{pass_s / plain_s:.2f}",
        f"{median(floors):.2f} ({', '.join(f'{one:.2f}' for one in floors)})" if floors else "",
        _binding(first),
        f"{max(one['peak_bytes'] for one in figures) / 1e6:.0f} MB",
        f"{sum(budgets)} of {len(budgets)}" if budgets else "",
        "equal" if all(one["same_gradients"] for one in figures) else "DIFFER",
        first.get("plan", "everything resident"),
    ]


def _binding(figures: dict[str, Any]) -> str:
    """The resource whose need is the floor."""
    floors_s: dict[str, float] = figures.get("floors_s", {})
    return max(floors_s, key=floors_s.__getitem__, default="")


def _share(percent: float | None) -> str:
    return "none" if percent is None else f"{percent:g} %"


def picture(rows: list[TrainingRow], path: Path) -> None:
    """T ÷ floor over the budget, a colour per model and pace."""
    canvas, (panel,) = figure(1, 6.0)
    for index, (model, paced) in enumerate(dict.fromkeys((row.case.model, row.case.paced_gb_per_s) for row in rows)):
        colour = f"C{index}"
        panel.plot([], [], ls="", marker="o", color=colour, label=f"{model}, {paced:g} GB/s")
        for row in having(rows, model=model, paced_gb_per_s=paced):
            if row.case.percent is not None:
                kept = row.figures["peak_bytes"] <= row.figures["budget_bytes"]
                point = [row.case.percent], [row.figures["over_floor"]]
                panel.plot(*point, ls="", marker="o", color=colour, mfc=colour if kept else "white")
    panel.set_xlabel("budget, % of plain training's peak")
    panel.set_ylabel("time ÷ floor")
    panel.set_ylim(bottom=0.95)
    finish(canvas, path, extra=[HOLLOW])


FLOORS = Study("Training: time over the floor", run_floors, table, picture)
STUDIES = {"floors": FLOORS}


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, then write the table and the picture."""
    asked = _parser().parse_args(arguments)
    raw = asked.output / f"training_{asked.study}_{asked.scale}.jsonl"
    if not asked.report:
        scratch = asked.scratch or settings().cache_dir
        scratch.mkdir(parents=True, exist_ok=True)
        device = CpuDevice(slow_tier=Tier.HOST, paced_bytes_per_s=asked.paced * 1e9)
        results = Results(raw, TrainingRow, device, run_job, again=asked.again, timeout_s=asked.timeout_s)
        budgets = [float(part) for part in asked.budgets.split(",")]
        models = asked.models.split(",")
        STUDIES[asked.study].run(Run(asked.scale, models, budgets, asked.repeats, asked.paced, scratch, results))
    write_report(STUDIES[asked.study], raw, TrainingRow)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--budgets", default="25,50,75", help="percent of plain training's peak")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--paced", type=float, default=2.0, metavar="GBPS", help="each direction of the link, in GB/s")
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
