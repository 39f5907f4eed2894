"""What of a budget is left free on a CPU, where nothing stops an allocation and a process differs from the next."""

from __future__ import annotations

import math
from collections.abc import Iterable

from autosp.spec import Outcome, Profile, Trial

BACKWARD_KERNEL_BYTES = 4_500_000
"""On a CPU: what the kernels of training take once in a process. A study's own passes have taken it before a plan is
tried: in a new process a ViT's peak was 4.5 MB above what its study saw, that of linear layers 0.8 MB."""

HEAP_NOISE_OF_WORKSPACE = 0.45
HEAP_GROWTH_OF_WORKSPACE = 0.3
HEAP_NOISE_OF_BUDGET = 0.01
"""On a CPU the heap fragments differently in every run. A plan's first passes in a new process were seen to take up to
0.3 of the workspace more than its validation did: so the growth is left free of what was measured, and the noise, which
has a validation's own scatter in it, of what is predicted: as far as the prediction has not left it free itself. An
accelerator's caching allocator has no such noise, and a cap that holds."""


def usable_bytes(profile: Profile, budget_bytes: int, group: int = 1) -> int:
    """What may be predicted to be in use."""
    free_bytes = _left_free(profile, budget_bytes, HEAP_NOISE_OF_WORKSPACE, group)
    return budget_bytes - free_bytes + profile.heap_scatter_bytes


def acceptable_bytes(profile: Profile, budget_bytes: int, group: int = 1) -> int:
    """What may have been measured to be in use, for a plan to be returned."""
    return budget_bytes - _left_free(profile, budget_bytes, HEAP_GROWTH_OF_WORKSPACE, group)


def usable_after(trials: Iterable[Trial], extra_bytes: int, usable_bytes: int, acceptable_bytes: int) -> int:
    """What may be predicted to be in use, given what plans were measured to take.

    Of a rival of one that took more than is acceptable, as much less as that was. Without this a study would try plans
    of the same memory until a limit ends it: what is usable may be more than what is acceptable, for predictions have
    the heap's scatter in them and measurements may have. `extra_bytes`: by which all predictions are corrected.
    """
    corrected = (
        trial.prediction.peak_bytes + extra_bytes - (trial.measurement.peak_bytes - acceptable_bytes)
        for trial in trials
        if trial.measurement.outcome in (Outcome.FITS, Outcome.OVER_BUDGET, Outcome.OUT_OF_MEMORY)
        and trial.measurement.peak_bytes > acceptable_bytes
    )
    return min([usable_bytes, *corrected])


def budget_for(profile: Profile, peak_bytes: int, group: int = 1) -> int:
    """The least budget of which so much may be predicted to be in use."""
    if profile.device.kind != "cpu":
        return peak_bytes
    heap_bytes = _heap_bytes(profile, HEAP_NOISE_OF_WORKSPACE, group) - profile.heap_scatter_bytes
    return math.ceil((peak_bytes + heap_bytes) / (1 - HEAP_NOISE_OF_BUDGET)) + 1


def _left_free(profile: Profile, budget_bytes: int, share_of_workspace: float, group: int) -> int:
    if profile.device.kind != "cpu":
        return 0
    return int(_heap_bytes(profile, share_of_workspace, group) + HEAP_NOISE_OF_BUDGET * budget_bytes)


def _heap_bytes(profile: Profile, share_of_workspace: float, group: int) -> float:
    kernel_bytes = BACKWARD_KERNEL_BYTES if profile.mode == "training" else 0
    return share_of_workspace * profile.workspace_of(group) + profile.partition.bookkeeping_bytes + kernel_bytes
