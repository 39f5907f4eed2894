"""The peers' benchmark, read: tables and targets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from peer_picture import picture
from peer_points import ModelResults, Point, collect, key_of, read_lines, read_rows
from peer_systems import TUNED, WINDOW, System
from record import markdown

from autosp.report.units import rate, seconds

WANTED_SPEEDUP = 1.8
"""Over the sliding window and over streamed group offloading, where the link limits the pass, at half the weights."""

PREFACE = (
    "Steady passes (median; least and most), each system in a process of its own, repeats interleaved. ÷ floor: "
    "by the least time that any schedule can take under the budget with the link as measured in the same run. ÷ "
    "budget: peak memory, on a CPU with the weight files that are mapped. The files of a system that reads them "
    "through the page cache are dropped from it before each pass: a machine with no more RAM than the budget "
    "could not keep them. `warm` is without that, with RAM for the weights beside the budget. Budgets are in "
    "percent of the weights; activations are within them. accelerate dispatch_model and mmgp take a share for "
    "weights only, which was lowered, run by run, by what the measured peak was over the budget. diffusers is "
    "given the names of the modules that hold lists of blocks; on a CPU it offloads to files, as offloading from "
    "CPU memory to CPU memory moves nothing."
)

SIMULATED_PREFACE = (
    "**The accelerator is simulated by the CPU** (`make simulated`): memory of its own, an allocator like CUDA's, "
    "kernels that are the CPU's, and copies by threads of their own that take at least their bytes over the link whose "
    "pace is named above. The systems run their own code, as on a GPU, under the allocator's cap. What can be compared "
    "is how long each waits for its weights, not how fast a GPU is."
)

PACED_PREFACE = (
    "The device is a CPU whose copies from RAM take at least their bytes over {rate}: a stand-in for an "
    "accelerator's link, chosen for this study. **The rows named after peers are their policies, re-enacted as "
    "settings of autosp's own runtime, not the peers' code**: accelerate's cpu_offload as one layer at a time "
    "without overlap, its device_map as the first layers resident and the rest one at a time, diffusers' streamed "
    "group offloading as a ring of two groups without residents. They have what autosp's runtime does well and "
    "the peers' code does not: one flat copy per group, no allocation in a pass, and the next pass's first group "
    "fetched during this one. Embeddings and heads stream as layers here, where diffusers keeps them on the "
    "device for the whole pass. With a stream, diffusers itself takes groups of one block only; larger groups are "
    "shown for what they would do. Steady passes, median, least and most."
)


def write_report(raw: Path, systems: dict[str, System], scale: str, paced_bytes_per_s: float | None) -> None:
    """`peers_<kind>.md` and `.png` beside the raw file, of one scale and, for a paced link, of one pace."""
    rows = list({key_of(row): row for row in read_rows(raw)}.values())
    rows = [row for row in rows if row.scale == scale and row.paced_bytes_per_s == paced_bytes_per_s]
    models = collect(rows)
    if not models:
        print(f"no results of scale {scale} in {raw}")
        return
    environment = [line["environment"] for line in read_lines(raw) if "environment" in line][-1]
    head = ", ".join(f"{key} {value}" for key, value in environment.items())
    preface = PREFACE if paced_bytes_per_s is None else PACED_PREFACE.format(rate=rate(paced_bytes_per_s))
    simulated = [SIMULATED_PREFACE] if environment.get("kind") == "simulated" else []
    parts = [head, *simulated, preface, summary(models, systems)]
    parts += [part for model in models for part in (_heading(model), table(model, systems))]
    raw.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    picture(models, systems, raw.with_suffix(".png"))
    print("\n\n".join(parts[1:]))


def _heading(model: ModelResults) -> str:
    plain = f"weights {model.weight_bytes / 1e9:.3f} GB; all of them in memory: {seconds(model.plain_s)} a pass"
    return f"## {model.name}\n\n{model.title}; {plain}"


def table(model: ModelResults, systems: dict[str, System]) -> str:
    """Budget by budget, a line per system; the fastest of those that did what was asked is bold."""
    lines = []
    for percent, budget_bytes in model.budgets.items():
        here = [point for (_, at), point in model.points.items() if at == percent]
        here.sort(key=lambda point: list(systems).index(point.system))
        best = min((point.time_s for point in here if point.counts), default=None)
        for point in here:
            at = f"{percent:g} %, {budget_bytes / 1e9:.3f} GB" if point is here[0] else ""
            lines.append([at, systems[point.system].title, *_cells(point, best)])
    columns = ["budget", "system", "pass", "spread", "÷ floor", "first", "warm", "÷ budget", "output", ""]
    return markdown(columns, lines)


def _cells(point: Point, best: float | None) -> list[str]:
    note = point.note.replace("|", "/")[:200]
    if not point.ran:
        return ["", "", "", "", "", "", "", f"{point.outcome}: {note}"]
    time_text = seconds(point.time_s)
    over = f"{point.over_budget:.2f}"
    return [
        f"**{time_text}**" if best is not None and point.counts and point.time_s == best else time_text,
        f"{seconds(min(point.samples_s))} – {seconds(max(point.samples_s))}",
        "" if point.over_floor is None else f"{point.over_floor:.2f}",
        "" if point.first_s is None else seconds(point.first_s),
        "" if point.warm_s is None else seconds(point.warm_s),
        over if point.over_budget <= 1 else f"{over}, over",
        "equal" if point.same_output else "differs",
        note,
    ]


def summary(models: list[ModelResults], systems: dict[str, System]) -> str:
    """The targets: how near the floor autosp is, who was faster, how far behind streaming without residents is."""
    percents = sorted({percent for model in models for percent in model.budgets})
    lines = [[model.name, *(_ratio(model.points.get((TUNED, percent))) for percent in percents)] for model in models]
    ratios = markdown(["autosp, ÷ floor", *(f"{percent:g} %" for percent in percents)], lines)
    faster = list(_faster(models, systems))
    compared = sum(1 for model in models for _ in _rivals(model))
    verdict = f"autosp was never slower than a system that kept the budget and the output: {compared} comparisons."
    if faster:
        verdict = f"In {len(faster)} of {compared} comparisons a system that kept the budget and the output was faster:"
    elif not compared:
        verdict = "No other system kept the budget and the output where autosp ran: there is nothing to compare."
    halves = list(_at_half(models, systems))
    wanted = f"At 50 %, time ÷ autosp's, where the link limits the pass ({WANTED_SPEEDUP} wanted):"
    return "\n\n".join(
        [
            "## Targets",
            ratios,
            "\n".join([verdict, *(f"- {line}" for line in faster)]),
            "\n".join([wanted, *(f"- {line}" for line in halves or ["no such point"])]),
        ]
    )


def _ratio(point: Point | None) -> str:
    if point is None:
        return ""
    if not point.ran or point.over_floor is None:
        return point.outcome
    flaw = "" if point.counts else ", over budget" if point.over_budget > 1 else ", output differs"
    return f"{point.over_floor:.2f}{flaw}"


def _rivals(model: ModelResults) -> Iterator[tuple[Point, Point]]:
    """autosp's point and each other that did what was asked at the same budget."""
    for (system, percent), point in model.points.items():
        mine = model.points.get((TUNED, percent))
        if system != TUNED and point.counts and mine is not None and mine.ran:
            yield mine, point


def _faster(models: list[ModelResults], systems: dict[str, System]) -> Iterator[str]:
    for model in models:
        for mine, point in _rivals(model):
            if point.time_s < mine.time_s:
                times = f"{seconds(point.time_s)} against {seconds(mine.time_s)}"
                overlap = "; the samples overlap" if max(point.samples_s) >= min(mine.samples_s) else ""
                yield f"{model.name} at {point.percent:g} %: {systems[point.system].title}, {times}{overlap}"


def _at_half(models: list[ModelResults], systems: dict[str, System]) -> Iterator[str]:
    for model in models:
        mine = model.points.get((TUNED, 50.0))
        if mine is None or not mine.ran or not model.transfer_bound[50.0]:
            continue
        names = [name for name in systems if name == WINDOW or "stream" in name]
        rivals = [model.points[name, 50.0] for name in names if (name, 50.0) in model.points]
        parts = [f"{systems[rival.system].title} {rival.time_s / mine.time_s:.2f}" for rival in rivals if rival.ran]
        yield f"{model.name}: {'; '.join(parts) or 'no such system ran'}"
