"""Whether budgets are kept: random models, batches and budgets, each tuned in one process and run in another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kept_rows import Answer, Measure, Study
from peer_measure import Memory, systems_of, timed
from peer_systems import TUNED, Setting, rehearse, weight_bytes
from record import markdown
from tuner_draws import Draw, budget_between, build, draw, import_families
from tuner_measure import run_folder, tune
from tuner_results import DEVICES, PACED_BYTES_PER_S, TOO_SMALL, Job, Row, Run

from autosp.batch import call
from autosp.errors import BudgetTooSmallError
from autosp.report.units import size
from autosp.search.space import suggested_gb
from autosp.spec import Outcome, Plan
from autosp.workload import Workload

OUT_OF_MEMORY = "out of memory"
PASSES = 5

PREFACE = (
    "Each draw: `tune` in a fresh process, then its plan in another one, for "
    f"{PASSES} passes. A budget that is refused is asked again, between what the error suggests and more than "
    "all of the weights; *too small* is where that was refused too. Over, tune: the peak that `tune` measured of its "
    "plan was beyond the budget. Over, run: that of the other process was, or it ran out of memory. On a CPU that is "
    "the kernel's figure beyond what the process had before the plan was applied, without the weights and without "
    "pages of files. Infeasible trials: over the budget or out of memory, in studies that ended with a plan all the "
    "same. Failed: crashed, ran out of time or raised something else."
)


def measure(job: Job) -> dict[str, Any]:
    """The first process of a draw: tune. With a plan in its numbers the second: run it."""
    return _run_plan(job) if "plan" in job.numbers else _tune(job)


def _tune(job: Job) -> dict[str, Any]:
    device = DEVICES[job.device]()
    drawn = Draw(**job.numbers["draw"])
    example = build(drawn, job.case.scale)
    all_bytes = weight_bytes(example.model)
    budget_bytes = max(1, budget_between(job.numbers.get("least_bytes", 0), all_bytes, drawn.share))
    with run_folder(job) as folder:
        try:
            tuned = tune(example, device, budget_bytes, folder)
        except BudgetTooSmallError as error:
            note = f"the least that works is {size(error.least_bytes)}"
            figures = {"budget_bytes": budget_bytes, "least_bytes": error.least_bytes}
            return {"outcome": TOO_SMALL, "note": note, "figures": figures}
    assert tuned.plan.measurement is not None, "tune measured it"
    return {
        "figures": {
            "budget_bytes": budget_bytes,
            "weight_bytes": all_bytes,
            "workspace_bytes": tuned.profile.workspace_bytes,
            "tune_s": tuned.wall_s,
            "tune_peak_bytes": tuned.plan.measurement.peak_bytes,
            "trials": dict(Counter(trial.measurement.outcome.value for trial in tuned.trials)),
            "setting": tuned.plan.candidate.label(),
            "plan": tuned.plan.model_dump_json(),
        }
    }


def _run_plan(job: Job) -> dict[str, Any]:
    device = DEVICES[job.device]()
    paced = PACED_BYTES_PER_S if job.device == "paced" else None
    system = systems_of(paced)[TUNED]
    plan = Plan.model_validate_json(job.numbers["plan"])
    with run_folder(job) as folder:
        setting = Setting(device, folder, paced=paced is not None)
        rehearse(system, setting)
        drawn = Draw(**job.numbers["draw"])
        rehearse_family(drawn, job.case.scale)
        example = build(drawn, job.case.scale)
        workload = Workload.of(example.model, example.batch, example.step, "inference", device)
        memory = Memory(device, example.model, folder=None)
        try:
            with device.limit(plan.budget_bytes), system.apply(example.model, replace(setting, plan=plan)) as own_peak:
                memory.begin_peak()
                for _ in range(PASSES):
                    _seconds, _output = timed(workload, device)  # as in a loop, the last output lives meanwhile
                peak_bytes = memory.peak_bytes() if own_peak is None else own_peak()
        except Exception as error:
            if not device.is_out_of_memory(error):
                raise
            return {"outcome": OUT_OF_MEMORY, "note": str(error)}
    return {"figures": {"peak_bytes": peak_bytes}}


def rehearse_family(drawn: Draw, scale: str) -> None:
    """A pass of the family's smallest model: what libraries take at their first use is the process's, not a plan's."""
    small = build(replace(drawn, layers=1, width=1, batch=1, length=1), scale)
    with torch.no_grad():
        call(small.model, small.batch)


