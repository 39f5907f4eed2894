"""The timeline of a plan: link and compute as predicted, as measured, and device memory over two steady periods."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from autosp.cost_model.memory import occupancy
from autosp.cost_model.simulate import PERIODS, Costs
from autosp.cost_model.training_memory import memory_of
from autosp.report.drawing import (
    BLUE,
    DARK_GREY,
    GREEN,
    GREY,
    ORANGE,
    PALE_GREY,
    PURPLE,
    SKY,
    VERMILLION,
    checked_path,
    new_figure,
    once,
    size_unit,
    time_unit,
)
from autosp.report.traffic import calls_periods, expected, expected_costs, traffic
from autosp.report.units import seconds, size
from autosp.schedule.actions import Kind
from autosp.schedule.lowering import ring_for
from autosp.schedule.timeline import Span, Timeline
from autosp.spec import Candidate, Profile

LABEL_SHARE = 0.009
"""The share of the width that one character of a bar's label takes; upright, a label needs `UPRIGHT_SHARE` in all."""
UPRIGHT_SHARE = 0.013

HAIRLINE_SHARE = 0.0015
"""Stalls narrower than this share of the width are not drawn: their outline would make more of them than they are."""

BETWEEN = "compute between layers"

Bars = list[tuple[float, float]]


def timeline(
    profile: Profile,
    candidate: Candidate,
    path: str | os.PathLike[str],
    budget_bytes: int | None = None,
    measured: Timeline | None = None,
) -> None:
    """Two steady periods: link and compute as predicted and, if given, as `measured`; device memory below.

    What was measured shows when streamed layers ran; between them ran the resident ones and all other compute.

    Raises: SettingError if `path` cannot be a picture.
    """
    target = checked_path(path)
    # One period more than is shown: what it prefetches belongs to the end of the last one shown.
    predicted = expected(profile, candidate, PERIODS + 1)
    shown = _Group.predicted(predicted, expected_costs(profile, candidate), candidate)
    groups = [shown]
    if measured is not None and measured.period_ends_s:
        groups.append(_Group.measured(measured, profile, candidate))
    width_s = max(group.bounds_s[-1] - group.bounds_s[0] for group in groups)
    axis = _Axis(*time_unit(width_s), width_s)

    figure = new_figure(13, 5 + 1.4 * len(groups))
    gantt, memory = figure.subplots(2, 1, sharex=True, height_ratios=[0.85 * len(groups) + 0.15, 1.15])
    _draw_groups(gantt, groups, candidate, axis)
    _draw_memory(memory, profile, candidate, predicted, shown.bounds_s, axis, budget_bytes)
    gantt.set_title(_title(profile, candidate, shown, measured), loc="left", fontsize=11)
    figure.savefig(target)


@dataclass(frozen=True)
class _Axis:
    """Time from the beginning of a window, in the unit of the picture."""

    unit: str
    unit_s: float
    width_s: float

    @property
    def width(self) -> float:
        return self.width_s / self.unit_s

    def bar(self, start_s: float, end_s: float, bounds_s: Sequence[float]) -> tuple[float, float] | None:
        """Start and width of what is inside the window of an interval; None if nothing is."""
        low, high = max(start_s, bounds_s[0]), min(end_s, bounds_s[-1])
        return ((low - bounds_s[0]) / self.unit_s, (high - low) / self.unit_s) if high > low else None


@dataclass(frozen=True)
class _Group:
    """The link and compute rows of one timeline, and the periods of it that are shown: between `bounds_s`."""

    name: str
    bounds_s: tuple[float, ...]
    reads: list[Span]
    loads: list[Span]
    computes: list[Span]
    stalls: Bars
    between: Bars
    """Compute that belongs to no layer."""
    between_colour: str
    between_label: str

    @classmethod
    def predicted(cls, timeline: Timeline, costs: Costs, candidate: Candidate) -> _Group:
        computes = timeline.computes
        waits = [(span.start_s - span.stall_s, span.start_s) for span in computes]
        before_s = costs.before_computes(span.action for span in computes)
        between = [(wait - seconds, wait) for seconds, (wait, _) in zip(before_s, waits, strict=True)] + [
            (end - costs.tail_s, end) for end in timeline.period_ends_s
        ]
        bounds = timeline.period_ends_s[PERIODS - 3 : PERIODS]
        reads, loads = timeline.of_kind(Kind.READ), timeline.of_kind(Kind.LOAD)
        return cls("predicted", bounds, reads, loads, computes, waits, between, GREY, BETWEEN)

    @classmethod
    def measured(cls, timeline: Timeline, profile: Profile, candidate: Candidate) -> _Group:
        computes = timeline.computes
        bounds = _measured_bounds(timeline, computes, profile, candidate)
        waits = [(span.start_s - span.stall_s, span.start_s) for span in computes]
        ends = [bounds[0], *(span.end_s for span in computes)]
        between = list(zip(ends, [*(wait for wait, _ in waits), bounds[-1]], strict=True))
        reads, loads = timeline.of_kind(Kind.READ), timeline.of_kind(Kind.LOAD)
        if not candidate.residents:
            return cls("measured", bounds, reads, loads, computes, waits, between, GREY, BETWEEN)
        label = "resident layers and compute between, not timed apart"
        return cls("measured", bounds, reads, loads, computes, waits, between, PALE_GREY, label)


