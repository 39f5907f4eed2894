"""What the chosen plan costs against the best there is: it and others under the budget, measured side by side."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from kept_rows import Study, having
from quick_answers import small_profile, timed_ranking
from record import markdown
from tuner_measure import Measured, Tuned, ask, in_rounds, on_bench, run_folder, tune
from tuner_models import budget_of, load
from tuner_results import DEVICES, Job, Row, Run, failed_lines, percentile, too_small

from autosp.errors import BudgetTooSmallError
from autosp.report.units import seconds
from autosp.search.space import rank
from autosp.spec import Candidate

RANKING = "ranking"
"""In place of a model: how long predicting and sorting takes."""

RANKED_LAYERS = 200

WANTED_REGRET = 1.01
WANTED_TRIALS = 6
WANTED_PASSES, WANTED_EXTRA_S = 25, 5.0
WANTED_AGAIN_S = 0.1
WANTED_RANK_S = 1.0

REPEATS = 3
"""Of what takes milliseconds."""

RESAMPLES = 2000

FINALISTS = 4
"""Rivals that are measured on: those that were fastest at first."""

FINAL_ROUNDS = 2
"""Times as many rounds as at first. What was fastest of many then was lucky, too, and may not be again."""

PREFACE = (
    "`tune` of a budget, then its plan, the best predicted of the others (as the study's trials correct "
    f"predictions) and some at random, each in every round; then the plan and the {FINALISTS} fastest of those "
    f"whose peak was within the budget, in {FINAL_ROUNDS} times as many rounds, which alone count (rows of before "
    "have none). Regret: the plan's median ÷ the least. The least of noisy medians is too low, so regret is never "
    "below 1; *held out* takes the best of the other rounds and is free of that. Interval: 95 %, rounds drawn "
    "anew. Noise: a round's median of the plan against the median of its other rounds. Passes: wall time of `tune` "
    "÷ a pass of its plan."
)


def measure(job: Job) -> dict[str, Any]:
    """Of a model under a budget, or of the ranking of many layers."""
    return _ranking() if job.case.model == RANKING else _regret(job)


def _ranking() -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    return {"figures": vars(timed_ranking(small_profile(), RANKED_LAYERS))}


def _regret(job: Job) -> dict[str, Any]:
    device = DEVICES[job.device]()
    example = load(job.case.model, job.case.scale, device.torch_device)
    budget_bytes = budget_of(example, job.case.budget_percent or 0)
    with run_folder(job) as folder:
        try:
            tuned = tune(example, device, budget_bytes, folder)
        except BudgetTooSmallError as error:
            return too_small(error)
        again_s = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            ask(example, device, budget_bytes, folder)
            again_s.append(time.perf_counter() - begin)
        candidates = rivals(tuned, job.numbers["top"], job.numbers["random"])
        with on_bench(example, device, tuned.profile, folder) as validated:
            found = in_rounds(validated, [tuned.plan.candidate, *candidates], job.numbers["rounds"])
            again = [each.candidate for each in finalists(found, budget_bytes)]
            finals = in_rounds(validated, again, FINAL_ROUNDS * job.numbers["rounds"], seed=1)
    assert tuned.plan.measurement is not None, "tune measured it"
    return {
        "figures": {
            "title": example.title,
            "budget_bytes": budget_bytes,
            "wall_s": tuned.wall_s,
            "pass_s": tuned.plan.measurement.latency_s,
            "trials": len(tuned.trials),
            "why": tuned.plan.why,
            "again_s": again_s,
            "candidates": [each.dump() for each in found],
            "finals": [each.dump() for each in finals],
        }
    }


def finalists(found: Sequence[Measured], budget_bytes: int) -> list[Measured]:
    """The plan, which comes first, and the fastest of the others that kept the budget. None if the plan did not."""
    chosen, *others = found
    if not chosen.keeps(budget_bytes):
        return []
    kept = [each for each in others if each.keeps(budget_bytes)]
    return [chosen, *sorted(kept, key=lambda each: each.latency_s)[:FINALISTS]]


def rivals(tuned: Tuned, top: int, others: int, seed: int = 0) -> list[Candidate]:
    """Candidates under the plan's budget besides the plan's: the best as the study knows them, and random ones."""
    plan = tuned.plan
    assert plan.budget_bytes is not None, "it was tuned"
    ranked = rank(tuned.profile, plan.budget_bytes, plan.host_budget_bytes)
    learned = tuned.learned([prediction.candidate for prediction in ranked])
    known = [one.candidate for one in learned.predictions if one.candidate != plan.candidate]
    rest = known[top:]
    return known[:top] + random.Random(seed).sample(rest, min(others, len(rest)))


def run(asked: Run) -> None:
    """Model by model, budget by budget, then the ranking."""
    for model in asked.models:
        for percent in asked.budgets:
            asked.measured(model, percent, numbers=asked.numbers)
    asked.measured(RANKING)


@dataclass(frozen=True)
class Regret:
    """Of one row: the chosen plan against all that kept the budget."""

    of_best: float
    low: float
    high: float
    held_out: float | None
    noise: float | None
    best: Candidate
    measured: int

    @property
    def verdict(self) -> str:
        """Whether the target is met, as far as noise lets it be seen."""
        if self.of_best <= WANTED_REGRET:
            return "met"
        return "within noise" if self.low <= WANTED_REGRET else "**missed**"


def regret_of(row: Row) -> Regret | None:
    """None if the plan ran out of memory, or over the budget, where all of the device was there for it."""
    budget_bytes = row.figures["budget_bytes"]
    heat = [Measured.of(dumped) for dumped in row.figures["candidates"]]
    finals = [Measured.of(dumped) for dumped in row.figures.get("finals", [])]  # rows of before have none
    chosen, *others = finals or heat
    if not chosen.keeps(budget_bytes):
        return None
    field = [chosen, *(each for each in others if each.keeps(budget_bytes))]
    times = [each.latency_s for each in field]
    rounds = np.array(
        [[measurement.latency_s for measurement in each.rounds] for each in field]
    )  # [candidates, rounds]
    drawn = _resampled(rounds)
    noise = chosen.noise()
    return Regret(
        of_best=times[0] / min(times),
        low=percentile(drawn, 2.5),
        high=percentile(drawn, 97.5),
        held_out=_held_out(rounds),
        noise=median(noise) if noise else None,
        best=field[int(np.argmin(times))].candidate,
        measured=sum(each.keeps(budget_bytes) for each in heat),
    )


def _resampled(rounds: np.ndarray) -> list[float]:
    """The regret of rounds drawn with repetition: a round is drawn for all candidates alike."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        medians = np.median(rounds[:, rng.integers(rounds.shape[1], size=rounds.shape[1])], axis=1)
        found.append(float(medians[0] / medians.min()))
    return found


