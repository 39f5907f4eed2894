"""Table and picture of training beside other systems."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from kept_rows import having
from panels import figure, finish
from record import markdown
from train_peer_systems import PLAIN, SYSTEMS, TUNED

from autosp.report.units import NOTHING, ratio, seconds, size

CLOSE = 1e-5
"""Relative. Other kernels of the update round otherwise: losses of the first steps that are no further apart."""

COLUMNS = [
    "system",
    "step",
    "÷ plain",
    "peak",
    "heap left alone",
    "losses",
    "autosp at that peak",
    "peak",
    "plan",
    "÷ system",
    "slower",
]

READING = (
    "*Step*: forward, backward and the optimizer's step, the median over repeats. *Peak*: of device memory; on a "
    "processor what a forward and backward takes beyond the weights, gradients and optimizer state that rest in host "
    "memory; of a system that keeps them on the device, all of it. *Heap left alone*: step and peak where the C "
    "library keeps what was freed; the other columns are of a heap that gives it back, as under autosp's plans. "
    "*Losses*: of the first steps, beside plain training's. *autosp at that peak*: tuned under the peak that the "
    "system had in the same repeat; *÷ system*: of each repeat. Where no setting of autosp's fits that peak, it is "
    "tuned under the least that works, and the pair counts as lost. *Slower*: whether its median step takes longer "
    "than the system's."
)
UNTRIED = (
    "The settings for an accelerator were written from the systems' sources; none of these rows was measured on one, "
    "where copies overlap with compute and the optimizer's step in host memory weighs more."
)


def table(rows: list[Any]) -> str:
    """For each model, optimizer and cap its systems; then the verdict, and what could not be run."""
    groups = dict.fromkeys(_group(row) for row in rows)
    parts: list[str] = []
    verdicts: list[bool] = []
    for group in groups:
        mine = [row for row in rows if _group(row) == group]
        lines = [_line(mine, system, verdicts) for system in SYSTEMS if _without_pair(mine, system)]
        if lines:
            parts.append(f"## {_title(mine)}\n\n{markdown(COLUMNS, lines)}")
    untried = [] if any(row.environment.get("kind", "cpu") != "cpu" for row in rows) else [UNTRIED]
    return "\n\n".join([READING, *untried, _verdict(verdicts), *parts, *_failures(rows)])


def _group(row: Any) -> tuple[Any, ...]:
    return row.case.model, row.case.scale, row.case.optimizer, row.case.cap_gb


def _title(mine: list[Any]) -> str:
    case = mine[0].case
    titles = [row.figures["title"] for row in mine if row.ok]
    cap = "" if case.cap_gb is None else f", at most {case.cap_gb:g} GB"
    return f"{titles[0] if titles else case.model}, {case.optimizer}{cap}"


def _without_pair(mine: list[Any], system: str) -> list[Any]:
    return having(mine, system=system, beside=None)


def _line(mine: list[Any], system: str, verdicts: list[bool]) -> list[str]:
    """Adds to `verdicts` whether autosp was not slower, if there is such a pair."""
    rows = _without_pair(mine, system)
    step_s = _step_s(rows)
    cells = [SYSTEMS[system].title, seconds(step_s), ratio(step_s, _step_s(_without_pair(mine, PLAIN)))]
    cells += [size(max(row.figures["peak_bytes"] for row in rows)), _alone(rows), _losses(rows, mine)]
    beside = having(mine, system=TUNED, beside=system)
    if not beside:
        tried = [row.outcome for row in mine if row.case.beside == system]
        verdicts += [False] * bool(tried)
        return [*cells, tried[0] if tried else NOTHING, *[NOTHING] * 4]
    tuned_s = _step_s(beside)
    fits = all(row.figures["budget_bytes"] <= row.figures["cap_bytes"] for row in beside)
    slower = tuned_s is None or step_s is None or tuned_s > step_s
    verdicts.append(fits and not slower)
    return [
        *cells,
        f"{seconds(tuned_s)}, losses {_losses(beside, mine)}",
        _budget(beside),
        beside[-1].figures["plan"],
        f"{ratio(tuned_s, step_s)} ({', '.join(_ratios(rows, beside))})",
        ("yes" if slower else "no") + ("" if fits else ", with more memory"),
    ]


def _alone(rows: list[Any]) -> str:
    known = [row.figures for row in rows if "alone_step_s" in row.figures]
    if not known:
        return NOTHING
    step_s = median(one["alone_step_s"] for one in known)
    return f"{seconds(step_s)}, {size(max(one['alone_peak_bytes'] for one in known))}"


def _budget(beside: list[Any]) -> str:
    """The peak, and what autosp was tuned under: more than the system's peak where that is too little."""
    peak = size(max(row.figures["peak_bytes"] for row in beside))
    budget_bytes, cap_bytes = beside[-1].figures["budget_bytes"], beside[-1].figures["cap_bytes"]
    more = "" if budget_bytes <= cap_bytes else f" = {ratio(budget_bytes, cap_bytes)} × the system's"
    return f"{peak} of {size(budget_bytes)}{more}"


