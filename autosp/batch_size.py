"""The batch size as a variable: the most samples per second under a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import nn

from autosp.batch import Step
from autosp.devices import Device, choose_device
from autosp.errors import BudgetTooSmallError, SettingError
from autosp.estimate import profile
from autosp.profiler.host import binding_host_budget, whole_device
from autosp.search.evidence import knows_links, newest_profile
from autosp.search.learned import PRIOR_ERROR
from autosp.search.space import least_bytes, rank
from autosp.spec import Plan, Profile, Record, StudyKey
from autosp.store import Repository
from autosp.tune import tune
from autosp.workload import Workload, parse_budgets

if TYPE_CHECKING:
    import os

    import torch

LEAST_GAIN = 0.05
"""Sizes are doubled for as long as each is predicted to bring this share more samples per second."""

MOST_TUNED = 3
"""Sizes that are tuned at most."""

MakeBatch = Callable[[int], Any]
"""A sample batch of so many samples."""


class Throughput(Record):
    """What one batch size is good for."""

    batch_size: int
    predicted_samples_per_s: float
    plan: Plan | None = Field(default=None, description="measured; None for a size that could not win")

    @property
    def samples_per_s(self) -> float | None:
        """As measured."""
        if self.plan is None or self.plan.measurement is None:
            return None
        return self.batch_size / self.plan.measurement.latency_s


class BatchSizes(Record):
    """Every batch size that was tried, the smallest first, and the plan of the best one."""

    sizes: tuple[Throughput, ...]
    best: Throughput

    @property
    def plan(self) -> Plan:
        """The plan that processes the most samples per second, for batches of `best.batch_size`."""
        assert self.best.plan is not None
        return self.best.plan


def tune_batch(
    model: nn.Module,
    make_batch: MakeBatch,
    max_gpu_gb: float | str | None = None,
    *,
    batch_sizes: Sequence[int] | None = None,
    max_cpu_gb: float | str | None = None,
    mode: str = "inference",
    step: Step | None = None,
    device: torch.device | str | Device | None = None,
    storage: str | os.PathLike[str] | None = None,
    max_trials: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> BatchSizes:
    """The batch size and the plan with the most samples per second under a memory budget, measured on this device.

    Every size is profiled and predicted; those that may be the best are tuned, as studies of their own.

    Args:
        make_batch: gives a sample batch of so many samples.
        batch_sizes: default: 1, 2, 4 and so on, as far as they fit and bring more samples per second.

    The other arguments are those of `tune`; `max_trials` holds for each size.

    Raises: as `tune`; BudgetTooSmallError if the smallest size does not fit.
    """
    if not callable(make_batch):
        raise SettingError(f"make_batch is a {type(make_batch).__name__}; pass a function of a number of samples")
    chosen = choose_device(device, mode)
    budgets = parse_budgets(
        whole_device(chosen) if max_gpu_gb is None else max_gpu_gb, max_cpu_gb, chosen.info.slow_tier
    )
    options: dict[str, Any] = {"max_cpu_gb": max_cpu_gb, "mode": mode, "step": step, "device": chosen}
    options["progress"] = progress
    predicted: list[tuple[Throughput, Any]] = []
    known: list[tuple[int, Profile]] = []
    for size in _sizes(batch_sizes):
        if batch_sizes is None and _is_enough(known, predicted, size, budgets[0]):
            break
        batch = make_batch(size)
        key = Workload.of(model, batch, step, mode, chosen, seed).key(chosen, *budgets)
        try:
            with Repository(storage) as repository:
                measured = _profile(repository, key, chosen, partial(profile, model, batch, **options))
            fastest_s = rank(measured, key.budget_bytes, _host_bytes(measured, key, chosen))[0].latency_s
        except BaseException as error:
            too_large = isinstance(error, BudgetTooSmallError) or chosen.is_out_of_memory(error)
            if not (predicted and too_large):
                raise
            break
        known.append((size, measured))
        predicted.append((Throughput(batch_size=size, predicted_samples_per_s=size / fastest_s), batch))
    limits: dict[str, Any] = {"storage": storage, "max_trials": max_trials, "seed": seed}
    tuned = _tuned(predicted, lambda batch: tune(model, batch, f"{budgets[0]}B", **options, **limits))
    best = max(tuned, key=lambda one: (one.samples_per_s or 0.0, -one.batch_size))
    return BatchSizes(sizes=tuple(tuned), best=best)


def _sizes(given: Sequence[int] | None) -> Iterator[int]:
    """In rising order.

    Raises: SettingError if one is not a positive number.
    """
    if given is None:
        yield from (2**power for power in count())
        return
    numbers = isinstance(given, Sequence) and all(isinstance(size, int) and size is not True for size in given)
    if not numbers or not given or min(given) < 1:
        raise SettingError(f"batch_sizes={given!r}: pass whole numbers of at least 1, or None")
    yield from sorted(set(given))


def _is_enough(
    known: Sequence[tuple[int, Profile]], predicted: Sequence[tuple[Throughput, Any]], size: int, budget_bytes: int
) -> bool:
    """Whether the last size brought little, or this one's least memory, about linear in it, would be too much."""
    if len(known) < 2:
        return False
    less_per_s, more_per_s = (one.predicted_samples_per_s for one, _ in predicted[-2:])
    (less, before), (more, last) = known[-2:]
    per_sample = (least_bytes(last) - least_bytes(before)) / (more - less)
    return more_per_s < less_per_s * (1 + LEAST_GAIN) or least_bytes(last) + per_sample * (size - more) > budget_bytes


def _profile(repository: Repository, key: StudyKey, device: Device, measure: Callable[[], Profile]) -> Profile:
    """The profile of a batch size. It is kept with the study that will tune this size, if that is worth it."""

    def holds(stored: Profile) -> bool:
        return knows_links(stored, _host_bytes(stored, key, device))

    known = newest_profile(repository, key, holds)
    if known is not None:
        return known
    measured = measure()
    repository.save_profile(repository.enter_study(f"{key.model_name}-{key.mode}", key), measured)
    return measured


def _host_bytes(measured: Profile, key: StudyKey, device: Device) -> int | None:
    """Of the layers of a profile: what they may take of the host, if that binds."""
    return binding_host_budget(measured.partition, device, key.host_budget_bytes, measured.mode)


def _tuned(predicted: Sequence[tuple[Throughput, Any]], tune_for: Callable[[Any], Plan]) -> list[Throughput]:
    """All sizes, with plans for the most promising one, and for those that could beat it if their predictions are off.

    Raises: BudgetTooSmallError if none of these has a plan.
    """
    tuned: dict[int, Throughput] = {}
    best = 0.0
    failed: BudgetTooSmallError | None = None
    for one, batch in sorted(predicted, key=lambda pair: -pair[0].predicted_samples_per_s)[:MOST_TUNED]:
        if one.predicted_samples_per_s * (1 + PRIOR_ERROR) <= best:
            break
        try:
            found = one.model_copy(update={"plan": tune_for(batch)})
        except BudgetTooSmallError as error:  # all that was predicted to fit took more
            failed = error
            continue
        tuned[one.batch_size] = found
        best = max(best, found.samples_per_s or 0.0)
    if failed is not None and not tuned:
        raise failed
    return [tuned.get(one.batch_size, one) for one, _ in predicted]
