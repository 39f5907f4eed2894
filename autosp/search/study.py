"""The Optuna study of one tuning: what is validated, in which order, and when no more is worth it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import optuna
from optuna.trial import TrialState

from autosp.search.learned import Learned, Lessons
from autosp.search.limits import Limits
from autosp.search.sampler import PARAMETERS, CostModelSampler
from autosp.search.space import Key, acceptable_bytes, all_resident, key_of, usable_bytes
from autosp.spec import Candidate, Measurement, Outcome, Prediction, Profile, Trial
from autosp.store.trials import running_trial

if TYPE_CHECKING:
    from autosp.store import Repository

TOLERANCE = 0.01
"""A candidate that can win by less than this is not worth a validation."""

Validate = Callable[[Candidate], Measurement]


@dataclass(frozen=True)
class Verdict:
    """The end of a study: its best trial, and why it may be taken for the best plan."""

    best: Trial | None
    why: str
    finished: bool
    """Whether the stop rule ended it, rather than a limit."""


def run_study(
    repository: Repository,
    name: str,
    profile: Profile,
    ranked: Sequence[Prediction],
    budget_bytes: int,
    validate: Validate,
    *,
    limits: Limits,
    progress: Callable[[str], None],
) -> Verdict:
    """Validate candidates until none can win, or a limit is reached. Continues a study that was interrupted.

    The trivial baselines come first (everything resident where it fits, the best plain sliding window), then the
    cost model's favourite.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = repository.optuna_storage()
    usable = usable_bytes(profile, budget_bytes)
    sampler = CostModelSampler(ranked, usable)
    study = optuna.create_study(study_name=name, storage=storage, sampler=sampler, load_if_exists=True)
    study.set_user_attr("autosp_fingerprint", repository.study_key(name).fingerprint)
    trials = repository.trials(name)
    lessons = Lessons(profile, ranked)
    tried = {key_of(trial.prediction.candidate) for trial in trials}
    for first in dict.fromkeys([*_baselines(profile, ranked), key_of(ranked[0].candidate)]):
        if first not in tried:
            study.enqueue_trial(dict(zip(PARAMETERS, first, strict=True)), skip_if_exists=True)
    while True:
        learned = lessons.learned(trials)
        verdict = judge(trials, learned, usable, acceptable_bytes(profile, budget_bytes))
        waiting = bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
        if verdict.finished and not waiting:
            return verdict
        if limits.reached(len(trials)):
            return verdict
        sampler.learned = learned
        with running_trial(study, storage) as trial:
            key = tuple(trial.suggest_int(p, sampler.space[p].low, sampler.space[p].high) for p in PARAMETERS)
            prediction = next((one for one in learned.predictions if key_of(one.candidate) == key), None)
            if prediction is None:  # enqueued by hand, and no candidate under this budget
                study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
                continue
            progress(f"trial {len(trials) + 1}: {prediction.candidate.label()}")
            done = Trial(number=trial.number, prediction=prediction, measurement=validate(prediction.candidate))
            repository.add_trial(name, done)
            _tell(study, trial, done, budget_bytes)
        trials.append(done)


def judge(trials: Sequence[Trial], learned: Learned, usable_bytes: int, acceptable_bytes: int) -> Verdict:
    """Whether an unvalidated candidate's optimistic prediction beats the best measurement by more than a tolerance.

    `usable_bytes` bounds what is predicted of a rival, `acceptable_bytes` what was measured of the winner.
    """
    fitting = [
        trial
        for trial in trials
        if trial.measurement.outcome is Outcome.FITS and trial.measurement.peak_bytes <= acceptable_bytes
    ]
    best = min(fitting, key=lambda trial: (trial.measurement.latency_s, trial.measurement.peak_bytes), default=None)
    rivals = learned.rivals({key_of(trial.prediction.candidate) for trial in trials}, usable_bytes)
    if best is None:
        return Verdict(None, "no validated candidate fits the budget", finished=not rivals and bool(trials))
    measured_s = best.measurement.latency_s
    found = f"{best.prediction.candidate.label()} was the fastest of {len(fitting)} validated"
    if not rivals:
        return Verdict(best, f"{found}; every candidate under the budget was tried", finished=True)
    optimistic_s = learned.optimistic_s(rivals[0])
    rival, error = rivals[0].candidate.label(), f"{learned.relative_error:.1%}"
    if optimistic_s >= measured_s * (1 - TOLERANCE):
        why = (
            f"{found}; the best of {len(rivals)} others ({rival}) can take no less than "
            f"{optimistic_s:.4g} s, given the cost model's error of {error}, against {measured_s:.4g} s measured"
        )
        return Verdict(best, why, finished=True)
    why = f"{found}; {rival} was not tried and may take {optimistic_s:.4g} s (model error {error})"
    return Verdict(best, why, finished=False)


def _baselines(profile: Profile, ranked: Sequence[Prediction]) -> list[Key]:
    """Keys of the candidates that are always validated, of those that fit."""
    resident = all_resident(profile).residents
    everything = next((key_of(p.candidate) for p in ranked if p.candidate.residents == resident), None)
    window = next((key_of(p.candidate) for p in ranked if not p.candidate.residents), None)
    found = [everything] if everything is not None else []
    return [*found, window] if window is not None else found


def _tell(study: optuna.Study, trial: optuna.Trial, done: Trial, budget_bytes: int) -> None:
    measured = done.measurement
    trial.set_user_attr("predicted_latency_s", done.prediction.latency_s)
    trial.set_user_attr("predicted_peak_bytes", done.prediction.peak_bytes)
    trial.set_user_attr("peak_bytes", measured.peak_bytes)
    trial.set_user_attr("outcome", measured.outcome.value)
    trial.set_constraint("memory", float(measured.peak_bytes - budget_bytes))
    trial.set_constraint("output", float(measured.outcome is Outcome.OUTPUT_DIFFERS))
    if measured.outcome in (Outcome.OUT_OF_MEMORY, Outcome.OUTPUT_DIFFERS):
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
    else:
        study.tell(trial, measured.latency_s, skip_if_finished=True)
