"""What the pictures share: where they go, their colours, units and legends.

They need matplotlib (`autosp[viz]`), no display and no torch.
Colours are Okabe and Ito's, which colour-blind readers tell apart; stalls and the workspace are hatched besides.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from autosp.errors import SettingError

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
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
