"""The timeline of a plan: links and compute as predicted, as measured, and device memory over two steady periods."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from autosp.cost_model.simulate import PERIODS, Costs
from autosp.report.drawing import (
    BLUE,
    DARK_GREEN,
    DARK_GREY,
    DARK_ORANGE,
    GREEN,
    GREY,
    ORANGE,
    PALE_GREEN,
    PALE_GREY,
    PALE_ORANGE,
    SKY,
    VERMILLION,
    YELLOW,
    TimeAxis,
    checked_path,
    new_figure,
    once,
    time_unit,
)
from autosp.report.memory_panel import draw_memory
from autosp.report.traffic import calls_periods, expected, expected_costs, traffic
from autosp.report.units import seconds
from autosp.schedule.actions import COMPUTES, RESOURCE, Kind, Resource
from autosp.schedule.timeline import Span, Timeline
from autosp.spec import Candidate, Profile

LABEL_SHARE = 0.009
"""The share of the width that one character of a bar's label takes; upright, a label needs `UPRIGHT_SHARE` in all."""
UPRIGHT_SHARE = 0.013

HAIRLINE_SHARE = 0.0015
"""Stalls narrower than this share of the width are not drawn: their outline would make more of them than they are."""

BETWEEN = "compute between layers"

ROWS = (Resource.RETURN, Resource.COMPUTE, Resource.LINK, Resource.DISK)
"""From the bottom. Compute and the link are always there, the others where anything happens on them."""


class Look(NamedTuple):
    """Of the bars of one kind."""

    colour: str
    name: str
    text: str = "white"


MOVES = {
    Kind.READ: Look(SKY, "read from disk"),
    Kind.LOAD: Look(BLUE, "transfer"),
    Kind.RESTORE: Look(SKY, "activations, out and back", "black"),
    Kind.SAVE: Look(SKY, "activations, out and back", "black"),
    Kind.GRADIENTS: Look(YELLOW, "gradients", "black"),
}

STREAMED = {
    Kind.FORWARD: Look(ORANGE, "forward, streamed layer", "black"),
    Kind.RECOMPUTE: Look(PALE_ORANGE, "computed again, streamed layer", "black"),
    Kind.BACKWARD: Look(DARK_ORANGE, "backward, streamed layer"),
}
RESIDENT = {
    Kind.FORWARD: Look(GREEN, "forward, resident layer"),
    Kind.RECOMPUTE: Look(PALE_GREEN, "computed again, resident layer", "black"),
    Kind.BACKWARD: Look(DARK_GREEN, "backward, resident layer"),
}

Bars = list[tuple[float, float]]


