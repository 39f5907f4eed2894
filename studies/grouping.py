"""Microbatches that share a pass, beside the same microbatches one after another under the same plan.

python studies/grouping.py training                  a training step over a paced link: m microbatches, one update
python studies/grouping.py training --paced 0.15     where transfers bind a step of sixteen microbatches, too
python studies/grouping.py inference                 m batches of one token each, weights from disk

m is 1, 2, 4, 8 and 16. Every measurement is a process of its own, of a minute or less at the default pace, of up to
three at 0.15 GB/s; the ways are interleaved. Rows are appended to results/grouping_<study>_<scale>.jsonl one by one,
and what is there already is not measured again, unless with --again: a command that was interrupted goes on. Rows of
another pace are other rows. The table and the picture are made beside the rows; --report makes them without measuring.
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
from grouping_measure import ALONE, GROUPED, SCALES, SEPARATE, Job, run_job
from kept_rows import Results, Study, add_arguments, having, write_report
from record import markdown

from autosp.devices import CpuDevice
from autosp.report.units import rate, ratio, seconds, size
from autosp.settings import settings

COUNTS = (1, 2, 4, 8, 16)
MOST_BYTES = 1.05
"""Weight bytes of a group over those of one microbatch."""
LEAST_GAIN = 5.0
"""Throughput at the largest m of a training step that transfers bound, over one microbatch after another."""


@dataclass(frozen=True)
class Case:
    """What is measured."""

    study: str
    scale: str
    way: str
    microbatches: int
    repeat: int
    paced_gb_per_s: float | None
    """Of the link of training; None: the disk's own, or nothing moves."""

    def __str__(self) -> str:
        pace = "" if self.paced_gb_per_s is None else f", {self.paced_gb_per_s:g} GB/s"
        return f"{self.study}{pace}, {self.way}, {self.microbatches} microbatches, repeat {self.repeat}"


@dataclass(frozen=True)
class Row(kept_rows.Row):
    """A row whose figures are those of steps."""

    case_type: ClassVar[type] = Case

    @property
    def step_s(self) -> float:
        """The median of its steps."""
        return median(self.figures["samples_s"])


@dataclass(frozen=True)
class Run:
    """What the command line asks for."""

    study: str
    scale: str
    scratch: Path
    repeats: int
    paced_gb_per_s: float | None
    results: Results[Row]


def run(asked: Run) -> None:
    """Each m with all weights in memory, and under the plan both ways."""
    cells = [(way, count) for count in COUNTS for way in (ALONE, GROUPED, SEPARATE)]
    for repeat in range(asked.repeats):
        for way, count in cells:
            paced_gb_per_s = None if way == ALONE else asked.paced_gb_per_s
            case = Case(asked.study, asked.scale, way, count, repeat, paced_gb_per_s)
            asked.results.measured(Job(case, str(asked.scratch)))


def _by_pace(rows: list[Row]) -> dict[float | None, list[Row]]:
    """Those that were measured both ways, of each pace, with those that need no link."""
    paces = dict.fromkeys(row.case.paced_gb_per_s for row in rows)
    found = {pace: [row for row in rows if row.case.paced_gb_per_s == pace or row.case.way == ALONE] for pace in paces}
    return {pace: mine for pace, mine in found.items() if having(mine, way=GROUPED, microbatches=1)}


def table(rows: list[Row]) -> str:
    """For each pace of the link: throughput, weight bytes and the floor by m; then whether the targets were met."""
    failed = [f"- {row.case}: {row.outcome}: {row.note}" for row in rows if not row.ok]
    parts = [_table_of(mine) for mine in _by_pace(rows).values()]
    return "\n\n".join([*parts, "\n".join(failed)] if failed else parts)


def _table_of(rows: list[Row]) -> str:
    first = having(rows, way=GROUPED, microbatches=1)[0].figures
    counts = [count for count in COUNTS if having(rows, way=GROUPED, microbatches=count)]
    columns = ["m", "grouped", "÷ floor", "binds", "in memory", "one after another", "gain", "weights moved", "÷ m = 1"]
    head = f"{first['title']}, {first['plan']}; link {rate(first['link_bytes_per_s'])}. The floor of a step is the "
    head += (
        "larger of compute (m microbatches one after another, all weights *in memory*, no plan) and of the link (the "
    )
    head += "bytes that the plan moves for one microbatch over its rate). *Result*: losses and gradients, or outputs, "
    head += "beside those of the unstreamed model, by their bits."
    lines = [_cells(rows, count) for count in counts]
    return "\n\n".join([head, markdown([*columns, "misses", "result"], lines), _targets(rows, counts)])


