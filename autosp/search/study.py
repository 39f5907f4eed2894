"""The Optuna study of one tuning: what is validated, in which order, and when no more is worth it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from autosp.search.finals import fastest, pooled, undecided
from autosp.search.headroom import acceptable_bytes, usable_after, usable_bytes
from autosp.search.learned import Learned, Lessons
from autosp.search.limits import Limits
from autosp.search.sampler import PARAMETERS, CostModelSampler, least_traffic, running_keys
from autosp.search.space import Key, all_resident, key_of
from autosp.search.validate import Validate
from autosp.spec import Outcome, Prediction, Profile, Trial
from autosp.store.trials import fail_dead_trials, running_trial

if TYPE_CHECKING:
    from autosp.cost_model.predict import Predictor
    from autosp.store import Repository

TOLERANCE = 0.01
"""A candidate that can win by less than this is not worth a validation."""

HOPELESS = 0.1
"""What is predicted to be slower than the best by more than this, and then is in a pass, is timed no more."""

PROFILE_S = "autosp_profile_s"
"""The study's attribute that says how long it took until its first trial could begin."""

POLL_S = 0.5
"""Between two looks at what other workers have found."""


@dataclass(frozen=True)
class Verdict:
    """The end of a study: its best trial, and why it may be taken for the best plan."""

    best: Trial | None
    why: str
    finished: bool
    """Whether the stop rule ended it, rather than a limit."""


class Next(Enum):
    """What a worker of a study does next."""

    VALIDATE = auto()
    WAIT = auto()
    """For trials of other workers: nothing is left that their results would not make needless, or that is allowed."""
    END = auto()


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
    hold_device: Callable[[], AbstractContextManager[None]] = nullcontext,
    repeat: Validate | None = None,
    profile_s: float = 0.0,
    predictor: Predictor | None = None,
) -> Verdict:
    """Validate candidates until none can win, or a limit is reached. Continues a study that was interrupted.

    With `repeat`, which measures a candidate anew, the fastest are measured again at the end: see `finals`.
    `profile_s`: what was spent before the study, by whoever comes first. See [Note: effort].
    `predictor`: of the candidates, where there is one.

    The cost model's favourite comes first, then the trivial baselines: everything resident where it fits, and the best
    plain sliding window, unless that is `HOPELESS` and the profile was taken under another one.

    [Note: workers] Any number of processes may run one study at once. A worker takes its device, then its turn at the
    study, in which it reads all results, decides, and claims a candidate: so no two claim the same, and each decides
    on all that is known. It lets go of its turn to validate, and of the device afterwards. What a process that died
    was validating is free again. All end when no trial runs and none could win: with the same verdict.
    """
    begin = time.perf_counter()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = repository.optuna_storage()
    group = ranked[0].candidate.group
    usable = usable_bytes(profile, budget_bytes, group)
    acceptable = acceptable_bytes(profile, budget_bytes, group)
    lessons = Lessons(profile, ranked, predictor)
    favourite = key_of(least_traffic(ranked).candidate)
    sampler = CostModelSampler(ranked, usable, [favourite, *_baselines(profile, ranked)])
    with repository.turn(name):
        study = optuna.create_study(study_name=name, storage=storage, sampler=sampler, load_if_exists=True)
        study.set_user_attr("autosp_fingerprint", repository.study_key(name).fingerprint)
        if PROFILE_S not in study.user_attrs:
            study.set_user_attr(PROFILE_S, profile_s + time.perf_counter() - begin)
    while True:
        with hold_device(), ExitStack() as turn:
            turn.enter_context(repository.turn(name))
            fail_dead_trials(study)
            running = running_keys(study)  # before the trials: one that ends meanwhile is not missed in both
            trials = repository.trials(name)
            learned = sampler.learned = lessons.learned(trials)
            sampler.usable_bytes = usable_after(trials, learned.extra_bytes, usable, acceptable)
            sampler.validated = frozenset(key_of(trial.prediction.candidate) for trial in trials)
            judged = partial(judge, trials, usable_bytes=sampler.usable_bytes, acceptable_bytes=acceptable)
            verdict = judged(learned)
            without_running = judged(learned.without(running)) if running else verdict
            pass_s = math.inf if verdict.best is None else verdict.best.measurement.latency_s
            finalists = [] if repeat is None else undecided(_acceptable(trials, acceptable))
            trial_s = max((trial.measurement.taken_s for trial in trials), default=0.0)
            spent_s = _spent_s(study, trials)
            if limits.beyond_effort(spent_s + trial_s * len(finalists), pass_s):
                finalists = []  # what is too short for them is long enough for another trial
            would_s = spent_s + trial_s * (len(finalists) + 1)
            due = len(sampler.due(study))
            reached = partial(limits.reached, spent_s=would_s, pass_s=pass_s, due=due)
            upcoming = _what_next(study, sampler, reached, due, len(trials), len(running), verdict, without_running)
            if upcoming is Next.END:
                if repeat is None or not finalists or not (verdict.finished or limits.by_default):
                    return verdict
                for one in finalists:
                    progress(f"again: {one.prediction.candidate.label()}")
                    measured = pooled(one.measurement, repeat(one.prediction.candidate))
                    repository.add_trial(name, one.model_copy(update={"measurement": measured}))
            if upcoming is Next.VALIDATE:
                with running_trial(study, storage) as trial:
                    prediction = _claimed(trial, sampler)
                    turn.close()
                    if prediction is None:
                        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
                        continue
                    progress(f"trial {len(trials) + 1}: {prediction.candidate.label()}")
                    measured = validate(prediction.candidate, _hopeless_s(prediction, verdict.best))
                    done = Trial(number=trial.number, prediction=prediction, measurement=measured)
                    repository.add_trial(name, done)
                    _tell(study, trial, done, budget_bytes)
        if upcoming is Next.WAIT:
            progress("waiting for other workers' trials")
            time.sleep(POLL_S)


