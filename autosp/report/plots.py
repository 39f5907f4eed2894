"""Pictures of a plan and of a search, drawn without a display. Needs matplotlib (`autosp[viz]`), not torch.

Colours are Okabe and Ito's, which colour-blind readers tell apart; stalls and the workspace are hatched besides.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from autosp.cost_model.memory import occupancy, peak_bytes
from autosp.cost_model.predict import contended_periods
from autosp.cost_model.simulate import PERIODS, Costs, Span, Timeline, costs_of, simulate
from autosp.errors import SettingError
from autosp.report.units import seconds, size
from autosp.schedule.actions import Kind
from autosp.schedule.streaming import build_ring, lower
from autosp.spec import Candidate, Outcome, Prediction, Profile, Trial

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY = "#BBBBBB"

SUFFIXES = (".png", ".svg", ".pdf")
LABEL_SHARE = 0.011
"""The share of the width that one character of a bar's label takes; upright it needs that much in all."""

Bars = list[tuple[float, float]]


def timeline(
    profile: Profile, candidate: Candidate, path: str | os.PathLike[str], budget_bytes: int | None = None
) -> None:
    """Two steady periods as the cost model sees them: link and compute above, device memory over time below.

    Raises: SettingError if `path` cannot be a picture.
    """
    target = checked_path(path)
    layer_bytes = [layer.n_bytes for layer in profile.partition.layers]
    visits = profile.partition.visits
    ring = build_ring(candidate, layer_bytes, visits)
    _, _, compute_factor, link_factor = contended_periods(profile, [ring])
    costs = costs_of(profile).contended(float(compute_factor[0]), float(link_factor[0]))
    # One period more than is shown: what it prefetches belongs to the end of the last one shown.
    run = simulate(lower(candidate, layer_bytes, visits), costs, PERIODS + 1)
    window = _Window.of(run)
    figure = Figure(figsize=(13, 6), dpi=120, layout="constrained")
    gantt, memory = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, 1.15])
    _draw_gantt(gantt, run, costs, candidate, window)
    _draw_memory(memory, profile, candidate, occupancy(run, layer_bytes), window, ring.arena_bytes, budget_bytes)
    stall_s = sum(span.stall_s for span in run.spans if window.start_s < span.end_s <= window.end_s) / 2
    periods = f", one of {profile.partition.repeats} periods of a pass" if profile.partition.repeats > 1 else ""
    took = f"{seconds(window.period_s)}{periods}, {seconds(stall_s)} of it stalled"
    gantt.set_title(f"{profile.model_name}, {candidate.label()}: {took}", loc="left", fontsize=11)
    figure.savefig(target)


def front(
    predictions: Sequence[Prediction],
    trials: Sequence[Trial],
    floor_curve: Sequence[tuple[int, float]],
    budget: int | None,
    path: str | os.PathLike[str],
) -> None:
    """Memory against latency: predicted settings, validated ones joined to their predictions, and the floor.

    `floor_curve` has (budget in bytes, seconds) points in ascending order; `budget` is in bytes.

    Raises: SettingError if `path` cannot be a picture.
    """
    target = checked_path(path)
    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    unit, unit_bytes = _size_unit(max([budget or 0, *(prediction.peak_bytes for prediction in predictions)]))
    peaks = [prediction.peak_bytes / unit_bytes for prediction in predictions]
    latencies_s = [prediction.latency_s for prediction in predictions]
    axes.scatter(peaks, latencies_s, s=14, color=SKY, alpha=0.6, lw=0, label="predicted", zorder=2)
    _draw_trials(axes, trials, unit_bytes)
    if floor_curve:
        budgets = [n_bytes / unit_bytes for n_bytes, _ in floor_curve]
        axes.plot(budgets, [s for _, s in floor_curve], color="black", lw=1.5, label="floor", zorder=1)
    if budget is not None:
        axes.axvline(budget / unit_bytes, color=PURPLE, ls="--", lw=1.5, label=f"budget {size(budget)}", zorder=1)
    measured_s = [trial.measurement.latency_s for trial in trials if trial.measurement.samples_s]
    _time_axis(axes, [*latencies_s, *measured_s, *(latency_s for _, latency_s in floor_curve)])
    axes.set_xlim(left=0)
    axes.set_xlabel(f"peak device memory, {unit}")
    axes.grid(color="#E5E5E5", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.005, 1.0), fontsize=9)
    figure.savefig(target)


