"""How near the floor autosp comes: budgets of a few shares of the weights, page cache cold and warm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from disk_results import Row, median_of
from disk_study import PHASES, Floor, Run, disk_of, floor_of, gb, output_of, plain_of
from kept_rows import Study, having
from peer_systems import PLAIN, TUNED
from record import markdown

from autosp.report.units import rate, seconds

WANTED = 1.10
"""Time ÷ floor."""

PREFACE = (
    "T: median of the steady passes of all repeats. Floor: the larger of *compute* (the pass with all weights in "
    "RAM, in this run) and *disk* (the bytes that the budget has no room for, if all of it but the activations held "
    "weights, over the disk's rate in the same process). Peak: the kernel's, beyond the process with the model "
    "mapped, page cache excluded; mapped: pages of weight files that the process looks at; cached: what of the "
    "files was in the page cache before the passes and after them. Cold: the files were dropped from the page cache "
    "before the passes, which follow one another without a pause: the next pass's first reads get no time for "
    "nothing."
)


class Point(NamedTuple):
    """One budget with one state of the page cache, over all repeats."""

    tokens: int
    percent: float
    phase: str
    time_s: float
    floor: Floor | None
    rows: list[Row]

    @property
    def over_floor(self) -> float | None:
        """The median pass over the floor of the median repeat; None where the disk was not measured."""
        return None if self.floor is None else self.time_s / self.floor.seconds

    @property
    def peak_bytes(self) -> int:
        """Of the repeat that took the most."""
        return max(row.phase(self.phase)["peak_bytes"] for row in self.rows)

    @property
    def within(self) -> bool:
        """Whether every repeat kept the budget."""
        return self.peak_bytes <= self.rows[0].figures["budget_bytes"]


def run(asked: Run) -> None:
    """Per repeat and length: all in RAM, then budget by budget."""
    for repeat in range(asked.repeats):
        for tokens in asked.tokens:
            asked.plain(tokens, repeat)
            for percent in asked.budgets:
                asked.measured_plan(TUNED, tokens, repeat, percent)


def points(rows: list[Row]) -> Iterator[Point]:
    """Length by length, budget by budget, cold then warm."""
    tuned = having(rows, system=TUNED)
    for tokens, percent in dict.fromkeys((row.case.tokens, row.case.budget_percent) for row in tuned):
        mine = having(tuned, tokens=tokens, budget_percent=percent)
        for phase in PHASES:
            pairs = [(row, plain_of(rows, row)) for row in mine]
            floors = [
                floor
                for row, plain in pairs
                if plain and (floor := floor_of(row, plain, row.figures["least_read_bytes"], phase))
            ]
            floor = Floor(median(f.compute_s for f in floors), median(f.read_s for f in floors)) if floors else None
            time_s = median(sample for row in mine for sample in row.samples_s(phase))
            yield Point(tokens, percent or 0.0, phase, time_s, floor, mine)


def table(rows: list[Row]) -> str:
    """All points, the budgets that were too small, and whether the target is met."""
    found = list(points(rows))
    columns = ["tokens", "budget", "setting", "cache", "T", "spread", "floor", "binds", "T ÷ floor", "disk"]
    columns += ["read a pass", "peak GB", "mapped", "cached", "÷ budget", "output"]
    lines = [_cells(rows, point) for point in found] + list(_failures(rows))
    judged = [point for point in found if point.over_floor is not None]
    met = [point for point in judged if (point.over_floor or 0) <= WANTED]
    kept = [point for point in found if point.within]
    said = f"T ÷ floor is at most {WANTED:.2f} in {len(met)} of {len(judged)} points; "
    said += f"the budget was kept in {len(kept)} of {len(found)}."
    return "\n\n".join([PREFACE, disk_of(rows), _plain_line(rows), said, markdown(columns, lines)])


def _plain_line(rows: list[Row]) -> str:
    parts = []
    for tokens in dict.fromkeys(row.case.tokens for row in having(rows, system=PLAIN)):
        mine = having(rows, system=PLAIN, tokens=tokens)
        time_s = median(sample for row in mine for sample in row.samples_s("ram"))
        peak = max(row.phase("ram")["peak_bytes"] for row in mine)
        parts.append(f"1×{tokens} tokens {seconds(time_s)}, {gb(peak)} GB")
    return "All weights in RAM: " + "; ".join(parts) + "."


def _cells(rows: list[Row], point: Point) -> list[str]:
    last = point.rows[-1]
    samples = [sample for row in point.rows for sample in row.samples_s(point.phase)]
    phases: list[dict[str, Any]] = [row.phase(point.phase) for row in point.rows]
    budget_bytes = last.figures["budget_bytes"]
    ratio = f"{point.peak_bytes / budget_bytes:.2f}"
    over = point.over_floor
    return [
        f"1×{point.tokens}",
        f"{point.percent:g} %, {gb(budget_bytes)} GB",
        last.figures["setting"],
        point.phase,
        seconds(point.time_s),
        f"{seconds(min(samples))} – {seconds(max(samples))}",
        "" if point.floor is None else seconds(point.floor.seconds),
        "" if point.floor is None else point.floor.binds,
        "" if over is None else f"**{over:.2f}**" if over <= WANTED else f"{over:.2f}",
        rate(median_of(value for row in point.rows for value in row.figures["disk_bytes_per_s"])),
        gb(median_of(phase["read_bytes"] for phase in phases)),
        gb(point.peak_bytes),
        gb(max(phase["mapped_bytes"] for phase in phases)),
        " → ".join(gb(max(phase[name] for phase in phases)) for name in ("cached_before_bytes", "cached_bytes")),
        ratio if point.within else f"{ratio}, over",
        output_of([(row, plain_of(rows, row)) for row in point.rows]),
    ]


def _failures(rows: list[Row]) -> Iterator[list[str]]:
    """Budgets that gave no figures, once each, with what was said."""
    said = {(row.case.tokens, row.case.budget_percent): row for row in rows if row.case.system == TUNED and not row.ok}
    for (tokens, percent), row in said.items():
        at = f"{percent:g} %, {gb(row.figures.get('budget_bytes'))} GB"
        yield [f"1×{tokens}", at, f"{row.outcome}: {row.note}".replace("|", "/"), *[""] * 13]


def picture(rows: list[Row], path: Path) -> None:
    """Time ÷ floor over the budget: a line per length, dashed where the page cache was warm."""
    from panels import HOLLOW, figure, finish

    canvas, (panel,) = figure(1, width=7.0)
    found = [point for point in points(rows) if point.over_floor is not None]
    for index, tokens in enumerate(dict.fromkeys(point.tokens for point in found)):
        for phase in PHASES:
            mine = sorted((p for p in found if (p.tokens, p.phase) == (tokens, phase)), key=lambda p: p.percent)
            style: dict[str, Any] = {"color": f"C{index}", "ls": "-" if phase == "cold" else "--"}
            percents, ratios = [p.percent for p in mine], [p.over_floor for p in mine]
            panel.plot(percents, ratios, **style, label=f"1×{tokens}, page cache {phase}")
            for point in mine:
                fill = f"C{index}" if point.within else "white"
                shape = "o" if phase == "cold" else "s"
                panel.plot([point.percent], [point.over_floor], marker=shape, color=f"C{index}", mfc=fill, ls="")
    panel.axhline(1, color="grey", lw=0.8)
    panel.axhline(WANTED, color="grey", lw=1.2, ls=":", label=f"wanted: at most {WANTED:.2f}")
    panel.set_xticks(sorted({point.percent for point in found}))
    panel.set_xlabel("budget, % of the weights")
    panel.set_ylabel("time ÷ floor")
    finish(canvas, path, extra=[HOLLOW])


FLOORS = Study("T ÷ floor of a model read from disk", run, table, picture)
