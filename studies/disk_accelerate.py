"""Beside accelerate: `disk_offload` with its own files, and the same hooks on the safetensors checkpoint itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from disk_models import SCALES
from disk_results import Row
from disk_study import PHASES, Run, disk_of, floor_of, gb, output_of, plain_of
from disk_systems import DAT, DISK_SYSTEMS, PLANNED, SAFETENSORS
from kept_rows import Study, having
from peer_systems import PLAIN, TUNED, WINDOW
from record import markdown

from autosp.report.units import seconds
from autosp.search.space import evenly_spread
from autosp.spec import Candidate, Plan

HALF_PERCENT = 50.0
RING_OF_HALF = Candidate(k=4, k_prime=2)
"""The ring beside half the layers."""

PREFACE = (
    "Steady passes (median; least and most), each system in a process of its own, repeats interleaved. `cold`: the "
    "files that the system reads are dropped from the page cache before each pass of accelerate's, and before the "
    "first of autosp's, which pass it by and follow one another without a pause; `warm`: they are all in it, which "
    "takes as much RAM again as the weights. Peak: the kernel's, beyond the process with the model mapped; weights "
    "that accelerate maps for the moment of their use are in it. ÷ floor: by the larger of the pass with all "
    "weights in RAM and of what the plan reads over the disk's rate in the same process."
)


class Target(NamedTuple):
    """What is wanted: a speed ratio at one of the scale's lengths (by position)."""

    length: int
    mine: str
    theirs: str
    wanted: float


NO_RESIDENTS = "no residents"
HALF = "half resident"
SEARCHED = "searched"

TARGETS = (
    Target(1, SEARCHED, DAT, 3.3),
    Target(1, SEARCHED, SAFETENSORS, 2.6),
    Target(0, NO_RESIDENTS, DAT, 2.0),
    Target(0, HALF, DAT, 3.8),
    Target(2, SEARCHED, DAT, 1.8),
)


def run(asked: Run) -> None:
    """Per repeat and length: all in RAM, accelerate twice, then autosp's plans."""
    narrow = SCALES[asked.scale].narrow_percent
    for repeat in range(asked.repeats):
        for tokens in asked.tokens:
            asked.plain(tokens, repeat)
            for system in (DAT, SAFETENSORS):
                asked.results.measured(asked.job(system, tokens, repeat))
            asked.measured_plan(TUNED, tokens, repeat, narrow)
            asked.measured_plan(PLANNED, tokens, repeat, narrow, WINDOW)
            asked.measured_by_hand(tokens, repeat, half_resident(asked.layers(tokens)))
            asked.measured_plan(TUNED, tokens, repeat, HALF_PERCENT)


