"""Less memory for a little time, what other studies know, and the front: on a device that is told what to answer."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from autosp.cost_model.reading import planned_reading
from autosp.errors import IsolationError, SettingError
from autosp.search.evidence import known_measurements, known_profile, unless_known
from autosp.search.failure import no_plan
from autosp.search.lean import MOST_BUDGETS, checked_slack, least_memory, plan_of
from autosp.search.space import front, rank
from autosp.settings import settings
from autosp.spec import Candidate, Measurement, Outcome, Plan, Profile, StudyKey, Tier
from autosp.store import Repository, StudyName
from builders import link, measurement, partition, plan, prediction, profile, study_key, trial

BUDGET = 1200
TINY = profile((100,) * 10, forward_s=0.1, bytes_per_s=150.0)
"""Ten layers, each of which computes for 0.1 s and comes in 0.67 s: fastest are all of them resident."""

LEAN = StudyName("lean", given="lean")


def key(budget_bytes: int = BUDGET, slack: float | None = None, model: str = "m" * 32) -> StudyKey:
    return study_key(budget_bytes=budget_bytes, slack=slack, model_fingerprint=model)


@pytest.fixture
def repository() -> Iterator[Repository]:
    with Repository() as opened:
        yield opened


def tuner(repository: Repository, slower: float = 1.0) -> tuple[list[int], Callable[[int], Plan]]:
    """Studies of one trial, the favourite's, which takes `slower` times what is predicted unless all is resident."""
    asked: list[int] = []

    def fastest_under(budget_bytes: int) -> Plan:
        asked.append(budget_bytes)
        favourite = rank(TINY, budget_bytes)[0]
        factor = slower if favourite.moved_bytes else 1.0
        name = f"under-{budget_bytes}"
        done = trial(favourite, latency_s=favourite.latency_s * factor)
        repository.create_study(name, key(budget_bytes))
        repository.save_profile(name, TINY)
        repository.add_trial(name, done)
        answer = plan(done, TINY, budget_bytes=budget_bytes, study_name=name)
        repository.save_plan(name, answer)
        return answer

    return asked, fastest_under


def test_the_front_is_what_no_setting_beats() -> None:
    line = front(TINY, BUDGET)
    everything = [predicted for budget in range(100, BUDGET, 50) for predicted in rank(TINY, budget)]
    for predicted in everything:
        assert any(
            one.peak_bytes <= predicted.peak_bytes and one.latency_s <= predicted.latency_s + 1e-9 for one in line
        )
    assert line[0].peak_bytes == 100
    assert line[-1].candidate.residents == tuple(range(10))
    assert [one.latency_s for one in line] == sorted((one.latency_s for one in line), reverse=True)


def test_least_memory_within_the_slack(repository: Repository) -> None:
    asked, fastest_under = tuner(repository)
    found = least_memory(repository, LEAN, key(slack=1.0), fastest_under)
    within = [one for one in front(TINY, BUDGET) if one.latency_s <= 2 * 1.0]  # everything resident takes 1 s
    assert found.measurement is not None
    assert found.measurement.peak_bytes == within[0].peak_bytes < 1000
    assert asked == [BUDGET, within[0].peak_bytes]
    assert found.study_name == "lean" and found.budget_bytes == BUDGET
    assert "within 100% of the fastest" in found.why
    assert repository.find_plan(key(slack=1.0)) == found
    assert [one.number for one in repository.trials("lean")] == [0, 1]


def test_what_turns_out_too_slow_is_not_the_answer(repository: Repository) -> None:
    asked, fastest_under = tuner(repository, slower=3.0)
    found = least_memory(repository, LEAN, key(slack=1.0), fastest_under)
    assert found.candidate.residents == tuple(range(10))
    assert found.measurement is not None and found.measurement.latency_s == pytest.approx(1.0)
    assert 1 < len(asked) <= 1 + MOST_BUDGETS


@pytest.mark.parametrize(
    "outcome", [Outcome.OVER_BUDGET, Outcome.OUTPUT_DIFFERS, Outcome.HOST_OUT_OF_MEMORY, Outcome.KILLED]
)
def test_a_budget_without_a_plan_is_no_answer_either(repository: Repository, outcome: Outcome) -> None:
    _, fastest_under = tuner(repository)

    def picky(budget_bytes: int) -> Plan:
        if budget_bytes < BUDGET:
            failed = trial(rank(TINY, budget_bytes)[0], outcome=outcome)
            raise no_plan(TINY, budget_bytes, [failed], finished=True)
        return fastest_under(budget_bytes)

    assert least_memory(repository, LEAN, key(slack=1.0), picky).candidate.residents == tuple(range(10))


def test_the_fastest_must_have_a_plan(repository: Repository) -> None:
    def none(budget_bytes: int) -> Plan:
        raise no_plan(TINY, budget_bytes, [trial(rank(TINY, BUDGET)[0], outcome=Outcome.KILLED)], finished=True)

    with pytest.raises(IsolationError):
        least_memory(repository, LEAN, key(slack=1.0), none)


def test_a_study_that_goes_on_keeps_the_trials_it_had_once_each(repository: Repository) -> None:
    before = [*rank(TINY, 300)[:2], rank(TINY, BUDGET)[0]]
    stored(repository, "lean", key(slack=1.0), TINY)
    for number, one in enumerate(before):
        repository.add_trial("lean", trial(one, number=number))
    least_memory(repository, LEAN, key(slack=1.0), tuner(repository)[1])
    after = [one.prediction.candidate for one in repository.trials("lean")]
    assert len(after) == len(set(after))
    assert {one.candidate for one in before} <= set(after)


