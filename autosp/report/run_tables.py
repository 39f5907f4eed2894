"""What a run of an applied plan took, as rich tables: pass by pass, beside what was predicted, and where it stalled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from rich.table import Table
from rich.text import Text

from autosp.report.tables import add_numbers, facts_table, new_table, over_floor
from autosp.report.traffic import Traffic
from autosp.report.units import NOTHING, error, percent, rate, ratio, seconds, size
from autosp.spec import Plan

STALLING_LAYERS = 8
"""How many of the layers that stall the most are shown."""


@dataclass(frozen=True)
class Pass:
    """One pass of an applied plan."""

    seconds: float
    moved_bytes: int
    misses: int


def passes_table(passes: Sequence[Pass], floor_s: float | None) -> Table:
    """Every pass of a run. The first one finds empty buffers."""
    table = new_table("Passes")
    add_numbers(table, "pass", "latency", "T/floor", "moved", "misses")
    for position, one in enumerate(passes, start=1):
        table.add_row(
            str(position), seconds(one.seconds), ratio(one.seconds, floor_s), size(one.moved_bytes), str(one.misses)
        )
    return table


def run_table(plan: Plan, passes: Sequence[Pass], peak_bytes: int) -> Table:
    """What a run took, beside what its plan promised."""
    latency_s = median(one.seconds for one in passes[1:] or passes)
    steady = {1: "one pass, with empty buffers", 2: "the second pass"}.get(
        len(passes), f"median of passes 2 to {len(passes)}"
    )
    rows = [("latency", f"{seconds(latency_s)}, {steady}")]
    if plan.prediction is not None and plan.measurement is not None:
        promised_s, measured_s = plan.prediction.latency_s, plan.measurement.latency_s
        rows.append(("promised", f"{seconds(promised_s)} predicted, {seconds(measured_s)} measured by its study"))
    if plan.floor_s is not None:
        rows.append(("T / floor", over_floor(latency_s, plan.floor_s)))
    share = ""
    if plan.budget_bytes is not None:
        share = f", {percent(peak_bytes, plan.budget_bytes)} of the budget of {size(plan.budget_bytes)}"
        share += ": OVER IT" if peak_bytes > plan.budget_bytes else ""
    rows.append(("peak", f"{size(peak_bytes)}{share}"))
    rows.append(("misses", str(sum(one.misses for one in passes))))
    return facts_table("Run", rows)


def traffic_table(plan: Plan, predicted: Traffic | None, measured: Traffic) -> Table:
    """A steady pass, predicted beside measured: its time, the stalls in it, and what its link moved how fast."""
    link = f"{plan.device.slow_tier.value} → device"
    table = new_table("A pass in the steady state")
    table.add_column("", no_wrap=True)
    add_numbers(table, "predicted", "measured", "error")
    rows: tuple[tuple[str, Callable[[Traffic], float | None], Callable[[float | None], str]], ...] = (
        ("latency", lambda one: one.pass_s, seconds),
        ("of it stalled", lambda one: one.stall_s, seconds),
        (f"{link}, moved", lambda one: one.moved_bytes, size),
        (f"{link}, busy", lambda one: one.link_busy_s, seconds),
        (f"{link}, while busy", lambda one: one.bytes_per_s, rate),
    )
    if plan.candidate.on_disk:
        rows += (
            ("disk → host, read", lambda one: one.read_bytes, size),
            ("disk → host, busy", lambda one: one.disk_busy_s, seconds),
            ("disk → host, while busy", lambda one: one.disk_bytes_per_s, rate),
        )
    for name, figure, show in rows:
        said = None if predicted is None else figure(predicted)
        found = figure(measured)
        off = error(said, found) if said is not None and found else NOTHING
        table.add_row(name, show(said), show(found), off)
    if plan.floor_s is not None:
        said = None if predicted is None else predicted.pass_s
        table.add_row(
            f"T / floor of {seconds(plan.floor_s)}", ratio(said, plan.floor_s), ratio(measured.pass_s, plan.floor_s), ""
        )
    return table


def stalls_table(plan: Plan, predicted: Traffic | None, measured: Traffic) -> Table:
    """The streamed layers that compute waited for the longest, in a steady pass."""
    stalls = sorted(measured.layer_stalls_s.items(), key=lambda item: -item[1])[:STALLING_LAYERS]
    table = new_table(f"Stalls, the longest {len(stalls)} of {len(measured.layer_stalls_s)} streamed layers")
    add_numbers(table, "layer")
    table.add_column("name", overflow="fold")
    add_numbers(table, "size", "predicted\nstall", "measured\nstall", "of the pass")
    for layer, stall_s in stalls:
        table.add_row(
            str(layer),
            Text(plan.partition.layers[layer].name or "(the model itself)"),
            size(plan.partition.layers[layer].n_bytes),
            seconds(None if predicted is None else predicted.layer_stalls_s.get(layer, 0.0)),
            seconds(stall_s),
            percent(stall_s, measured.pass_s),
        )
    return table
