"""Which of the fastest plans wins: they are measured again, in turn, and a tie goes to the one with less memory.

A machine drifts, and one plan's passes follow one another: plans that were measured minutes apart are compared fairly
only once each was measured both before and after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from autosp.spec import Measurement, Outcome, Trial

CLOSE = 0.02
"""Plans that were slower than the fastest by no more than this are finalists."""

MOST_FINALISTS = 3
ROUNDS = 2
"""In which each finalist is measured, its trial among them."""

STANDARD_ERRORS = 2.0
"""Medians that are no further apart than this are a tie: chance alone parts equal plans more in one of twenty cases."""

MEDIAN_ERROR = 1.2533
"""Standard error of a median over that of a mean: sqrt(pi / 2), for normal noise."""

MAD_TO_DEVIATION = 1.4826
"""Standard deviation over the median absolute deviation, for normal noise."""


def fastest(fitting: Sequence[Trial]) -> Trial:
    """The trial with the least latency; of those that tie with it, the one with the least memory."""
    first = min(fitting, key=lambda trial: (trial.measurement.latency_s, trial.measurement.peak_bytes))
    tied = [trial for trial in fitting if trial is first or ties(first.measurement, trial.measurement)]
    return min(tied, key=lambda trial: (trial.measurement.peak_bytes, trial.measurement.latency_s))


def undecided(fitting: Sequence[Trial]) -> list[Trial]:
    """Finalists that are to be measured once more, the slowest first: the reverse of the order that led to them.

    None, if one plan is faster than all others by more than `CLOSE`.
    """
    ordered = sorted(fitting, key=lambda trial: trial.measurement.latency_s)
    close = [
        trial
        for trial in ordered[:MOST_FINALISTS]
        if trial.measurement.latency_s <= ordered[0].measurement.latency_s * (1 + CLOSE)
    ]
    if len(close) < 2:
        return []
    return [trial for trial in reversed(close) if trial.measurement.rounds < ROUNDS]


def ties(one: Measurement, other: Measurement) -> bool:
    """Whether chance may have parted their medians, as far as their samples tell.

    What is not `CLOSE` is none, however much they spread: memory is no reason to return what may well be slower.
    """
    faster, slower = sorted((one.latency_s, other.latency_s))
    if min(one.rounds, other.rounds) < ROUNDS:
        return faster == slower
    if slower > faster * (1 + CLOSE):
        return False
    return slower - faster <= STANDARD_ERRORS * math.hypot(median_error_s(one), median_error_s(other))


def median_error_s(measured: Measurement) -> float:
    """Standard error of its median, from the spread of its samples."""
    samples = measured.samples_s
    deviation_s = MAD_TO_DEVIATION * median(abs(sample - measured.latency_s) for sample in samples)
    return MEDIAN_ERROR * deviation_s / math.sqrt(len(samples))


def pooled(before: Measurement, again: Measurement) -> Measurement:
    """Both rounds as one measurement: all samples, the higher peak. A round that failed is what counts."""
    if not again.outcome.is_timed:
        return again
    samples_s = (*before.samples_s, *again.samples_s)
    outcome = Outcome.FITS if before.outcome is again.outcome is Outcome.FITS else Outcome.OVER_BUDGET
    return before.model_copy(
        update={
            "outcome": outcome,
            "samples_s": samples_s,
            "latency_s": median(samples_s),
            "peak_bytes": max(before.peak_bytes, again.peak_bytes),
            "misses": max(before.misses, again.misses),
            "rounds": before.rounds + again.rounds,
            "taken_s": before.taken_s + again.taken_s,
        }
    )