def test_a_plan_of_another_trial_reads_as_that_one_does_best_and_says_where_it_is_from() -> None:
    """In the page cache, reading takes a tenth of the time, and of compute: it pays for what moves, not for the rest."""
    disk = link(bytes_per_s=150.0, source=Tier.DISK).model_copy(
        update={"target": Tier.DEVICE, "cached_bytes_per_s": 1500.0}
    )
    known = TINY.model_copy(update={"links": (disk,)})
    resident = Candidate(k=10, k_prime=1, residents=tuple(range(10)))
    moved = prediction(Candidate(k=2, k_prime=1), latency_s=6.7, moved_bytes=1000)
    best = plan(trial(prediction(resident)), known, budget_bytes=BUDGET, study_name="under")
    best = best.model_copy(update={"reading": planned_reading(known, prediction(resident)), "why": "it won"})
    found = plan_of(trial(moved), best, known)
    assert found.candidate == moved.candidate and found.budget_bytes == BUDGET
    assert (best.reading.from_cache, found.reading.from_cache) == (False, True)
    assert found.why == "k=2 k'=1 residents=0 was measured on the way to study under's k=10 k'=1 residents=10"
    assert plan_of(trial(prediction(resident)), best, known) == best


@pytest.mark.parametrize("slack", [0, -0.1, 1.5, float("nan"), "5%", True])
def test_slacks_that_are_none(slack: object) -> None:
    with pytest.raises(SettingError, match="slack="):
        checked_slack(slack)  # type: ignore[arg-type]


def stored(repository: Repository, name: str, of: StudyKey, known: Profile | None) -> None:
    repository.create_study(name, of)
    if known is not None:
        repository.save_profile(name, known)


def test_the_newest_profile_of_the_same_work_counts(repository: Repository) -> None:
    newer = TINY.model_copy(update={"tail_s": 0.5})
    stored(repository, "other model", key(model="o" * 32), TINY)
    stored(repository, "no profile", key(1), None)
    assert known_profile(repository, key(), TINY.partition, None) is None
    stored(repository, "first", key(2), TINY)
    stored(repository, "second", key(3, slack=0.1), newer)
    stored(repository, "no profile either", key(4), None)
    assert known_profile(repository, key(), TINY.partition, None) == newer


@pytest.mark.parametrize("stale", ["schema", "layers", "disk"])
def test_a_profile_that_no_longer_holds_is_refused(repository: Repository, stale: str) -> None:
    kept = TINY.model_copy(update={"schema_version": 10**6}) if stale == "schema" else TINY
    found = partition((100,) * 9) if stale == "layers" else TINY.partition
    stored(repository, "kept", key(2), kept)
    assert known_profile(repository, key(), found, 500 if stale == "disk" else None) is None


def test_measurements_of_other_budgets_on_the_same_profile(repository: Repository) -> None:
    resident, window, over = (one for one in rank(TINY, BUDGET)[:3])
    stored(repository, "larger", key(2 * BUDGET), TINY)
    repository.add_trial("larger", trial(resident, latency_s=1.5, peak_bytes=BUDGET))
    repository.add_trial("larger", trial(window, peak_bytes=BUDGET + 1, number=1))
    repository.add_trial("larger", trial(over, outcome=Outcome.OVER_BUDGET, number=2))
    stored(repository, "another profile", key(3 * BUDGET), TINY.model_copy(update={"tail_s": 0.5}))
    repository.add_trial("another profile", trial(window))
    stored(repository, "own", key(), TINY)
    repository.add_trial("own", trial(window))
    known = known_measurements(repository, "own", TINY, BUDGET)
    assert known == {resident.candidate: measurement(latency_s=1.5, peak_bytes=BUDGET)}


def test_measurements_of_another_version_are_no_evidence(repository: Repository) -> None:
    (resident, *_) = rank(TINY, BUDGET)
    stored(repository, "newer", key(2 * BUDGET), TINY)
    repository.add_trial("newer", trial(resident))
    with closing(sqlite3.connect(settings().storage)) as database, database:
        database.execute("UPDATE autosp_trial SET measurement = json_set(measurement, '$.from_the_future', 1)")
    stored(repository, "own", key(), TINY)
    assert known_measurements(repository, "own", TINY, BUDGET) == {}
    assert known_profile(repository, key(), TINY.partition, None) == TINY


def test_what_is_known_is_answered_once() -> None:
    first, second = measurement(latency_s=1.0), measurement(latency_s=2.0)
    asked: list[Candidate] = []

    def validate(candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
        asked.append(candidate)
        return second

    one, other = Candidate(k=1, k_prime=1), Candidate(k=2, k_prime=1)
    answer = unless_known({one: first}, validate)
    assert [answer(one), answer(other), answer(one)] == [first, second, second]
    assert asked == [other, one]


def test_what_was_hopeless_elsewhere_is_measured_where_it_may_win() -> None:
    brief = measurement(latency_s=3.0).model_copy(update={"samples_s": (3.0,)})
    whole = measurement(latency_s=2.9)
    plan = Candidate(k=1, k_prime=1)
    asked: list[float] = []

    def validate(candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
        asked.append(hopeless_s)
        return whole

    assert unless_known({plan: brief}, validate)(plan, 2.0) == brief
    assert unless_known({plan: brief}, validate)(plan, 4.0) == whole
    assert unless_known({plan: brief}, validate)(plan) == whole
    assert asked == [4.0, math.inf]
