"""The least memory that is nearly as fast as the fastest plan: a search over budgets, each tried as a study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from autosp.cost_model.reading import planned_reading
from autosp.errors import SettingError, StudyNotFoundError
from autosp.search.failure import NO_PLAN
from autosp.search.headroom import budget_for
from autosp.search.learned import Learned, Lessons
from autosp.search.space import front
from autosp.spec import Outcome, Plan, Prediction, Profile, StudyKey, Trial

if TYPE_CHECKING:
    from autosp.store import Repository, StudyName

MOST_BUDGETS = 4
"""Smaller budgets that are tried. The front that was predicted, corrected by what was measured, leads to them."""

FastestUnder = Callable[[int], Plan]
"""Tunes under a budget of so many bytes."""


def checked_slack(slack: float | None) -> float | None:
    """The slack, if it is one.

    Raises: SettingError if it is no share between 0 and 1.
    """
    if slack is not None and not (type(slack) in (int, float) and 0 < slack <= 1):
        raise SettingError(f"slack={slack!r}: pass a share such as 0.05, for plans that take up to 5 % longer, or None")
    return slack


def least_memory(repository: Repository, name: StudyName, key: StudyKey, fastest_under: FastestUnder) -> Plan:
    """The plan of least measured memory that takes at most `key.slack` longer than the fastest under the key's budget.

    Smaller budgets are tried for as long as one is predicted to be fast enough, given what was measured so far. Of all
    trials on the way the best is taken; they become the trials of the study with that name.
    """
    fastest = fastest_under(key.budget_bytes)
    profile, trials = study_of(repository, fastest)
    entered = name.enter(repository, key)
    repository.save_profile(entered, profile)
    assert fastest.measurement is not None and key.slack is not None
    limit_s = fastest.measurement.latency_s * (1 + key.slack)
    lessons = Lessons(profile, front(profile, key.budget_bytes, fastest.host_budget_bytes, key.group))
    tried = {key.budget_bytes}
    too_slow_bytes = 0
    for _ in range(MOST_BUDGETS):
        best = _leanest(trials, limit_s)
        learned = lessons.learned(trials)
        target = _next(learned, trials, limit_s, too_slow_bytes, best.measurement.peak_bytes)
        if target is None:
            break
        budget_bytes = budget_for(profile, learned.peak_bytes(target), key.group)
        if budget_bytes in tried:
            break
        tried.add(budget_bytes)
        found = _trials_under(repository, fastest_under, budget_bytes)
        trials += found
        if not any(_fast_enough(trial, limit_s) for trial in found):
            too_slow_bytes = target.peak_bytes
    return _stored(repository, entered, key, profile, fastest, trials, limit_s)


def study_of(repository: Repository, plan: Plan) -> tuple[Profile, list[Trial]]:
    """The profile and the trials that a tuned plan rests on.

    Raises: StudyNotFoundError if the database has no profile of its study.
    """
    name = plan.study_name or ""
    profile = repository.profile(name)
    if profile is None:
        raise StudyNotFoundError(f"study {name!r} has no profile: tune under another study_name")
    return profile, repository.trials(name)


def _trials_under(repository: Repository, fastest_under: FastestUnder, budget_bytes: int) -> list[Trial]:
    """What tuning under a budget measured; nothing where all plans need more after all, or failed."""
    try:
        return study_of(repository, fastest_under(budget_bytes))[1]
    except NO_PLAN:
        return []


def _next(
    learned: Learned, trials: Sequence[Trial], limit_s: float, above_bytes: int, below_bytes: int
) -> Prediction | None:
    """The prediction of least memory that is fast enough, of those between what was too slow and the best so far."""
    tried = {trial.prediction.candidate for trial in trials}
    return min(
        (
            prediction
            for prediction in learned.predictions
            if above_bytes < prediction.peak_bytes
            and learned.peak_bytes(prediction) < below_bytes
            and prediction.latency_s <= limit_s
            and prediction.candidate not in tried
        ),
        key=lambda prediction: prediction.peak_bytes,
        default=None,
    )


def _fast_enough(trial: Trial, limit_s: float) -> bool:
    return trial.measurement.outcome is Outcome.FITS and trial.measurement.latency_s <= limit_s


def _leanest(trials: Sequence[Trial], limit_s: float) -> Trial:
    return min(
        (trial for trial in trials if _fast_enough(trial, limit_s)),
        key=lambda trial: (trial.measurement.peak_bytes, trial.measurement.latency_s),
    )


def _stored(
    repository: Repository,
    name: str,
    key: StudyKey,
    profile: Profile,
    fastest: Plan,
    trials: Sequence[Trial],
    limit_s: float,
) -> Plan:
    """The answer, as that of a study with all the trials of those it rests on, and those it had before."""
    best = _leanest(trials, limit_s)
    assert fastest.measurement is not None
    why = (
        f"{best.prediction.candidate.label()} takes {best.measurement.latency_s:.4g} s with "
        f"{best.measurement.peak_bytes / 1e9:.4g} GB, the least memory of {len(trials)} validated that is within "
        f"{key.slack:.0%} of the fastest: {fastest.measurement.latency_s:.4g} s with "
        f"{fastest.measurement.peak_bytes / 1e9:.4g} GB (study {fastest.study_name})"
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    found = plan_of(best, fastest, profile)
    answer = found.model_copy(update={"created_at": now, "study_name": name, "why": why})
    distinct = {trial.prediction.candidate: trial for trial in reversed([*trials, *repository.trials(name)])}
    for number, trial in enumerate(reversed(distinct.values())):
        repository.add_trial(name, trial.model_copy(update={"number": number}))
    repository.save_plan(name, answer)
    return answer


def plan_of(trial: Trial, like: Plan, profile: Profile) -> Plan:
    """The plan of a trial of the same study, or of one under another budget that `like`'s has room for.

    `profile`: the one that both rest on.
    """
    candidate = trial.prediction.candidate
    if candidate == like.candidate:
        return like
    return like.model_copy(
        update={
            "candidate": candidate,
            "reading": planned_reading(profile, trial.prediction),
            "prediction": trial.prediction,
            "measurement": trial.measurement,
            "why": f"{candidate.label()} was measured on the way to study {like.study_name}'s {like.candidate.label()}",
        }
    )