def _measured_bounds(
    timeline: Timeline, computes: Sequence[Span], profile: Profile, candidate: Candidate
) -> tuple[float, ...]:
    """Begin of the last two periods, or of what there is, and the end.

    Periods within one call of the model begin where their first streamed layer was called.
    """
    ends = timeline.period_ends_s
    periods = calls_periods(timeline, profile.partition, candidate)
    if periods == 1:
        return (0.0, *ends)[-3:]
    last = [span for span in computes if span.period == len(ends) - 1]
    firsts = last[:: max(1, len(last) // periods)][:periods]
    return (*(span.start_s - span.stall_s for span in firsts), ends[-1])[-3:]


def _title(profile: Profile, candidate: Candidate, shown: _Group, measured: Timeline | None) -> str:
    begin_s, end_s = shown.bounds_s[0], shown.bounds_s[-1]
    stall_s = sum(end - start for start, end in shown.stalls if begin_s < end <= end_s) / 2
    repeats = profile.partition.repeats
    one_of = f", one of {repeats} periods of a pass" if repeats > 1 else ""
    predicted = f"{seconds((end_s - begin_s) / 2)}{one_of}, {seconds(stall_s)} of it stalled"
    title = f"{profile.model_name}, {candidate.label()}: predicted {predicted}"
    if measured is None or not measured.period_ends_s:
        return title
    found = traffic(measured, profile.partition, candidate)
    return f"{title}; measured {seconds(found.pass_s / repeats)}, {seconds(found.stall_s / repeats)} of it stalled"


# -- link and compute ---------------------------------------------------------------------------------------------


def _draw_groups(axes: Axes, groups: Sequence[_Group], candidate: Candidate, axis: _Axis) -> None:
    label = once()
    names: dict[float, str] = {}
    rows = 3 if any(group.reads for group in groups) else 2
    height = rows + 0.25
    for position, group in enumerate(reversed(groups)):
        base = height * position
        prefix = f"{group.name}\n" if len(groups) > 1 else ""
        names |= {base + 1: f"{prefix}link", base: f"{prefix}compute"}
        names |= {base + 2: f"{prefix}disk"} if rows == 3 else {}
        _draw_group(axes, group, base, candidate, axis, label)
        for bound_s in group.bounds_s[1:]:
            axes.vlines(
                (bound_s - group.bounds_s[0]) / axis.unit_s,
                base - 0.5,
                base + rows - 0.5,
                color=DARK_GREY,
                lw=0.9,
                ls=":",
            )
    axes.set_yticks(list(names), list(names.values()))
    axes.set_ylim(-0.5, height * len(groups) - 0.75)
    axes.tick_params(axis="y", length=0)
    _frame(axes, axis)


def _draw_group(
    axes: Axes, group: _Group, base: float, candidate: Candidate, axis: _Axis, label: Callable[[str], str]
) -> None:
    resident = [span for span in group.computes if span.action.layers[0] in candidate.residents]
    streamed = [span for span in group.computes if span.action.layers[0] not in candidate.residents]
    for row, spans, colour, name in (
        (base + 2, group.reads, SKY, "read from disk"),
        (base + 1, group.loads, BLUE, "transfer"),
        (base, streamed, ORANGE, "compute, streamed layer"),
        (base, resident, GREEN, "compute, resident layer"),
    ):
        _draw_spans(axes, axis, group, row, spans, colour, name, label)
    hairline = HAIRLINE_SHARE * axis.width
    stall: dict[str, Any] = {"facecolor": "white", "edgecolor": VERMILLION, "hatch": "//////", "lw": 0.6}
    for gaps, least, name, look in (
        (group.between, 0.0, group.between_label, {"facecolor": group.between_colour, "lw": 0}),
        (group.stalls, hairline, "stall", stall),
    ):
        bars = [bar for start, end in gaps if (bar := axis.bar(start, end, group.bounds_s)) and bar[1] > least]
        if bars:
            axes.broken_barh(bars, (base - 0.4, 0.8), label=label(name), **look)
    if not group.loads:
        axes.text(axis.width / 4, base + 1, "nothing moves", ha="center", va="center", color=DARK_GREY)


def _draw_spans(
    axes: Axes,
    axis: _Axis,
    group: _Group,
    row: float,
    spans: Sequence[Span],
    colour: str,
    name: str,
    label: Callable[[str], str],
) -> None:
    """Bars with their layers' numbers where these have room."""
    inside = [
        (bar, span.action.layers) for span in spans if (bar := axis.bar(span.start_s, span.end_s, group.bounds_s))
    ]
    if not inside:
        return
    bars = [bar for bar, _ in inside]
    axes.broken_barh(bars, (row - 0.4, 0.8), facecolor=colour, edgecolor="white", lw=0.4, label=label(name))
    for (start, width), layers in inside:
        text = str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"
        share = width / axis.width
        level = share > LABEL_SHARE * (len(text) + 0.5)
        if level or share > UPRIGHT_SHARE:
            look: dict[str, Any] = {"fontsize": 8 if level else 7, "color": "black" if colour == ORANGE else "white"}
            axes.text(start + width / 2, row, text, ha="center", va="center", rotation=0 if level else 90, **look)


# -- memory -------------------------------------------------------------------------------------------------------


def _draw_memory(
    axes: Axes,
    profile: Profile,
    candidate: Candidate,
    predicted: Timeline,
    bounds_s: Sequence[float],
    axis: _Axis,
    budget_bytes: int | None,
) -> None:
    partition = profile.partition
    layer_bytes = [layer.n_bytes for layer in partition.layers]
    arena = ring_for(profile.mode, candidate, partition).arena_bytes
    fixed = partition.resident_bytes + sum(layer_bytes[index] for index in candidate.residents)
    peak = memory_of(profile).peak_bytes(candidate, arena)
    beside = peak - fixed - arena
    unit, unit_bytes = size_unit(max(peak, budget_bytes or 0))
    times, levels = _levels(occupancy(predicted, layer_bytes), bounds_s, axis)
    occupied = (fixed + np.array(levels)) / unit_bytes
    end = times[-1]
    if fixed:
        axes.fill_between([0, end], fixed / unit_bytes, color=GREEN, lw=0, label=f"resident, {size(fixed)}")
    if arena:
        label = f"streamed, in an arena of {size(arena)}"
        axes.fill_between(times, fixed / unit_bytes, occupied, step="post", color=BLUE, alpha=0.75, lw=0, label=label)
    axes.fill_between(
        times,
        occupied,
        occupied + beside / unit_bytes,
        step="post",
        facecolor="white",
        edgecolor="#888888",
        hatch="....",
        lw=0,
        label=f"activations and workspace, at most {size(beside)}",
    )
    axes.axhline(peak / unit_bytes, color="black", lw=1.2, label=f"reserved at peak, {size(peak)}")
    if budget_bytes is not None:
        axes.axhline(budget_bytes / unit_bytes, color=PURPLE, ls="--", lw=1.8, label=f"budget, {size(budget_bytes)}")
    axes.set_ylim(0, max(peak, budget_bytes or 0) / unit_bytes * 1.06)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_ylabel(f"device memory, predicted, {unit}")
    axes.set_xlabel(f"{axis.unit} from the beginning of a steady period")
    _frame(axes, axis)


def _levels(
    curve: Sequence[tuple[float, int]], bounds_s: Sequence[float], axis: _Axis
) -> tuple[list[float], list[int]]:
    """The steps of a curve inside the window, with its first and last moment: places on the axis, and bytes."""
    begin_s, end_s = bounds_s[0], bounds_s[-1]
    before = [n_bytes for when, n_bytes in curve if when <= begin_s]
    inside = [(when, n_bytes) for when, n_bytes in curve if begin_s < when < end_s]
    levels = [before[-1] if before else 0, *(n_bytes for _, n_bytes in inside)]
    times = [(when - begin_s) / axis.unit_s for when in (begin_s, *(when for when, _ in inside), end_s)]
    return times, [*levels, levels[-1]]


def _frame(axes: Axes, axis: _Axis) -> None:
    """What both parts share: the legend beside, no needless lines."""
    axes.set_xlim(0, axis.width)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False, fontsize=9)