def _held_out(rounds: np.ndarray) -> float | None:
    """The plan's time ÷ that of the best of the other rounds, in each round; their median."""
    count = rounds.shape[1]
    if count < 2:
        return None
    ratios = []
    for at in range(count):
        best = int(np.argmin(np.median(np.delete(rounds, at, axis=1), axis=1)))
        ratios.append(float(rounds[0, at] / rounds[best, at]))
    return median(ratios)


def tuned_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of models, with figures: models as they came, each with its budgets from the least."""
    found = [row for row in rows if row.ok and row.case.model != RANKING]
    models = list(dict.fromkeys(row.case.model for row in found))
    return sorted(found, key=lambda row: (models.index(row.case.model), row.case.budget_percent or 0))


def wall_limit_s(row: Row) -> float:
    """What `tune` may take."""
    return WANTED_PASSES * float(row.figures["pass_s"]) + WANTED_EXTRA_S


def table(rows: list[Row]) -> str:
    """A line per model and budget."""
    columns = ["model", "budget", "plan", "regret", "interval", "held out", "noise", f"≤ {WANTED_REGRET}", "of"]
    columns += ["best", "trials", "tune", "passes", f"≤ {WANTED_PASSES} + {WANTED_EXTRA_S:g} s", "again"]
    lines = [_cells(row) for row in tuned_rows(rows)] + failed_lines(rows, len(columns))
    said = [
        f"`rank` of {RANKED_LAYERS} layers: {figures['settings']} settings of the grid, {figures['fitting']} fit half "
        f"of the weights: {seconds(median(figures['rank_s']))} on one core (wanted: {WANTED_RANK_S:g} s)."
        for figures in (row.figures for row in having(rows, model=RANKING))
    ]
    return "\n\n".join([PREFACE, markdown(columns, lines), *said])


def _cells(row: Row) -> list[str]:
    figures = row.figures
    chosen = Measured.of(figures["candidates"][0]).candidate
    regret = regret_of(row)
    judged = ["over the budget", *[""] * 6]
    if regret is not None:
        judged = [
            f"{regret.of_best:.3f}",
            f"{regret.low:.3f} – {regret.high:.3f}",
            "" if regret.held_out is None else f"{regret.held_out:.3f}",
            "" if regret.noise is None else f"{regret.noise:.1%}",
            regret.verdict,
            f"{regret.measured}",
            "the plan" if regret.best == chosen else regret.best.label(),
        ]
    return [
        figures["title"],
        f"{row.case.budget_percent:g} %",
        chosen.label(),
        *judged,
        f"{figures['trials']}",
        seconds(figures["wall_s"]),
        f"{figures['wall_s'] / figures['pass_s']:.0f}",
        "met" if figures["wall_s"] <= wall_limit_s(row) else "**missed**",
        seconds(median(figures["again_s"])),
    ]


def picture(rows: list[Row], path: Path) -> None:
    """Regret with its interval, and the wall time of `tune` against its limit."""
    from panels import figure, finish

    canvas, (left, right) = figure(2, width=5.5)
    for index, model in enumerate(dict.fromkeys(row.case.model for row in tuned_rows(rows))):
        mine = having(tuned_rows(rows), model=model)
        pairs = [(row.case.budget_percent, regret) for row in mine if (regret := regret_of(row)) is not None]
        style: dict[str, Any] = {"color": f"C{index}", "marker": "o", "label": model}
        reach = [[each.of_best - min(each.low, each.of_best) for _, each in pairs]]
        reach += [[max(each.high, each.of_best) - each.of_best for _, each in pairs]]
        at = [percent + index for percent, _ in pairs]
        left.errorbar(at, [each.of_best for _, each in pairs], yerr=reach, ls="", capsize=3, **style)
        limits = [row.figures["wall_s"] / wall_limit_s(row) for row in mine]
        right.plot([row.case.budget_percent for row in mine], limits, **style)
    left.axhline(WANTED_REGRET, color="grey", lw=0.8, ls=":")
    right.axhline(1, color="grey", lw=0.8, ls=":")
    left.set_ylabel("plan's median ÷ best median")
    right.set_ylabel(f"wall time of tune ÷ ({WANTED_PASSES} passes + {WANTED_EXTRA_S:g} s)")
    for panel in (left, right):
        panel.set_xlabel("budget, % of the weights")
    finish(canvas, path)


REGRET = Study("The chosen plan against the best there is", run, table, picture)