def in_two_processes(answer: Answer, measure: Measure, job: Job, folder: Path, timeout_s: float) -> dict[str, Any]:
    """Tune, once more if the budget is refused, then run the plan; each by `answer`."""
    tuned = answer(measure, job, folder, timeout_s)
    refused = tuned["figures"] if tuned.get("outcome") == TOO_SMALL else None
    if refused is not None:
        suggested_bytes = round(float(suggested_gb(refused["least_bytes"])) * 1e9)
        job = replace(job, numbers=job.numbers | {"least_bytes": suggested_bytes})
        tuned = answer(measure, job, folder, timeout_s)
    if "outcome" in tuned:
        return tuned
    figures = tuned["figures"] | {"refused": refused}
    job = replace(job, numbers=job.numbers | {"plan": figures.pop("plan")})
    ran = answer(measure, job, folder, timeout_s)
    return ran | {"figures": figures | ran.get("figures", {})}


def run(asked: Run) -> None:
    """Draw by draw."""
    import_families()
    first = asked.numbers["first"]
    for number in range(first, first + asked.numbers["draws"]):
        drawn = draw(number)
        asked.measured(drawn.family, number=number, numbers={"draw": asdict(drawn)})


def over_in_tune(row: Row) -> bool:
    """Whether `tune` returned a plan that it had seen over the budget."""
    return bool(row.figures.get("tune_peak_bytes", 0) > row.figures.get("budget_bytes", 0))


def over_in_run(row: Row) -> bool:
    """Whether the plan went over the budget in a process of its own."""
    return row.outcome == OUT_OF_MEMORY or (row.ok and row.figures["peak_bytes"] > row.figures["budget_bytes"])


def failed(row: Row) -> bool:
    """Whether there is neither a plan nor a reason why there is none."""
    return row.outcome not in ("ok", TOO_SMALL, OUT_OF_MEMORY)


def infeasible_trials(row: Row) -> int:
    """Trials over the budget or out of memory, in a study that ended with a plan."""
    counts: dict[str, int] = row.figures.get("trials", {})
    return counts.get(Outcome.OVER_BUDGET.value, 0) + counts.get(Outcome.OUT_OF_MEMORY.value, 0)


def over(row: Row) -> bool:
    """Either of the two."""
    return over_in_run(row) or (row.outcome != TOO_SMALL and over_in_tune(row))


def table(rows: list[Row]) -> str:
    """A line per family, one for all, and one for each draw that went over or failed."""
    columns = ["family", "draws", "plans", "refused first", "too small", "over, tune", "over, run", "failed"]
    columns += ["infeasible trials", "largest peak ÷ budget", "median", "seconds of tune, median"]
    families = dict.fromkeys(sorted(row.case.model for row in rows))
    lines = [_cells(name, [row for row in rows if row.case.model == name]) for name in families]
    parts = [PREFACE, markdown(columns, [*lines, _cells("**all**", rows)])]
    bad = [row for row in rows if over(row) or failed(row)]
    if bad:
        parts.append(markdown(["draw", "setting", "budget", "peak of tune", "of the run", ""], list(map(_told, bad))))
    return "\n\n".join(parts)


def _cells(name: str, rows: Sequence[Row]) -> list[str]:
    ran = [row for row in rows if row.ok]
    shares = [row.figures["peak_bytes"] / row.figures["budget_bytes"] for row in ran]
    return [
        name,
        f"{len(rows)}",
        f"{len(ran)}",
        f"{sum(row.figures['refused'] is not None for row in ran)}",
        f"{sum(row.outcome == TOO_SMALL for row in rows)}",
        f"{sum(map(over_in_tune, ran))}",
        f"{sum(map(over_in_run, rows))}",
        f"{sum(map(failed, rows))}",
        f"{sum(map(infeasible_trials, rows))}",
        f"{max(shares):.3f}" if shares else "",
        f"{median(shares):.3f}" if shares else "",
        f"{median(row.figures['tune_s'] for row in ran):.1f}" if ran else "",
    ]


def _told(row: Row) -> list[str]:
    figures = row.figures
    sizes = [size(figures.get(name)) for name in ("budget_bytes", "tune_peak_bytes", "peak_bytes")]
    said = "" if row.ok else f"{row.outcome}: {row.note}".replace("|", "/")
    return [str(row.case), figures.get("setting", ""), *sizes, said]


def picture(rows: list[Row], path: Path) -> None:
    """Peak over budget against the budget's share of the weights."""
    from panels import figure, finish

    canvas, (panel,) = figure(1, width=7.0)
    ran = [row for row in rows if row.ok]
    for index, family in enumerate(dict.fromkeys(sorted(row.case.model for row in ran))):
        mine = [row.figures for row in ran if row.case.model == family]
        at = [100 * figures["budget_bytes"] / figures["weight_bytes"] for figures in mine]
        peaks = [figures["peak_bytes"] / figures["budget_bytes"] for figures in mine]
        panel.plot(at, peaks, color=f"C{index}", marker="o", ms=4, ls="", label=family)
    panel.axhline(1, color="grey", lw=0.8)
    panel.set_xscale("log")
    panel.set_xlabel("budget, % of the weights")
    panel.set_ylabel("peak in a fresh process ÷ budget")
    finish(canvas, path)


BUDGET = Study("Random models, batches and budgets: is the budget kept?", run, table, picture)
