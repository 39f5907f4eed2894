"""What the disk tier's studies have in common: how a run is asked for, the plans, and the floor of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from disk_measure import LAYERS, TUNE
from disk_results import Case, Job, Results, Row
from disk_systems import PLAIN, PLANNED
from peer_systems import TUNED

from autosp.report.units import rate
from autosp.schedule.streaming import build_ring
from autosp.spec import Candidate, Plan

PHASES = ("cold", "warm")
EQUAL = "equal"


@dataclass(frozen=True)
class Run:
    """What the command line asks for. `plans` are kept apart: all studies run the same ones."""

    scale: str
    scratch: Path
    tokens: tuple[int, ...]
    budgets: tuple[float, ...]
    repeats: int
    results: Results
    plans: Results

    def job(self, system: str, tokens: int, repeat: int = 0, **known: Any) -> Job:
        """A job; `known` are further fields of the case or of the job."""
        of_case = {name: known.pop(name) for name in ("budget_percent", "setting") if name in known}
        return Job(Case(self.scale, system, tokens, repeat, **of_case), str(self.scratch), **known)

    def plain(self, tokens: int, repeat: int) -> Row:
        """The model with all weights in RAM, in this repeat."""
        return self.results.measured(self.job(PLAIN, tokens, repeat))

    def tuned(self, tokens: int, percent: float) -> Row:
        """autosp's plan for a budget, searched once; the row is there too if nothing fits."""
        budget_bytes = round(self.layers(tokens).partition.total_bytes * percent / 100)
        job = self.job(TUNE, tokens, budget_percent=percent, budget_bytes=budget_bytes)
        return self.plans.measured(job)

    def layers(self, tokens: int) -> Plan:
        """A plan of one layer at a time.

        Raises: RuntimeError if the model's layers could not be observed.
        """
        row = self.plans.measured(self.job(LAYERS, tokens))
        if not row.ok:
            raise RuntimeError(f"the layers of {row.case} are not known: {row.note}")
        return Plan.model_validate_json(row.figures["plan"])

    def measured_plan(self, system: str, tokens: int, repeat: int, percent: float, name: str = TUNED) -> None:
        """Run the search's plan of that name for the budget; if there is none, its row has the reason."""
        tuned = self.tuned(tokens, percent)
        setting = "" if name == TUNED else name
        job = self.job(system, tokens, repeat, budget_percent=percent, setting=setting)
        text = tuned.figures.get("plans", {}).get(name)
        if text is None:
            if job.case not in self.results.rows:
                outcome = "no plan" if tuned.ok else tuned.outcome
                figures = {"budget_bytes": tuned.figures.get("budget_bytes")}
                self.results.keep(Row(job.case, outcome, tuned.note, figures))
            return
        plan = Plan.model_validate_json(text)
        numbers = figures_of(plan) | {
            "budget_bytes": tuned.figures["budget_bytes"],
            "least_read_bytes": least_read_bytes(plan, tuned.figures["workspace_bytes"]),
        }
        self.results.measured(replace(job, plan=text, numbers=numbers))

    def measured_by_hand(self, tokens: int, repeat: int, candidate: Candidate) -> None:
        """Run a setting that a user chose."""
        why = f"{candidate.label()} was set by the user"
        plan = self.layers(tokens).model_copy(update={"candidate": candidate, "why": why})
        job = self.job(PLANNED, tokens, repeat, setting=candidate.label())
        self.results.measured(replace(job, plan=plan.model_dump_json(), numbers=figures_of(plan)))


@dataclass(frozen=True)
class Floor:
    """The least time of a pass: all compute, as the model with its weights in RAM takes it, or all reads."""

    compute_s: float
    read_s: float

    @property
    def seconds(self) -> float:
        """The larger of both."""
        return max(self.compute_s, self.read_s)

    @property
    def binds(self) -> str:
        """Which of the two it is."""
        return "disk" if self.read_s > self.compute_s else "compute"


def floor_of(row: Row, plain: Row, read_bytes: int, phase: str) -> Floor | None:
    """For a row: the plain passes of its repeat, the disk as it was in its process. None where it was not measured."""
    rates = row.figures["disk_bytes_per_s"]
    if not rates:
        return None
    return Floor(median(plain.samples_s(phase)), read_bytes / median(rates))


def least_read_bytes(plan: Plan, workspace_bytes: int) -> int:
    """What no plan under the budget can keep: visited layers less all that the budget has room for, with no ring."""
    partition, budget_bytes = plan.partition, plan.budget_bytes or 0
    visited = sum(partition.layers[index].n_bytes for index in set(partition.visits))
    room = max(0, budget_bytes - workspace_bytes - partition.resident_bytes)
    return max(0, visited - room) * partition.repeats


def figures_of(plan: Plan) -> dict[str, int]:
    """What the plan reads in a steady pass, and the memory that it reserves for weights."""
    partition = plan.partition
    ring = build_ring(plan.candidate, [layer.n_bytes for layer in partition.layers], partition.visits)
    moved = sum(ring.groups[transfer.group].n_bytes for transfer in ring.transfers)
    residents = sum(partition.layers[index].n_bytes for index in plan.candidate.residents)
    return {
        "streamed_bytes": moved * partition.repeats,
        "planned_bytes": partition.resident_bytes + residents + ring.arena_bytes,
    }


def plain_of(rows: list[Row], row: Row) -> Row | None:
    """The plain model's row of the same repeat."""
    for other in rows:
        same = (other.case.tokens, other.case.repeat) == (row.case.tokens, row.case.repeat)
        if other.ok and other.case.system == PLAIN and same:
            return other
    return None


def output_of(pairs: Sequence[tuple[Row, Row | None]]) -> str:
    """Whether rows gave the bits of the same model without the system, in every pass.

    That is the mapped model after a plan was removed from it, where there is one, else the one in RAM. Kernels for a
    single row choose by a weight's alignment, so a model in RAM and the same one mapped may differ in their last bits.
    """
    if any(row.figures["digest"] is None for row, _ in pairs):
        return "varies from pass to pass"
    return EQUAL if all(row.figures["digest"] == _expected(row, plain) for row, plain in pairs) else "differs"


def _expected(row: Row, plain: Row | None) -> str | None:
    return row.figures.get("at_rest_digest") or (plain.figures["digest"] if plain is not None else None)


def gb(n_bytes: float | None) -> str:
    """GB with three digits behind the point."""
    return "" if n_bytes is None else f"{n_bytes / 1e9:.3f}"


def disk_of(rows: list[Row]) -> str:
    """The disk over all measurements of the table: its median rate, and how much it varied."""
    rates = [value for row in rows if row.ok for value in row.figures.get("disk_bytes_per_s", ())]
    if not rates:
        return "The disk's rate was not measured: its filesystem has no O_DIRECT."
    return f"Disk past the page cache, one reader: {rate(median(rates))} ({rate(min(rates))} – {rate(max(rates))})."
