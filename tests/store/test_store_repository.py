from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import store_samples
from autosp.errors import StoreError, StudyMismatchError, StudyNotFoundError
from autosp.spec import Outcome
from autosp.store import Repository, StudyName
from autosp.store.trials import running_trial

finite = st.floats(allow_nan=False, allow_infinity=False)


def test_records_come_back_equal_from_another_repository(repository: Repository, storage: Path) -> None:
    repository.save_profile("tiny", store_samples.profile())
    repository.add_trial("tiny", store_samples.trial(3))
    repository.save_plan("tiny", store_samples.plan())
    with Repository(storage) as other:
        assert other.study_key("tiny") == store_samples.study_key()
        assert other.profile("tiny") == store_samples.profile()
        assert other.trials("tiny") == [store_samples.trial(3)]
        assert other.plan("tiny") == store_samples.plan()


@hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples_s=st.lists(finite), peak_bytes=st.integers(), stall_s=finite, why=st.text())
def test_every_finite_value_and_text_survives(
    repository: Repository, samples_s: list[float], peak_bytes: int, stall_s: float, why: str
) -> None:
    trial = store_samples.trial(1)
    trial = trial.model_copy(
        update={
            "measurement": trial.measurement.model_copy(
                update={"samples_s": tuple(samples_s), "peak_bytes": peak_bytes}
            ),
            "prediction": trial.prediction.model_copy(update={"stall_s": stall_s}),
        }
    )
    repository.add_trial("tiny", trial)
    assert repository.trials("tiny") == [trial]
    repository.save_plan("tiny", store_samples.plan(why))
    assert repository.plan("tiny") == store_samples.plan(why)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_json_cannot_hold_is_refused_not_stored(repository: Repository, value: float) -> None:
    with pytest.raises(StoreError, match=r"Prediction cannot be stored: latency_s is not a finite number"):
        repository.add_trial("tiny", store_samples.trial(latency_s=value, number=2))
    with pytest.raises(StoreError, match="Plan cannot be stored"):
        repository.save_plan("tiny", store_samples.plan().model_copy(update={"floor_s": value}))
    assert repository.trials("tiny") == []
    assert repository.plan("tiny") is None


def test_trials_are_in_number_order_and_a_number_is_replaced(repository: Repository) -> None:
    for number in (2, 0, 1):
        repository.add_trial("tiny", store_samples.trial(number, latency_s=1.0))
    repository.add_trial("tiny", store_samples.trial(0, latency_s=0.5))
    assert [(trial.number, trial.measurement.latency_s) for trial in repository.trials("tiny")] == [
        (0, 0.5),
        (1, 1.0),
        (2, 1.0),
    ]


def test_nothing_saved_yet_is_none(repository: Repository) -> None:
    assert repository.profile("tiny") is None
    assert repository.plan("tiny") is None
    assert repository.trials("tiny") == []
    assert repository.find_plan(store_samples.study_key()) is None


def test_the_newest_plan_counts_and_finishes_the_study(repository: Repository) -> None:
    assert not repository.summaries()[0].finished
    repository.save_plan("tiny", store_samples.plan("first"))
    repository.save_plan("tiny", store_samples.plan("second"))
    assert repository.summaries()[0].finished
    assert repository.plan("tiny") == store_samples.plan("second")


def test_studies_and_plans_are_found_by_key_the_newest_first(repository: Repository) -> None:
    key = store_samples.study_key()
    repository.save_plan("tiny", store_samples.plan("of the older study"))
    repository.create_study("tiny-2", key)
    repository.create_study("other", store_samples.study_key(budget_bytes=1))
    assert repository.find_study(key) == "tiny-2"
    plan = repository.find_plan(key)
    assert plan is not None
    assert plan.why == "of the older study"
    assert repository.find_study(store_samples.study_key(budget_bytes=1)) == "other"
    assert repository.find_plan(store_samples.study_key(budget_bytes=1)) is None
    assert repository.find_study(store_samples.study_key(budget_bytes=2)) is None


