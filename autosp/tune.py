"""The whole story: profile, predict, validate, store, answer."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from autosp.apart import import_apart
from autosp.batch import Step
from autosp.cost_model.floor import floor_s
from autosp.cost_model.reading import measured_reading, planned_reading
from autosp.devices import Device, choose_device
from autosp.devices.lock import device_lock
from autosp.profiler import measure
from autosp.profiler.host import binding_host_budget, whole_device
from autosp.progress import progress_bar
from autosp.runtime.bench import Bench
from autosp.search.evidence import known_measurements, known_profile, unless_known
from autosp.search.failure import no_plan
from autosp.search.isolated import IsolatedTrials, Isolation
from autosp.search.lean import checked_slack, least_memory
from autosp.search.limits import Limits
from autosp.search.space import rank
from autosp.search.validate import Reference, validate
from autosp.settings import settings
from autosp.spec import PROFILE_SCHEMA_VERSION, Plan, StudyKey
from autosp.store import Repository
from autosp.workload import Workload, parse_budgets, require_searched

if TYPE_CHECKING:
    import os

    import torch


def tune(
    model: nn.Module,
    sample_batch: Any,
    max_gpu_gb: float | str | None = None,
    *,
    max_cpu_gb: float | str | None = None,
    slack: float | None = None,
    mode: str = "inference",
    step: Step | None = None,
    device: torch.device | str | Device | None = None,
    storage: str | os.PathLike[str] | None = None,
    study_name: str | None = None,
    max_trials: int | None = None,
    timeout_s: float | None = None,
    seed: int = 0,
    isolate: bool = False,
    trial_timeout_s: float | None = None,
    progress: bool = True,
) -> Plan:
    """The fastest plan under a memory budget, measured on this device.

    Args:
        sample_batch: a tensor, a tuple of positional or a mapping of keyword arguments, of the shapes to plan for.
        max_gpu_gb: GB (10^9 bytes) of device memory, or a string such as "8GiB". Without an accelerator: of RAM.
            Default: what the device has.
        max_cpu_gb: the same of host memory for streamed weights; what it has no room for rests on disk behind it.
            Default: what the machine has. Without an accelerator the smaller of the two budgets holds.
        slack: 0.05 for the least memory that takes no more than 5 % longer than the fastest plan under the budget.
        step: `step(model, batch)` instead of the plain call, for a `generate` or a loss.
        device: default: the accelerator if there is one.
        storage: database, a path or a SQLAlchemy URL; default `AUTOSP_STORAGE`, else the user's data directory.
        study_name: default: made from the model's name. An unfinished study of that name is continued.
        max_trials, timeout_s: limits on validation; the stop rule usually ends it earlier.
        seed: of the pass whose outputs are compared.
        isolate: validate in a process of its own: if it crashes, hangs, is killed, or loses the device, that is the
            trial's outcome, and the next one gets a new process. Model, batch and step must be picklable.
        trial_timeout_s: with `isolate`, when a trial hangs. Default: a minute and 20 times what was predicted.
        progress: show a progress bar.

    A second call with the same model, batch, device and budget answers from the database. The model is as before when
    this returns or raises. Processes that are given one `study_name` and `storage` share the work, and all return the
    one plan; those of one machine take turns at its device.

    Raises: BudgetError, BudgetTooSmallError, ModelError, SettingError, TierError, StoreError, StudyMismatchError,
    IsolationError; whatever the model itself raises passes through.
    """
    require_searched(mode)
    chosen = choose_device(device)
    budget = whole_device(chosen) if max_gpu_gb is None else max_gpu_gb
    budgets = parse_budgets(budget, max_cpu_gb, chosen.info.slow_tier)
    workload = Workload.of(model, sample_batch, step, mode, chosen, seed)
    limits = Limits(max_trials, timeout_s)
    isolation = Isolation.of(isolate, trial_timeout_s)
    with Repository(storage) as repository:
        key = workload.key(chosen, *budgets, checked_slack(slack))
        known = repository.find_plan(key) if study_name is None else None
        if known is not None:
            return known
        base = f"{key.model_name}-{key.mode}" + (f"-slack-{slack:g}" if slack else "")
        name = study_name or repository.find_study(key) or repository.unique_name(base)
        return _go_on(repository, name, key, workload, chosen, limits, isolation, progress)


def resume(
    study_name: str,
    model: nn.Module,
    sample_batch: Any,
    *,
    step: Step | None = None,
    device: torch.device | str | Device | None = None,
    storage: str | os.PathLike[str] | None = None,
    max_trials: int | None = None,
    timeout_s: float | None = None,
    seed: int = 0,
    isolate: bool = False,
    trial_timeout_s: float | None = None,
    progress: bool = True,
) -> Plan:
    """Continue an interrupted study, or answer with the plan of a finished one. Nothing that was measured is repeated.

    With `max_trials` (of the whole study) or `timeout_s`, a study that ended at such a limit goes on to the new one.

    Raises: StudyNotFoundError naming the close names; StudyMismatchError naming what differs; and what `tune` raises.
    """
    chosen = choose_device(device)
    workload = Workload.of(model, sample_batch, step, "inference", chosen, seed)
    limits = Limits(max_trials, timeout_s)
    isolation = Isolation.of(isolate, trial_timeout_s)
    with Repository(storage) as repository:
        entered = repository.study_key(study_name)
        key = workload.key(chosen, entered.budget_bytes, entered.host_budget_bytes, entered.slack)
        repository.has_study(study_name, key)
        known = repository.plan(study_name)
        if known is not None and limits == Limits():
            return known
        return _go_on(repository, study_name, key, workload, chosen, limits, isolation, progress)


def _go_on(
    repository: Repository,
    name: str,
    key: StudyKey,
    workload: Workload,
    device: Device,
    limits: Limits,
    isolation: Isolation | None,
    progress: bool,
) -> Plan:
    """Where slower plans of less memory will do, each budget that is tried is a study of its own."""
    if key.slack is None:
        return _continue(repository, name, key, workload, device, limits, isolation, progress)

    def fastest_under(budget_bytes: int) -> Plan:
        under = key.model_copy(update={"budget_bytes": budget_bytes, "slack": None})
        known = repository.find_plan(under)
        if known is not None:
            return known
        study = repository.find_study(under) or repository.unique_name(f"{name}-{budget_bytes / 1e9:.4g}GB")
        return _continue(repository, study, under, workload, device, limits, isolation, progress)

    repository.has_study(name, key)
    return least_memory(repository, name, key, fastest_under)


def _continue(
    repository: Repository,
    name: str,
    key: StudyKey,
    workload: Workload,
    device: Device,
    limits: Limits,
    isolation: Isolation | None,
    progress: bool,
) -> Plan:
    """Profile unless that is stored, validate what may win, store and return the best.

    A new study is entered once there is something to validate: a wrong batch or budget leaves nothing in the database.
    """
    import_apart("autosp.search.study")  # optuna, which an answer from the database does not need
    from autosp.search.study import Validate, run_study

    budget_bytes = key.budget_bytes
    repository.has_study(name, key)  # a wrong model or budget is known before the device is waited for
    with progress_bar(progress) as show, ExitStack() as held, ExitStack() as opened:
        hold_device = partial(device_lock, device, settings().cache_dir, show)
        held.enter_context(hold_device())
        show("order of the layers")
        parts, output = workload.observed_pass(device)
        show("weights to the slow tier")
        reference = Reference(output, lambda: workload.observed_pass(device)[1])
        measured = repository.profile(name) if repository.has_study(name, key) else None
        if measured is not None and measured.schema_version != PROFILE_SCHEMA_VERSION:
            measured = None
        parts = measured.partition if measured else parts
        host_bytes = binding_host_budget(parts, device, key.host_budget_bytes)
        if measured is not None and measured.disk_link is None and host_bytes is not None:
            measured = None  # the machine had more room when it was made
        measured = measured or known_profile(repository, key, parts, host_bytes)
        if measured is None or isolation is None:
            bench = opened.enter_context(Bench(workload.model, parts, device, settings().cache_dir, host_bytes))
            measured = measured or measure(bench, workload, show, budget_bytes)
            bench.readers.use(measured_reading(measured))
        ranked = rank(measured, budget_bytes, host_bytes)
        repository.create_study(name, key)
        agreed = repository.agree_on_profile(name, measured)
        if agreed != measured:
            measured, ranked = agreed, rank(agreed, budget_bytes, host_bytes)
        known = known_measurements(repository, name, measured, budget_bytes)
        if isolation is None:
            validated: Validate = partial(validate, bench, workload, reference, budget_bytes, progress=show)
        else:
            opened.close()  # the model is as it was, and can be sent
            budgets = budget_bytes, host_bytes
            trials = IsolatedTrials(workload, device, measured, settings().cache_dir, budgets, isolation, ranked, show)
            validated = opened.enter_context(trials).validate
        held.close()
        verdict = run_study(
            repository,
            name,
            measured,
            ranked,
            budget_bytes,
            unless_known(known, validated),
            limits=limits,
            progress=show,
            hold_device=hold_device,
            repeat=validated,
        )
    if verdict.best is None:
        raise no_plan(measured, budget_bytes, repository.trials(name))
    answer = Plan(
        **workload.identity(device),
        study_name=name,
        budget_bytes=budget_bytes,
        host_budget_bytes=host_bytes,
        partition=measured.partition,
        candidate=verdict.best.prediction.candidate,
        reading=planned_reading(measured, verdict.best.prediction),
        prediction=verdict.best.prediction,
        measurement=verdict.best.measurement,
        floor_s=floor_s(measured, budget_bytes, host_bytes),
        why=verdict.why,
    )
    return repository.agree_on_plan(name, answer)
