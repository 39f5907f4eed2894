"""How long a study may go on."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from autosp.errors import SettingError
from autosp.search.limits import EFFORT_PASSES, EFFORT_S, LEAST_TRIALS, MAX_TRIALS, Limits


@pytest.mark.parametrize("max_trials", [0, -1, 1.0, 2.5, "3", True, False, math.inf])
def test_trials_are_a_positive_whole_number(max_trials: Any) -> None:
    with pytest.raises(SettingError, match="max_trials=") as error:
        Limits(max_trials=max_trials)
    assert repr(max_trials) in str(error.value)


@pytest.mark.parametrize("timeout_s", [0, 0.0, -1, math.inf, -math.inf, math.nan, "3"])
def test_seconds_are_positive_and_finite(timeout_s: Any) -> None:
    with pytest.raises(SettingError, match="timeout_s=") as error:
        Limits(timeout_s=timeout_s)
    assert repr(timeout_s) in str(error.value)


def test_seconds_are_no_boolean() -> None:
    with pytest.raises(SettingError):
        Limits(timeout_s=True)


def test_default_number_of_trials() -> None:
    assert not Limits().reached(0)
    assert not Limits().reached(MAX_TRIALS - 1)
    assert Limits().reached(MAX_TRIALS)


def test_number_of_trials() -> None:
    limits = Limits(max_trials=3)
    assert [limits.reached(trials) for trials in range(5)] == [False, False, False, True, True]
    assert not Limits(max_trials=MAX_TRIALS + 5).reached(MAX_TRIALS)


def test_time_is_over() -> None:
    over = Limits(timeout_s=10.0, _started=time.monotonic() - 11)
    assert over.reached(1)
    assert not over.reached(0)  # one trial is made in any case
    assert Limits(max_trials=1, timeout_s=10.0, _started=time.monotonic() - 11).reached(1)


def test_time_is_not_over() -> None:
    assert not Limits(timeout_s=1e6).reached(MAX_TRIALS - 1)
    assert Limits(timeout_s=1e6).reached(MAX_TRIALS)


def test_limits_are_equal_whenever_made() -> None:
    assert Limits(3, 5.0) == Limits(3, 5.0, _started=0.0)
    assert Limits() != Limits(max_trials=MAX_TRIALS)
    assert Limits() != Limits(timeout_s=1.0)


def test_effort_counts_in_passes_of_the_best_plan() -> None:
    most_s = EFFORT_PASSES * 2.0 + EFFORT_S
    assert not Limits().reached(LEAST_TRIALS, most_s, 2.0)
    assert Limits().reached(LEAST_TRIALS, most_s + 0.1, 2.0)
    assert not Limits().reached(LEAST_TRIALS - 1, most_s + 0.1, 2.0)
    assert not Limits().reached(LEAST_TRIALS, most_s + 0.1, 2.0, due=1)  # the favourite and the baselines are tried
    assert Limits().reached(MAX_TRIALS, due=1)


def test_seconds_beyond_the_effort() -> None:
    most_s = EFFORT_PASSES * 2.0 + EFFORT_S
    assert not Limits().beyond_effort(most_s, 2.0)
    assert Limits().beyond_effort(most_s + 0.1, 2.0)
    assert not Limits().beyond_effort(1e9, math.inf)  # nothing fits so far
    assert not Limits(max_trials=1).beyond_effort(1e9, 2.0)


def test_a_limit_of_the_users_replaces_the_effort() -> None:
    assert not Limits(max_trials=50).reached(LEAST_TRIALS, 1e9, 1.0)
    assert not Limits(timeout_s=1e6).reached(LEAST_TRIALS, 1e9, 1.0)
    assert [limits.by_default for limits in (Limits(), Limits(1), Limits(None, 1.0))] == [True, False, False]
