"""Kills `autosp.tune` by SIGKILL at random moments, and counts what its studies lost and repeated.

python studies/kills.py --kills 40

A process tunes a small model on the CPU and is killed after a random time; another one goes on, until the study has its
plan; then comes the next study, until that many processes were killed. By Optuna's own record of what began: a trial is
repeated if its candidate was validated before. By ours of what ended: a trial is lost if it is not there later.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import optuna
import torch
from optuna.trial import TrialState
from record import markdown, save
from torch import nn

import autosp
from autosp.spec import Outcome, Plan, Trial
from autosp.store import Repository

BUDGET_GB = 0.03
LONGEST_S = 12.0
"""Of a process's life: some are killed while they start or profile, most while they validate."""


@dataclass
class Figures:
    """What became of all studies."""

    kills: int = 0
    studies: int = 0
    finished_trials: int = 0
    killed_trials: int = 0
    repeated_trials: int = 0
    lost_trials: int = 0
    plans_within_budget: int = 0


def tune(storage: str, name: str) -> None:
    """One process's life."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1084, 1084) for _ in range(8)))
    autosp.tune(model, torch.ones(4, 1084), BUDGET_GB, device="cpu", storage=storage, study_name=name, progress=False)


def finish(storage: str, name: str, moments: random.Random, most_kills: int, figures: Figures) -> Plan:
    """Work on one study until it has its plan, with up to that many kills."""
    spawn = multiprocessing.get_context("spawn")
    known: list[Trial] = []
    for kill in range(most_kills + 1):
        process = spawn.Process(target=tune, args=(storage, name))
        process.start()
        process.join(moments.uniform(0.0, LONGEST_S) if kill < most_kills else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            figures.kills += 1
        with Repository(storage) as repository:
            entered = name in {summary.name for summary in repository.summaries()}
            trials = repository.trials(name) if entered else []
            figures.lost_trials += sum(trial not in trials for trial in known)
            known = trials
            plan = repository.plan(name) if entered else None
        if plan is not None:
            return plan
    raise SystemExit(f"study {name} came to no plan")


def count_trials(storage: str, name: str, figures: Figures) -> None:
    """By what Optuna was told; what ended as its process was killed, before it told, is in our record only."""
    with Repository(storage) as repository:
        validated = {trial.number for trial in repository.trials(name)}
        began = optuna.load_study(study_name=name, storage=repository.optuna_storage()).trials
    ended = Counter(tuple(sorted(trial.params.items())) for trial in began if trial.number in validated)
    figures.finished_trials += len(validated)
    figures.repeated_trials += sum(count - 1 for count in ended.values())
    figures.killed_trials += sum(trial.state is TrialState.FAIL and trial.number not in validated for trial in began)


def main() -> None:
    """Kill, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    moments, figures, trials = random.Random(arguments.seed), Figures(), []
    with tempfile.TemporaryDirectory() as folder:
        storage = str(Path(folder) / "studies.db")
        while figures.kills < arguments.kills:
            name = f"killed-{figures.studies}"
            plan = finish(storage, name, moments, arguments.kills - figures.kills, figures)
            before = figures.finished_trials
            count_trials(storage, name, figures)
            trials.append(figures.finished_trials - before)
            figures.studies += 1
            fits = plan.measurement is not None and plan.measurement.outcome is Outcome.FITS
            figures.plans_within_budget += fits
    rows = [[label.replace("_", " "), str(value)] for label, value in asdict(figures).items()]
    rows.append(["median trials per study", f"{median(trials):g}"])
    save("kills_cpu", asdict(figures), markdown(["", ""], rows))
    if figures.repeated_trials or figures.lost_trials or figures.killed_trials > figures.kills:
        raise SystemExit("a trial was lost or repeated")


if __name__ == "__main__":
    main()
