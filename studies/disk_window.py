"""Memory reduction against delay over window sizes: Demand Layering's headline (arXiv 2210.04024) as our own table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from disk_models import SCALES
from disk_results import Row
from disk_study import EQUAL, PHASES, Floor, Run, disk_of, floor_of, gb, output_of, plain_of
from disk_systems import PLANNED
from kept_rows import Study, having
from matplotlib.ticker import LogLocator, NullLocator
from peer_systems import PLAIN, TUNED
from record import markdown

from autosp.report.units import seconds
from autosp.spec import Candidate

THEIRS = ((0.965, 0.148), (0.884, 0.01))
"""Demand Layering: reduction, delay. Of the second row the paper says that there is about none: 1 % here."""

PREFACE = (
    "Memory: the kernel's peak beyond the process with the model mapped, less the activations, which are what the "
    "pass with all weights in RAM took beyond the weights; reserved: what the plan reserves for weights. Reduction: "
    "against all weights in RAM. Delay: against the pass with all weights in RAM of the same repeat. ÷ floor: by "
    "the larger of that pass and of what the plan reads over the disk's rate in the same process. Without residents "
    "a window reads every layer in every pass; `searched` are autosp's answers for budgets, with residents where "
    "there is room. Demand Layering (arXiv 2210.04024) reports 96.5 % less memory at 14.8 % delay, and 88.4 % at "
    "about none."
)


SEARCHED = "autosp, searched for a budget"
ONE_BY_ONE = "window of so many layers, one per transfer"
BY_HALVES = "window of so many layers, half of them per transfer"

SERIES: dict[str, dict[str, Any]] = {
    ONE_BY_ONE: {"marker": "o", "color": "C0"},
    BY_HALVES: {"marker": "^", "color": "C2"},
    SEARCHED: {"marker": "s", "color": "C1"},
}

BESIDE: dict[str, dict[str, Any]] = {
    ONE_BY_ONE: {"xytext": (4, 3), "ha": "left"},
    BY_HALVES: {"xytext": (-4, -9), "ha": "right"},
    SEARCHED: {"xytext": (4, -9), "ha": "left"},
}
"""Where a series' labels are, so that those of points in one place are not."""


class Point(NamedTuple):
    """One plan with one state of the page cache, over all repeats."""

    tokens: int
    setting: str
    candidate: Candidate
    searched: bool
    phase: str
    time_s: float
    memory_bytes: int
    reserved_bytes: int
    reduction: float
    delay: float
    floor: Floor | None
    output: str

    def beats(self, theirs: tuple[float, float]) -> bool:
        """Whether it takes no more memory and no more time than theirs, in shares of all weights in RAM."""
        return self.reduction >= theirs[0] and self.delay <= theirs[1]


def run(asked: Run) -> None:
    """Per repeat and length: all in RAM, the plans of the search, then windows set by hand."""
    sizes = SCALES[asked.scale].windows
    for repeat in range(asked.repeats):
        for tokens in asked.tokens:
            asked.plain(tokens, repeat)
            for percent in asked.budgets:
                asked.measured_plan(TUNED, tokens, repeat, percent)
            count = len(set(asked.layers(tokens).partition.visits))
            for candidate in windows(sizes, count):
                asked.measured_by_hand(tokens, repeat, candidate)


