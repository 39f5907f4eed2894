"""Jobs of the disk tier's studies and their rows: measured once, kept one by one, never measured again unless asked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from isolation import NoAnswerError, answer_of
from record import RESULTS, environment

from autosp.devices import CpuDevice


@dataclass(frozen=True)
class Case:
    """What is measured. Of rows with the same case the last one counts."""

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
class Row:
    """One line of the raw results. `outcome` is "ok", or says why there are no figures."""

    case: Case
    outcome: str = "ok"
    note: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there are figures."""
        return self.outcome == "ok"

    def phase(self, name: str) -> dict[str, Any]:
        """The figures of the passes with the page cache "cold" or "warm"; all in RAM there is but one."""
        phases: dict[str, dict[str, Any]] = self.figures["phases"]
        return phases.get(name) or phases["ram"]

    def samples_s(self, name: str) -> list[float]:
        """Steady passes of a phase."""
        samples: list[float] = self.phase(name)["samples_s"]
        return samples


Measure = Callable[[Job, str], None]
"""Runs a job in its process, and writes `outcome`, `note` and `figures` to a JSON file."""


Answer = Callable[[Measure, Job, Path, float], dict[str, Any]]
"""Runs a measure on a job with a folder for its file and a limit in seconds, and returns what it wrote."""


class Results:
    """The rows of one study so far, in memory and in its file."""

    def __init__(
        self,
        raw: Path,
        measure: Measure,
        *,
        again: bool = False,
        timeout_s: float = 3600.0,
        answer: Answer = answer_of,
    ) -> None:
        self.raw = raw
        self._answer = answer
        self.rows: dict[Case, Row] = {} if again else {row.case: row for row in read_rows(raw)}
        self._measure = measure
        self._timeout_s = timeout_s
        self._begin_s = time.monotonic()

    def measured(self, job: Job) -> Row:
        """The job's row, measured now if it is not there."""
        return self.rows.get(job.case) or self.fresh(job)

    def fresh(self, job: Job) -> Row:
        """The job's row, measured now; a line says when it began and what came of it."""
        minutes, seconds = divmod(int(time.monotonic() - self._begin_s), 60)
        print(f"[{minutes}:{seconds:02}] {job.case} …", end=" ", flush=True)
        row = self._answered(job)
        print(self._said(row), flush=True)
        return self.keep(row)

    def keep(self, row: Row) -> Row:
        """Add a row, with where and when it was measured."""
        row = Row(row.case, row.outcome, row.note, row.figures, row.environment or environment(CpuDevice()))
        self.rows[row.case] = row
        self.raw.parent.mkdir(parents=True, exist_ok=True)
        with self.raw.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        return row

    def _answered(self, job: Job) -> Row:
        try:
            return Row(job.case, **self._answer(self._measure, job, Path(job.scratch), self._timeout_s))
        except NoAnswerError as error:
            return Row(job.case, error.outcome, str(error))

    @staticmethod
    def _said(row: Row) -> str:
        phases = row.figures.get("phases", {})
        times = [f"{name} {median(phase['samples_s']):.3f} s" for name, phase in phases.items()]
        return " ".join([row.outcome, *times, row.note])


def read_rows(raw: Path) -> list[Row]:
    """The rows of a raw file in their order; none if it is not there."""
    if not raw.exists():
        return []
    lines = [json.loads(line) for line in raw.read_text(encoding="utf-8").splitlines()]
    return [Row(**{**line, "case": Case(**line["case"])}) for line in lines]


def raw_path(study: str, scale: str, folder: Path = RESULTS) -> Path:
    """The file of a study's raw rows; its table and picture are beside it."""
    return folder / f"disk_{study}_{scale}.jsonl"


def having(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with figures whose cases have these values."""
    return [row for row in rows if row.ok and all(getattr(row.case, name) == value for name, value in wanted.items())]


def median_of(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return median(there) if there else None
