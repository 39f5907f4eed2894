"""Why a study has no plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from autosp.errors import AutospError, BudgetTooSmallError, HostMemoryError, IsolationError, OutputMismatchError
from autosp.search.headroom import budget_for
from autosp.search.space import suggested_gb
from autosp.spec import Outcome, Profile, Trial

NO_PLAN = (BudgetTooSmallError, OutputMismatchError, HostMemoryError, IsolationError)
"""What `no_plan` gives: where other studies have a plan, one that has none is no reason to lose theirs."""


def no_plan(profile: Profile, budget_bytes: int, trials: Sequence[Trial], *, finished: bool) -> AutospError:
    """The error for a study in which every candidate that was tried failed on the device.

    `finished`: whether all were that were predicted to fit. Otherwise a limit ended it, and less memory may do.
    """
    differing = [trial for trial in trials if trial.measurement.outcome is Outcome.OUTPUT_DIFFERS]
    if differing:
        return OutputMismatchError(
            f"{len(differing)} of {len(trials)} validated plans gave another output than the plain model, "
            f"{differing[0].prediction.candidate.label()} first, and no other fits; nothing is returned. "
            "Compile whole blocks of the model, or nothing: kernels of compiled code that is cut may round otherwise"
        )
    measured = [trial for trial in trials if not trial.measurement.outcome.cut_short]
    if not measured:
        ends = Counter(trial.measurement.outcome.value for trial in trials)
        if {*ends} == {Outcome.HOST_OUT_OF_MEMORY.value}:
            return HostMemoryError(
                f"host memory had no room for any of {len(trials)} validated plans: lower max_cpu_gb, or close other "
                "programs"
            )
        told = ", ".join(f"{count} {outcome}" for outcome, count in ends.items())
        return IsolationError(
            f"none of {len(trials)} validated plans came to its end ({told}): free host memory, raise "
            "trial_timeout_s, or see what the model does without isolate=True"
        )
    leanest = min(measured, key=lambda trial: trial.measurement.peak_bytes)
    least_peak = leanest.measurement.peak_bytes + profile.heap_scatter_bytes  # which a prediction would have in it
    least = budget_for(profile, least_peak, leanest.prediction.candidate.group)
    layer = max(profile.partition.layers, key=lambda layer: layer.n_bytes)
    told = (
        "the least that works is"
        if finished
        else "others were not tried when a limit ended the study; the least of these needs"
    )
    more_trials = "" if finished else "a higher max_trials or timeout_s, or "
    return BudgetTooSmallError(
        f"all {len(measured)} plans that could be measured took more than {budget_bytes / 1e9:.4g} GB has room for; "
        f"{told} {least / 1e9:.4g} GB, set by layer {layer.index} ({layer.name}); "
        f"try {more_trials}max_gpu_gb={suggested_gb(least)}",
        budget_bytes=budget_bytes,
        least_bytes=least,
        layer=layer.name,
    )
