"""How far predictions are off: candidates over the whole range of memory, each measured in several rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from kept_rows import Study
from record import markdown
from tuner_measure import Measured, by_candidate, in_rounds, on_bench, run_folder, tune
from tuner_models import budget_of, load
from tuner_results import DEVICES, Job, Row, Run, failed_lines, percentile, too_small

from autosp.cost_model.predict import predict
from autosp.errors import BudgetTooSmallError
from autosp.profiler.host import binding_host_budget
from autosp.search.space import rank
from autosp.spec import Candidate, Prediction, Profile

STUDIED_PERCENT = 50.0
"""The budget of the study that the profile is from, and whose trials correct it."""

BUDGETS_PERCENT = (15, 25, 50, 75, 90)
"""Budgets for which the candidates have been filled with residents; the best of each is measured."""

PREFACE = (
    "Error: prediction ÷ measured median − 1. *Profile alone* is what `tune` knows before its first trial, *after the "
    f"study* what it knows after the trials of a budget of {STUDIED_PERCENT:g} % of the weights. Noise: one round's "
    "median against the median of the same candidate's other rounds; no prediction can be seen to be better than "
    "that. Memory: the predicted peak against the largest that any round measured."
)


def measure(job: Job) -> dict[str, Any]:
    """Tune at the studied budget, then measure a sample of all candidates."""
    device = DEVICES[job.device]()
    example = load(job.case.model, job.case.scale, device.torch_device)
    with run_folder(job) as folder:
        try:
            tuned = tune(example, device, budget_of(example, job.case.budget_percent or STUDIED_PERCENT), folder)
        except BudgetTooSmallError as error:
            return too_small(error)
        profile = tuned.profile
        host_bytes = binding_host_budget(profile.partition, device, None)
        candidates = sample(every_candidate(profile, host_bytes), job.numbers["candidates"])
        with on_bench(example, device, profile, folder) as validated:
            found = in_rounds(validated, candidates, job.numbers["rounds"])
    alone = by_candidate(predict(profile, candidates))
    learned = tuned.learned(candidates)
    after = by_candidate(learned.predictions)
    return {
        "figures": {
            "title": example.title,
            "budget_bytes": tuned.plan.budget_bytes,
            "weight_bytes": budget_of(example, 100),
            "profile": profile.model_dump(mode="json"),
            "study_trials": len(tuned.trials),
            "candidates": [
                each.dump()
                | {
                    "predicted_s": alone[each.candidate].latency_s,
                    "predicted_bytes": alone[each.candidate].peak_bytes,
                    "predicted_after_s": after[each.candidate].latency_s,
                    "predicted_after_bytes": learned.peak_bytes(after[each.candidate]),
                }
                for each in found
            ],
        }
    }


def every_candidate(profile: Profile, host_budget_bytes: int | None) -> list[tuple[float, Prediction]]:
    """What `tune` would choose among, over all budgets: the least budget (percent) that has it, and its prediction."""
    whole = profile.partition.total_bytes + profile.workspace_bytes
    found: dict[Candidate, tuple[float, Prediction]] = {}
    for percent in (*BUDGETS_PERCENT, 200):
        budget_bytes = round(whole * percent / 100)
        try:
            ranked = rank(profile, budget_bytes, host_budget_bytes)
        except BudgetTooSmallError:
            continue
        for prediction in ranked:
            found.setdefault(prediction.candidate, (percent, prediction))
    return list(found.values())


def sample(known: Sequence[tuple[float, Prediction]], count: int) -> list[Candidate]:
    """All candidates if they are few, else the fastest of each budget, and others spread over predicted memory."""
    ordered = sorted((prediction for _, prediction in known), key=lambda prediction: prediction.peak_bytes)
    if len(ordered) <= count:
        return [prediction.candidate for prediction in ordered]
    best = []
    for limit in BUDGETS_PERCENT:
        fitting = [prediction for percent, prediction in known if percent <= limit]
        if fitting:
            best.append(min(fitting, key=lambda prediction: prediction.latency_s))
    rest = max(2, count - len(set(best)))
    spread = [ordered[index * (len(ordered) - 1) // (rest - 1)] for index in range(rest)]
    return list(dict.fromkeys(prediction.candidate for prediction in (*best, *spread)))


def run(asked: Run) -> None:
    """Model by model."""
    for model in asked.models:
        asked.measured(model, STUDIED_PERCENT, numbers=asked.numbers)


@dataclass(frozen=True)
class Errors:
    """Relative errors of some candidates' predictions, signed; and what no prediction can be better than."""

    latency: list[float]
    latency_after: list[float]
    memory: list[float]
    memory_after: list[float]
    noise: list[float]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Errors:
        """All candidates that ran, of all these rows."""
        found: dict[str, list[float]] = {"latency": [], "latency_after": [], "memory": [], "memory_after": []}
        noise: list[float] = []
        for row in rows:
            for dumped in row.figures["candidates"]:
                measured = Measured.of(dumped)
                if measured.ran:
                    noise += measured.noise()
                    found["latency"].append(dumped["predicted_s"] / measured.latency_s - 1)
                    found["latency_after"].append(dumped["predicted_after_s"] / measured.latency_s - 1)
                    found["memory"].append(dumped["predicted_bytes"] / measured.peak_bytes - 1)
                    found["memory_after"].append(dumped["predicted_after_bytes"] / measured.peak_bytes - 1)
        return cls(**found, noise=noise)