def _what_next(
    study: optuna.Study,
    sampler: CostModelSampler,
    reached: Callable[[int], bool],
    due: int,
    done: int,
    running: int,
    verdict: Verdict,
    without_running: Verdict,
) -> Next:
    """`reached`: whether so many trials are the most. `due`: how many are to be tried in any case, and were not yet.
    `without_running`: the verdict if what other workers are validating could not win.
    """
    if reached(done):
        return Next.END
    nothing_else = Next.WAIT if running else Next.END
    must_run = due or study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    if verdict.finished and not must_run:
        return nothing_else
    if reached(done + running):
        return Next.WAIT
    if not must_run and (without_running.finished or sampler.next_key(study) is None):
        return nothing_else
    return Next.VALIDATE


def _spent_s(study: optuna.Study, trials: Sequence[Trial]) -> float:
    """What the study took so far.

    [Note: effort] The clock counts: profiling, and every trial and final from its set-up on, each as the database has
    it. So all workers of a study agree on when it ends, and waiting for other work on the device counts for nothing.
    What a process did that was killed does not count either.
    """
    return float(study.user_attrs[PROFILE_S]) + sum(trial.measurement.taken_s for trial in trials)


def _claimed(trial: optuna.Trial, sampler: CostModelSampler) -> Prediction | None:
    """What a trial is to try. None if it was enqueued by hand, and is no candidate under this budget."""
    key = tuple(trial.suggest_int(name, sampler.space[name].low, sampler.space[name].high) for name in PARAMETERS)
    return next((one for one in sampler.learned.predictions if key_of(one.candidate) == key), None)


def _hopeless_s(prediction: Prediction, best: Trial | None) -> float:
    """A pass that takes longer shows that the candidate is no rival: as predicted."""
    limit_s = math.inf if best is None else best.measurement.latency_s * (1 + HOPELESS)
    return limit_s if prediction.latency_s > limit_s else math.inf


def judge(trials: Sequence[Trial], learned: Learned, usable_bytes: int, acceptable_bytes: int) -> Verdict:
    """Whether an unvalidated candidate's optimistic prediction beats the best measurement by more than a tolerance.

    `usable_bytes` bounds what is predicted of a rival, `acceptable_bytes` what was measured of the winner.
    """
    fitting = _acceptable(trials, acceptable_bytes)
    best = fastest(fitting) if fitting else None
    rivals = learned.rivals({key_of(trial.prediction.candidate) for trial in trials}, usable_bytes)
    if best is None:
        return Verdict(None, "no validated candidate fits the budget", finished=not rivals and bool(trials))
    measured_s = best.measurement.latency_s
    found = f"{best.prediction.candidate.label()} was the fastest of {len(fitting)} validated"
    if measured_s > min(trial.measurement.latency_s for trial in fitting):
        found += ", as far as noise tells, and the one of these with the least memory"
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


def _acceptable(trials: Sequence[Trial], acceptable_bytes: int) -> list[Trial]:
    return [
        trial
        for trial in trials
        if trial.measurement.outcome is Outcome.FITS and trial.measurement.peak_bytes <= acceptable_bytes
    ]


def _baselines(profile: Profile, ranked: Sequence[Prediction]) -> list[Key]:
    """Keys of the trivial candidates that are validated whatever is predicted of their rivals, of those that fit."""
    resident = all_resident(profile).residents
    everything = [p for p in ranked if p.candidate.residents == resident][:1]
    window = [p for p in ranked if not p.candidate.residents and not _was_profiled(profile, p, ranked[0])][:1]
    return [key_of(prediction.candidate) for prediction in (*everything, *window)]


def _was_profiled(profile: Profile, window: Prediction, favourite: Prediction) -> bool:
    """Whether the ring that profiling timed, a plain window itself, tells enough of a window that cannot win.

    It ran one microbatch, so it tells nothing of a group.
    """
    hopeless = window.latency_s > favourite.latency_s * (1 + HOPELESS)
    return hopeless and profile.overlapped is not None and window.candidate.group == 1


def _tell(study: optuna.Study, trial: optuna.Trial, done: Trial, budget_bytes: int) -> None:
    """Tell Optuna, unless another worker took this one for dead meanwhile: what was measured is stored, and counts."""
    measured = done.measurement
    with suppress(UpdateFinishedTrialError):
        trial.set_user_attr("predicted_latency_s", done.prediction.latency_s)
        trial.set_user_attr("predicted_peak_bytes", done.prediction.peak_bytes)
        trial.set_user_attr("peak_bytes", measured.peak_bytes)
        trial.set_user_attr("outcome", measured.outcome.value)
        trial.set_constraint("memory", float(measured.peak_bytes - budget_bytes))
        trial.set_constraint("output", float(measured.outcome is Outcome.OUTPUT_DIFFERS))
        trial.set_constraint("process", float(measured.outcome.cut_short))
        if measured.outcome.is_timed:
            study.tell(trial, measured.latency_s, skip_if_finished=True)
        else:
            study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
