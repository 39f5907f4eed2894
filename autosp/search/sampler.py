"""An Optuna sampler led by the cost model: it proposes the candidate that may be fastest, given what was measured."""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import takewhile
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from autosp.search.learned import Learned
from autosp.search.space import Key, key_of
from autosp.spec import Prediction

PARAMETERS = ("k", "k_prime", "residents", "on_disk", "read_ahead", "recompute", "offload")
"""As in `key_of`."""


TIE = 0.01
"""Predictions that are no further apart than this share say nothing about which plan is faster."""


def least_traffic(ordered: Sequence[Prediction]) -> Prediction:
    """Of predictions, the fastest first, those that tie with the first: the one that moves least, then of least memory.

    What a transfer costs compute is what the cost model knows least: of that, a plan that moves less has less.
    """
    tied = takewhile(lambda prediction: prediction.latency_s <= ordered[0].latency_s * (1 + TIE), ordered)
    return min(tied, key=lambda prediction: (prediction.moved_bytes, prediction.peak_bytes))


class CostModelSampler(BaseSampler):
    """Proposes the unvalidated candidate with the least predicted latency among those corrected to fit the budget.

    Of those that tie, the one that moves least.

    Before these, the candidates `first`, in their order.
    """

    def __init__(self, ranked: Sequence[Prediction], usable_bytes: int, first: Sequence[Key] = ()) -> None:
        """`ranked`: all candidates; `learned` says how they are predicted by now."""
        self._ranked = ranked
        self.usable_bytes = usable_bytes
        self._first = first
        self.learned = Learned(tuple(ranked), 0.0, 0)
        self.validated: frozenset[Key] = frozenset()
        """What was measured, whatever Optuna's trials say: a process may be killed before it tells Optuna."""
        most = [max(numbers) for numbers in zip(*(key_of(prediction.candidate) for prediction in ranked), strict=True)]
        most[PARAMETERS.index("residents")] = most[PARAMETERS.index("k")]
        least = {"k_prime": 1}
        self.space = {
            name: IntDistribution(least.get(name, 0), high) for name, high in zip(PARAMETERS, most, strict=True)
        }

    def best_unvalidated(self, tried: Set[Key]) -> Prediction | None:
        """The next candidate; None if all that fit were tried."""
        rivals = self.learned.rivals(tried, self.usable_bytes)
        return least_traffic(rivals) if rivals else None

    def due(self, study: Study) -> list[Key]:
        """Those of `first` that no trial has or had."""
        return self._due(self.validated | _taken(study))

    def next_key(self, study: Study) -> Key | None:
        """What the next trial is to try; None if nothing is left that no trial has or had."""
        taken = self.validated | _taken(study)
        if due := self._due(taken):
            return due[0]
        best = self.best_unvalidated(taken)
        return None if best is None else key_of(best.candidate)

    def _due(self, taken: Set[Key]) -> list[Key]:
        return [key for key in self._first if key not in taken]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All numbers are chosen together."""
        return dict(self.space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next candidate's numbers."""
        key = self.next_key(study)
        return {} if key is None else dict(zip(PARAMETERS, key, strict=True))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Nothing is left to validate: the fastest candidate by the cost model."""
        return dict(zip(PARAMETERS, key_of(self._ranked[0].candidate), strict=True))[param_name]


def running_keys(study: Study) -> frozenset[Key]:
    """What is being validated now."""
    return frozenset(
        _key_in(trial) for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if trial.params
    )


def _taken(study: Study) -> frozenset[Key]:
    """What trials have or had. A failed one measured nothing: its candidate is free again."""
    trials = study.get_trials(deepcopy=False)
    return frozenset(_key_in(trial) for trial in trials if trial.params and trial.state is not TrialState.FAIL)


def _key_in(trial: FrozenTrial) -> Key:
    # A study of before the disk tier has the first three only, one of before training the first five.
    k, k_prime, residents, on_disk, read_ahead, recompute, offload = (trial.params.get(name, 0) for name in PARAMETERS)
    return k, k_prime, residents, on_disk, read_ahead, recompute, offload
