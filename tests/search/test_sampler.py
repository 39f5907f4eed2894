"""The sampler, alone and as Optuna uses it."""

from __future__ import annotations

from collections.abc import Iterator

import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from autosp.search.learned import Learned
from autosp.search.sampler import PARAMETERS, CostModelSampler, least_traffic, running_keys
from autosp.search.space import Key, key_of, rank
from autosp.spec import Candidate, Prediction
from builders import prediction, profile

BUDGET = 1000
FAST = prediction(Candidate(k=4, k_prime=2, residents=(1, 3)), latency_s=10.0, stall_s=8.0, peak_bytes=900)
STEADY = prediction(Candidate(k=3, k_prime=1), latency_s=11.0, stall_s=0.0, peak_bytes=800)
SLOW = prediction(Candidate(k=1, k_prime=1), latency_s=30.0, stall_s=15.0, peak_bytes=200)
RANKED = [FAST, STEADY, SLOW]
ON_DISK = prediction(Candidate(k=1, k_prime=1, on_disk=(2,), read_ahead=2), latency_s=30.0, peak_bytes=200)
TWO_TIERS = {"on_disk": 0, "read_ahead": 0, "recompute": 0, "offload": 0}


@pytest.fixture
def sampler() -> CostModelSampler:
    """Over three candidates."""
    return CostModelSampler(RANKED, BUDGET)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No line per study on the terminal."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def study_of(sampler: CostModelSampler) -> optuna.Study:
    """In memory."""
    return optuna.create_study(sampler=sampler)


def suggested(trial: optuna.Trial, sampler: CostModelSampler) -> Key:
    """What a trial is to try, asked for as `run_study` does."""
    low_high = {name: sampler.space[name] for name in PARAMETERS}
    k, k_prime, residents, on_disk, read_ahead, recompute, offload = (
        trial.suggest_int(name, space.low, space.high)
        for name, space in low_high.items()
        if isinstance(space, IntDistribution)
    )
    return k, k_prime, residents, on_disk, read_ahead, recompute, offload


def asked(study: optuna.Study, sampler: CostModelSampler, *, state: TrialState = TrialState.COMPLETE) -> Key:
    """The next candidate's key; its trial is told."""
    trial = study.ask()
    key = suggested(trial, sampler)
    study.tell(trial, 1.0 if state is TrialState.COMPLETE else None, state=state)
    return key


def test_proposes_the_best_unvalidated(sampler: CostModelSampler) -> None:
    assert sampler.best_unvalidated(set()) == FAST
    assert sampler.best_unvalidated({key_of(FAST.candidate)}) == STEADY
    assert sampler.best_unvalidated({key_of(STEADY.candidate)}) == FAST
    assert sampler.best_unvalidated({key_of(FAST.candidate), key_of(STEADY.candidate)}) == SLOW
    assert sampler.best_unvalidated({key_of(each.candidate) for each in RANKED}) is None


def test_of_predictions_that_tie_the_one_that_moves_least_is_proposed() -> None:
    most, same, least, slower = (
        prediction(Candidate(k=k, k_prime=1), latency_s=latency_s, moved_bytes=moved, peak_bytes=peak)
        for k, latency_s, moved, peak in [(1, 1.0, 900, 10), (2, 1.004, 100, 50), (3, 1.009, 100, 40), (4, 1.02, 0, 10)]
    )
    assert least_traffic([most, same, least, slower]) == least
    assert least_traffic([most, slower]) == most
    ranked = [most, same, least, slower]
    sampler = CostModelSampler(ranked, 1000)
    sampler.learned = Learned(tuple(ranked), 0.0, 0)
    assert sampler.best_unvalidated(set()) == least
    assert sampler.best_unvalidated({key_of(least.candidate)}) == same
    assert sampler.best_unvalidated({key_of(one.candidate) for one in ranked}) is None


def test_uses_the_order_that_was_learned(sampler: CostModelSampler) -> None:
    sampler.learned = Learned((STEADY, FAST, SLOW), 0.0, 0)
    assert sampler.best_unvalidated(set()) == STEADY
    sampler.learned = Learned((FAST, STEADY, SLOW), 0.0, 0)
    assert sampler.best_unvalidated(set()) == FAST


@pytest.mark.parametrize(("extra", "expected"), [(100, FAST), (101, STEADY), (201, SLOW), (801, None)])
def test_uses_the_corrected_memory(sampler: CostModelSampler, extra: int, expected: Prediction | None) -> None:
    sampler.learned = Learned(tuple(RANKED), 0.0, extra)
    assert sampler.best_unvalidated(set()) == expected


def test_space_holds_every_candidate(sampler: CostModelSampler) -> None:
    assert sampler.space == {
        "k": IntDistribution(0, 4),
        "k_prime": IntDistribution(1, 2),
        "residents": IntDistribution(0, 4),
        "on_disk": IntDistribution(0, 0),
        "read_ahead": IntDistribution(0, 0),
        "recompute": IntDistribution(0, 0),
        "offload": IntDistribution(0, 0),
    }
    three_tiers = CostModelSampler([*RANKED, ON_DISK], BUDGET).space
    assert (three_tiers["on_disk"].high, three_tiers["read_ahead"].high) == (1, 2)


