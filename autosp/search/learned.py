"""What a study has learned from its trials: predictions made anew, and how far they may be off."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np

from autosp.cost_model.calibrate import calibrated, observations, undisturbed
from autosp.cost_model.predict import Predictor, predict, with_rings
from autosp.search.space import Key, key_of
from autosp.spec import Prediction, Profile, Trial

PRIOR_ERROR = 0.10
"""Relative error assumed of the cost model before it was tested. A first trial corrects it, and tests nothing."""

MOST_ERROR = 0.5


@dataclass(frozen=True)
class Learned:
    """Candidates as they are predicted now, the fastest first."""

    predictions: tuple[Prediction, ...]
    relative_error: float
    """No measurement is expected to be further below its prediction."""
    extra_bytes: int
    """How much more than predicted a plan took, at most."""

    def optimistic_s(self, prediction: Prediction) -> float:
        """The least that the candidate may turn out to take."""
        return prediction.latency_s * (1 - self.relative_error)

    def peak_bytes(self, prediction: Prediction) -> int:
        """The corrected memory."""
        return prediction.peak_bytes + self.extra_bytes

    def rivals(self, tried: AbstractSet[Key], usable_bytes: int) -> list[Prediction]:
        """The candidates that are not among `tried` and are corrected to fit, the fastest first."""
        return [
            prediction
            for prediction in self.predictions
            if key_of(prediction.candidate) not in tried and self.peak_bytes(prediction) <= usable_bytes
        ]

    def without(self, keys: AbstractSet[Key]) -> Learned:
        """As if there were no candidates of these names."""
        left = (prediction for prediction in self.predictions if key_of(prediction.candidate) not in keys)
        return replace(self, predictions=tuple(left))


class Lessons:
    """Predicts a study's candidates again and again, as its trials come in."""

    def __init__(self, profile: Profile, ranked: Sequence[Prediction], predictor: Predictor | None = None) -> None:
        """`predictor`: of these candidates and perhaps others, where there is one already."""
        self._profile = profile
        candidates = [prediction.candidate for prediction in ranked]
        self._predictor = predictor or Predictor(profile, with_rings(profile, candidates))
        places = {candidate: place for place, candidate in enumerate(self._predictor.candidates)}
        self._places = [places[candidate] for candidate in candidates]

    def learned(self, trials: Sequence[Trial]) -> Learned:
        """What these trials, and the plans that the profile was made from, say of all candidates.

        A trial far off all others was disturbed and counts for nothing. The error is the most by which one of the
        others was faster than predicted, and no less than what their number leaves open.
        """
        timed = [trial for trial in trials if trial.measurement.samples_s]
        profile = calibrated(self._profile, [*observations(self._profile), *timed])
        found = self._predictor.predict(profile)
        predictions = [found[place] for place in self._places]
        predictions.sort(key=lambda prediction: (prediction.latency_s, prediction.peak_bytes))
        if not timed:
            return Learned(tuple(predictions), PRIOR_ERROR, 0)
        again = predict(profile, [trial.prediction.candidate for trial in timed])
        measured = np.array([trial.measurement.latency_s for trial in timed])
        faster = np.array([prediction.latency_s for prediction in again]) / measured - 1
        usual = faster[undisturbed(np.abs(faster))]
        error = max(float(usual.max()), PRIOR_ERROR / max(1, len(usual) - 1))
        excess = (
            trial.measurement.peak_bytes - prediction.peak_bytes for trial, prediction in zip(timed, again, strict=True)
        )
        return Learned(tuple(predictions), min(error, MOST_ERROR), max(0, *excess))
