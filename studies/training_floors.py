"""Time over the floor, for budgets of so many percent of plain training's peak."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from kept_rows import Study, having
from panels import HOLLOW, figure, finish
from record import markdown
from training_measure import Case, Job, Run, TrainingRow, binding, plain_s
from training_models import MODELS


def run_floors(run: Run) -> None:
    """Every missing row: plain training, then each budget, before the next repeat begins."""
    for model in run.models or MODELS:
        for repeat in range(run.repeats):
            case = Case(model, run.scale, run.paced_gb_per_s, repeat)
            job = Job(case, str(run.scratch))
            job.storage.unlink(missing_ok=True)
            plain = run.results.measured(job)
            if not plain.ok:
                continue
            for percent in run.budgets:
                case = Case(model, run.scale, run.paced_gb_per_s, repeat, percent)
                run.results.measured(Job.beside(plain, case, run.scratch))


def table(rows: list[TrainingRow]) -> str:
    """A table for each pace of the link."""
    parts = [
        "Budgets are of the peak of training with everything resident, under a plan; ÷ plain: of training without one. "
        "÷ floor: by the largest need of compute and of each direction of the link, as `training_floors` has them. "
        "Compute's is what profiling saw at its fastest, or plain training before and after in the same process where "
        "that was faster (in rows of the scale `cpu`, which are older: in the same repeat)."
    ]
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
    return [
        first["title"],
        _share(case.percent),
        f"{pass_s:.3g} s",
        f"{pass_s / plain_s(figures, [row.figures for row in plain]):.2f}",
        f"{median(floors):.2f} ({', '.join(f'{one:.2f}' for one in floors)})" if floors else "",
        binding(first),
        f"{max(one['peak_bytes'] for one in figures) / 1e6:.0f} MB",
        f"{sum(budgets)} of {len(budgets)}" if budgets else "",
        "equal" if all(one["same_gradients"] for one in figures) else "DIFFER",
        first.get("plan", "everything resident"),
    ]


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
    panel.axhline(1, color="grey", lw=0.8)
    finish(canvas, path, extra=[HOLLOW])


FLOORS = Study("Training: time over the floor", run_floors, table, picture)