def timeline(
    profile: Profile,
    candidate: Candidate,
    path: str | os.PathLike[str],
    budget_bytes: int | None = None,
    measured: Timeline | None = None,
) -> None:
    """Two steady periods: links and compute as predicted and, if given, as `measured`; device memory below.

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
    axis = TimeAxis(*time_unit(width_s), width_s)
    busy = {RESOURCE[kind] for group in groups for kind in group.spans} | {Resource.COMPUTE, Resource.LINK}
    rows = [row for row in ROWS if row in busy]

    inches = 0.55 * len(rows) * len(groups)
    figure = new_figure(13, 5.3 + inches)
    gantt, memory = figure.subplots(2, 1, sharex=True, height_ratios=[inches + 0.3, 3.6])
    _draw_groups(gantt, groups, rows, candidate, axis)
    draw_memory(memory, profile, candidate, predicted, shown.bounds_s, axis, budget_bytes)
    gantt.set_title(_title(profile, candidate, shown, measured), loc="left", fontsize=11)
    figure.savefig(target)


@dataclass(frozen=True)
class _Group:
    """The rows of one timeline, and the periods of it that are shown: between `bounds_s`."""

    name: str
    bounds_s: tuple[float, ...]
    spans: Mapping[Kind, list[Span]]
    """Of the kinds that there are, but evictions and the update."""
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
        return cls("predicted", bounds, _by_kind(timeline), waits, between, GREY, BETWEEN)

    @classmethod
    def measured(cls, timeline: Timeline, profile: Profile, candidate: Candidate) -> _Group:
        computes = timeline.computes
        bounds = _measured_bounds(timeline, computes, profile, candidate)
        waits = [(span.start_s - span.stall_s, span.start_s) for span in computes]
        ends = [bounds[0], *(span.end_s for span in computes)]
        between = list(zip(ends, [*(wait for wait, _ in waits), bounds[-1]], strict=True))
        spans = _by_kind(timeline)
        if not candidate.residents:
            return cls("measured", bounds, spans, waits, between, GREY, BETWEEN)
        label = "resident layers and compute between, not timed apart"
        return cls("measured", bounds, spans, waits, between, PALE_GREY, label)


def _by_kind(timeline: Timeline) -> dict[Kind, list[Span]]:
    """What is drawn of a timeline."""
    found = {kind: timeline.of_kind(kind) for kind in (*COMPUTES, *MOVES)}
    return {kind: spans for kind, spans in found.items() if spans}


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


# -- links and compute --------------------------------------------------------------------------------------------


def _draw_groups(
    axes: Axes, groups: Sequence[_Group], rows: Sequence[Resource], candidate: Candidate, axis: TimeAxis
) -> None:
    label = once()
    names: dict[float, str] = {}
    height = len(rows) + 0.25
    for position, group in enumerate(reversed(groups)):
        base = height * position
        prefix = f"{group.name}\n" if len(groups) > 1 else ""
        places = {row: base + number for number, row in enumerate(rows)}
        names |= {place: f"{prefix}{row}" for row, place in places.items()}
        _draw_group(axes, group, places, candidate, axis, label)
        for bound_s in group.bounds_s[1:]:
            at = (bound_s - group.bounds_s[0]) / axis.unit_s
            axes.vlines(at, base - 0.5, base + len(rows) - 0.5, color=DARK_GREY, lw=0.9, ls=":")
    axes.set_yticks(list(names), list(names.values()))
    axes.set_ylim(-0.5, height * len(groups) - 0.75)
    axes.tick_params(axis="y", length=0)
    axis.frame(axes)


def _draw_group(
    axes: Axes,
    group: _Group,
    places: Mapping[Resource, float],
    candidate: Candidate,
    axis: TimeAxis,
    label: Callable[[str], str],
) -> None:
    for kind, of_kind, spans in _looks(group, candidate):
        _draw_spans(axes, axis, group, places[RESOURCE[kind]], spans, of_kind, label)
    hairline = HAIRLINE_SHARE * axis.width
    stall: dict[str, Any] = {"facecolor": "white", "edgecolor": VERMILLION, "hatch": "//////", "lw": 0.6}
    for gaps, least, name, look in (
        (group.between, 0.0, group.between_label, {"facecolor": group.between_colour, "lw": 0}),
        (group.stalls, hairline, "stall", stall),
    ):
        bars = [bar for start, end in gaps if (bar := axis.bar(start, end, group.bounds_s)) and bar[1] > least]
        if bars:
            axes.broken_barh(bars, (places[Resource.COMPUTE] - 0.4, 0.8), label=label(name), **look)
    if Kind.LOAD not in group.spans:
        where = axis.width / 4, places[Resource.LINK]
        axes.text(*where, "nothing moves", ha="center", va="center", color=DARK_GREY)


def _looks(group: _Group, candidate: Candidate) -> Iterator[tuple[Kind, Look, list[Span]]]:
    """What is drawn alike. In inference all compute is forward, and is not called so."""
    trains = Kind.BACKWARD in group.spans
    for kind, spans in group.spans.items():
        if kind in MOVES:
            yield kind, MOVES[kind], spans
            continue
        for looks, stays in ((STREAMED, False), (RESIDENT, True)):
            look = looks[kind] if trains else looks[kind]._replace(name=looks[kind].name.replace("forward", "compute"))
            yield kind, look, [span for span in spans if (span.action.layers[0] in candidate.residents) is stays]


def _draw_spans(
    axes: Axes,
    axis: TimeAxis,
    group: _Group,
    row: float,
    spans: Sequence[Span],
    look: Look,
    label: Callable[[str], str],
) -> None:
    """Bars with their layers' numbers where these have room."""
    inside = [
        (bar, span.action.layers) for span in spans if (bar := axis.bar(span.start_s, span.end_s, group.bounds_s))
    ]
    if not inside:
        return
    bars = [bar for bar, _ in inside]
    axes.broken_barh(bars, (row - 0.4, 0.8), facecolor=look.colour, edgecolor="white", lw=0.2, label=label(look.name))
    for (start, width), layers in inside:
        text = str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"
        share = width / axis.width
        level = share > LABEL_SHARE * (len(text) + 0.5)
        if level or share > UPRIGHT_SHARE:
            style: dict[str, Any] = {"fontsize": 8 if level else 7, "color": look.text, "rotation": 0 if level else 90}
            axes.text(start + width / 2, row, text, ha="center", va="center", **style)
