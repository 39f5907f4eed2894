"""Canvas and legend of a study's picture: panels side by side, one legend below them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEIGHT_INCHES = 4.4
LEGEND_LINE_INCHES = 0.22
LEGEND_ENTRY_INCHES = 3.2

HOLLOW = {"color": "grey", "marker": "o", "mfc": "white", "ls": "", "label": "hollow: over the budget"}
"""A legend's entry for what only a marker says."""


def figure(panels: int, width: float) -> tuple[Any, list[Any]]:
    """A figure with panels side by side, each `width` inches wide."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(1, panels, figsize=(width * panels, HEIGHT_INCHES), squeeze=False)
    for panel in axes.flat:
        panel.grid(axis="y", color="#dddddd", lw=0.6)
        panel.set_axisbelow(True)
    return canvas, list(axes.flat)


def finish(canvas: Any, path: Path, *, extra: list[dict[str, Any]] | None = None, columns: int = 3) -> None:
    """Put one legend of all panels below them, and save the picture."""
    from matplotlib import pyplot

    entries: dict[str, Any] = {}
    for panel in canvas.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    for style in extra or []:
        entries[style["label"]] = pyplot.Line2D([], [], **style)
    columns = max(1, min(columns, round(canvas.get_figwidth() / LEGEND_ENTRY_INCHES)))
    height = LEGEND_LINE_INCHES * (-(-len(entries) // columns) + 1)
    canvas.set_size_inches(canvas.get_figwidth(), HEIGHT_INCHES + height)
    canvas.tight_layout(rect=(0, height / (HEIGHT_INCHES + height), 1, 1))
    canvas.legend(entries.values(), entries.keys(), loc="lower center", ncols=columns, fontsize=8, frameon=False)
    canvas.savefig(path, dpi=130)
    pyplot.close(canvas)