@dataclass(frozen=True)
class _Window:
    """The two steady periods of a timeline, on an axis that starts at 0 and has a unit."""

    start_s: float
    middle_s: float
    end_s: float
    unit: str
    unit_s: float

    @classmethod
    def of(cls, run: Timeline) -> _Window:
        start, middle, end = run.period_ends_s[PERIODS - 3 : PERIODS]
        unit, unit_s = ("s", 1.0) if end - start >= 2 else ("ms", 1e-3) if end - start >= 2e-3 else ("µs", 1e-6)
        return cls(start, middle, end, unit, unit_s)

    @property
    def period_s(self) -> float:
        return (self.end_s - self.start_s) / 2

    @property
    def width(self) -> float:
        return self.at(self.end_s)

    def at(self, second: float) -> float:
        """The place of a moment on the axis."""
        return (second - self.start_s) / self.unit_s

    def bar(self, start_s: float, end_s: float) -> tuple[float, float] | None:
        """Start and width of what is inside the window of an interval; None if nothing is."""
        low, high = max(start_s, self.start_s), min(end_s, self.end_s)
        return (self.at(low), (high - low) / self.unit_s) if high > low else None


class _Marker(NamedTuple):
    label: str
    shape: str
    area: int
    colour: str


def _draw_gantt(axes: Axes, run: Timeline, costs: Costs, candidate: Candidate, window: _Window) -> None:
    rows = {"link": 1.0, "compute": 0.0}
    legend = _legend(axes)
    loads = [span for span in run.spans if span.action.kind is Kind.LOAD]
    forwards = [span for span in run.spans if span.action.kind is Kind.FORWARD]
    resident = {True: "compute, resident layer", False: "compute, streamed layer"}
    for colour, label, chosen in (
        (GREEN, resident[True], [s for s in forwards if s.action.layers[0] in candidate.residents]),
        (ORANGE, resident[False], [s for s in forwards if s.action.layers[0] not in candidate.residents]),
    ):
        _bars(axes, window, rows["compute"], chosen, colour, legend(label))
    _bars(axes, window, rows["link"], loads, BLUE, legend("transfer"))
    stalls, between = _gaps(forwards, run.period_ends_s, costs)
    styles: tuple[tuple[Bars, dict[str, Any]], ...] = (
        (between, {"facecolor": GREY, "label": legend("compute between layers")}),
        (stalls, {"facecolor": "white", "edgecolor": VERMILLION, "hatch": "//////", "label": legend("stall")}),
    )
    for gaps, style in styles:
        inside = [bar for start, end in gaps if (bar := window.bar(start, end))]
        if inside:
            axes.broken_barh(inside, (rows["compute"] - 0.4, 0.8), lw=0.6, **style)
    if not loads:
        axes.text(window.width / 4, rows["link"], "nothing moves", ha="center", va="center", color="#555555")
    axes.set_yticks(list(rows.values()), list(rows))
    axes.set_ylim(-0.5, 1.5)
    axes.tick_params(axis="y", length=0)
    _frame(axes, window)


def _bars(axes: Axes, window: _Window, row: float, spans: Sequence[Span], colour: str, label: str) -> None:
    """Bars with their layers' numbers where these have room."""
    inside = [(bar, span.action.layers) for span in spans if (bar := window.bar(span.start_s, span.end_s))]
    if not inside:
        return
    axes.broken_barh(
        [bar for bar, _ in inside], (row - 0.4, 0.8), facecolor=colour, edgecolor="white", lw=0.5, label=label
    )
    for (start, width), layers in inside:
        text = str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"
        share = width / window.width
        if share > 0.8 * LABEL_SHARE:
            turned = 0 if share > LABEL_SHARE * (len(text) + 0.5) else 90
            look: dict[str, Any] = {"fontsize": 7 if turned else 8, "color": "black" if colour == ORANGE else "white"}
            axes.text(start + width / 2, row, text, ha="center", va="center", rotation=turned, **look)


def _gaps(forwards: Sequence[Span], period_ends_s: Sequence[float], costs: Costs) -> tuple[Bars, Bars]:
    """(start, end) of every stall, and of compute that belongs to no layer."""
    stalls: Bars = []
    between: Bars = []
    per_period = len(costs.forward_s)
    for position, span in enumerate(forwards):
        waiting_s = span.start_s - span.stall_s
        stalls.append((waiting_s, span.start_s))
        between.append((waiting_s - costs.before_s[position % per_period], waiting_s))
    between += [(end - costs.tail_s, end) for end in period_ends_s]
    return stalls, between


