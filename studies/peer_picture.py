"""The peers' benchmark as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from peer_points import ModelResults
from peer_systems import TUNED, System

PANEL_INCHES = (5.2, 3.9)
LEGEND_INCHES = 1.3


def picture(models: list[ModelResults], systems: dict[str, System], path: Path) -> None:
    """Ratio to the floor over the budget, a panel per model, a line per system."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(models))
    lines = -(-len(models) // columns)
    height = PANEL_INCHES[1] * lines + LEGEND_INCHES
    figure, axes = pyplot.subplots(lines, columns, figsize=(max(8.0, PANEL_INCHES[0] * columns), height), squeeze=False)
    points = [point for model in models for point in model.points.values() if point.over_floor is not None]
    names = [name for name in systems if any(point.system == name for point in points)]
    colours = {name: pyplot.get_cmap("tab10")(index % 10) for index, name in enumerate(names)}
    for panel in axes.flat[len(models) :]:
        panel.set_axis_off()
    for panel, model in zip(axes.flat, models, strict=False):
        _panel(panel, model, names, colours)
    handles = [_legend_line(pyplot, colours[name], systems[name].title, name == TUNED) for name in names]
    handles.append(pyplot.Line2D([], [], color="grey", marker="o", mfc="white", ls="", label="hollow: over the budget"))
    handles.append(pyplot.Line2D([], [], color="grey", marker="x", ls="", label="cross: output differs"))
    figure.tight_layout(rect=(0, LEGEND_INCHES / height, 1, 1))
    figure.legend(handles=handles, loc="lower center", ncols=min(4, columns + 1), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _legend_line(pyplot: Any, colour: Any, title: str, bold: bool) -> Any:
    return pyplot.Line2D([], [], color=colour, marker="o", lw=2.5 if bold else 1.2, label=title)


def _panel(panel: Any, model: ModelResults, names: list[str], colours: dict[str, Any]) -> None:
    for name in names:
        points = [model.points[name, percent] for percent in model.budgets if (name, percent) in model.points]
        drawn = [(point.percent, point.over_floor, point) for point in points if point.over_floor is not None]
        width = 2.5 if name == TUNED else 1.2
        panel.plot([x for x, _, _ in drawn], [y for _, y, _ in drawn], color=colours[name], lw=width, zorder=2)
        for x, y, point in drawn:
            fill = colours[name] if point.over_budget <= 1 else "white"
            style: dict[str, Any] = {"marker": "o", "mfc": fill} if point.same_output else {"marker": "x"}
            panel.plot([x], [y], color=colours[name], ls="", ms=6, zorder=3, **style)
    panel.axhline(1, color="grey", lw=0.8, ls=":")
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_title(model.name, fontsize=10)
    panel.set_xlabel("budget, % of the weights", fontsize=9)
    panel.set_ylabel("time ÷ floor", fontsize=9)
    panel.set_xticks(list(model.budgets))
    panel.grid(axis="y", color="#dddddd", lw=0.6)