def _ratios(rows: list[Any], beside: list[Any]) -> list[str]:
    by_repeat = {row.case.repeat: row.figures["step_s"] for row in rows}
    return [ratio(row.figures["step_s"], by_repeat.get(row.case.repeat)) for row in beside]


def _step_s(rows: list[Any]) -> float | None:
    return median(row.figures["step_s"] for row in rows) if rows else None


def _losses(rows: list[Any], mine: list[Any]) -> str:
    """Beside those of plain training: "equal" by their bits, or how far they are apart."""
    plain = _without_pair(mine, PLAIN)
    if not plain:
        return NOTHING
    expected = plain[0].figures["losses"]
    apart = max(
        abs(one - other) / abs(other)
        for row in rows
        for one, other in zip(row.figures["losses"], expected, strict=True)
    )
    if all(row.figures["losses"] == expected for row in rows):
        return "equal"
    return f"within {apart:.0e}" if apart <= CLOSE else f"DIFFER by {apart:.0e}"


def _verdict(verdicts: list[bool]) -> str:
    if not verdicts:
        return "No system was measured with autosp beside it."
    return f"At the same memory autosp is not slower than the system in {sum(verdicts)} of {len(verdicts)} pairs."


def _failures(rows: list[Any]) -> list[str]:
    """What could not be run, and what it said; once for all models."""
    said: dict[str, list[str]] = {}
    for row in rows:
        if not row.ok:
            beside = f" with the memory of {row.case.beside}" if row.case.beside else ""
            text = f"**{SYSTEMS[row.case.system].title}**{beside}: {row.outcome}: {row.note}"
            said.setdefault(text, []).append(f"{row.case.model} with {row.case.optimizer}")
    lines = [f"- {text} ({', '.join(dict.fromkeys(where))})" for text, where in said.items()]
    return ["## What could not be run\n\n" + "\n".join(lines)] if lines else []


def picture(rows: list[Any], path: Path) -> None:
    """Step ÷ plain over the peak ÷ plain's peak: a panel per optimizer, a line from each system to autosp beside it."""
    optimizers = list(dict.fromkeys(row.case.optimizer for row in rows))
    canvas, panels = figure(len(optimizers), 5.0)
    colours = {name: f"C{index}" for index, name in enumerate(SYSTEMS)}
    for panel, optimizer in zip(panels, optimizers, strict=True):
        of_optimizer = [row for row in rows if row.case.optimizer == optimizer]
        for group in dict.fromkeys(_group(row) for row in of_optimizer):
            _draw(panel, [row for row in of_optimizer if _group(row) == group], colours)
        panel.set_title(optimizer)
        panel.set_xlabel("peak ÷ plain training's")
        panel.set_ylabel("step ÷ plain training's")
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
    finish(canvas, path, extra=[{"color": "grey", "marker": "*", "ls": "", "label": "autosp at that peak"}])


def _draw(panel: Any, mine: list[Any], colours: dict[str, str]) -> None:
    plain = _without_pair(mine, PLAIN)
    if not plain:
        return
    plain_s, plain_bytes = _step_s(plain), max(row.figures["peak_bytes"] for row in plain)
    assert plain_s is not None
    for system in SYSTEMS:
        rows = _without_pair(mine, system)
        if not rows:
            continue
        x = max(row.figures["peak_bytes"] for row in rows) / plain_bytes
        y = (_step_s(rows) or 0.0) / plain_s
        panel.plot([x], [y], ls="", marker="o", color=colours[system], label=SYSTEMS[system].title)
        if system != PLAIN:
            beside_point = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            panel.annotate(mine[0].case.model, (x, y), fontsize=8, **beside_point)
        beside_s = _step_s(having(mine, system=TUNED, beside=system))
        if beside_s is not None:
            panel.plot([x, x], [y, beside_s / plain_s], color=colours[system], lw=0.8)
            panel.plot([x], [beside_s / plain_s], ls="", marker="*", ms=9, color=colours[system])