def sizes(errors: Sequence[float]) -> tuple[float, float]:
    """Median and 95th percentile of the errors without their signs."""
    absolute = [abs(error) for error in errors]
    return median(absolute), percentile(absolute, 95)


def under_and_over(errors: Sequence[float]) -> tuple[float, float]:
    """The worst under-prediction, nothing if there is none, and the median error."""
    return max(0.0, -min(errors)), median(errors)


def table(rows: list[Row]) -> str:
    """A line per model, and one for all candidates together."""
    columns = ["model", "candidates", "rounds", "latency, profile alone", "after the study", "noise"]
    columns += ["memory, worst under", "median over", "after: worst under", "median over"]
    good = [row for row in rows if row.ok]
    lines = [_cells(row.figures["title"], [row]) for row in good] + [_cells("**all**", good)]
    legend = "Latency and noise: median / 95th percentile of the absolute error."
    return "\n\n".join([PREFACE, legend, markdown(columns, [*lines, *failed_lines(rows, len(columns))])])


def _cells(title: str, rows: Sequence[Row]) -> list[str]:
    errors = Errors.of(rows)
    count = sum(len(row.figures["candidates"]) for row in rows)
    rounds = sorted({len(each["rounds"]) for row in rows for each in row.figures["candidates"]})
    ran = len(errors.latency)
    if not ran:
        return [title, f"0 of {count} ran", *[""] * 8]
    memory = [part for of in (errors.memory, errors.memory_after) for part in under_and_over(of)]
    return [
        title,
        f"{ran}" if ran == count else f"{ran} of {count} ran",
        " – ".join(map(str, rounds)),
        *(two(sizes(of)) if of else "" for of in (errors.latency, errors.latency_after, errors.noise)),
        *(f"{part:.1%}" for part in memory),
    ]


def two(figures: tuple[float, float]) -> str:
    """Median and 95th percentile."""
    return f"{figures[0]:.1%} / {figures[1]:.1%}"


def picture(rows: list[Row], path: Path) -> None:
    """Errors of latency and of memory over the memory that was measured."""
    from panels import figure, finish

    canvas, (latency, memory) = figure(2, width=5.5)
    for index, row in enumerate(row for row in rows if row.ok):
        pairs = [(each, Measured.of(each)) for each in row.figures["candidates"]]
        pairs = [(each, measured) for each, measured in pairs if measured.ran]
        shares = [100 * measured.peak_bytes / row.figures["weight_bytes"] for _, measured in pairs]
        style: dict[str, Any] = {"color": f"C{index}", "marker": "o", "ls": "", "ms": 4}
        for key, fill in (("predicted_s", "white"), ("predicted_after_s", f"C{index}")):
            label = f"{row.case.model}, {'profile alone' if fill == 'white' else 'after the study'}"
            errors = [100 * (each[key] / measured.latency_s - 1) for each, measured in pairs]
            latency.plot(shares, errors, **style, mfc=fill, label=label)
        errors = [100 * (each["predicted_bytes"] / measured.peak_bytes - 1) for each, measured in pairs]
        memory.plot(shares, errors, **style, mfc="white")
    for panel, what in ((latency, "latency"), (memory, "memory")):
        panel.axhline(0, color="grey", lw=0.8)
        panel.set_xlabel("measured peak, % of the weights")
        panel.set_ylabel(f"error of predicted {what}, %")
    finish(canvas, path)


ACCURACY = Study("Predictions against measurements", run, table, picture)
