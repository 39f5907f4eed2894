"""The study of training: its table and its picture, from rows that were measured before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import training
from training import Case, TrainingRow


def row(pass_s: float, peak_mb: int, *, paced: float = 2.0, percent: float | None = None) -> TrainingRow:
    figures: dict[str, Any] = {"title": "Tiny", "pass_s": pass_s, "peak_bytes": peak_mb * 10**6, "same_gradients": True}
    if percent is not None:
        floors_s = {"compute": 1.0, "weights in": 2.0}
        figures |= {"budget_bytes": 50 * 10**6, "floors_s": floors_s, "over_floor": pass_s / 2.0, "plan": "k=1"}
    return TrainingRow(Case("tiny", "cpu", paced, percent=percent), figures=figures)


ROWS = [
    row(2.0, 100),
    row(4.0, 40, percent=50.0),
    row(2.0, 100, paced=8.0),
    row(3.0, 60, paced=8.0, percent=50.0),
    TrainingRow(Case("tiny", "cpu", 8.0, percent=25.0), "failed", "BudgetTooSmallError: no setting fits"),
]


def test_each_pace_of_the_link_has_a_table() -> None:
    slow, fast = training.table(ROWS).split("Each direction of the link: ")[1:]
    assert slow.startswith("2 GB/s") and fast.startswith("8 GB/s")
    assert "| Tiny | 50 % | 4 s | 2.00 | 2.00 (2.00) | weights in | 40 MB | 1 of 1 | equal | k=1 |" in slow
    assert "| Tiny | 50 % | 3 s | 1.50 | 1.50 (1.50) | weights in | 60 MB | 0 of 1 | equal | k=1 |" in fast
    assert "no setting fits" in fast


def test_a_model_has_one_colour_and_over_the_budget_is_hollow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panels: list[Any] = []
    monkeypatch.setattr("training.finish", lambda canvas, path, extra: panels.extend(canvas.axes))
    rows = [row(4.0, 40, percent=50.0), row(6.0, 60, percent=25.0)]
    training.picture(rows, tmp_path / "picture.png")
    _, kept, over = panels[0].get_lines()
    assert kept.get_color() == over.get_color() == kept.get_markerfacecolor()
    assert over.get_markerfacecolor() == "white"