def test_creating_a_study_again_is_harmless_unless_the_key_differs(repository: Repository) -> None:
    repository.add_trial("tiny", store_samples.trial())
    repository.create_study("tiny", store_samples.study_key())
    assert len(repository.trials("tiny")) == 1
    with pytest.raises(StudyMismatchError, match=r"'tiny'.*budget_bytes: 2000000000 there, 5 here"):
        repository.create_study("tiny", store_samples.study_key(budget_bytes=5))
    assert repository.study_key("tiny") == store_samples.study_key()


@pytest.mark.parametrize(
    "act",
    [
        lambda repository: repository.study_key("tinny"),
        lambda repository: repository.profile("tinny"),
        lambda repository: repository.save_profile("tinny", store_samples.profile()),
        lambda repository: repository.trials("tinny"),
        lambda repository: repository.add_trial("tinny", store_samples.trial()),
        lambda repository: repository.plan("tinny"),
        lambda repository: repository.save_plan("tinny", store_samples.plan()),
        lambda repository: repository.delete_study("tinny"),
    ],
)
def test_an_unknown_study_names_close_ones(
    repository: Repository, storage: Path, act: Callable[[Repository], object]
) -> None:
    repository.create_study("quite different", store_samples.study_key())
    with pytest.raises(StudyNotFoundError) as caught:
        act(repository)
    message = str(caught.value)
    assert "'tinny'" in message
    assert "did you mean 'tiny'?" in message
    assert "quite different" not in message
    assert "autosp studies" in message
    assert str(storage) in message


def test_a_study_without_a_name_gets_one_that_neither_we_nor_optuna_use(repository: Repository) -> None:
    import optuna

    assert repository.enter_study("new", store_samples.study_key(1)) == "new"
    assert repository.enter_study("tiny", store_samples.study_key(2)) == "tiny-2"
    optuna.create_study(study_name="tiny-3", storage=repository.optuna_storage())
    assert repository.enter_study("tiny", store_samples.study_key(3)) == "tiny-4"
    assert repository.study_key("tiny-4") == store_samples.study_key(3)


def test_a_study_without_a_name_is_the_newest_with_its_key(repository: Repository) -> None:
    repository.create_study("mine", store_samples.study_key())
    assert repository.enter_study("tiny", store_samples.study_key()) == "mine"
    assert [summary.name for summary in repository.summaries()] == ["mine", "tiny"]


def test_a_name_is_the_one_given_or_is_made_as_its_study_is_entered(repository: Repository) -> None:
    mine, made = StudyName("mine", given="mine"), StudyName("tiny")
    key, other = store_samples.study_key(1), store_samples.study_key(2)
    assert [name.find(repository, key) for name in (mine, made)] == [None, None]
    assert (mine.enter(repository, key), made.enter(repository, other)) == ("mine", "tiny-2")
    assert (mine.find(repository, key), made.find(repository, other)) == ("mine", "tiny-2")
    for use in (mine.find, mine.enter):
        with pytest.raises(StudyMismatchError, match="'mine' was made for something else"):
            use(repository, other)


def test_summaries_tell_the_fastest_trial_that_fits(repository: Repository) -> None:
    repository.add_trial("tiny", store_samples.trial(0, latency_s=0.3))
    repository.add_trial("tiny", store_samples.trial(1, latency_s=0.2))
    repository.add_trial("tiny", store_samples.trial(2, latency_s=0.1, outcome=Outcome.OVER_BUDGET))
    repository.add_trial("tiny", store_samples.trial(3, latency_s=0.0, outcome=Outcome.OUT_OF_MEMORY))
    repository.create_study("newer", store_samples.study_key(budget_bytes=1))
    newer, tiny = repository.summaries()
    assert (newer.name, newer.trials, newer.best_latency_s, newer.peak_bytes) == ("newer", 0, None, None)
    assert (tiny.name, tiny.trials, tiny.best_latency_s, tiny.peak_bytes) == ("tiny", 4, 0.2, 5_000_006_001)
    assert tiny.key == store_samples.study_key()


