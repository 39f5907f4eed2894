"""Learns from validated trials how far the cost model is off, and how sure it is of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autosp.spec import Prediction, Trial

PRIOR_ERROR = 0.10
"""Relative error assumed of the cost model before it was tested."""

PRIOR_WEIGHT = 0.3
"""How strongly the factors are held at 1, in trials."""


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

    The error left is the largest residual seen, and no less than the prior's share that the trials have not worn off.
    """
    timed = [trial for trial in trials if trial.measurement.samples_s]
    extra = max((t.measurement.peak_bytes - t.prediction.peak_bytes for t in timed), default=0)
    if not timed:
        return Correction(1.0, 1.0, PRIOR_ERROR, 0)
    measured = np.array([trial.measurement.latency_s for trial in timed])
    stall = np.array([trial.prediction.stall_s for trial in timed])
    compute = np.array([trial.prediction.latency_s for trial in timed]) - stall
    rows = np.stack([compute / measured, stall / measured], axis=1)
    held = np.sqrt(PRIOR_WEIGHT) * np.eye(2)
    target = np.concatenate([np.ones(len(timed)), np.sqrt(PRIOR_WEIGHT) * np.ones(2)])
    (compute_factor, stall_factor), *_ = np.linalg.lstsq(np.concatenate([rows, held]), target, rcond=None)
    corrected = compute_factor * compute + stall_factor * stall
    residual = float(np.max(np.abs(corrected / measured - 1)))
    error = max(residual, PRIOR_ERROR / (1 + len(timed)))
    return Correction(float(compute_factor), float(stall_factor), min(error, 0.5), max(0, int(extra)))