def _draw_memory(
    axes: Axes,
    profile: Profile,
    candidate: Candidate,
    curve: Sequence[tuple[float, int]],
    window: _Window,
    arena: int,
    budget_bytes: int | None,
) -> None:
    partition = profile.partition
    fixed = partition.resident_bytes + sum(partition.layers[index].n_bytes for index in candidate.residents)
    peak = peak_bytes(profile, candidate, arena)
    unit, unit_bytes = _size_unit(max(peak, budget_bytes or 0))
    before = [n_bytes for when, n_bytes in curve if when <= window.start_s]
    inside = [(when, n_bytes) for when, n_bytes in curve if window.start_s < when < window.end_s]
    levels = [before[-1] if before else 0, *(n_bytes for _, n_bytes in inside)]
    times = [window.at(when) for when in (window.start_s, *(when for when, _ in inside), window.end_s)]
    occupied = (fixed + np.array([*levels, levels[-1]])) / unit_bytes
    if fixed:
        axes.fill_between([0, window.width], fixed / unit_bytes, color=GREEN, lw=0, label=f"resident, {size(fixed)}")
    if arena:
        label = f"streamed, in an arena of {size(arena)}"
        axes.fill_between(times, fixed / unit_bytes, occupied, step="post", color=BLUE, alpha=0.75, lw=0, label=label)
    axes.fill_between(
        times,
        occupied,
        occupied + profile.workspace_bytes / unit_bytes,
        step="post",
        facecolor="white",
        edgecolor="#888888",
        hatch="....",
        lw=0,
        label=f"activations and workspace, at most {size(profile.workspace_bytes)}",
    )
    axes.axhline(peak / unit_bytes, color="black", lw=1.2, label=f"reserved at peak, {size(peak)}")
    if budget_bytes is not None:
        axes.axhline(budget_bytes / unit_bytes, color=PURPLE, ls="--", lw=1.8, label=f"budget, {size(budget_bytes)}")
    axes.set_ylim(0, max(peak, budget_bytes or 0) / unit_bytes * 1.06)
    axes.set_ylabel(f"device memory, {unit}")
    axes.set_xlabel(f"{window.unit} from the beginning of a steady period")
    _frame(axes, window)


def _frame(axes: Axes, window: _Window) -> None:
    """What both pictures share: the period's boundary, the legend beside, no needless lines."""
    axes.axvline(window.at(window.middle_s), color="#555555", lw=0.9, ls=":")
    axes.set_xlim(0, window.width)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False, fontsize=9)


def _draw_trials(axes: Axes, trials: Sequence[Trial], unit_bytes: float) -> None:
    """Each validated setting, with a thin line to where it was predicted; the fastest that fits is a star."""
    fitting = [trial for trial in trials if trial.measurement.outcome is Outcome.FITS]
    best = min(fitting, key=lambda trial: trial.measurement.latency_s, default=None)
    legend = _legend(axes)
    for trial in trials:
        said, found = trial.prediction, trial.measurement
        if not found.samples_s:
            continue
        if trial is best:
            look = _Marker("fastest measured", "*", 220, VERMILLION)
        elif found.outcome is Outcome.FITS:
            look = _Marker("measured", "o", 40, BLUE)
        else:
            look = _Marker("measured, over budget", "X", 48, ORANGE)
        x = [said.peak_bytes / unit_bytes, found.peak_bytes / unit_bytes]
        axes.plot(x, [said.latency_s, found.latency_s], color=GREY, lw=0.8, zorder=3)
        axes.scatter(
            x[1],
            found.latency_s,
            s=look.area,
            marker=look.shape,
            color=look.colour,
            edgecolor="black",
            lw=0.6,
            zorder=5 if trial is best else 4,
            label=legend(look.label),
        )


def _time_axis(axes: Axes, values_s: Sequence[float]) -> None:
    """Seconds or milliseconds; logarithmic where latencies differ much."""
    low, high = min(values_s, default=0.0), max(values_s, default=1.0)
    unit, unit_s = ("s", 1.0) if high >= 1 else ("ms", 1e-3)
    if low > 0 and high / low > 6:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, high * 1.08)
        axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit_s:g}"))
    axes.set_ylabel(f"latency of a pass, {unit}")


def _size_unit(n_bytes: float) -> tuple[str, float]:
    """The unit of an axis that reaches to `n_bytes`, and its bytes."""
    return ("GB", 1e9) if n_bytes >= 1e9 else ("MB", 1e6)


def _legend(axes: Axes) -> Callable[[str], str]:
    """Lets each label into the legend once: matplotlib leaves out labels that begin with an underscore."""
    seen: set[str] = set()

    def once(label: str) -> str:
        known = label in seen
        seen.add(label)
        return f"_{label}" if known else label

    return once


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path of a picture.

    Raises: SettingError if its suffix names no picture, or its folder is not there.
    """
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise SettingError(f"{target}: a picture's name ends in one of {', '.join(SUFFIXES)}")
    if not target.parent.is_dir():
        raise SettingError(f"{target}: there is no folder {target.parent}")
    return target
