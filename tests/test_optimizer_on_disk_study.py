"""The study of the optimizer's state on disk, on a toy: its table comes out of one command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optimizer_on_disk
import pytest
from kept_rows import rows_in


def at_once(measure: Callable[[Any, str], None], job: Any, folder: Path, timeout_s: float) -> dict[str, Any]:
    """A measurement in this process."""
    measure(job, str(answer := folder / "answer.json"))
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def test_the_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ["--scale", "toy", "--repeats", "1", "--output", str(tmp_path), "--scratch", str(tmp_path)]
    optimizer_on_disk.main(words, at_once)
    raw = tmp_path / "optimizer_on_disk_toy.jsonl"
    rows = rows_in(raw, optimizer_on_disk.Row)
    assert [row.outcome for row in rows] == ["ok"] * 3, [row.note for row in rows]
    memory, half, disk = (row.figures for row in rows)
    assert all(row.figures["equal"] for row in rows)
    assert memory["read_bytes"] == memory["written_bytes"] == 0
    assert disk["read_bytes"] == disk["written_bytes"] == disk["state_bytes"]
    assert 0 < half["read_bytes"] < disk["read_bytes"]
    assert raw.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert optimizer_on_disk.floor_of(disk, 0.0) > 0
    assert optimizer_on_disk.floor_of(disk, 1e9) == 1e9
    before = raw.read_bytes()
    optimizer_on_disk.main(words, at_once)
    assert raw.read_bytes() == before, "what is there is not measured again"
