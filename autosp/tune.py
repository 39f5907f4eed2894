"""The whole story: profile, predict, validate, store, answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm.auto import tqdm

from autosp.apart import import_apart
from autosp.batch import Step
from autosp.cost_model.floor import floor_s
from autosp.devices import Device, choose_device
from autosp.errors import AutospError, BudgetTooSmallError, OutputMismatchError, SettingError
from autosp.partition import partition
from autosp.profiler import measure
from autosp.profiler.host import binding_host_budget
from autosp.runtime.bench import Bench
from autosp.search.limits import Limits
from autosp.search.space import rank, suggested_gb
from autosp.search.validate import Reference, validate
from autosp.settings import settings
from autosp.spec import Outcome, Partition, Plan, Prediction, Profile, StudyKey, Trial
from autosp.store import Repository
from autosp.workload import Workload, parse_budget, parse_budgets

if TYPE_CHECKING:
    import os

    import torch

Progress = Callable[[str], None]


def tune(
    model: nn.Module,
    sample_batch: Any,
    max_gpu_gb: float | str,
    *,
    max_cpu_gb: float | str | None = None,
    mode: str = "inference",
    step: Step | None = None,
    device: torch.device | str | Device | None = None,
    storage: str | os.PathLike[str] | None = None,
    study_name: str | None = None,
    max_trials: int | None = None,
    timeout_s: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """The fastest plan under a memory budget, measured on this device.

    Args:
        sample_batch: a tensor, a tuple of positional or a mapping of keyword arguments, of the shapes to plan for.
        max_gpu_gb: GB (10^9 bytes) of device memory, or a string such as "8GiB". Without an accelerator: of RAM.
        max_cpu_gb: the same of host memory for streamed weights; what it has no room for rests on disk behind it.
            Default: what the machine has. Without an accelerator the smaller of the two budgets holds.
        step: `step(model, batch)` instead of the plain call, for a `generate` or a loss.
        device: default: the accelerator if there is one.
        storage: database, a path or a SQLAlchemy URL; default `AUTOSP_STORAGE`, else the user's data directory.
        study_name: default: made from the model's name. An unfinished study of that name is continued.
        max_trials, timeout_s: limits on validation; the stop rule usually ends it earlier.
        seed: of the pass whose outputs are compared.
        progress: show a progress bar.

    A second call with the same model, batch, device and budget answers from the database. The model is as before when
    this returns or raises.

    Raises: BudgetError, BudgetTooSmallError, ModelError, SettingError, TierError, StoreError, StudyMismatchError;
    whatever the model itself raises passes through.
    """
    _is_searched(mode)
    chosen = choose_device(device)
    budgets = parse_budgets(max_gpu_gb, max_cpu_gb, chosen.info.slow_tier)
    workload = Workload.of(model, sample_batch, step, mode, chosen, seed)
    limits = Limits(max_trials, timeout_s)
    with Repository(storage) as repository:
        key = workload.key(chosen, *budgets)
        known = repository.find_plan(key) if study_name is None else None
        if known is not None:
            return known
        name = study_name or repository.find_study(key) or repository.unique_name(f"{key.model_name}-{key.mode}")
        return _continue(repository, name, key, workload, chosen, limits, progress)


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
    progress: bool = True,
) -> Plan:
    """Continue an interrupted study, or answer with the plan of a finished one. Nothing that was measured is repeated.

    With `max_trials` (of the whole study) or `timeout_s`, a study that ended at such a limit goes on to the new one.

    Raises: StudyNotFoundError naming the close names; StudyMismatchError naming what differs; and what `tune` raises.
    """
    chosen = choose_device(device)
    workload = Workload.of(model, sample_batch, step, "inference", chosen, seed)
    limits = Limits(max_trials, timeout_s)
    with Repository(storage) as repository:
        entered = repository.study_key(study_name)
        key = workload.key(chosen, entered.budget_bytes, entered.host_budget_bytes)
        _is_entered(repository, study_name, key)
        known = repository.plan(study_name)
        if known is not None and limits == Limits():
            return known
        return _continue(repository, study_name, key, workload, chosen, limits, progress)


def profile(
    model: nn.Module,
    sample_batch: Any,
    *,
    max_cpu_gb: float | str | None = None,
    mode: str = "inference",
    step: Step | None = None,
    device: torch.device | str | Device | None = None,
    progress: bool = True,
) -> Profile:
    """Measure every layer and link under the least-memory plan; the disk, too, where the host has no room for all.

    The model is as before when this returns or raises.
    """
    _is_searched(mode)
    chosen = choose_device(device)
    workload = Workload.of(model, sample_batch, step, mode, chosen)
    with _progress(progress) as show:
        show("order of the layers")
        parts = partition(
            model, workload.run, chosen.torch_device, lookups=chosen.reads_host, slow_tier=chosen.info.slow_tier
        )
        show("weights to the slow tier")
        host_bytes = None if max_cpu_gb is None else parse_budget(max_cpu_gb, "max_cpu_gb")
        host_bytes = binding_host_budget(parts, chosen, host_bytes)
        with Bench(model, parts, chosen, settings().cache_dir, host_bytes) as bench:
            return measure(bench, workload, show)


def estimate(profile: Profile, max_gpu_gb: float | str, max_cpu_gb: float | str | None = None) -> list[Prediction]:
    """Every setting predicted to fit the budgets, the fastest first. Needs no device.

    Raises: BudgetError, BudgetTooSmallError; SettingError if the profile does not know the disk and settings need it.
    """
    return rank(profile, *parse_budgets(max_gpu_gb, max_cpu_gb, profile.device.slow_tier))


def floor(profile: Profile, max_gpu_gb: float | str, max_cpu_gb: float | str | None = None) -> float:
    """Seconds that no schedule can beat under the budgets on the profiled hardware."""
    return floor_s(profile, *parse_budgets(max_gpu_gb, max_cpu_gb, profile.device.slow_tier))


def _continue(
    repository: Repository,
    name: str,
    key: StudyKey,
    workload: Workload,
    device: Device,
    limits: Limits,
    progress: bool,
) -> Plan:
    """Profile unless that is stored, validate what may win, store and return the best.

    A new study is entered once there is something to validate: a wrong batch or budget leaves nothing in the database.
    """
    import_apart("autosp.search.study")  # optuna, which an answer from the database does not need
    from autosp.search.study import run_study

    budget_bytes = key.budget_bytes
    entered = _is_entered(repository, name, key)
    with _progress(progress) as show:
        show("order of the layers")
        parts, output = _plain_pass(workload, device)
        show("weights to the slow tier")
        reference = Reference(output, lambda: _plain_pass(workload, device)[1])
        measured = repository.profile(name) if entered else None
        parts = measured.partition if measured else parts
        host_bytes = binding_host_budget(parts, device, key.host_budget_bytes)
        if measured is not None and measured.disk_link is None and host_bytes is not None:
            measured = None  # the machine had more room when it was made
        with Bench(workload.model, parts, device, settings().cache_dir, host_bytes) as bench:
            measured = measured or measure(bench, workload, show)
            ranked = rank(measured, budget_bytes, host_bytes)
            repository.create_study(name, key)
            repository.save_profile(name, measured)
            verdict = run_study(
                repository,
                name,
                measured,
                ranked,
                budget_bytes,
                lambda candidate: validate(bench, workload, candidate, reference, budget_bytes, show),
                limits=limits,
                progress=show,
            )
    if verdict.best is None:
        raise _no_plan(measured, budget_bytes, repository.trials(name))
    answer = Plan(
        **workload.identity(device),
        study_name=name,
        budget_bytes=budget_bytes,
        host_budget_bytes=host_bytes,
        partition=measured.partition,
        candidate=verdict.best.prediction.candidate,
        prediction=verdict.best.prediction,
        measurement=verdict.best.measurement,
        floor_s=floor_s(measured, budget_bytes, host_bytes),
        why=verdict.why,
    )
    repository.save_plan(name, answer)
    return answer


def _is_searched(mode: str) -> None:
    """Raises: SettingError for a mode whose plans are set by the user."""
    if mode == "training":
        raise SettingError(
            "mode='training' has no search: set k and k' with autosp.plan(model, sample_batch, k=…, k_prime=…, "
            "mode='training', step=…), which autosp.apply takes"
        )


def _is_entered(repository: Repository, name: str, key: StudyKey) -> bool:
    """Whether the database has the study. Raises: StudyMismatchError if it was made for something else."""
    if name not in {summary.name for summary in repository.summaries()}:
        return False
    repository.create_study(name, key)  # leaves it as it is, if it is the same
    return True


def _plain_pass(workload: Workload, device: Device) -> tuple[Partition, Any]:
    """The layers, and the output, of one pass of the unstreamed model."""
    outputs: list[Any] = []
    parts = partition(
        workload.model,
        lambda: outputs.append(workload.run_seeded()),
        device.torch_device,
        lookups=device.reads_host,
        slow_tier=device.info.slow_tier,
    )
    return parts, outputs[0]


def _no_plan(profile: Profile, budget_bytes: int, trials: list[Trial]) -> AutospError:
    """Every candidate that was predicted to fit failed on the device."""
    differing = [trial for trial in trials if trial.measurement.outcome is Outcome.OUTPUT_DIFFERS]
    if differing:
        return OutputMismatchError(
            f"{len(differing)} of {len(trials)} validated plans gave another output than the plain model, "
            f"{differing[0].prediction.candidate.label()} first, and no other fits; nothing is returned"
        )
    least = min(trial.measurement.peak_bytes for trial in trials)
    layer = max(profile.partition.layers, key=lambda layer: layer.n_bytes)
    return BudgetTooSmallError(
        f"all {len(trials)} validated plans took more than {budget_bytes / 1e9:.4g} GB on the device; the least was "
        f"{least / 1e9:.4g} GB, set by layer {layer.index} ({layer.name}); "
        f"try max_gpu_gb={suggested_gb(least)}",
        budget_bytes=budget_bytes,
        least_bytes=least,
        layer=layer.name,
    )


@contextmanager
def _progress(visible: bool) -> Iterator[Progress]:
    """A bar that counts steps and names the one that is running."""
    with tqdm(disable=not visible, desc="autosp", bar_format="{desc}: {n_fmt} steps [{elapsed}{postfix}]") as bar:

        def show(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        yield show