def test_deleting_a_study_leaves_no_row_behind_and_others_alone(repository: Repository, storage: Path) -> None:
    repository.create_study("other", store_samples.study_key())
    for name in ("tiny", "other"):
        repository.add_trial(name, store_samples.trial())
        repository.save_plan(name, store_samples.plan())
    repository.add_trial("tiny", store_samples.trial(1))
    with Repository(storage) as reopened:
        assert reopened.delete_study("tiny") == 2
    assert [summary.name for summary in repository.summaries()] == ["other"]
    with closing(sqlite3.connect(storage)) as database:
        for table in ("autosp_study", "autosp_trial", "autosp_plan"):
            assert database.execute(f"SELECT count(*) FROM {table}").fetchone() == (1,)


def test_a_study_under_the_name_of_a_deleted_one_begins_afresh(repository: Repository, storage: Path) -> None:
    import optuna

    with Repository(storage) as reopened:
        theirs = reopened.optuna_storage()
        for name in ("tiny", "other"):
            study = optuna.create_study(study_name=name, storage=theirs)
            with running_trial(study, theirs) as trial:
                trial.suggest_int("x", 0, 9)
                trial.set_constraint("memory", 1.0)
                study.tell(trial, 1.0)
    assert repository.delete_study("tiny") == 0
    assert optuna.get_all_study_names(repository.optuna_storage()) == ["other"]
    repository.create_study("tiny", store_samples.study_key(1))
    assert optuna.create_study(study_name="tiny", storage=repository.optuna_storage()).trials == []


def from_the_future(storage: Path, column: str, study: str) -> None:
    """What a newer version might have written of a study."""
    table = f"autosp_{'trial' if column in ('prediction', 'measurement') else 'study'}"
    which = "study_id = (SELECT id FROM autosp_study WHERE name = ?)" if table == "autosp_trial" else "name = ?"
    with closing(sqlite3.connect(storage)) as database, database:
        database.execute(
            f"UPDATE {table} SET {column} = json_set({column}, '$.from_the_future', 1) WHERE {which}", [study]
        )


@pytest.mark.parametrize("column", ["key", "measurement"])
def test_a_study_of_another_version_is_left_out_of_the_list_and_can_be_deleted(
    repository: Repository, storage: Path, column: str
) -> None:
    repository.create_study("newer", store_samples.study_key(1))
    repository.add_trial("newer", store_samples.trial())
    from_the_future(storage, column, "newer")
    with pytest.warns(UserWarning, match=r"left out: .* of study 'newer' cannot be read .* another version of autosp"):
        summaries = repository.summaries()
    assert [summary.name for summary in summaries] == ["tiny"]
    assert repository.delete_study("newer") == 1
    assert [summary.name for summary in repository.summaries()] == ["tiny"]


def test_a_study_of_another_version_is_no_sibling(repository: Repository, storage: Path) -> None:
    for name, budget_bytes in (("newer", 1), ("older", 2)):
        repository.create_study(name, store_samples.study_key(budget_bytes))
        repository.save_profile(name, store_samples.profile())
    from_the_future(storage, "key", "newer")
    assert repository.siblings(store_samples.study_key()) == ["older"]


def test_a_row_of_another_version_is_an_error_that_names_the_study(repository: Repository, storage: Path) -> None:
    repository.save_plan("tiny", store_samples.plan())
    with closing(sqlite3.connect(storage)) as database, database:
        database.execute("UPDATE autosp_plan SET plan = json_set(plan, '$.from_the_future', 1)")
    with pytest.raises(StoreError, match="Plan of study 'tiny' cannot be read"):
        repository.plan("tiny")


def test_closing_twice_is_harmless(storage: Path) -> None:
    repository = Repository(storage)
    repository.optuna_storage()
    repository.close()
    repository.close()
