"""Device memory over time, as predicted: resident layers, the arena, and what a training pass has beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from autosp.cost_model.memory import occupancy
from autosp.cost_model.rounds import Bytes
from autosp.cost_model.training_memory import TrainingMemory, memory_of
from autosp.report.drawing import BLUE, GREEN, ORANGE, PURPLE, SKY, YELLOW, TimeAxis, size_unit
from autosp.report.units import size
from autosp.schedule.actions import Kind
from autosp.schedule.lowering import ring_for
from autosp.schedule.timeline import Timeline
from autosp.spec import Candidate, Profile

Steps = Sequence[tuple[float, int]]
"""From each second on, so many bytes."""


class _Part(NamedTuple):
    """Of what is on the device."""

    steps: Steps
    colour: str
    label: str


def draw_memory(
    axes: Axes,
    profile: Profile,
    candidate: Candidate,
    predicted: Timeline,
    bounds_s: Sequence[float],
    axis: TimeAxis,
    budget_bytes: int | None,
) -> None:
    """What is on the device between the bounds, one on the other; what is reserved for it at the peak; the budget."""
    partition = profile.partition
    layer_bytes = [layer.n_bytes for layer in partition.layers]
    arena = ring_for(profile.mode, candidate, partition).arena_bytes
    fixed = partition.resident_bytes + sum(layer_bytes[index] for index in candidate.residents)
    memory = memory_of(profile)
    peak = memory.peak_bytes(candidate, arena)
    parts = [_Part(occupancy(predicted, layer_bytes), BLUE, f"streamed, in an arena of {size(arena)}")]
    beside, what = peak - fixed - arena, "activations and workspace"
    if isinstance(memory, TrainingMemory):
        state = memory.state_bytes(candidate.residents)
        curves = memory.curves(candidate)
        parts = [_Part([(bounds_s[0], state)], ORANGE, f"optimizer state, {size(state)}"), *parts]
        parts += _moving(curves, predicted)
        beside, what = beside - int(np.add(*curves).max()) - state, "workspace"
    unit, unit_bytes = size_unit(max(peak, budget_bytes or 0))
    times, levels_of = _levels([part.steps for part in parts], bounds_s)
    places = [(when - bounds_s[0]) / axis.unit_s for when in times]
    top = np.full(len(times), fixed) / unit_bytes
    if fixed:
        axes.fill_between(places, top, color=GREEN, lw=0, label=f"resident, {size(fixed)}")
    for part, levels in zip(parts, levels_of, strict=True):
        below, top = top, top + levels / unit_bytes
        if levels.any():
            look: dict[str, Any] = {"step": "post", "color": part.colour, "alpha": 0.75, "lw": 0}
            axes.fill_between(places, below, top, label=part.label, **look)
    look = {"step": "post", "facecolor": "white", "edgecolor": "#888888", "hatch": "....", "lw": 0}
    axes.fill_between(places, top, top + beside / unit_bytes, label=f"{what}, at most {size(beside)}", **look)
    axes.axhline(peak / unit_bytes, color="black", lw=1.2, label=f"reserved at peak, {size(peak)}")
    if budget_bytes is not None:
        axes.axhline(budget_bytes / unit_bytes, color=PURPLE, ls="--", lw=1.8, label=f"budget, {size(budget_bytes)}")
    axes.set_ylim(0, max(peak, budget_bytes or 0) / unit_bytes * 1.06)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_ylabel(f"device memory, predicted, {unit}")
    axes.set_xlabel(f"{axis.unit} from the beginning of a steady period")
    axis.frame(axes)


def _moving(curves: Sequence[Bytes], predicted: Timeline) -> list[_Part]:
    """Activations, and gradients: as during a visit from its beginning until the next one's.

    What is computed again for a visit backward is part of it.
    """
    begins: list[tuple[float, int]] = []
    period, visit, again = -1, 0, False
    for span in predicted.computes:
        if span.period > period:
            period, visit = span.period, 0
        if not again:
            begins.append((span.start_s - span.stall_s, visit))
        again = span.action.kind is Kind.RECOMPUTE
        visit += not again
    return [
        _Part(
            [(when, int(curve[visit])) for when, visit in begins], colour, f"{name}, at most {size(int(curve.max()))}"
        )
        for curve, colour, name in zip(curves, (SKY, YELLOW), ("activations", "gradients"), strict=True)
    ]


def _levels(parts: Sequence[Steps], bounds_s: Sequence[float]) -> tuple[list[float], list[Bytes]]:
    """All moments inside the bounds at which a part changes, with the first and the last; and each part's levels."""
    begin_s, end_s = bounds_s[0], bounds_s[-1]
    inside = {when for steps in parts for when, _ in steps if begin_s < when < end_s}
    times = [begin_s, *sorted(inside), end_s]
    found = []
    for steps in parts:
        levels = np.array([0, *(n_bytes for _, n_bytes in steps)], np.int64)
        found.append(levels[np.searchsorted([when for when, _ in steps], times, side="right")])
        found[-1][-1] = found[-1][-2]  # what changes at the end is the next period's
    return times, found
