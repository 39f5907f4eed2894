"""What the pictures share: where they go, their colours, units and legends.

They need matplotlib (`autosp[viz]`), no display and no torch.
Colours are Okabe and Ito's, which colour-blind readers tell apart; stalls and the workspace are hatched besides.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autosp.errors import SettingError

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
YELLOW = "#F0E442"
PALE_ORANGE, DARK_ORANGE = "#F7D999", "#8C5A00"
PALE_GREEN, DARK_GREEN = "#99D8C7", "#005740"
GREY, PALE_GREY, DARK_GREY, GRID = "#BBBBBB", "#DDDDDD", "#555555", "#E5E5E5"

SUFFIXES = (".png", ".svg", ".pdf")


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


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure whose parts make room for each other, drawn without a display."""
    return Figure(figsize=(width_inches, height_inches), dpi=120, layout="constrained")


def size_unit(n_bytes: float) -> tuple[str, float]:
    """The unit of an axis that reaches to `n_bytes`, and its bytes."""
    return ("GB", 1e9) if n_bytes >= 1e9 else ("MB", 1e6)


def time_unit(longest_s: float) -> tuple[str, float]:
    """The unit of an axis that reaches to `longest_s`, and its seconds."""
    return ("s", 1.0) if longest_s >= 2 else ("ms", 1e-3) if longest_s >= 2e-3 else ("µs", 1e-6)


def once() -> Callable[[str], str]:
    """Lets each label into a legend once: matplotlib leaves out labels that begin with an underscore."""
    seen: set[str] = set()

    def label(text: str) -> str:
        known = text in seen
        seen.add(text)
        return f"_{text}" if known else text

    return label


@dataclass(frozen=True)
class TimeAxis:
    """Time from the beginning of a window, in the unit of the picture."""

    unit: str
    unit_s: float
    width_s: float

    @property
    def width(self) -> float:
        """Of the window, in that unit."""
        return self.width_s / self.unit_s

    def bar(self, start_s: float, end_s: float, bounds_s: Sequence[float]) -> tuple[float, float] | None:
        """Start and width of what is inside the window of an interval; None if nothing is."""
        low, high = max(start_s, bounds_s[0]), min(end_s, bounds_s[-1])
        return ((low - bounds_s[0]) / self.unit_s, (high - low) / self.unit_s) if high > low else None

    def frame(self, axes: Axes) -> None:
        """What all parts over one time share: the legend beside, no needless lines."""
        axes.set_xlim(0, self.width)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False, fontsize=9)
