"""Cases, jobs and rows of the tuner's studies, and the kinds of device that they are run on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import kept_rows
import numpy as np
from record import RESULTS

from autosp.devices import CpuDevice, Device, choose_device
from autosp.errors import BudgetTooSmallError, SettingError
from autosp.spec import Tier

PACED_BYTES_PER_S = 0.5e9

TOO_SMALL = "too small"
"""The outcome where nothing fits the budget: an answer, and no failure."""


def _accelerator() -> Device:
    device = choose_device(None)
    if device.info.kind == "cpu":
        raise SettingError("--device accelerator: torch sees none here; pass disk or paced")
    return device


DEVICES: dict[str, Callable[[], Device]] = {
    "disk": CpuDevice,
    "paced": lambda: CpuDevice(slow_tier=Tier.HOST, paced_bytes_per_s=PACED_BYTES_PER_S),
    "accelerator": _accelerator,
}
"""Disk to RAM; RAM to RAM at the pace of a link; host to accelerator."""


@dataclass(frozen=True)
class Case:
    """What is measured."""

    scale: str
    model: str
    budget_percent: float | None = None
    """Of the weights."""
    setting: str = ""
    """What else there is to name: a sampler."""
    number: int = 0
    """Of a random draw."""

    def __str__(self) -> str:
        budget = "" if self.budget_percent is None else f"{self.budget_percent:g} %"
        return ", ".join(part for part in (self.model, budget, self.setting, f"{self.number or ''}") if part)


@dataclass(frozen=True)
class Job:
    """A case with what its process needs."""

    case: Case
    device: str
    """A key of `DEVICES`."""
    scratch: str
    """A folder on a real disk, for every file of a run."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """What is asked of the process."""


@dataclass(frozen=True)
class Row(kept_rows.Row):
    """A row of one of the tuner's studies."""

    case_type: ClassVar[type] = Case


@dataclass(frozen=True)
class Run:
    """What the command line asks of a study."""

    device: str
    scale: str
    scratch: Path
    models: tuple[str, ...]
    results: kept_rows.Results[Row]
    sources: list[Row]
    """Rows of the accuracy study, which the samplers search."""
    budgets: tuple[float, ...] = (25.0, 50.0, 75.0)
    numbers: dict[str, int] = field(default_factory=dict)
    """How many candidates, rounds, draws …"""

    def measured(self, model: str, budget_percent: float | None = None, **known: Any) -> Row:
        """The row of a case, measured if it is not there; `known` are further fields of the case or of the job."""
        of_case = {name: known.pop(name) for name in ("setting", "number") if name in known}
        case = Case(self.scale, model, budget_percent, **of_case)
        return self.results.measured(Job(case, self.device, str(self.scratch), **known))


def too_small(error: BudgetTooSmallError) -> dict[str, Any]:
    """The answer of a job under whose budget nothing fits."""
    return {"outcome": TOO_SMALL, "note": f"the least that works is {error.least_bytes / 1e9:.4g} GB"}


def raw_path(study: str, kind: str, folder: Path = RESULTS) -> Path:
    """The file of a study's raw rows; its table and picture are beside it."""
    return folder / f"tuner_{study}_{kind}.jsonl"


def percentile(values: Iterable[float], percent: float) -> float:
    """Of at least one value."""
    return float(np.percentile(list(values), percent))


def verdict(met: bool) -> str:
    """A target's last column."""
    return "met" if met else "**missed**"


def failed_lines(rows: Sequence[Row], columns: int) -> list[list[str]]:
    """A table's lines for rows without figures, with what was said."""
    said = [(row, f"{row.outcome}: {row.note}".replace("|", "/")) for row in rows if not row.ok]
    return [[str(row.case), text, *[""] * (columns - 2)] for row, text in said]
