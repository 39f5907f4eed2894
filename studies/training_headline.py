"""The Superpipeline paper's headline: 60 % less memory than plain training, at 5 % more time at most.

A plan moves the weights of a pass once, however many microbatches share it, so the time that moving them takes is
hidden behind the compute of enough of them. How many are enough is what this table says.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from kept_rows import Study, having
from panels import HOLLOW, figure, finish
from record import markdown
from training_measure import Case, Job, Run, TrainingRow, binding, plain_s

from autosp.report.units import ratio, seconds, size

PERCENT = 40.0
"""Of the memory of plain training."""
MOST_TIME = 1.05
"""Of the time of plain training."""
HEADLINE_MODELS = ("vit", "llama")


def run_headline(run: Run) -> None:
    """Every missing row: plain training of each number of microbatches, then its plan."""
    for model in run.models or HEADLINE_MODELS:
        for repeat in range(run.repeats):
            Job(Case(model, run.scale, run.paced_gb_per_s, repeat), str(run.scratch)).storage.unlink(missing_ok=True)
            for count in run.microbatches:
                case = Case(model, run.scale, run.paced_gb_per_s, repeat, microbatches=count)
                plain = run.results.measured(Job(case, str(run.scratch)))
                if not plain.ok:
                    continue
                case = Case(model, run.scale, run.paced_gb_per_s, repeat, PERCENT, count)
                run.results.measured(Job.beside(plain, case, run.scratch))


def table(rows: list[TrainingRow]) -> str:
    """A table for each pace of the link, and the smallest m of each model at which the headline holds."""
    return "\n\n".join(_table(paced, mine) for paced, mine in _by_pace(rows).items())


def _table(paced: float, rows: list[TrainingRow]) -> str:
    lines, said = [], []
    for model in _models(rows):
        counts = sorted({row.case.microbatches for row in rows if row.case.model == model})
        lines += [_line(rows, model, count) for count in counts]
        said.append(_reached(rows, model, counts))
    columns = ["model", "m", "plain", "plan", "÷ plain", "÷ resident", "÷ floor", "binds", "plain's peak", "peak"]
    head = f"Each direction of the link: {paced:g} GB/s. m microbatches: *plain*, one after another without a plan, or "
    head += f"sharing a pass under the plan tuned for {PERCENT:g} % of plain training's peak. *resident*: one after "
    head += "another under a plan that keeps everything in device memory. ÷ floor: as in the study of the floors."
    return "\n\n".join([head, markdown([*columns, "share", "gradients", "setting"], lines), "\n".join(said)])


def _line(rows: list[TrainingRow], model: str, count: int) -> list[str]:
    plain, mine = _both(rows, model, count)
    if not plain or not mine:
        notes = [row.note for row in rows if (row.case.model, row.case.microbatches) == (model, count) and not row.ok]
        return [_title(rows, model), str(count), *[""] * 10, "; ".join(dict.fromkeys(notes)) or "not measured yet"]
    pass_s, peak_bytes = _median(mine, "pass_s"), max(one["peak_bytes"] for one in mine)
    return [
        _title(rows, model),
        str(count),
        seconds(plain_s(mine, plain)),
        seconds(pass_s),
        ratio(pass_s, plain_s(mine, plain)),
        ratio(pass_s, _median(plain, "pass_s")),
        ratio(_median(mine, "over_floor"), 1.0),
        binding(mine[0]),
        size(_median(plain, "peak_bytes")),
        size(peak_bytes),
        f"{peak_bytes / _median(plain, 'peak_bytes'):.1%}",
        "equal" if all(one["same_gradients"] for one in mine) else "DIFFER",
        mine[0]["plan"],
    ]


def _reached(rows: list[TrainingRow], model: str, counts: list[int]) -> str:
    least = next((count for count in counts if _holds(rows, model, count)), None)
    answer = f"smallest m = {least}" if least else f"not reached up to {counts[-1]}"
    saved, more = f"{100 - PERCENT:g} % less memory", f"{100 * (MOST_TIME - 1):.0f} % more time at most"
    return f"- {_title(rows, model)}: {saved} at {more}: {answer}."


def _title(rows: list[TrainingRow], model: str) -> str:
    return next((row.figures["title"] for row in having(rows, model=model)), model)


def _holds(rows: list[TrainingRow], model: str, count: int) -> bool:
    """Whether it does for m = `count`: time by the medians, memory and bits every time."""
    plain, mine = _both(rows, model, count)
    if not plain or not mine:
        return False
    right = all(one["same_gradients"] and one["peak_bytes"] <= one["budget_bytes"] for one in mine)
    return right and _median(mine, "pass_s") <= MOST_TIME * plain_s(mine, plain)


def _both(rows: list[TrainingRow], model: str, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Figures of plain training, and of the plan."""
    mine = having(rows, model=model, microbatches=count)
    plain = [row.figures for row in mine if row.case.percent is None]
    return plain, [row.figures for row in mine if row.case.percent is not None]


def _median(figures: list[dict[str, Any]], name: str) -> float:
    return median(one[name] for one in figures)


def _models(rows: list[TrainingRow]) -> list[str]:
    return list(dict.fromkeys(row.case.model for row in rows))


def _by_pace(rows: list[TrainingRow]) -> dict[float, list[TrainingRow]]:
    paces = dict.fromkeys(row.case.paced_gb_per_s for row in rows)
    return {paced: [row for row in rows if row.case.paced_gb_per_s == paced] for paced in paces}


def picture(rows: list[TrainingRow], path: Path) -> None:
    """Time ÷ plain training's over m, a line per model and pace; the headline's limit."""
    canvas, (panel,) = figure(1, 6.0)
    counts = sorted({row.case.microbatches for row in rows})
    lines = [(paced, model) for paced, mine in _by_pace(rows).items() for model in _models(mine)]
    for number, (paced, model) in enumerate(lines):
        colour, points = f"C{number}", []
        of_pace = having(rows, paced_gb_per_s=paced)
        for count in counts:
            plain, mine = _both(of_pace, model, count)
            if plain and mine:
                points.append((count, _median(mine, "pass_s") / plain_s(mine, plain)))
                kept = all(one["peak_bytes"] <= one["budget_bytes"] for one in mine)
                panel.plot(*points[-1], ls="", marker="o", color=colour, mfc=colour if kept else "white")
        panel.plot([m for m, _ in points], [over for _, over in points], color=colour, label=f"{model}, {paced:g} GB/s")
    panel.axhline(MOST_TIME, color="grey", ls="--", label=f"{MOST_TIME:g}")
    panel.set_xlim(counts[0] / 1.2, counts[-1] * 1.2)
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xlabel("microbatches of a step")
    panel.set_ylabel(f"time ÷ plain, {PERCENT:g} % of the memory")
    finish(canvas, path, extra=[HOLLOW])


HEADLINE = Study("Training: 60 % less memory, and the time that it takes", run_headline, table, picture)
