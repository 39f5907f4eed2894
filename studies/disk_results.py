"""Cases, jobs and rows of the disk tier's studies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import kept_rows
from isolation import answer_of
from kept_rows import Answer, Measure, rows_in
from record import RESULTS

from autosp.devices import CpuDevice


@dataclass(frozen=True)
class Case:
    """What is measured."""

    scale: str
    system: str
    tokens: int = 0
    repeat: int = 0
    budget_percent: float | None = None
    setting: str = ""
    """What else there is to name: a plan that was set by hand, a block size."""

    def __str__(self) -> str:
        parts = [self.system, self.setting, f"1×{self.tokens}" if self.tokens else ""]
        parts.append("" if self.budget_percent is None else f"{self.budget_percent:g} %")
        return ", ".join(part for part in (*parts, f"repeat {self.repeat}") if part)


@dataclass(frozen=True)
class Job:
    """A case with what its process needs."""

    case: Case
    scratch: str
    """A folder on a real disk: the checkpoint is there, and every file of a run."""
    plan: str | None = None
    """JSON of the plan that is run."""
    budget_bytes: int | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    """What its row is to be judged by; or, of readers, what is asked of them."""


@dataclass(frozen=True)
class Row(kept_rows.Row):
    """A row whose figures are those of passes, by the state of the page cache."""

    case_type: ClassVar[type] = Case

    def phase(self, name: str) -> dict[str, Any]:
        """The figures of the passes with the page cache "cold" or "warm"; all in RAM there is but one."""
        phases: dict[str, dict[str, Any]] = self.figures["phases"]
        return phases.get(name) or phases["ram"]

    def samples_s(self, name: str) -> list[float]:
        """Steady passes of a phase."""
        samples: list[float] = self.phase(name)["samples_s"]
        return samples

    def said(self) -> str:
        """With the times of its phases."""
        phases = self.figures.get("phases", {})
        times = [f"{name} {median(phase['samples_s']):.3f} s" for name, phase in phases.items()]
        return " ".join([self.outcome, *times, self.note])


class Results(kept_rows.Results[Row]):
    """Rows measured on the CPU, from the disk."""

    def __init__(
        self,
        raw: Path,
        measure: Measure,
        *,
        again: bool = False,
        timeout_s: float = 3600.0,
        answer: Answer = answer_of,
    ) -> None:
        super().__init__(raw, Row, CpuDevice(), measure, again=again, timeout_s=timeout_s, answer=answer)


def read_rows(raw: Path) -> list[Row]:
    """The rows of a raw file in their order; none if it is not there."""
    return rows_in(raw, Row)


def raw_path(study: str, scale: str, folder: Path = RESULTS) -> Path:
    """The file of a study's raw rows; its table and picture are beside it."""
    return folder / f"disk_{study}_{scale}.jsonl"


def median_of(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return median(there) if there else None
