"""Learns from validated trials how far the cost model is off, and how sure it is of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autosp.spec import Prediction, Trial

PRIOR_ERROR = 0.10
"""Relative error assumed of the cost model before it was tested."""

PRIOR_WEIGHT = 0.3
"""How strongly the factors are held at 1, in trials."""

OUTLIER_ERROR = 0.25
OUTLIER_RATIO = 4
"""A residual above both of these, the second times the median residual, is a disturbed trial's."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Correction:
    """Measured = `compute_factor` x compute + `stall_factor` x stall, up to `relative_error`."""

    compute_factor: float
    stall_factor: float
    relative_error: float
    extra_bytes: int

    def latency_s(self, prediction: Prediction) -> float:
        """The corrected prediction."""
        stall_s = prediction.stall_s
        return self.compute_factor * (prediction.latency_s - stall_s) + self.stall_factor * stall_s

    def optimistic_s(self, prediction: Prediction) -> float:
        """The least that the candidate may turn out to take."""
        return self.latency_s(prediction) * (1 - self.relative_error)

    def peak_bytes(self, prediction: Prediction) -> int:
        """The corrected memory."""
        return prediction.peak_bytes + self.extra_bytes


def learn(trials: Sequence[Trial]) -> Correction:
    """Fit both factors by least squares of relative errors, held at 1 by a weak prior.

    A trial far off all others was disturbed (a machine has neighbours) and is left out of a second fit. The error is
    the largest residual of the others, and no less than what the prior, or the size of the correction, leaves open.
    """
    timed = [trial for trial in trials if trial.measurement.samples_s]
    extra = max((t.measurement.peak_bytes - t.prediction.peak_bytes for t in timed), default=0)
    if not timed:
        return Correction(1.0, 1.0, PRIOR_ERROR, 0)
    measured = np.array([trial.measurement.latency_s for trial in timed])
    stall = np.array([trial.prediction.stall_s for trial in timed])
    parts = np.stack([np.array([trial.prediction.latency_s for trial in timed]) - stall, stall], axis=1)
    factors, residuals = _fit(parts, measured)
    usual = residuals <= max(OUTLIER_ERROR, OUTLIER_RATIO * float(np.median(residuals)))
    if not usual.all():
        factors, residuals = _fit(parts[usual], measured[usual])
    doubt = max(PRIOR_ERROR, *(abs(float(factor) - 1) for factor in factors)) / (1 + len(residuals))
    error = max(float(residuals.max()), doubt)
    return Correction(float(factors[0]), float(factors[1]), min(error, 0.5), max(0, int(extra)))


def _fit(parts: Array, measured: Array) -> tuple[Array, Array]:
    """Factors of compute and stall [2], and the relative residual of each trial [N]."""
    held = np.sqrt(PRIOR_WEIGHT) * np.eye(2)
    rows = np.concatenate([parts / measured[:, None], held])
    target = np.concatenate([np.ones(len(measured)), np.sqrt(PRIOR_WEIGHT) * np.ones(2)])
    factors, *_ = np.linalg.lstsq(rows, target, rcond=None)
    return factors, np.abs(parts @ factors / measured - 1)
