"""The studies of training: their tables and pictures, from rows that were measured before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import training
import training_floors
import training_headline
from training_measure import Case, Job, TrainingRow, measure


def row(pass_s: float, peak_mb: int, *, paced: float = 2.0, percent: float | None = None) -> TrainingRow:
    figures: dict[str, Any] = {"title": "Tiny", "pass_s": pass_s, "peak_bytes": peak_mb * 10**6, "same_gradients": True}
    if percent is not None:
        floors_s = {"compute": 1.0, "weights in": 2.0}
        figures |= {"budget_bytes": 50 * 10**6, "floors_s": floors_s, "over_floor": pass_s / 2.0, "plan": "k=1"}
    else:
        figures |= {"unplanned_s": pass_s}
    return TrainingRow(Case("tiny", "cpu", paced, percent=percent), figures=figures)


ROWS = [
    row(2.0, 100),
    row(4.0, 40, percent=50.0),
    row(2.0, 100, paced=8.0),
    row(3.0, 60, paced=8.0, percent=50.0),
    TrainingRow(Case("tiny", "cpu", 8.0, percent=25.0), "failed", "BudgetTooSmallError: no setting fits"),
]


def test_each_pace_of_the_link_has_a_table() -> None:
    slow, fast = training_floors.table(ROWS).split("Each direction of the link: ")[1:]
    assert slow.startswith("2 GB/s") and fast.startswith("8 GB/s")
    assert "| Tiny | 50 % | 4 s | 2.00 | 2.00 (2.00) | weights in | 40 MB | 1 of 1 | equal | k=1 |" in slow
    assert "| Tiny | 50 % | 3 s | 1.50 | 1.50 (1.50) | weights in | 60 MB | 0 of 1 | equal | k=1 |" in fast
    assert "no setting fits" in fast


def test_a_plan_is_compared_with_plain_training_of_its_own_process(tmp_path: Path) -> None:
    """Where the row has it."""
    plain, planned = row(2.0, 100), row(4.0, 40, percent=50.0)
    assert "| Tiny | 50 % | 4 s | 2.00 |" in training_floors.table([plain, planned])
    planned.figures["unplanned_s"] = 3.2
    assert "| Tiny | 50 % | 4 s | 1.25 |" in training_floors.table([plain, planned])


def test_compute_needs_no_more_than_plain_training_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training_measure.ENOUGH_S", 0.0)
    figures = measure(Job(Case("mlp", "tiny", 2.0, percent=50.0), str(tmp_path), 50_000_000))["figures"]
    assert figures["same_gradients"]
    compute_s = figures["floors_s"]["compute"]
    assert compute_s <= min(figures["unplanned_s"], figures["profiled_compute_s"]) * (1 + 1e-9)
    assert figures["over_floor"] == figures["pass_s"] / max(figures["floors_s"].values())


def test_a_model_has_one_colour_and_over_the_budget_is_hollow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panels: list[Any] = []
    monkeypatch.setattr("training_floors.finish", lambda canvas, path, extra: panels.extend(canvas.axes))
    rows = [row(4.0, 40, percent=50.0), row(6.0, 60, percent=25.0)]
    training_floors.picture(rows, tmp_path / "picture.png")
    kept, over = [line for line in panels[0].get_lines() if line.get_marker() == "o" and len(line.get_xdata())]
    assert kept.get_color() == over.get_color() == kept.get_markerfacecolor()
    assert over.get_markerfacecolor() == "white"


def figures_of(measure: Callable[[Any, str], None], job: Any, folder: Path, timeout_s: float) -> dict[str, Any]:
    """A plan that needs 3 s for its transfers, and 1 s a microbatch; of the Llama it has too little memory."""
    case, count = job.case, job.case.microbatches
    figures = {"title": case.model.upper(), "same_gradients": True}
    if case.percent is None:
        return {"figures": figures | {"pass_s": 1.1 * count, "unplanned_s": 1.0 * count, "peak_bytes": 100}}
    if case.model == "llama":
        return {"outcome": "failed", "note": "BudgetTooSmallError: no setting fits"}
    floors_s = {"compute": 1.0 * count, "weights in": 3.0}
    pass_s = max(floors_s.values())
    figures |= {"pass_s": pass_s, "peak_bytes": 40, "budget_bytes": job.budget_bytes, "plan": "k=2"}
    return {"figures": figures | {"floors_s": floors_s, "over_floor": 1.0}}


def test_the_headline_names_the_smallest_group_that_reaches_it(tmp_path: Path) -> None:
    words = ["headline", "--repeats", "1", "--output", str(tmp_path), "--scratch", str(tmp_path)]
    for counts in ("1,2", "1,2,4,8"):
        training.main([*words, "--microbatches", counts], figures_of)
    raw = tmp_path / "training_headline_cpu.jsonl"
    assert len(raw.read_text(encoding="utf-8").splitlines()) == 2 * 2 * 4, "what is there is not measured again"
    text = raw.with_suffix(".md").read_text(encoding="utf-8")
    line = "| VIT | 2 | 2.00 s | 3.00 s | 1.50 | 1.36 | 1.00 | weights in | 100 B | 40 B | 40.0% | equal | k=2 |"
    assert line in text
    assert "- VIT: 60 % less memory at 5 % more time at most: smallest m = 4." in text
    assert "- LLAMA: 60 % less memory at 5 % more time at most: not reached up to 8." in text
    assert "no setting fits" in text
    assert raw.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_headline_is_not_reached_over_the_budget_or_with_other_bits() -> None:
    rows = []
    for count, peak_bytes, same in ((1, 41, True), (2, 40, False), (4, 40, True)):
        plain = {"title": "ViT", "pass_s": 1.0, "unplanned_s": 1.0, "peak_bytes": 100, "same_gradients": True}
        mine = plain | {"peak_bytes": peak_bytes, "budget_bytes": 40, "same_gradients": same, "over_floor": 1.0}
        cases = (Case("vit", "cpu", 2.0, 0, percent, count) for percent in (None, 40.0))
        found = zip(cases, (plain, mine | {"plan": "k=2"}), strict=True)
        rows += [TrainingRow(case, figures=figures) for case, figures in found]
    assert "at most: smallest m = 4." in training_headline.table(rows)
