"""Raw results of the peers' benchmark, and what they say of a system on a model at a budget."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from peer_measure import TUNE, Row
from peer_systems import PLAIN

Key = tuple[str, str, str, int, float | None, float | None]


def key_of(row: Row) -> Key:
    """What a row measures. Of rows with the same key the last one counts."""
    return (row.scale, row.model, row.system, row.repeat, row.budget_percent, row.paced_bytes_per_s)


def read_rows(raw: Path) -> list[Row]:
    """The rows of a raw file in their order; none if it is not there."""
    return [Row(**line) for line in read_lines(raw) if "environment" not in line]


@dataclass(frozen=True)
class Point:
    """One system on one model at one budget, over all repeats."""

    model: str
    system: str
    percent: float
    outcome: str
    note: str
    samples_s: tuple[float, ...] = ()
    warm_s: float | None = None
    first_s: float | None = None
    over_floor: float | None = None
    over_budget: float = 0.0
    same_output: bool = False

    @property
    def ran(self) -> bool:
        """Whether there are times."""
        return bool(self.samples_s)

    @property
    def counts(self) -> bool:
        """Whether it did what was asked: inside the budget, with the plain model's output."""
        return self.outcome == "ok" and self.over_budget <= 1 and self.same_output

    @property
    def time_s(self) -> float:
        """Median of all steady passes."""
        return median(self.samples_s)


@dataclass(frozen=True)
class ModelResults:
    """All points of one model. `transfer_bound` names the budgets at which the link limits the pass."""

    name: str
    title: str
    weight_bytes: int
    plain_s: float
    budgets: dict[float, int]
    transfer_bound: dict[float, bool]
    points: dict[tuple[str, float], Point]


def collect(rows: list[Row]) -> list[ModelResults]:
    """Points from rows. A run that no budget changes counts at every budget, with that budget's floor and cap."""
    by_model: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_model[row.model].append(row)
    return [model for name, mine in by_model.items() if (model := _model(name, mine)) is not None]


def _model(name: str, rows: list[Row]) -> ModelResults | None:
    plain = [row for row in rows if row.system == PLAIN and row.outcome == "ok"]
    tuned = {(row.budget_percent, row.repeat): row.figures for row in rows if row.system == TUNE and row.figures}
    if not plain:
        return None
    budgets = {row.budget_percent: row.budget_bytes for row in rows if row.budget_percent and row.budget_bytes}
    points = {}
    for percent, budget_bytes in sorted(budgets.items()):
        floors = {repeat: figures["floor_s"] for (at, repeat), figures in tuned.items() if at == percent}
        for system in dict.fromkeys(row.system for row in rows if row.system not in (PLAIN, TUNE)):
            mine = [row for row in rows if row.system == system and row.budget_percent in (None, percent)]
            if mine:
                points[system, percent] = _point(mine, percent, budget_bytes, floors)
    bound = {
        percent: any(f["floor_s"] > f["compute_s"] for (at, _), f in tuned.items() if at == percent)
        for percent in budgets
    }
    plain_s = median([sample for row in plain for sample in row.samples_s])
    return ModelResults(
        name, plain[0].title, plain[0].weight_bytes, plain_s, dict(sorted(budgets.items())), bound, points
    )


def _point(rows: list[Row], percent: float, budget_bytes: int, floors: dict[int, float]) -> Point:
    last = rows[-1]
    ran = [row for row in rows if row.outcome == "ok"]
    failed = [row for row in rows if row.outcome != "ok"]
    if not ran:
        return Point(last.model, last.system, percent, last.outcome, last.note)
    warm = [sample for row in ran for sample in row.warm_samples_s]
    ratios = [median(row.samples_s) / floors[row.repeat] for row in ran if floors.get(row.repeat)]
    note = last.note if not failed else f"{len(failed)} of {len(rows)} runs {failed[0].outcome}: {failed[0].note}"
    return Point(
        model=last.model,
        system=last.system,
        percent=percent,
        outcome="ok" if not failed else failed[0].outcome,
        note=note,
        samples_s=tuple(sample for row in ran for sample in row.samples_s),
        warm_s=median(warm) if warm else None,
        first_s=median([row.first_s for row in ran if row.first_s is not None]),
        over_floor=median(ratios) if ratios else None,
        over_budget=max(row.peak_bytes or 0 for row in ran) / budget_bytes,
        same_output=all(row.same_output for row in ran),
    )


def read_lines(raw: Path) -> list[dict[str, Any]]:
    """The raw file: rows, and the environments that they were measured in."""
    if not raw.exists():
        return []
    return [json.loads(line) for line in raw.read_text(encoding="utf-8").splitlines()]
