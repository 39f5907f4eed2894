"""An Optuna sampler led by the cost model: it proposes the candidate that may be fastest, given what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from autosp.search.learned import Learned
from autosp.search.space import Key, key_of
from autosp.spec import Prediction

PARAMETERS = ("k", "k_prime", "residents", "on_disk", "read_ahead")
"""As in `key_of`."""


class CostModelSampler(BaseSampler):
    """Proposes the unvalidated candidate with the least predicted latency among those corrected to fit the budget."""

    def __init__(self, ranked: Sequence[Prediction], budget_bytes: int) -> None:
        """`ranked`: all candidates; `learned` says how they are predicted by now."""
        self._ranked = ranked
        self._budget_bytes = budget_bytes
        self.learned = Learned(tuple(ranked), 0.0, 0)
        most = [max(numbers) for numbers in zip(*(key_of(prediction.candidate) for prediction in ranked), strict=True)]
        most[PARAMETERS.index("residents")] = most[PARAMETERS.index("k")]
        least = {"k_prime": 1}
        self.space = {
            name: IntDistribution(least.get(name, 0), high) for name, high in zip(PARAMETERS, most, strict=True)
        }

    def best_unvalidated(self, tried: set[Key]) -> Prediction | None:
        """The next candidate; None if all that fit were tried."""
        return next(iter(self.learned.rivals(tried, self._budget_bytes)), None)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All numbers are chosen together."""
        return dict(self.space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next candidate's numbers."""
        tried: set[Key] = set()
        for other in study.get_trials(deepcopy=False):
            if other.params and other.state is not TrialState.FAIL:  # a failed trial measured nothing
                # A study of before the disk tier has no more than the first three.
                k, k_prime, residents, on_disk, read_ahead = (other.params.get(name, 0) for name in PARAMETERS)
                tried.add((k, k_prime, residents, on_disk, read_ahead))
        best = self.best_unvalidated(tried)
        if best is None:
            return {}
        return dict(zip(PARAMETERS, key_of(best.candidate), strict=True))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Nothing is left to validate: the fastest candidate by the cost model."""
        return dict(zip(PARAMETERS, key_of(self._ranked[0].candidate), strict=True))[param_name]
