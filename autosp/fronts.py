"""The commands that weigh one thing against another: memory and latency, batch size and throughput."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from autosp import answers
from autosp.errors import SettingError, StudyNotFoundError
from autosp.factory import make_subject
from autosp.options import (
    Budget,
    BudgetOrAll,
    DeviceName,
    Factory,
    Group,
    GroupOrStudys,
    HostBudget,
    MaxTrials,
    ModeName,
    Output,
    Plot,
    Storage,
)
from autosp.spec import Plan, Trial
from autosp.terminal import budget_of, check_folder, console, load_pictures, save, tell


def estimate(
    max_gpu_gb: Budget,
    max_cpu_gb: HostBudget = None,
    factory: Annotated[str | None, typer.Argument(metavar="[MODULE:FACTORY]", help="Measured now.")] = None,
    study: Annotated[str | None, typer.Option(help="Take this study's stored profile: no model is needed.")] = None,
    mode: ModeName = "inference",
    group: GroupOrStudys = None,
    top: Annotated[int, typer.Option(min=1, help="How many predictions to print.")] = 10,
    storage: Storage = None,
    device: DeviceName = None,
    plot: Plot = None,
) -> None:
    """Predict every setting under a budget, without validating any."""
    import autosp
    from autosp.report.tables import predictions_table
    from autosp.workload import parse_budgets

    if (factory is None) == (study is None):
        raise SettingError("name what to estimate: either MODULE:FACTORY or --study, one of them")
    budget = budget_of(max_gpu_gb)
    host_budget = None if max_cpu_gb is None else budget_of(max_cpu_gb)
    trials: list[Trial] = []
    chosen: Plan | None = None
    if plot is not None:
        load_pictures("drawing").checked_path(plot)
    if factory is not None:
        subject = make_subject(factory)
        profile = autosp.profile(
            subject.model,
            subject.batch,
            max_cpu_gb=host_budget,
            mode=mode,
            step=subject.step,
            device=device,
            group=group or 1,
            progress=sys.stderr.isatty(),
        )
        group = group or 1
        others: set[int] = set()
    else:
        stored = answers.read_study(str(study), storage)
        if stored.profile is None:
            raise StudyNotFoundError(f"study {study!r} has no profile yet: continue it with `autosp resume`")
        profile, group = stored.profile, group or stored.group
        if group == stored.group:
            trials, chosen = stored.trials, stored.plan
        others = {stored.budget_bytes}
    ranked = autosp.estimate(profile, budget, host_budget, group=group)
    console().print(predictions_table(ranked, autosp.floor(profile, budget, host_budget, group=group), top))
    if plot is not None:
        budget_bytes, host_bytes = parse_budgets(budget, host_budget, profile.device.slow_tier)
        budgets_bytes = [budget_bytes, *others.difference({budget_bytes})]
        answers.draw_front(profile, trials, budgets_bytes, host_bytes, plot, chosen, group)
    else:
        tell("`--plot front.png` draws memory against latency, with the floor")


def _save_all(plans: Sequence[Plan], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number, plan in enumerate(plans, start=1):
        plan.save(folder / f"plan-{number}.json")


def pareto(
    factory: Factory,
    max_gpu_gb: BudgetOrAll = None,
    max_cpu_gb: HostBudget = None,
    points: Annotated[int, typer.Option(min=2, help="Budgets that are validated.")] = 4,
    max_trials: Annotated[int, typer.Option(min=1, help="Most validations under each of them.")] = 3,
    mode: ModeName = "inference",
    group: Group = 1,
    storage: Storage = None,
    device: DeviceName = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", file_okay=False, help="A folder to write the plans to.")
    ] = None,
    plot: Plot = None,
) -> None:
    """Find the front of memory and latency: plans from the least memory to the fastest, measured on this device."""
    import autosp
    from autosp.report.tables import front_table

    if plot is not None:
        load_pictures("drawing").checked_path(plot)
    check_folder(output)
    subject = make_subject(factory)
    front = autosp.pareto(
        subject.model,
        subject.batch,
        None if max_gpu_gb is None else budget_of(max_gpu_gb),
        max_cpu_gb=None if max_cpu_gb is None else budget_of(max_cpu_gb),
        points=points,
        mode=mode,
        step=subject.step,
        device=device,
        group=group,
        storage=storage,
        max_trials=max_trials,
        progress=sys.stderr.isatty(),
    )
    if output is not None:
        save("plans", output, partial(_save_all, front.plans))
    console().print(front_table(front.plans))
    if plot is not None:
        answers.draw_plans(front.plans, front.predicted, plot, storage)
    else:
        tell("`--plot front.png` draws the front, `-o FOLDER` writes its plans")


def tune_batch(
    factory: Annotated[
        str,
        typer.Argument(metavar="MODULE:FACTORY", help="Makes (model, make_batch) or (model, make_batch, step)."),
    ],
    max_gpu_gb: BudgetOrAll = None,
    max_cpu_gb: HostBudget = None,
    size: Annotated[
        list[int] | None, typer.Option("--size", min=1, help="A batch size to try; again for more. Default: 1, 2, 4 …")
    ] = None,
    max_trials: MaxTrials = None,
    mode: ModeName = "inference",
    storage: Storage = None,
    device: DeviceName = None,
    output: Output = None,
) -> None:
    """Find the batch size and the plan with the most samples per second. `make_batch(n)` gives n samples."""
    import autosp
    from autosp.report.tables import batch_sizes_table

    check_folder(output)
    subject = make_subject(factory)
    if not callable(subject.batch):
        raise SettingError(f"{factory} must return (model, make_batch), where make_batch(n) gives a batch of n samples")
    found = autosp.tune_batch(
        subject.model,
        subject.batch,
        None if max_gpu_gb is None else budget_of(max_gpu_gb),
        batch_sizes=size,
        max_cpu_gb=None if max_cpu_gb is None else budget_of(max_cpu_gb),
        mode=mode,
        step=subject.step,
        device=device,
        storage=storage,
        max_trials=max_trials,
        progress=sys.stderr.isatty(),
    )
    rows = [(one.batch_size, one.predicted_samples_per_s, one.samples_per_s, one.plan) for one in found.sizes]
    console().print(batch_sizes_table(rows, found.best.batch_size))
    answers.show_answer(found.plan, storage, output)
