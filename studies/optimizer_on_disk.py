"""Training whose optimizer's state is in memory, half on disk, or all but a window on disk.

python studies/optimizer_on_disk.py

Steps of Adam with clipping over a stack of linear layers, whose updates run beside the next forward. The update's floor
is the larger of the update alone, with all of the state in memory, and of the bytes that it reads and writes over what
the disk gave just before, with O_DIRECT. Every measurement is a process of its own. Rows are appended to
results/optimizer_on_disk_<scale>.jsonl one by one, and what is there already is not measured again, unless with
--again. The table and the picture are made beside the rows; --report makes them without measuring.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import kept_rows
from kept_rows import Results, Study, add_arguments, having, write_report
from optimizer_on_disk_measure import SCALES, WAYS, Job, run_job
from record import markdown

from autosp.devices import CpuDevice
from autosp.report.units import rate, ratio, seconds, size
from autosp.settings import settings
from autosp.spec import Tier


@dataclass(frozen=True)
class Case:
    """What is measured."""

    scale: str
    way: str
    batch: int
    """Its rows."""
    repeat: int

    def __str__(self) -> str:
        return f"{self.way}, batches of {self.batch}, repeat {self.repeat}"


@dataclass(frozen=True)
class Row(kept_rows.Row):
    """A row whose figures are those of steps."""

    case_type: ClassVar[type] = Case


@dataclass(frozen=True)
class Run:
    """What the command line asks for."""

    scale: str
    scratch: Path
    repeats: int
    results: Results[Row]


def run(asked: Run) -> None:
    """Every way, before the next repeat begins."""
    for repeat in range(asked.repeats):
        for batch in SCALES[asked.scale].batches:
            for way in WAYS:
                asked.results.measured(Job(Case(asked.scale, way, batch, repeat), str(asked.scratch)))


def table(rows: list[Row]) -> str:
    """A line for each way: a step, its update alone over its floor, and the memory."""
    first = next(row for row in rows if row.ok).figures
    lines = [
        _cells(rows, way, batch)
        for batch in dict.fromkeys(row.case.batch for row in rows)
        for way in WAYS
        if having(rows, way=way, batch=batch)
    ]
    head = (
        f"{first['title']}, {size(first['weight_bytes'])} of weights, as much of gradients, and "
        f"{size(first['state_bytes'])} of state. *Update*: the same with nothing beside it, until all state rests. "
        "*Memory*: the most that the process had, without pages of files, beyond what it had before the model. "
        "*Result*: weights and state beside those of plain training, by their bits."
    )
    columns = ["state", "batch", "step", "÷ in memory", "update", "÷ floor", "disk", "moved", "memory", "result"]
    failed = [f"- {row.case}: {row.outcome}: {row.note}" for row in rows if not row.ok]
    return "\n\n".join([head, markdown(columns, lines), *(["\n".join(failed)] if failed else [])])


def _cells(rows: list[Row], way: str, batch: int) -> list[str]:
    figures = [row.figures for row in having(rows, way=way, batch=batch)]
    in_memory = having(rows, way=WAYS[0], batch=batch)
    step_s, update_s = _median(figures, "step_s"), _median(figures, "update_s")
    known = [row.figures for row in in_memory]
    floors_s = [floor_of(one, _median(known, "update_s")) for one in figures] if known else [0.0]
    moved_bytes = figures[0]["read_bytes"] + figures[0]["written_bytes"]
    same = all(one["equal"] for one in figures)
    return [
        way,
        str(batch),
        seconds(step_s),
        ratio(step_s, _median(known, "step_s") if known else None),
        seconds(update_s),
        ratio(update_s, median(floors_s)),
        rate(moved_bytes / _disk_s(figures[0])) if moved_bytes else "",
        size(moved_bytes) if moved_bytes else "",
        size(max(one["peak_bytes"] for one in figures)),
        "equal" if same else "DIFFERS",
    ]


def floor_of(figures: dict[str, Any], in_memory_s: float) -> float:
    """Seconds that an update takes at least."""
    return max(in_memory_s, _disk_s(figures))


def _disk_s(figures: dict[str, Any]) -> float:
    """Of what an update reads and writes: one after the other, or both at once, whichever is less."""
    read_bytes, written_bytes = figures["read_bytes"], figures["written_bytes"]
    apart_s = read_bytes / figures["read_bytes_per_s"] + written_bytes / figures["write_bytes_per_s"]
    return min(apart_s, float((read_bytes + written_bytes) / figures["both_bytes_per_s"]))


def _median(figures: list[dict[str, Any]], name: str) -> float:
    return median(sample for one in figures for sample in one[name])


def picture(rows: list[Row], path: Path) -> None:
    """Seconds of a step over the memory that it takes."""
    from panels import figure, finish

    canvas, (panel,) = figure(1, width=6.0)
    for number, batch in enumerate(dict.fromkeys(row.case.batch for row in rows)):
        found = [[row.figures for row in having(rows, way=way, batch=batch)] for way in WAYS]
        peaks = [max(one["peak_bytes"] for one in figures) / 1e9 for figures in found if figures]
        steps_s = [_median(figures, "step_s") for figures in found if figures]
        panel.plot(peaks, steps_s, color=f"C{number}", marker="o", label=f"batches of {batch}")
    panel.set_xlabel("memory, GB")
    panel.set_ylabel("seconds a step")
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    finish(canvas, path)


STUDY = Study("Training with the optimizer's state on disk", run, table, picture)


def main(arguments: list[str] | None = None, answer: Callable[..., Any] | None = None) -> None:
    """Measure what is missing, then write the table and the picture. `answer` runs a measurement otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    add_arguments(parser)
    asked = parser.parse_args(arguments)
    raw = asked.output / f"optimizer_on_disk_{asked.scale}.jsonl"
    if not asked.report:
        scratch = asked.scratch or settings().cache_dir
        scratch.mkdir(parents=True, exist_ok=True)
        device = CpuDevice(slow_tier=Tier.HOST)
        made = partial(Results, answer=answer) if answer else Results
        results = made(raw, Row, device, run_job, again=asked.again, timeout_s=asked.timeout_s)
        run(Run(asked.scale, scratch.resolve(), asked.repeats, results))
    write_report(STUDY, raw, Row)


if __name__ == "__main__":
    main()