def half_resident(plan: Plan) -> Candidate:
    """Every other layer stays; the others share a small ring."""
    visited = list(dict.fromkeys(plan.partition.visits))
    residents = tuple(sorted(evenly_spread(visited, len(visited) // 2)))
    ring = RING_OF_HALF.k
    return Candidate(k=len(residents) + ring, k_prime=RING_OF_HALF.k_prime, residents=residents)


def role_of(row: Row) -> str:
    """What a row stands for in the targets."""
    if row.case.system == PLANNED:
        return NO_RESIDENTS if row.case.setting == WINDOW else HALF
    if row.case.system == TUNED:
        narrow = row.case.budget_percent == SCALES[row.case.scale].narrow_percent
        return SEARCHED if narrow else f"{SEARCHED} at {row.case.budget_percent:g} %"
    return row.case.system


def table(rows: list[Row]) -> str:
    """The targets beside what was measured, then a table per length."""
    parts = [PREFACE, disk_of(rows), "## Targets\n\n" + _targets(rows)]
    for tokens in sorted({row.case.tokens for row in rows}):
        parts.append(f"## 1×{tokens} tokens\n\n{_table(rows, tokens)}")
    return "\n\n".join(parts)


def _targets(rows: list[Row]) -> str:
    lines = []
    for target in TARGETS:
        tokens = SCALES[rows[0].case.scale].tokens[target.length]
        name = f"1×{tokens}, {target.mine}, over {DISK_SYSTEMS[target.theirs].title}"
        for phase in PHASES:
            mine = _of_role(rows, tokens, target.mine)
            theirs = _of_role(rows, tokens, target.theirs)
            if mine and theirs:
                lines.append([name, phase, f"{target.wanted:g}×", *_verdict(rows, mine, theirs, target.wanted, phase)])
            else:
                lines.append([name, phase, f"{target.wanted:g}×", "", "", "", "not measured"])
    columns = ["what", "cache", "wanted", "measured", "floor allows", "peaks GB: ours, theirs", ""]
    return markdown(columns, lines)


def _verdict(rows: list[Row], mine: list[Row], theirs: list[Row], wanted: float, phase: str) -> list[str]:
    their_s, my_s = _time_s(theirs, phase), _time_s(mine, phase)
    ratio = their_s / my_s
    floors = list(_floors(rows, mine, phase))
    allowed = f"{their_s / median(floors):.2f}×" if floors else ""
    verdict = "met" if ratio >= wanted else "missed"
    if floors and ratio < wanted:
        verdict += f"; T ÷ floor {my_s / median(floors):.2f}"
    return [f"{ratio:.2f}×", allowed, f"{gb(_peak(mine, phase))}, {gb(_peak(theirs, phase))}", verdict]


def _table(rows: list[Row], tokens: int) -> str:
    lines = []
    for role in dict.fromkeys(role_of(row) for row in rows if row.case.tokens == tokens):
        mine = _of_role(rows, tokens, role)
        if not mine:
            row = next(row for row in rows if row.case.tokens == tokens and role_of(row) == role)
            lines.append([_title(row), f"{row.outcome}: {row.note}".replace("|", "/"), *[""] * 7])
        for phase in PHASES if mine and mine[0].case.system != PLAIN else ("ram",) if mine else ():
            lines.append(_cells(rows, mine, phase))
    columns = ["system", "cache", "pass", "spread", "÷ floor", "read a pass GB", "peak GB", "mapped GB", "output"]
    return markdown(columns, lines)


def _cells(rows: list[Row], mine: list[Row], phase: str) -> list[str]:
    samples = [sample for row in mine for sample in row.samples_s(phase)]
    floors = list(_floors(rows, mine, phase))
    plains = [plain_of(rows, row) for row in mine]
    return [
        _title(mine[0]),
        phase,
        seconds(median(samples)),
        f"{seconds(min(samples))} – {seconds(max(samples))}",
        f"{median(samples) / median(floors):.2f}" if floors else "",
        gb(median(row.phase(phase)["read_bytes"] for row in mine)),
        gb(_peak(mine, phase)),
        gb(max(row.phase(phase)["mapped_bytes"] for row in mine)),
        output_of(list(zip(mine, plains, strict=True))),
    ]


def _title(row: Row) -> str:
    title = DISK_SYSTEMS[row.case.system].title
    at = "" if row.case.budget_percent is None else f", {row.case.budget_percent:g} % of the weights"
    setting = row.figures.get("setting") or row.case.setting
    return title + at + (f": {setting}" if setting else "")


def _of_role(rows: list[Row], tokens: int, role: str) -> list[Row]:
    return [row for row in having(rows, tokens=tokens) if role_of(row) == role]


def _time_s(rows: list[Row], phase: str) -> float:
    return median(sample for row in rows for sample in row.samples_s(phase))


def _peak(rows: list[Row], phase: str) -> int:
    return max(row.phase(phase)["peak_bytes"] for row in rows)


def _floors(rows: list[Row], mine: list[Row], phase: str) -> Iterator[float]:
    """Of autosp's rows: each by its own plan, disk and plain passes."""
    for row in mine:
        plain = plain_of(rows, row)
        if plain is not None and "streamed_bytes" in row.figures:
            floor = floor_of(row, plain, row.figures["streamed_bytes"], phase)
            if floor is not None:
                yield floor.seconds


def picture(rows: list[Row], path: Path) -> None:
    """Seconds of a pass, a panel per length: a bar per system, cold beside warm, with the peak in words."""
    from panels import figure, finish

    lengths = sorted({row.case.tokens for row in having(rows)})
    canvas, panels = figure(len(lengths), width=5.4)
    for panel, tokens in zip(panels, lengths, strict=True):
        roles = list(dict.fromkeys(role_of(row) for row in having(rows, tokens=tokens)))
        for index, role in enumerate(roles):
            mine = _of_role(rows, tokens, role)
            for offset, phase in ((-0.2, "cold"), (0.2, "warm")):
                bar: dict[str, Any] = {"color": "C0" if phase == "cold" else "C1", "label": f"page cache {phase}"}
                time_s = _time_s(mine, phase)
                panel.barh(index + offset, time_s, height=0.38, **bar)
                text = f"{seconds(time_s)}, {gb(_peak(mine, phase))} GB"
                panel.annotate(text, (time_s, index + offset), (3, 0), textcoords="offset points", va="center", size=7)
        panel.set_yticks(range(len(roles)), [_short(role) for role in roles], fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.35)
        panel.set_title(f"1×{tokens} tokens", fontsize=10)
        panel.set_xlabel("seconds of a pass; peak memory beside")
    finish(canvas, path)


def _short(role: str) -> str:
    if role in DISK_SYSTEMS and role not in (PLANNED, TUNED):
        return {PLAIN: "all in RAM", DAT: "accelerate,\n.dat files", SAFETENSORS: "accelerate,\nsafetensors"}[role]
    return f"autosp,\n{role}"


ACCELERATE = Study("autosp beside accelerate's disk offloading", run, table, picture)