def windows(sizes: Sequence[int], count: int) -> Iterator[Candidate]:
    """Windows of a model of `count` layers without residents: one layer per transfer, and half the window."""
    for k in sizes:
        if k <= count:
            for k_prime in dict.fromkeys((1, k // 2)):
                yield Candidate(k=k, k_prime=k_prime)


def points(rows: list[Row]) -> Iterator[Point]:
    """Length by length, in the order measured, cold then warm. Figures are medians over repeats, memory the most."""
    cases = dict.fromkeys(
        (row.case.tokens, row.case.system, row.case.setting, row.case.budget_percent)
        for row in [*having(rows, system=PLANNED), *having(rows, system=TUNED)]
    )
    for tokens, system, setting, percent in sorted(cases, key=lambda case: case[0]):
        mine = having(rows, tokens=tokens, system=system, setting=setting, budget_percent=percent)
        pairs = [(row, plain) for row in mine if (plain := plain_of(rows, row)) is not None]
        if pairs:
            for phase in PHASES:
                yield _point(pairs, phase)


def _point(pairs: list[tuple[Row, Row]], phase: str) -> Point:
    row = pairs[-1][0]
    times = [median(row.samples_s(phase)) for row, _ in pairs]
    plains = [median(plain.samples_s(phase)) for _, plain in pairs]
    weights = row.figures["weight_bytes"]
    memory = max(row.phase(phase)["peak_bytes"] - activation_bytes(plain) for row, plain in pairs)
    found = [floor_of(row, plain, row.figures["streamed_bytes"], phase) for row, plain in pairs]
    floors = [floor for floor in found if floor is not None]
    percent = row.case.budget_percent
    budget = "" if percent is None else f", searched for {percent:g} %"
    return Point(
        tokens=row.case.tokens,
        setting=row.figures["setting"] + budget,
        candidate=Candidate(**row.figures["candidate"]),
        searched=percent is not None,
        phase=phase,
        time_s=median(times),
        memory_bytes=max(0, memory),
        reserved_bytes=row.figures["planned_bytes"],
        reduction=1 - max(0, memory) / weights,
        delay=median(mine / plain for mine, plain in zip(times, plains, strict=True)) - 1,
        floor=Floor(median(f.compute_s for f in floors), median(f.read_s for f in floors)) if floors else None,
        output=output_of(pairs),
    )


def activation_bytes(plain: Row) -> int:
    """What a pass takes beyond its weights."""
    return max(0, plain.phase("ram")["peak_bytes"] - plain.figures["weight_bytes"])


def table(rows: list[Row]) -> str:
    """A table per length, which of the two limits it, and whether both of their rows are beaten."""
    found = list(points(rows))
    parts = [PREFACE, disk_of(rows)]
    for tokens in dict.fromkeys(point.tokens for point in found):
        mine = [point for point in found if point.tokens == tokens]
        columns = ["setting", "cache", "pass", "delay", "memory GB", "reserved GB", "reduction", "÷ floor", "output"]
        parts += [_heading(rows, mine), markdown(columns, [*map(_cells, mine), *_cells_of_theirs()])]
    failed = [f"- {row.case}: {row.outcome}: {row.note}" for row in rows if not row.ok and row.case.repeat == 0]
    return "\n\n".join([*parts, "\n".join(failed)] if failed else parts)


def _heading(rows: list[Row], mine: list[Point]) -> str:
    tokens = mine[0].tokens
    plain = having(rows, system=PLAIN, tokens=tokens)
    plain_s = median(sample for row in plain for sample in row.samples_s("ram"))
    activations = max(activation_bytes(row) for row in plain)
    said = f"## 1×{tokens} tokens\n\nAll weights in RAM: {seconds(plain_s)} and {gb(activations)} GB of activations."
    floors = [point.floor for point in mine if point.floor is not None and not point.searched]
    if floors:
        read_s = max(floor.read_s for floor in floors)
        said += f" Reading every layer takes {seconds(read_s)}: "
        said += (
            "less than compute, so both of their rows are to be beaten."
            if read_s < plain_s
            else ("more than compute, so ÷ floor is what a window can be judged by.")
        )
    for phase in PHASES:
        for theirs in THEIRS:
            best = [point for point in mine if point.phase == phase and point.beats(theirs) and point.output == EQUAL]
            who = f"beaten by {min(best, key=lambda point: point.delay).setting}" if best else "not beaten"
            said += f"\n- page cache {phase}, {theirs[0]:.1%} less memory at {theirs[1]:.1%} delay: {who}"
    return said


def _cells(point: Point) -> list[str]:
    return [
        point.setting,
        point.phase,
        seconds(point.time_s),
        f"{point.delay:+.1%}",
        gb(point.memory_bytes),
        gb(point.reserved_bytes),
        f"{point.reduction:.1%}",
        "" if point.floor is None else f"{point.time_s / point.floor.seconds:.2f}",
        point.output,
    ]


def _cells_of_theirs() -> list[list[str]]:
    """Demand Layering's two rows, as their paper has them."""
    delays = (f"{THEIRS[0][1]:+.1%}", "about none")
    return [
        ["Demand Layering's paper", "", "", delay, "", "", f"{reduction:.1%}", "", ""]
        for (reduction, _), delay in zip(THEIRS, delays, strict=True)
    ]


def picture(rows: list[Row], path: Path) -> None:
    """Delay over memory with a cold page cache, a panel per length; Demand Layering's two rows in each."""
    from panels import figure, finish

    found = [point for point in points(rows) if point.phase == "cold"]
    lengths = list(dict.fromkeys(point.tokens for point in found))
    canvas, panels = figure(len(lengths), width=5.0)
    for panel, tokens in zip(panels, lengths, strict=True):
        for name, style in SERIES.items():
            mine = [point for point in found if point.tokens == tokens and _series(point) == name]
            shares, delays = [100 * (1 - p.reduction) for p in mine], [100 * p.delay for p in mine]
            if mine:
                panel.plot(shares, delays, ms=5, ls="", label=name, **style)
            for point, x, y in zip(mine, shares, delays, strict=True):
                text = point.setting.split("searched for ")[-1] if point.searched else f"{point.candidate.k}"
                near: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "color": style["color"]}
                panel.annotate(text, (x, y), **near, **BESIDE[name])
        theirs: dict[str, Any] = {"marker": "*", "ls": "", "ms": 10, "color": "C3", "label": "Demand Layering's paper"}
        panel.plot([100 * (1 - reduction) for reduction, _ in THEIRS], [14.8, 0.0], **theirs)
        panel.axhline(0, color="grey", lw=0.8)
        panel.set_xscale("log")
        panel.margins(x=0.12)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_title(f"1×{tokens} tokens", fontsize=10)
        panel.set_xlabel("memory of the weights, % of all of them")
    panels[0].set_ylabel("delay, % of the pass with all weights in RAM")
    finish(canvas, path, columns=2)


def _series(point: Point) -> str:
    if point.searched:
        return SEARCHED
    return ONE_BY_ONE if point.candidate.k_prime == 1 else BY_HALVES


WINDOWS = Study("Memory reduction against delay over window sizes", run, table, picture)
