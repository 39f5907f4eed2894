"""Our sampler beside optuna's, on the same study: what each has found after so many trials.

A study is replayed on candidates that were all measured before: a proposal stands for the nearest of them, and is
answered with its measurement of a random round. So every sampler sees the same noise, and none waits for a device.
"""

from __future__ import annotations

import math
import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import optuna
from kept_rows import Study, having
from optuna.trial import TrialState
from record import markdown
from tuner_measure import Measured
from tuner_results import TOO_SMALL, Job, Row, Run, failed_lines

from autosp.cost_model.predict import predict
from autosp.search.headroom import acceptable_bytes, usable_bytes
from autosp.search.limits import Limits
from autosp.search.sampler import PARAMETERS
from autosp.search.space import Key, key_of
from autosp.search.study import run_study
from autosp.spec import Candidate, Measurement, Outcome, Profile, StudyKey
from autosp.store import Repository

OURS = "cost model"
MISSING = "not installed"
STEPS = (1, 2, 3, 4, 6, 8, 12)
"""Trials after which the samplers are compared."""

STARTUP_TRIALS = 3
"""Random trials of TPE and GP before they model anything; optuna's 10 would leave them two of twelve."""

PREFACE = (
    "Median of the best found ÷ the best measured, after so many trials, over the seeds and (in the last table) the "
    "models; a dash where most seeds had found nothing within the budget. All samplers have the same candidates, the "
    "same measurements, and the constraint of `tune`: what it leaves of a budget for a fresh process to grow into is "
    "no plan's. *cost model* is `tune`'s own study with its profile, its trivial baselines and its stop rule, after "
    "which it finds nothing more; the others begin knowing nothing. "
    f"TPE and GP start with {STARTUP_TRIALS} random trials."
)

SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "TPE": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=STARTUP_TRIALS),
    "GP": lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS),
    "BruteForce": lambda seed: optuna.samplers.BruteForceSampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
"""Of optuna, for a seed."""

NEEDS = {"GP": "scipy"}


