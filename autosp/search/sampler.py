"""An Optuna sampler led by the cost model: it proposes the candidate that may be fastest, given what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from autosp.search.correction import Correction
from autosp.search.space import key_of
from autosp.spec import Prediction

PARAMETERS = ("k", "k_prime", "residents")


class CostModelSampler(BaseSampler):
    """Proposes the unvalidated candidate with the least corrected latency among those corrected to fit the budget."""

    def __init__(self, ranked: Sequence[Prediction], budget_bytes: int) -> None:
        self._ranked = ranked
        self._budget_bytes = budget_bytes
        self.correction = Correction(1.0, 1.0, 0.0, 0)
        largest = max(prediction.candidate.k for prediction in ranked)
        self.space: dict[str, IntDistribution] = {
            "k": IntDistribution(0, largest),
            "k_prime": IntDistribution(1, max(prediction.candidate.k_prime for prediction in ranked)),
            "residents": IntDistribution(0, largest),
        }

    def best_unvalidated(self, tried: set[tuple[int, int, int]]) -> Prediction | None:
        """The next candidate; None if all that fit were tried."""
        open_candidates = [
            prediction
            for prediction in self._ranked
            if key_of(prediction.candidate) not in tried
            and self.correction.peak_bytes(prediction) <= self._budget_bytes
        ]
        return min(open_candidates, key=self.correction.latency_s, default=None)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """k, k' and the number of residents are chosen together."""
        return dict(self.space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next candidate's numbers."""
        tried = {
            tuple(other.params[name] for name in PARAMETERS)
            for other in study.get_trials(deepcopy=False)
            if other.params and other.state is not TrialState.FAIL  # a failed trial measured nothing
        }
        best = self.best_unvalidated({(k, k_prime, residents) for k, k_prime, residents in tried})
        if best is None:
            return {}
        return dict(zip(PARAMETERS, key_of(best.candidate), strict=True))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Nothing is left to validate: the fastest candidate by the cost model."""
        return dict(zip(PARAMETERS, key_of(self._ranked[0].candidate), strict=True))[param_name]
