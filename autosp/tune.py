"""The whole story: profile, predict, validate, store, answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from autosp.apart import import_apart
from autosp.batch import Step
from autosp.cost_model.floor import floor_s
from autosp.cost_model.reading import measured_reading, planned_reading
from autosp.devices import Device, choose_device
from autosp.devices.lock import device_lock
from autosp.errors import SettingError
from autosp.profiler import measure
from autosp.profiler.host import binding_host_budget, whole_device
from autosp.profiler.training import training_partition
from autosp.progress import progress_bar
from autosp.runtime.bench import Bench
from autosp.search.evidence import known_measurements, known_profile, unless_known
from autosp.search.failure import no_plan
from autosp.search.isolated import IsolatedTrials, Isolation
from autosp.search.lean import checked_slack, least_memory
from autosp.search.limits import Limits
from autosp.search.space import Ranking, ranking
from autosp.search.validate import Reference, Validate, timed, validate
from autosp.settings import settings
from autosp.spec import PROFILE_SCHEMA_VERSION, Partition, Plan, Prediction, Profile, StudyKey
from autosp.store import Repository, StudyName
from autosp.workload import Workload, parse_budgets, refuse_host_budget

if TYPE_CHECKING:
    import os

    import torch

    from autosp.search.study import Verdict


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
    group: int = 1,
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
        mode: "training" for a plan that `backward()` runs under, too. Trials run forward and backward, no optimizer:
            gradients and loss are those of plain training, and the plan's time is a pass's without its update. On an
            accelerator room is left for the state that one keeps there: `Partition.state_bytes`.
        step: `step(model, batch)` instead of the plain call, for a `generate`. In training it returns the loss.
        device: default: the accelerator if there is one.
        group: how many microbatches, each like the sample batch, share a pass: see `StreamedModel.run_group`, and in
            training `backward_group`. Time and memory of the plan are those of all of them.
        storage: database, a path or a SQLAlchemy URL; default `AUTOSP_STORAGE`, else the user's data directory.
        study_name: default: made from the model's name. An unfinished study of that name is continued.
        max_trials, timeout_s: limits on validation; the stop rule usually ends it earlier. Default: those of `Limits`,
            8 validations, or 2 and what fits, with the profile, the time of 25 passes of the best plan and 5 s.
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
    chosen = choose_device(device, mode)
    refuse_host_budget(mode, max_cpu_gb)
    budget = whole_device(chosen) if max_gpu_gb is None else max_gpu_gb
    budgets = parse_budgets(budget, max_cpu_gb, chosen.info.slow_tier)
    workload = Workload.of(model, sample_batch, step, mode, chosen, seed, group)
    limits = Limits(max_trials, timeout_s)
    isolation = Isolation.of(isolate, trial_timeout_s)
    if study_name is not None and (not isinstance(study_name, str) or not study_name.strip()):
        raise SettingError(f"study_name={study_name!r}: pass a text that is not empty, or None")
    with Repository(storage) as repository:
        key = workload.key(chosen, *budgets, checked_slack(slack))
        known = repository.find_plan(key) if study_name is None else None
        if known is not None:
            return known
        base = f"{key.model_name}-{key.mode}" + (f"-group-{group}" if group > 1 else "")
        base += f"-slack-{slack:g}" if slack else ""
        name = StudyName(study_name or base, given=study_name)
        return _answer(Search(repository, workload, chosen, limits, isolation, progress), name, key)


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
    limits = Limits(max_trials, timeout_s)
    isolation = Isolation.of(isolate, trial_timeout_s)
    with Repository.existing(storage) as repository:
        entered = repository.study_key(study_name)
        chosen = choose_device(device, entered.mode)
        workload = Workload.of(model, sample_batch, step, entered.mode, chosen, seed, entered.group)
        key = workload.key(chosen, entered.budget_bytes, entered.host_budget_bytes, entered.slack)
        repository.has_study(study_name, key)
        known, goes_on = repository.plan(study_name), limits != Limits()
        if known is not None and not goes_on:
            return known
        search = Search(repository, workload, chosen, limits, isolation, progress, goes_on)
        return _answer(search, StudyName(study_name, given=study_name), key)


@dataclass(frozen=True)
class Search:
    """What a call of `tune` or `resume` works with, whatever the budget."""

    repository: Repository
    workload: Workload
    device: Device
    limits: Limits
    isolation: Isolation | None
    progress: bool
    goes_on: bool = False
    """Whether studies that have an answer go on to the limits."""


def _answer(search: Search, name: StudyName, key: StudyKey) -> Plan:
    """Where slower plans of less memory will do, each budget that is tried is a study of its own."""
    if key.slack is None:
        return _fastest(search, name, key)
    repository = search.repository

    def fastest_under(budget_bytes: int) -> Plan:
        under = key.model_copy(update={"budget_bytes": budget_bytes, "slack": None})
        known = None if search.goes_on else repository.find_plan(under)
        return known or _fastest(search, StudyName(f"{name.base}-{budget_bytes / 1e9:.4g}GB"), under)

    name.find(repository, key)  # a wrong model or budget is known before anything is measured
    return least_memory(repository, name, key, fastest_under)


def _fastest(search: Search, name: StudyName, key: StudyKey) -> Plan:
    """Profile unless that is stored, validate what may win, store and return the best.

    A new study is entered once there is something to validate: a wrong batch or budget leaves nothing in the database.
    """
    repository = search.repository
    name.find(repository, key)  # a wrong model or budget is known before the device is waited for
    with progress_bar(search.progress) as show, ExitStack() as held, ExitStack() as opened:
        study = _Study(search, name, key, show, opened)
        held.enter_context(study.hold_device())
        begin = time.perf_counter()
        found = study.found_or_measured()
        ranked = ranking(found.profile, *found.budgets, key.group)
        entered = name.enter(repository, key)
        agreed = repository.agree_on_profile(entered, found.profile)
        if agreed != found.profile:
            found = replace(found, profile=agreed)
            ranked = ranking(agreed, *found.budgets, key.group)
        validated = timed(study.validated(found, ranked.predictions))
        profile_s = time.perf_counter() - begin
        held.close()
        verdict = study.verdict(entered, found, ranked, validated, profile_s)
    if verdict.best is None:
        raise no_plan(found.profile, key.budget_bytes, repository.trials(entered), finished=verdict.finished)
    answer = Plan(
        **search.workload.identity(search.device),
        study_name=entered,
        budget_bytes=found.budgets[0],
        host_budget_bytes=found.budgets[1],
        partition=found.profile.partition,
        candidate=verdict.best.prediction.candidate,
        reading=planned_reading(found.profile, verdict.best.prediction),
        prediction=verdict.best.prediction,
        measurement=verdict.best.measurement,
        floor_s=floor_s(found.profile, *found.budgets, key.group),
        why=verdict.why,
    )
    return repository.agree_on_plan(entered, answer)


@dataclass(frozen=True)
class _Found:
    """A profile, and what it holds for."""

    profile: Profile
    budgets: tuple[int, int | None]
    """Bytes of the device, and of the host where that binds."""
    bench: Bench | None
    """Open, unless trials are isolated and the profile was stored: it would be in their way."""
    output: Any
    """Of the pass that showed the layers; None in training."""


@dataclass(frozen=True)
class _Study:
    """The search under one budget. `opened` holds what stays open until its verdict."""

    search: Search
    name: StudyName
    key: StudyKey
    show: Callable[[str], None]
    opened: ExitStack

    def hold_device(self) -> AbstractContextManager[None]:
        """Wait for the device, and keep other processes from it."""
        return device_lock(self.search.device, settings().cache_dir, self.show)

    def found_or_measured(self) -> _Found:
        """The study's profile, or another of the same work that still holds, or one measured now."""
        repository, workload, device = self.search.repository, self.search.workload, self.search.device
        self.show("order of the layers")
        parts, output = _observed(workload, device)
        self.show("weights to the slow tier")
        name = self.name.find(repository, self.key)
        stored = None if name is None else repository.profile(name)
        if stored is not None and stored.schema_version != PROFILE_SCHEMA_VERSION:
            stored = None
        parts = stored.partition if stored else parts
        host_bytes = binding_host_budget(parts, device, self.key.host_budget_bytes, workload.mode)
        if stored is not None and stored.disk_link is None and host_bytes is not None:
            stored = None  # the machine had more room when it was made
        known = stored or known_profile(repository, self.key, parts, host_bytes)
        budgets = self.key.budget_bytes, host_bytes
        if known is not None and self.search.isolation is not None:
            return _Found(known, budgets, None, output)
        bench = Bench(workload.model, parts, device, settings().cache_dir, host_bytes, workload.mode)
        self.opened.enter_context(bench)
        profile = known or measure(bench, workload, self.show, self.key.budget_bytes)
        bench.readers.use(measured_reading(profile))
        return _Found(profile, budgets, bench, output)

    def validated(self, found: _Found, ranked: Sequence[Prediction]) -> Validate:
        """What measures a candidate: in this process, or, isolated, in another."""
        workload, device, bench = self.search.workload, self.search.device, found.bench
        if self.search.isolation is not None:
            self.opened.close()  # the model is as it was, and can be sent
            how = (settings().cache_dir, found.budgets, self.search.isolation, ranked, self.show)
            return self.opened.enter_context(IsolatedTrials(workload, device, found.profile, *how)).validate
        assert bench is not None, "only isolated trials go without"
        if workload.mode == "training":
            self.show("plain gradients")
            reference = Reference.of_training(bench, workload)
        else:
            reference = Reference(found.output, lambda: workload.observed_pass(device)[1])
        return partial(validate, bench, workload, reference, found.budgets[0], progress=self.show)

    def verdict(self, name: str, found: _Found, ranked: Ranking, validated: Validate, profile_s: float) -> Verdict:
        """Of the study, which has this name by now, once it has run. What others of the same work measured is not
        measured again.
        """
        import_apart("autosp.search.study")  # optuna, which an answer from the database does not need
        from autosp.search.study import run_study

        repository, budget_bytes = self.search.repository, found.budgets[0]
        known = known_measurements(repository, name, found.profile, budget_bytes)
        return run_study(
            repository,
            name,
            found.profile,
            ranked.predictions,
            budget_bytes,
            unless_known(known, validated),
            limits=self.search.limits,
            progress=self.show,
            hold_device=self.hold_device,
            repeat=validated,
            profile_s=profile_s,
            predictor=ranked.predictor,
        )


def _observed(workload: Workload, device: Device) -> tuple[Partition, Any]:
    """The layers; and the output of the pass that showed them, where it is what a plan's is compared with."""
    if workload.mode == "training":
        return training_partition(workload, device, settings().cache_dir), None
    return workload.observed_pass(device)
