"""Memory against latency: every setting, what was validated of them, and the least time any schedule could take."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from autosp.cost_model.floor import floor_s
from autosp.report.drawing import (
    BLUE,
    DARK_GREY,
    GREEN,
    GREY,
    GRID,
    ORANGE,
    PURPLE,
    VERMILLION,
    checked_path,
    new_figure,
    once,
    size_unit,
    time_unit,
)
from autosp.report.units import seconds, size
from autosp.spec import Candidate, Outcome, Prediction, Profile, Trial

FLOOR_POINTS = 400
MARGIN = 0.04
"""Left free around the data, as a share of their range."""

LOGARITHMIC_ABOVE = 6
"""Latencies whose extremes differ by more than this factor get a logarithmic axis."""

Point = tuple[float, float]
"""Peak in bytes, latency in seconds."""


class _Look(NamedTuple):
    label: str
    marker: str
    area: int
    colour: str
    order: int


class _Scale(NamedTuple):
    """The axes' units."""

    memory: str
    memory_bytes: float
    time: str
    time_s: float

    def at(self, point: Point) -> Point:
        return point[0] / self.memory_bytes, point[1] / self.time_s


def front(
    profile: Profile,
    predictions: Sequence[Prediction],
    trials: Sequence[Trial],
    budgets_bytes: Sequence[int],
    path: str | os.PathLike[str],
    *,
    chosen: Candidate | None = None,
    host_budget_bytes: int | None = None,
) -> None:
    """Every prediction as a dot, coloured by its residents; validated ones joined to what was measured of them.

    With them: the line through the predictions that no other beats in both memory and latency, the plan chosen, the
    least-memory plan on which the profile rests, the budgets, and the floor at every budget.

    Raises: SettingError if `path` cannot be a picture.
    """
    target = checked_path(path)
    everything = [*map(_said, predictions), *_measured_points([*trials, profile.observed])]
    peaks = [peak for peak, _ in everything] + list(budgets_bytes)
    low, high = min(peaks, default=0), max(peaks, default=1)
    margin = MARGIN * (high - low or high)
    floor = [
        (float(x), floor_s(profile, round(x), host_budget_bytes))
        for x in np.linspace(low - margin, high + margin, FLOOR_POINTS)
    ]
    latencies_s = [latency_s for _, latency_s in (*everything, *floor)]
    scale = _Scale(*size_unit(high), *time_unit(max(latencies_s)))

    figure = new_figure(10, 6.5)
    axes = figure.subplots()
    _draw_predictions(axes, predictions, scale)
    _draw_line(axes, pareto(map(_said, predictions)), scale)
    x, y = zip(*map(scale.at, floor), strict=True)
    axes.plot(x, y, color="black", lw=1.6, label="floor: the least time under a budget", zorder=3)
    _draw_trials(axes, profile, trials, chosen, scale)
    for budget in budgets_bytes:
        label = f"budget {size(budget)}"
        axes.axvline(budget / scale.memory_bytes, color=PURPLE, ls="--", lw=1.4, label=label, zorder=2)
    _dress(axes, latencies_s, scale)
    axes.set_xlim((low - margin) / scale.memory_bytes, (high + margin) / scale.memory_bytes)
    best = f", chosen: {chosen.label()}" if chosen is not None else ""
    axes.set_title(f"{profile.model_name}{best}", loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(target)


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other point beats in both coordinates, by rising memory and falling latency."""
    best: list[Point] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _said(prediction: Prediction) -> Point:
    return prediction.peak_bytes, prediction.latency_s


def _measured_points(trials: Iterable[Trial]) -> list[Point]:
    """Both ends of every trial that could be timed."""
    timed = [trial for trial in trials if trial.measurement.samples_s]
    return [
        *(_said(trial.prediction) for trial in timed),
        *((trial.measurement.peak_bytes, trial.measurement.latency_s) for trial in timed),
    ]


def _draw_predictions(axes: Axes, predictions: Sequence[Prediction], scale: _Scale) -> None:
    if not predictions:
        return
    # Few residents last: where dots lie on each other, the rarer ones are seen.
    shown = sorted(predictions, key=lambda prediction: -len(prediction.candidate.residents))
    x, y = zip(*(scale.at(_said(prediction)) for prediction in shown), strict=True)
    residents = [len(prediction.candidate.residents) for prediction in shown]
    dots = axes.scatter(x, y, c=residents, cmap="viridis", s=12, alpha=0.75, lw=0, zorder=4)
    assert axes.figure is not None
    bar = axes.figure.colorbar(dots, ax=axes, pad=0.015, aspect=35)
    bar.set_label(f"resident layers of each of {len(shown)} predicted settings")
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()
    bar.outline.set_visible(False)


def _draw_line(axes: Axes, points: Sequence[Point], scale: _Scale) -> None:
    """Between two settings there is none: the better of both holds until the next has its memory."""
    if points:
        x, y = zip(*map(scale.at, points), strict=True)
        axes.step(x, y, where="post", color=BLUE, lw=1.0, label="Pareto-optimal predictions", zorder=3)


def _draw_trials(
    axes: Axes, profile: Profile, trials: Sequence[Trial], chosen: Candidate | None, scale: _Scale
) -> None:
    """Each from a hollow dot, as predicted, to a filled mark, as measured; the chosen one last, above the others."""
    label = once()
    observed = profile.observed
    for trial in (observed, *trials):
        found = trial.measurement
        if not found.samples_s:
            continue
        look = _look(trial, observed, chosen)
        said, measured = scale.at(_said(trial.prediction)), scale.at((found.peak_bytes, found.latency_s))
        axes.plot(*zip(said, measured, strict=True), color=DARK_GREY, lw=0.9, zorder=look.order)
        hollow = label("predicted end of a validated setting")
        axes.scatter(*said, s=30, facecolor="white", edgecolor=DARK_GREY, lw=1.0, label=hollow, zorder=look.order)
        axes.scatter(
            *measured,
            s=look.area,
            marker=look.marker,
            color=look.colour,
            edgecolor="black",
            lw=0.7,
            label=label(look.label),
            zorder=look.order + 1,
        )


def _look(trial: Trial, observed: Trial, chosen: Candidate | None) -> _Look:
    took = seconds(trial.measurement.latency_s)
    if trial is observed:
        return _Look(f"least-memory plan, observed: {took}", "D", 48, GREEN, 6)
    if trial.prediction.candidate == chosen:
        return _Look(f"chosen plan, measured: {took}", "*", 260, VERMILLION, 10)
    if trial.measurement.outcome is Outcome.FITS:
        return _Look("measured", "o", 48, ORANGE, 8)
    return _Look("measured, over budget", "X", 60, GREY, 8)


def _dress(axes: Axes, latencies_s: Sequence[float], scale: _Scale) -> None:
    """Axes, units and grid; latencies that differ much get a logarithmic axis."""
    low, high = min(latencies_s) / scale.time_s, max(latencies_s) / scale.time_s
    if low > 0 and high / low > LOGARITHMIC_ABOVE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low / 1.1, high * 1.1)
    else:
        margin = 2 * MARGIN * (high - low or high)
        axes.set_ylim(max(0.0, low - margin), high + margin)
        axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(10))
    axes.set_ylabel(f"latency of a pass, {scale.time}")
    axes.set_xlabel(f"peak device memory, or budget, {scale.memory}")
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
