"""The study of grouping on a toy: both tables come out of one command each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grouping
import pytest
from kept_rows import rows_in


def at_once(measure: Callable[[Any, str], None], job: Any, folder: Path, timeout_s: float) -> dict[str, Any]:
    """A measurement in this process."""
    measure(job, str(answer := folder / "answer.json"))
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("study", grouping.STUDIES)
def test_tables(study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("grouping.COUNTS", (1, 3))
    monkeypatch.setattr("grouping_measure.MOST_STEPS", 2)
    words = [study, "--scale", "toy", "--repeats", "1", "--output", str(tmp_path), "--scratch", str(tmp_path)]
    grouping.main(words, at_once)
    raw = tmp_path / f"grouping_{study}_toy.jsonl"
    rows = rows_in(raw, grouping.Row)
    assert [row.outcome for row in rows] == ["ok"] * 6, [row.note for row in rows]
    by_case = {(row.case.way, row.case.microbatches): row.figures for row in rows}
    assert all(figures["equal"] for (way, _), figures in by_case.items() if way != grouping.ALONE)
    one, grouped, separate = (
        by_case[key] for key in ((grouping.GROUPED, 1), (grouping.GROUPED, 3), (grouping.SEPARATE, 3))
    )
    assert grouped["moved_bytes"] == one["moved_bytes"] > 0
    assert separate["moved_bytes"] > 2 * one["moved_bytes"]
    assert "at most 1.00 times those of one (target 1.05: met)" in raw.with_suffix(".md").read_text()
    assert raw.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    before = raw.read_bytes()
    grouping.main(words, at_once)
    assert raw.read_bytes() == before, "what is there is not measured again"


def test_rows_of_another_pace_are_other_rows(tmp_path: Path) -> None:
    def figures(measure: Callable[[Any, str], None], job: Any, folder: Path, timeout_s: float) -> dict[str, Any]:
        case = job.case
        if case.way == grouping.ALONE:
            return {"figures": {"samples_s": [case.microbatches / 24]}}
        passes = case.microbatches if case.way == grouping.SEPARATE else 1
        bytes_per_s = case.paced_gb_per_s * 1e9
        answer = {"title": "toy", "plan": "k=2", "equal": True, "misses": 0, "link_bytes_per_s": bytes_per_s}
        answer |= {"samples_s": [passes / case.paced_gb_per_s], "moved_bytes": passes * 10**9, "least_bytes": 10**9}
        return {"figures": answer}

    words = ["training", "--scale", "toy", "--repeats", "1", "--output", str(tmp_path), "--scratch", str(tmp_path)]
    for pace in ("1", "2", "1"):
        grouping.main([*words, "--paced", pace], figures)
    raw = tmp_path / "grouping_training_toy.jsonl"
    assert len(raw.read_text(encoding="utf-8").splitlines()) == 2 * 10 + 5
    text = raw.with_suffix(".md").read_text(encoding="utf-8")
    assert "Gain at m = 16: 16.0 (target 5 at m = 16 where transfers bind the step: met)" in text
    assert "Gain at m = 16: 16.0 (target 5 at m = 16 where transfers bind the step: compute binds this one)" in text
    bound = [line.split(" | ")[3] for line in text.splitlines() if line.startswith(("| 1 |", "| 16 |"))]
    assert bound == ["link", "link", "link", "compute"]
    assert "link 1.00 GB/s" in text and "link 2.00 GB/s" in text