@dataclass(frozen=True)
class Table:
    """Candidates that were measured, one per key, and the budget that they are judged by."""

    profile: Profile
    budget_bytes: int
    measured: dict[Key, Measured]

    @classmethod
    def of(cls, figures: dict[str, Any], budget_percent: float) -> Table:
        """Of a row of the accuracy study."""
        found: dict[Key, Measured] = {}
        for dumped in figures["candidates"]:
            each = Measured.of(dumped)
            if each.ran:
                found.setdefault(key_of(each.candidate), each)
        budget_bytes = round(figures["weight_bytes"] * budget_percent / 100)
        return cls(Profile.model_validate(figures["profile"]), budget_bytes, found)

    @property
    def most_bytes(self) -> int:
        """What may have been measured of a plan that is returned under the budget."""
        return acceptable_bytes(self.profile, self.budget_bytes)

    @property
    def best_s(self) -> float | None:
        """The least median of those that may be returned; None if there are none."""
        fitting = [each.latency_s for each in self.measured.values() if each.peak_bytes <= self.most_bytes]
        return min(fitting, default=None)

    def space(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """The numbers in which the candidates differ, each with its range."""
        ranges = zip(PARAMETERS, zip(*self.measured, strict=True), strict=True)
        return {
            name: optuna.distributions.IntDistribution(min(numbers), max(numbers))
            for name, numbers in ranges
            if min(numbers) < max(numbers)
        }

    def nearest(self, numbers: dict[str, Any]) -> Key:
        """The candidate that a proposal stands for: distances are in shares of the ranges."""
        space: dict[str, Any] = self.space()

        def distance(key: Key) -> float:
            mine = dict(zip(PARAMETERS, key, strict=True))
            return sum(abs(mine[name] - numbers[name]) / (space[name].high - space[name].low) for name in space)

        return min(self.measured, key=distance)

    def answer(self, key: Key, rng: random.Random) -> Measurement:
        """A round's measurement, judged by what may be returned."""
        measurement = rng.choice(self.measured[key].rounds)
        fits = measurement.peak_bytes <= self.most_bytes
        return measurement.model_copy(update={"outcome": Outcome.FITS if fits else Outcome.OVER_BUDGET})


Tried = list[tuple[Key, Measurement]]


def with_cost_model(table: Table, seed: int, trials: int) -> Tried:
    """The study of `tune`, on the table's candidates."""
    rng = random.Random(seed)
    tried: Tried = []

    def validate(candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
        tried.append((key_of(candidate), table.answer(key_of(candidate), rng)))
        return tried[-1][1]

    profile = table.profile
    predictions = predict(profile, [each.candidate for each in table.measured.values()])
    usable = usable_bytes(profile, table.budget_bytes)
    ranked = sorted((each for each in predictions if each.peak_bytes <= usable), key=lambda each: each.latency_s)
    if not ranked:
        return []
    key = StudyKey(
        model_name=profile.model_name,
        model_fingerprint=profile.model_fingerprint,
        device_fingerprint=profile.device.fingerprint,
        batch_signature=profile.batch_signature,
        step="replayed",
        mode=profile.mode,
        budget_bytes=table.budget_bytes,
    )
    with tempfile.TemporaryDirectory() as folder, Repository(Path(folder) / "study.db") as repository:
        repository.create_study("replayed", key)
        run_study(
            repository,
            "replayed",
            profile,
            ranked,
            table.budget_bytes,
            validate,
            limits=Limits(trials),
            progress=lambda text: None,
        )
    return tried


def with_optuna(table: Table, name: str, seed: int, trials: int) -> Tried:
    """A study of one of optuna's samplers; what does not fit is pruned with its constraint."""
    rng = random.Random(seed)
    space = table.space()
    tried: Tried = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(sampler=SAMPLERS[name](seed))
        for _ in range(trials):
            trial = study.ask(space)
            key = table.nearest(trial.params)
            measurement = table.answer(key, rng)
            tried.append((key, measurement))
            trial.set_constraint("memory", float(measurement.peak_bytes - table.most_bytes))
            if measurement.outcome is Outcome.FITS:
                study.tell(trial, measurement.latency_s)
            else:
                study.tell(trial, state=TrialState.PRUNED)
    return tried


def found_after(table: Table, tried: Tried) -> list[float | None]:
    """For each of `STEPS`, the incumbent's median ÷ the best; the incumbent is what the sampler saw to be fastest."""
    best_s = table.best_s
    assert best_s is not None, "some candidate fits"
    found: list[float | None] = []
    for step in STEPS:
        fitting = [(m.latency_s, key) for key, m in tried[:step] if m.outcome is Outcome.FITS]
        found.append(table.measured[min(fitting)[1]].latency_s / best_s if fitting else None)
    return found


def measure(job: Job) -> dict[str, Any]:
    """One sampler on one table, for every seed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name, numbers = job.case.setting, job.numbers
    needed = NEEDS.get(name)
    if needed is not None and find_spec(needed) is None:
        return {"outcome": MISSING, "note": f"{name} needs {needed}: pip install 'autosp[studies]'"}
    table = Table.of(numbers["figures"], job.case.budget_percent or 0)
    if table.best_s is None:
        return {"outcome": TOO_SMALL, "note": "none of the measured candidates is within the budget"}
    found = []
    for seed in range(numbers["seeds"]):
        tried = with_cost_model(table, seed, STEPS[-1]) if name == OURS else with_optuna(table, name, seed, STEPS[-1])
        found.append({"trials": len(tried), "found": found_after(table, tried)})
    return {"figures": {"title": numbers["figures"]["title"], "candidates": len(table.measured), "seeds": found}}


def run(asked: Run) -> None:
    """Every sampler on every table that the accuracy study has measured."""
    sources = [row for row in asked.sources if row.ok and row.case.model in asked.models]
    if not sources:
        print("no candidates were measured for these models: run the accuracy study first")
    for row in sources:
        for percent in asked.budgets:
            for name in (OURS, *SAMPLERS):
                numbers = {"figures": row.figures, "seeds": asked.numbers["seeds"]}
                asked.measured(row.case.model, percent, setting=name, numbers=numbers)


def curve(rows: Sequence[Row]) -> list[float | None]:
    """For each of `STEPS`, the median over all seeds of the rows; None if most of them had found nothing."""
    seeds = [seed["found"] for row in rows for seed in row.figures["seeds"]]
    medians = [median(float("inf") if one is None else one for one in step) for step in zip(*seeds, strict=True)]
    return [None if one == float("inf") else one for one in medians]


def table(rows: list[Row]) -> str:
    """A table per model and budget, and one of all together."""
    parts = [PREFACE]
    good = [row for row in rows if row.ok]
    for model, percent in dict.fromkeys((row.case.model, row.case.budget_percent) for row in good):
        mine = having(good, model=model, budget_percent=percent)
        figures = mine[0].figures
        parts.append(f"{figures['title']}, {percent:g} % of the weights, {figures['candidates']} candidates:")
        parts.append(_table(mine))
    parts += ["All together:", _table(good)]
    skipped = failed_lines(rows, 2)
    return "\n\n".join([*parts, markdown(["left out", ""], skipped)] if skipped else parts)


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for name in dict.fromkeys(row.case.setting for row in rows):
        mine = having(rows, setting=name)
        stopped = median(seed["trials"] for row in mine for seed in row.figures["seeds"])
        cells = ["–" if one is None else f"{one:.3f}" for one in curve(mine)]
        lines.append([name, *cells, f"{stopped:g}"])
    return markdown(["sampler", *(f"{step}" for step in STEPS), "trials until its end"], lines)


def picture(rows: list[Row], path: Path) -> None:
    """The best found over the number of trials, over all models and budgets."""
    from panels import figure, finish

    canvas, (panel,) = figure(1, width=7.0)
    good = [row for row in rows if row.ok]
    for index, name in enumerate(dict.fromkeys(row.case.setting for row in good)):
        found = [float("nan") if one is None else one for one in curve(having(good, setting=name))]
        panel.plot(STEPS, found, color=f"C{index}", marker="o", drawstyle="steps-post", label=name)
    panel.axhline(1, color="grey", lw=0.8)
    panel.set_xticks(STEPS)
    panel.set_xlabel("trials")
    panel.set_ylabel("best found ÷ best measured")
    finish(canvas, path)


SAMPLING = Study("Samplers on the same study", run, table, picture)
