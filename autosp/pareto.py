"""The whole trade of memory for latency: one profile, and a study at each budget where the predicted front bends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field
from torch import nn

from autosp.batch import Step
from autosp.devices import Device, choose_device
from autosp.errors import SettingError, StoreError
from autosp.search.failure import NO_PLAN
from autosp.search.headroom import budget_for
from autosp.search.lean import plan_of, study_of
from autosp.search.learned import Lessons
from autosp.search.space import front
from autosp.spec import Outcome, Plan, Prediction, Record
from autosp.store import Repository
from autosp.tune import tune

if TYPE_CHECKING:
    import os

    import torch


class Front(Record):
    """Memory against latency, as predicted and as measured."""

    plans: tuple[Plan, ...] = Field(description="validated plans that none beats in both, by rising memory")
    predicted: tuple[Prediction, ...] = Field(description="settings that none was predicted to beat, by rising memory")


def pareto(
    model: nn.Module,
    sample_batch: Any,
    max_gpu_gb: float | str | None = None,
    *,
    max_cpu_gb: float | str | None = None,
    points: int = 4,
    mode: str = "inference",
    step: Step | None = None,
    device: torch.device | str | Device | None = None,
    group: int = 1,
    storage: str | os.PathLike[str] | None = None,
    max_trials: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> Front:
    """Plans from the least memory to the fastest under a budget, each measured on this device.

    The front is predicted from one profile. A study validates it at each of the `points` where it bends most, its ends
    among them, with at most `max_trials` each. What was measured in one study is not measured again in another, and a
    second call answers from the database. The other arguments are those of `tune`.

    Raises: as `tune`.
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise SettingError(f"points={points!r}: pass a whole number of at least 2, the two ends")
    chosen = choose_device(device, mode)

    def fastest_under(budget: float | str | None) -> Plan:
        return tune(
            model,
            sample_batch,
            budget,
            max_cpu_gb=max_cpu_gb,
            mode=mode,
            step=step,
            device=chosen,
            group=group,
            storage=storage,
            max_trials=max_trials,
            seed=seed,
            progress=progress,
        )

    fastest = fastest_under(max_gpu_gb)
    with Repository(storage) as repository:
        profile, trials = study_of(repository, fastest)
    assert fastest.budget_bytes is not None
    line = front(profile, fastest.budget_bytes, fastest.host_budget_bytes, group)
    learned = Lessons(profile, line).learned(trials)
    for prediction in bends(line, points)[:-1]:  # the last one is what the first study was for
        budget_bytes = budget_for(profile, learned.peak_bytes(prediction), group)
        if budget_bytes < fastest.budget_bytes:
            with suppress(*NO_PLAN):  # everything that was predicted to fit there may need more, or fail
                fastest_under(f"{budget_bytes}B")
    return Front(plans=tuple(_undominated(_validated(fastest, storage))), predicted=tuple(line))


def _validated(fastest: Plan, storage: str | os.PathLike[str] | None) -> list[Plan]:
    """All that was measured on the profile of a plan, for its group, under whatever budget, and fits the plan's."""
    with Repository(storage) as repository:
        profile, _ = study_of(repository, fastest)
        found: list[Plan] = []
        for name in reversed(repository.siblings(repository.study_key(fastest.study_name or ""))):
            with suppress(StoreError):  # written by another version of autosp
                plan = repository.plan(name)
                same_group = plan is not None and plan.candidate.group == fastest.candidate.group
                if plan is not None and same_group and repository.profile(name) == profile:
                    found += [plan_of(trial, plan, profile) for trial in repository.trials(name)]
    most = fastest.budget_bytes or 0
    return [plan for plan in found if plan.measurement is not None and plan.measurement.peak_bytes <= most]


def bends(line: Sequence[Prediction], count: int) -> list[Prediction]:
    """The ends of a front, and where its latency is farthest from straight lines between those chosen before."""
    memory = np.array([prediction.peak_bytes for prediction in line], float)
    latency = np.array([prediction.latency_s for prediction in line])
    chosen = sorted({0, len(line) - 1})
    while len(chosen) < min(count, len(line)):
        distance = np.abs(np.interp(memory, memory[chosen], latency[chosen]) - latency)
        distance[chosen] = -1
        chosen = sorted([*chosen, int(distance.argmax())])
    return [line[position] for position in chosen]


def _undominated(plans: Sequence[Plan]) -> list[Plan]:
    best: list[Plan] = []
    fitting = [plan for plan in plans if plan.measurement and plan.measurement.outcome is Outcome.FITS]
    for plan in sorted(fitting, key=_measured):
        if not best or _measured(plan)[1] < _measured(best[-1])[1]:
            best.append(plan)
    return best


def _measured(plan: Plan) -> tuple[int, float]:
    assert plan.measurement is not None
    return plan.measurement.peak_bytes, plan.measurement.latency_s
