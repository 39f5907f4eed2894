"""What the commands show of a study: what the database has, its tables, and the front of its predictions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from autosp.spec import Plan, Prediction, Profile, Trial
from autosp.terminal import console, load_plots, save, tell

if TYPE_CHECKING:
    from autosp.factory import Subject


class Stored(NamedTuple):
    """What the database has of a study."""

    name: str
    budget_bytes: int
    profile: Profile | None
    trials: list[Trial]
    plan: Plan | None


def read_study(study: str, storage: str | None) -> Stored:
    """All of a study.

    Raises: StudyNotFoundError naming the close names.
    """
    from autosp.store import Repository

    with Repository(storage) as repository:
        return Stored(
            study,
            repository.study_key(study).budget_bytes,
            repository.profile(study),
            repository.trials(study),
            repository.plan(study),
        )


def kept_study(subject: Subject, budget: float | str, device: str | None, storage: str | None) -> str | None:
    """The study that `tune` of this subject would continue."""
    from autosp.devices import choose_device
    from autosp.store import Repository
    from autosp.workload import Workload, parse_budget

    chosen = choose_device(device)
    workload = Workload.of(subject.model, subject.batch, subject.step, "inference", chosen)
    with Repository(storage) as repository:
        return repository.find_study(workload.key(chosen, parse_budget(budget)))


def show_answer(plan: Plan, storage: str | None, output: Path | None) -> None:
    """Save a plan, then print it with its trials: what took minutes is not lost to a closed pipe."""
    if output is not None:
        save(plan, output)
    if plan.study_name is not None:
        print_study(read_study(plan.study_name, storage)._replace(plan=plan))


def print_study(stored: Stored) -> None:
    """Its trials, and its plan if it has one."""
    from autosp.cost_model.floor import floor_s
    from autosp.report.tables import plan_table, trials_table

    plan = stored.plan
    floor = None if stored.profile is None else floor_s(stored.profile, stored.budget_bytes)
    if not stored.trials:
        tell(f"study {stored.name} has no trials yet")
    else:
        console().print(trials_table(stored.trials, stored.budget_bytes, floor, plan.candidate if plan else None))
    if plan is not None:
        console().print(plan_table(plan))


def draw_front(profile: Profile, ranked: list[Prediction], trials: list[Trial], budget_bytes: int, path: Path) -> None:
    """The predictions under the budget and those that more memory would allow, up to the whole model."""
    from autosp.cost_model.floor import floor_s
    from autosp.search.space import least_bytes, rank

    least = min(least_bytes(profile), budget_bytes)
    most = max(budget_bytes, round(1.05 * (profile.partition.total_bytes + profile.workspace_bytes)))
    beyond = [prediction for prediction in rank(profile, most) if prediction.peak_bytes > budget_bytes]
    budgets = range(least, most, max(1, (most - least) // 200))
    curve = [(n_bytes, floor_s(profile, n_bytes)) for n_bytes in budgets]
    load_plots().front([*ranked, *beyond], trials, curve, budget_bytes, path)
