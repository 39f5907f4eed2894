"""What several commands need: a study as the database has it, its tables and pictures, and a model to run a plan on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from autosp.errors import SettingError, StoreError
from autosp.spec import Plan, Prediction, Profile, Trial
from autosp.terminal import console, load_pictures, save, tell

if TYPE_CHECKING:
    from autosp.devices import Device
    from autosp.factory import Subject
    from autosp.report.run_tables import Pass
    from autosp.runtime.streamed_model import StreamedModel
    from autosp.schedule.timeline import Timeline
    from autosp.workload import Workload


class Stored(NamedTuple):
    """What the database has of a study."""

    name: str
    group: int
    budget_bytes: int
    host_budget_bytes: int | None
    profile: Profile | None
    trials: list[Trial]
    plan: Plan | None


def read_study(study: str, storage: str | None) -> Stored:
    """All of a study.

    Raises: StudyNotFoundError naming the close names.
    """
    from autosp.store import Repository

    with Repository.existing(storage) as repository:
        key, plan = repository.study_key(study), repository.plan(study)
        host_budget_bytes = plan.host_budget_bytes if plan is not None else key.host_budget_bytes
        profile, trials = repository.profile(study), repository.trials(study)
        return Stored(study, key.group, key.budget_bytes, host_budget_bytes, profile, trials, plan)


def kept_study(
    subject: Subject,
    mode: str,
    budget: float | str | None,
    host_budget: float | str | None,
    slack: float | None,
    device: str | None,
    group: int,
    storage: str | None,
    study_name: str | None,
) -> str | None:
    """The study that `tune` of this subject would continue: that of the name, where one was given.

    With slack: at least that of the fastest plan, which goes by a name of its own.
    """
    from autosp.devices import choose_device
    from autosp.profiler.host import whole_device
    from autosp.store import Repository
    from autosp.workload import Workload, parse_budgets

    chosen = choose_device(device, mode)
    workload = Workload.of(subject.model, subject.batch, subject.step, mode, chosen, group=group)
    budgets = parse_budgets(whole_device(chosen) if budget is None else budget, host_budget, chosen.info.slow_tier)
    with Repository(storage) as repository:
        key, fastest = workload.key(chosen, *budgets, slack), workload.key(chosen, *budgets)
        if study_name is None:
            found = repository.find_study(key)
        else:
            found = study_name if repository.has_study(study_name, key) else None
        return found or (repository.find_study(fastest) if slack else None)


def show_answer(plan: Plan, storage: str | None, output: Path | None) -> None:
    """Save a plan, then print it with its trials: what took minutes is not lost to a closed pipe."""
    if output is not None:
        save("plan", output, plan.save)
    if plan.study_name is not None:
        print_study(read_study(plan.study_name, storage)._replace(plan=plan))


def print_study(stored: Stored) -> None:
    """Its trials, and its plan if it has one."""
    from autosp.cost_model.floor import floor_s
    from autosp.report.tables import plan_table, trials_table

    plan = stored.plan
    floor = None
    if stored.profile is not None:
        floor = floor_s(stored.profile, stored.budget_bytes, stored.host_budget_bytes, stored.group)
    if not stored.trials:
        tell(f"study {stored.name} has no trials yet")
    else:
        chosen = plan.candidate if plan else None
        console().print(trials_table(stored.trials, stored.budget_bytes, floor, chosen, stored.profile))
    if plan is not None:
        console().print(plan_table(plan))


def draw_front(
    profile: Profile,
    trials: Sequence[Trial],
    budgets_bytes: Sequence[int],
    host_budget_bytes: int | None,
    path: Path,
    plan: Plan | None = None,
    group: int = 1,
) -> None:
    """Predictions under each budget and those that more memory would allow, up to the whole model."""
    from autosp.cost_model.training_memory import memory_of
    from autosp.search.space import all_resident, rank

    everything = all_resident(profile).model_copy(update={"group": group})
    with_all = memory_of(profile).peak_bytes(everything, arena_bytes=0)
    whole = round(1.05 * max(with_all, profile.partition.total_bytes + profile.planned_workspace_of(group)))
    budgets = {*budgets_bytes, max(*budgets_bytes, whole)}
    ranked = [rank(profile, budget_bytes, host_budget_bytes, group) for budget_bytes in budgets]
    predictions = {prediction.candidate: prediction for some in ranked for prediction in some}
    load_pictures("front").front(
        profile,
        list(predictions.values()),
        trials,
        budgets_bytes,
        path,
        chosen=plan.candidate if plan else None,
        host_budget_bytes=host_budget_bytes,
    )


def draw_plans(plans: Sequence[Plan], predicted: Sequence[Prediction], path: Path, storage: str | None) -> None:
    """A measured front on the one that was predicted."""
    from autosp.search.lean import study_of
    from autosp.store import Repository

    with Repository(storage) as repository:
        profile, _ = study_of(repository, plans[-1])
    load_pictures("front").front(
        profile,
        predicted,
        [
            Trial(number=number, prediction=plan.prediction, measurement=plan.measurement)
            for number, plan in enumerate(plans)
            if plan.prediction is not None and plan.measurement is not None
        ],
        [],
        path,
        host_budget_bytes=plans[-1].host_budget_bytes,
    )


def profile_of(plan: Plan, storage: str | None) -> Profile | None:
    """The profile that a plan rests on. If the database does not have it: None, and the reason is told."""
    from autosp.store import Repository

    if plan.study_name is None:
        tell("nothing is predicted: the plan comes from no study")
        return None
    try:
        with Repository.existing(storage) as repository:
            profile = repository.profile(plan.study_name)
    except (SettingError, StoreError) as error:
        tell(f"nothing is predicted: {error}")
        return None
    if profile is not None and _rests_on(plan, profile):
        return profile
    tell(f"nothing is predicted: the database has no profile of study {plan.study_name} that fits the plan")
    return None


def _rests_on(plan: Plan, profile: Profile) -> bool:
    same_device = profile.device.fingerprint == plan.device.fingerprint
    return same_device and profile.partition == plan.partition


def workload_of(factory: str, plan: Plan) -> tuple[Workload, Device]:
    """A model and its batch to run a plan on. Told if the batch is not what the plan is for."""
    from autosp.batch import signature
    from autosp.devices import device_for
    from autosp.factory import make_subject
    from autosp.workload import Workload

    subject = make_subject(factory)
    device = device_for(plan.device)
    group = plan.candidate.group
    workload = Workload.of(subject.model, subject.batch, subject.step, plan.mode, device, group=group)
    if signature(workload.batch) != plan.batch_signature:
        tell(f"the plan is for {plan.batch_signature}: its figures do not hold for {signature(workload.batch)}")
    return workload, device


def print_traffic(plan: Plan, predicted: Timeline | None, measured: Timeline) -> None:
    """What a run moved and where it stalled, beside what was predicted of it."""
    from autosp.report.run_tables import stalls_table, traffic_table
    from autosp.report.traffic import traffic

    said = None if predicted is None else traffic(predicted, plan.partition, plan.candidate)
    found = traffic(measured, plan.partition, plan.candidate)
    console().print(traffic_table(plan, said, found))
    if found.layer_stalls_s:
        console().print(stalls_table(plan, said, found))


def timed_pass(workload: Workload, device: Device, streamed: StreamedModel[Any]) -> Pass:
    """Run one pass, with all microbatches of its group, in training with its backward, and wait for its end."""
    from autosp.report.run_tables import Pass
    from autosp.runtime import bench

    before = streamed.stats()
    seconds, _ = bench.timed_pass(device, partial(workload.run_under, streamed))
    after = streamed.stats()
    return Pass(
        seconds=seconds,
        moved_bytes=after.moved_bytes - before.moved_bytes,
        misses=after.misses - before.misses,
    )