def _cells(rows: list[Row], count: int) -> list[str]:
    grouped, separate = _step_s(rows, GROUPED, count), _step_s(rows, SEPARATE, count)
    mine = having(rows, way=GROUPED, microbatches=count)
    moved_bytes = mine[0].figures["moved_bytes"]
    return [
        str(count),
        seconds(grouped),
        ratio(grouped, max(_floors(rows, count).values())),
        _binding(rows, count),
        seconds(_step_s(rows, ALONE, count)),
        seconds(separate),
        ratio(separate, grouped),
        size(moved_bytes),
        ratio(moved_bytes, _moved_bytes(rows)),
        str(max(row.figures["misses"] for row in mine)),
        "equal" if all(row.figures["equal"] for row in mine) else "differs",
    ]


def _floors(rows: list[Row], count: int) -> dict[str, float]:
    """What each resource needs at least for a step, in seconds."""
    figures = having(rows, way=GROUPED, microbatches=count)[0].figures
    compute_s = _step_s(rows, ALONE, count) or 0.0
    return {"compute": compute_s, "link": figures["least_bytes"] / figures["link_bytes_per_s"]}


def _binding(rows: list[Row], count: int) -> str:
    floors_s = _floors(rows, count)
    return max(floors_s, key=floors_s.__getitem__)


def _targets(rows: list[Row], counts: list[int]) -> str:
    moved = [row.figures["moved_bytes"] / _moved_bytes(rows) for row in having(rows, way=GROUPED)]
    gain = (_step_s(rows, SEPARATE, counts[-1]) or 0.0) / (_step_s(rows, GROUPED, counts[-1]) or float("inf"))
    fewest = "met" if max(moved) <= MOST_BYTES else "missed"
    binding = _binding(rows, counts[-1])
    met = "met" if gain >= LEAST_GAIN else "missed"
    said = f"Weight bytes of a group: at most {max(moved):.2f} times those of one (target {MOST_BYTES}: {fewest}). "
    said += f"Gain at m = {counts[-1]}: {gain:.1f} (target {LEAST_GAIN:g} at m = 16 where transfers bind the step: "
    return said + (f"{met})." if binding == "link" else f"{binding} binds this one).")


def _moved_bytes(rows: list[Row]) -> int:
    return int(having(rows, way=GROUPED, microbatches=1)[0].figures["moved_bytes"])


def _step_s(rows: list[Row], way: str, count: int) -> float | None:
    found = [row.step_s for row in having(rows, way=way, microbatches=count)]
    return median(found) if found else None


def picture(rows: list[Row], path: Path) -> None:
    """Microbatches a second over m, both ways, with the floor."""
    from panels import figure, finish

    canvas, (panel,) = figure(1, width=6.0)
    paces = _by_pace(rows)
    for number, (pace, mine) in enumerate(paces.items()):
        of_pace = f", {pace:g} GB/s" if len(paces) > 1 else ""
        for way, line in ((GROUPED, "-"), (SEPARATE, ":")):
            found = [(count, step_s) for count in COUNTS if (step_s := _step_s(mine, way, count))]
            points = [m for m, _ in found], [m / step_s for m, step_s in found]
            panel.plot(*points, color=f"C{number}", ls=line, marker="o", label=way + of_pace)
    alone = [(count, count / step_s) for count in COUNTS if (step_s := _step_s(rows, ALONE, count))]
    if alone:
        panel.plot(*zip(*alone, strict=True), color="grey", ls="--", marker=".", label=ALONE)
    panel.set_xscale("log", base=2)
    panel.set_xticks(COUNTS)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xlabel("microbatches of a step")
    panel.set_ylabel("microbatches a second")
    panel.set_ylim(bottom=0)
    finish(canvas, path)


STUDIES = {
    "training": Study("A training step of several microbatches that share a pass", run, table, picture),
    "inference": Study("Several batches that share a pass, weights from disk", run, table, picture),
}


def main(arguments: list[str] | None = None, answer: Callable[..., Any] | None = None) -> None:
    """Measure what is missing, then write the table and the picture. `answer` runs a measurement otherwise."""
    asked = _parser().parse_args(arguments)
    raw = asked.output / f"grouping_{asked.study}_{asked.scale}.jsonl"
    if not asked.report:
        scratch = asked.scratch or settings().cache_dir
        scratch.mkdir(parents=True, exist_ok=True)
        paced = asked.paced if asked.study == "training" else None
        made = partial(Results, answer=answer) if answer else Results
        results = made(raw, Row, CpuDevice(), run_job, again=asked.again, timeout_s=asked.timeout_s)
        run(Run(asked.study, asked.scale, scratch.resolve(), asked.repeats, paced, results))
    write_report(STUDIES[asked.study], raw, Row)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--paced", type=float, default=0.5, help="GB/s of the link of training; default: 0.5")
    parser.add_argument("--repeats", type=int, default=2)
    add_arguments(parser)
    parser.set_defaults(timeout_s=300.0)
    return parser


if __name__ == "__main__":
    main()