def test_where_layers_rest_tells_settings_apart() -> None:
    study = study_of(sampler := CostModelSampler([SLOW, ON_DISK], BUDGET))
    assert {asked(study, sampler) for _ in range(2)} == {(1, 1, 0, 0, 0, 0, 0), (1, 1, 0, 1, 2, 0, 0)}


def test_goes_on_with_a_study_of_before_the_disk_tier(sampler: CostModelSampler) -> None:
    study = study_of(sampler)
    old = {"k": 4, "k_prime": 2, "residents": 2}
    study.add_trial(
        optuna.trial.create_trial(params=old, distributions={name: sampler.space[name] for name in old}, value=1.0)
    )
    assert asked(study, sampler) == key_of(STEADY.candidate)


def test_asked_by_optuna(sampler: CostModelSampler) -> None:
    study = study_of(sampler)
    assert [asked(study, sampler) for _ in RANKED] == [key_of(each.candidate) for each in RANKED]
    assert [trial.params for trial in study.trials] == [
        {"k": 4, "k_prime": 2, "residents": 2} | TWO_TIERS,
        {"k": 3, "k_prime": 1, "residents": 0} | TWO_TIERS,
        {"k": 1, "k_prime": 1, "residents": 0} | TWO_TIERS,
    ]


def test_asked_by_optuna_with_fixed_distributions(sampler: CostModelSampler) -> None:
    trial = study_of(sampler).ask(sampler.space)
    assert trial.params == {"k": 4, "k_prime": 2, "residents": 2} | TWO_TIERS


def test_never_proposes_a_candidate_twice() -> None:
    predictions = rank(profile((10, 20, 30, 40), bytes_per_s=5.0), 80)
    sampler = CostModelSampler(predictions, 80)
    study = study_of(sampler)
    keys = [asked(study, sampler) for _ in predictions]
    assert sorted(keys) == sorted(key_of(each.candidate) for each in predictions)


def test_does_not_propose_what_runs_elsewhere(sampler: CostModelSampler) -> None:
    study = study_of(sampler)
    first, second = study.ask(), study.ask()
    assert suggested(first, sampler) == key_of(FAST.candidate)
    assert suggested(second, sampler) == key_of(STEADY.candidate)


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED])
def test_does_not_propose_what_was_tried(sampler: CostModelSampler, state: TrialState) -> None:
    study = study_of(sampler)
    assert asked(study, sampler, state=state) == key_of(FAST.candidate)
    assert asked(study, sampler) == key_of(STEADY.candidate)


def test_proposes_again_what_was_killed(sampler: CostModelSampler) -> None:
    study = study_of(sampler)
    assert asked(study, sampler, state=TrialState.FAIL) == key_of(FAST.candidate)
    assert asked(study, sampler) == key_of(FAST.candidate)


def test_enqueued_candidates_come_first(sampler: CostModelSampler) -> None:
    study = study_of(sampler)
    study.enqueue_trial({"k": 1, "k_prime": 1, "residents": 0})
    keys = [asked(study, sampler) for _ in RANKED]
    assert keys == [key_of(each.candidate) for each in (SLOW, FAST, STEADY)]


def test_what_was_learned_is_used_between_trials(sampler: CostModelSampler) -> None:
    study = study_of(sampler)
    study.enqueue_trial({"k": 1, "k_prime": 1, "residents": 0})
    asked(study, sampler)
    sampler.learned = Learned((STEADY, FAST, SLOW), 0.0, 0)
    assert asked(study, sampler) == key_of(STEADY.candidate)


def test_nothing_left(sampler: CostModelSampler) -> None:
    study = study_of(sampler)
    for _ in RANKED:
        asked(study, sampler)
    assert asked(study, sampler) == key_of(FAST.candidate)  # valid numbers, for who asks all the same


def test_what_must_run_comes_first_and_once() -> None:
    sampler = CostModelSampler(RANKED, BUDGET, [key_of(SLOW.candidate), key_of(STEADY.candidate)])
    study = study_of(sampler)
    assert sampler.due(study) == [key_of(SLOW.candidate), key_of(STEADY.candidate)]
    assert asked(study, sampler) == key_of(SLOW.candidate)
    sampler.validated = frozenset({key_of(STEADY.candidate)})
    assert sampler.due(study) == []
    assert asked(study, sampler) == key_of(FAST.candidate)
    assert sampler.next_key(study) is None


def test_what_was_measured_is_not_proposed_though_optuna_was_never_told(sampler: CostModelSampler) -> None:
    study = study_of(sampler)
    sampler.validated = frozenset({key_of(FAST.candidate)})
    assert sampler.next_key(study) == key_of(STEADY.candidate)


def test_what_runs_is_not_proposed_and_what_failed_is(sampler: CostModelSampler) -> None:
    study = study_of(sampler)
    trial = study.ask()
    key = suggested(trial, sampler)
    assert running_keys(study) == {key}
    assert sampler.next_key(study) != key
    study.tell(trial, state=TrialState.FAIL)
    assert running_keys(study) == frozenset()
    assert sampler.next_key(study) == key
