"""Records as rich tables. The only module of the report that needs rich, and none of it needs torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from autosp.report.units import NOTHING, error, percent, ranges, rate, ratio, seconds, size
from autosp.spec import (
    Candidate,
    LayerProfile,
    LinkProfile,
    Outcome,
    Partition,
    Plan,
    Prediction,
    Profile,
    Reading,
    StudySummary,
    Tier,
    Trial,
)

CHOSEN = "bold green"
FAILED = "red"


def facts_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, one per line."""
    table = new_table(title)
    table.show_header = False
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def trials_table(
    trials: Sequence[Trial],
    budget_bytes: int,
    floor_s: float | None,
    chosen: Candidate | None = None,
    profile: Profile | None = None,
) -> Table:
    """What was validated: predicted beside measured, the fastest first, those that failed last.

    `chosen` is marked, and so are the trivial plans: everything resident, and plain sliding windows. Of
    `profile` comes the one that profiling timed, for comparison alone: its budget may have been another.
    """
    floor = "" if floor_s is None else f", floor {seconds(floor_s)}"
    table = new_table(f"Trials under {size(budget_bytes)}{floor}")
    add_numbers(table, "trial", "k", "k'", "residents", "predicted\nlatency", "measured\nlatency", "error", "T/floor")
    add_numbers(table, "predicted\npeak", "measured\npeak")
    table.add_column("outcome", no_wrap=True)
    table.add_column("")
    profiled = None
    if profile is not None and all(trial.prediction.candidate.group == 1 for trial in trials):
        profiled = profile.overlapped  # which ran one microbatch
    for trial in sorted([*trials, *filter(None, [profiled])], key=_by_outcome):
        said, found = trial.prediction, trial.measurement
        won = said.candidate == chosen and trial is not profiled
        timed = found.latency_s if found.samples_s else None
        over = found.outcome is Outcome.OUT_OF_MEMORY
        peak = NOTHING if found.outcome.cut_short else size(found.peak_bytes)
        outcome = "profiled" if trial is profiled else found.outcome.value
        table.add_row(
            NOTHING if trial is profiled else str(trial.number),
            *_setting(said.candidate),
            seconds(said.latency_s),
            seconds(timed),
            error(said.latency_s, timed) if timed else NOTHING,
            ratio(timed, floor_s),
            size(said.peak_bytes),
            f"> {size(budget_bytes)}" if over else peak,
            "chosen" if won else outcome,
            _remarks(said.candidate),
            style=CHOSEN if won else None if found.outcome is Outcome.FITS else FAILED,
        )
    return table


def predictions_table(predictions: Sequence[Prediction], floor_s: float, limit: int) -> Table:
    """The first `limit` of ranked predictions."""
    shown = min(limit, len(predictions))
    table = new_table(f"Predictions, the best {shown} of {len(predictions)}; floor {seconds(floor_s)}")
    add_numbers(table, "rank", "k", "k'", "residents", "latency", "T/floor", "stall", "moved/pass", "peak")
    table.add_column("")
    for position, prediction in enumerate(predictions[:limit], start=1):
        table.add_row(
            str(position),
            *_setting(prediction.candidate),
            seconds(prediction.latency_s),
            ratio(prediction.latency_s, floor_s),
            seconds(prediction.stall_s),
            size(prediction.moved_bytes),
            size(prediction.peak_bytes),
            _remarks(prediction.candidate),
        )
    return table


def front_table(plans: Sequence[Plan]) -> Table:
    """Plans that trade memory for latency: each measured, and compared with the fastest."""
    count = "1 plan" if len(plans) == 1 else f"{len(plans)} plans, each"
    table = new_table(f"Memory against latency: {count} measured")
    add_numbers(
        table, "plan", "peak", "latency", "of the\nfastest", "predicted\nlatency", "error", "k", "k'", "residents"
    )
    table.add_column("study", no_wrap=True)
    least_s = min((plan.measurement.latency_s for plan in plans if plan.measurement), default=None)
    for number, plan in enumerate(plans, start=1):
        said, found = plan.prediction, plan.measurement
        latency_s = found.latency_s if found else None
        table.add_row(
            str(number),
            size(found.peak_bytes if found else None),
            seconds(latency_s),
            ratio(latency_s, least_s),
            seconds(said.latency_s if said else None),
            error(said.latency_s, latency_s) if said and latency_s else NOTHING,
            *_setting(plan.candidate),
            Text(plan.study_name or NOTHING),
        )
    return table


def batch_sizes_table(rows: Iterable[tuple[int, float, float | None, Plan | None]], best: int) -> Table:
    """Batch sizes, each with its predicted and its measured samples per second and the plan of that."""
    table = new_table("Samples per second by batch size")
    add_numbers(
        table, "batch", "predicted\nper s", "measured\nper s", "error", "latency", "peak", "k", "k'", "residents"
    )
    for batch_size, predicted, measured, plan in rows:
        found = plan.measurement if plan else None
        table.add_row(
            str(batch_size),
            f"{predicted:.4g}",
            f"{measured:.4g}" if measured else NOTHING,
            error(predicted, measured) if measured else NOTHING,
            seconds(found.latency_s if found else None),
            size(found.peak_bytes if found else None),
            *(_setting(plan.candidate) if plan else (NOTHING,) * 3),
            style=CHOSEN if batch_size == best else None,
        )
    return table


def studies_table(summaries: Sequence[StudySummary]) -> Table:
    """One line per study, in the order given."""
    table = new_table(f"{len(summaries)} studies" if len(summaries) != 1 else "1 study")
    table.add_column("study", no_wrap=True)
    table.add_column("model", no_wrap=True)
    table.add_column("batch", overflow="fold", max_width=40)
    add_numbers(table, "budget", "trials", "latency", "peak")
    table.add_column("state", no_wrap=True)
    table.add_column("created", no_wrap=True)
    for summary in summaries:
        table.add_row(
            Text(summary.name),
            Text(summary.key.model_name),
            Text(summary.key.batch_signature),
            size(summary.key.budget_bytes),
            str(summary.trials),
            seconds(summary.best_latency_s),
            size(summary.peak_bytes),
            "finished" if summary.finished else "unfinished",
            summary.created_at[:16].replace("T", " "),
        )
    return table


def plan_table(plan: Plan) -> Table:
    """A plan, what it promises, what was measured of it, and why it was chosen."""
    found, said, candidate = plan.measurement, plan.prediction, plan.candidate
    latency_s = found.latency_s if found is not None else None
    on_disk = _on_disk(candidate, plan.partition)
    rows = [
        ("model", f"{plan.model_name} on {plan.batch_signature}"),
        ("device", f"{plan.device.name}, weights stream from {plan.device.slow_tier.value}"),
        ("layers", _layers(plan.partition)),
        ("setting", f"k={candidate.k}, k'={candidate.k_prime}: {candidate.ring} layers in the ring"),
        ("residents", _residents(candidate, plan.partition)),
        *([("on disk", on_disk)] if on_disk else []),
    ]
    if candidate.group > 1:
        each = "" if latency_s is None else f": {seconds(latency_s / candidate.group)} for each"
        rows.append(("group", f"{candidate.group} microbatches share a pass{each}"))
    if candidate.on_disk or plan.device.slow_tier is Tier.DISK:
        rows.append(("reading", _reading(plan.reading)))
    if said is not None:
        rows.append(("predicted", f"{seconds(said.latency_s)} a pass, {seconds(said.stall_s)} of it stalled"))
    if found is not None:
        moved = f"{size(found.moved_bytes)} moved, {found.misses} misses" if found.moved_bytes else "nothing moved"
        rows.append(("measured", f"{seconds(latency_s)} a pass, the first {seconds(found.cold_latency_s)}; {moved}"))
    if plan.floor_s is not None:
        rows.append(("T / floor", over_floor(latency_s, plan.floor_s)))
    if found is not None:
        share = f", {percent(found.peak_bytes, plan.budget_bytes)} of the budget" if plan.budget_bytes else ""
        rows.append(("peak", f"{size(found.peak_bytes)}{share}"))
    if plan.budget_bytes is not None:
        rows.append(("budget", size(plan.budget_bytes)))
    if plan.host_budget_bytes is not None:
        took = "" if said is None else f", of which {size(said.host_bytes)} are predicted to be taken"
        rows.append(("host budget", f"{size(plan.host_budget_bytes)}{took}"))
    rows.append(("why", plan.why or NOTHING))
    return facts_table("Plan" if plan.study_name is None else f"Plan of study {plan.study_name}", rows)


def layers_table(profile: Profile) -> Table:
    """Every layer: its bytes, its compute over a period, backward too, and the time that its transfer takes alone."""
    visits: defaultdict[int, list[LayerProfile]] = defaultdict(list)
    for visit in profile.visits:
        visits[visit.layer].append(visit)
    link, partition = profile.link, profile.partition
    periods = f", {partition.repeats} periods a pass" if partition.repeats > 1 else ""
    table = new_table(f"Layers, in the order of their first visit{periods}", show_footer=True)
    transfers_s = [link.latency_s + layer.n_bytes / link.bytes_per_s for layer in partition.layers]
    compute_s = {index: sum(visit.forward_s for visit in mine) for index, mine in visits.items()}
    for again in profile.backward:
        compute_s[again.layer] = compute_s.get(again.layer, 0.0) + again.backward_s
    add_numbers(table, "layer")
    table.add_column("name", "all layers", overflow="fold")
    add_numbers(table, "visits", "tensors")
    for header, total in (
        ("size", size(partition.streamable_bytes)),
        ("compute", seconds(sum(compute_s.values()))),
        ("transfer", seconds(sum(transfers_s))),
    ):
        table.add_column(header, total, justify="right", no_wrap=True)
    add_numbers(table, "transfer/compute", "output", "workspace")
    for layer, transfer_s in zip(partition.layers, transfers_s, strict=True):
        mine = visits[layer.index]
        table.add_row(
            str(layer.index),
            Text(layer.name or "(the model itself)"),
            str(len(mine)),
            str(len(layer.tensors)),
            size(layer.n_bytes),
            seconds(compute_s.get(layer.index)),
            seconds(transfer_s),
            ratio(transfer_s, compute_s.get(layer.index)),
            size(max(visit.output_bytes for visit in mine)) if mine else NOTHING,
            size(max(visit.peak_bytes for visit in mine)) if mine else NOTHING,
        )
    return table


def link_table(link: LinkProfile) -> Table:
    """The sweep over transfer sizes, the line through it, and what link and compute cost each other."""
    table = new_table(f"Link {link.source.value} → {link.target.value}")
    add_numbers(table, "transfer", "time", "bandwidth")
    for point in link.points:
        table.add_row(size(point.n_bytes), seconds(point.seconds), rate(point.n_bytes / point.seconds))
    table.add_section()
    table.add_row("fitted", f"{seconds(link.latency_s)} +", rate(link.bytes_per_s))
    table.add_row("under compute", f"× {link.link_slowdown:.2f}", rate(link.bytes_per_s / link.link_slowdown))
    table.add_row("compute meanwhile", f"× {link.compute_slowdown:.2f}", "")
    if link.reading is not None:
        table.add_row("read by", _reading(link.reading), "")
    if link.cached_bytes_per_s is not None:
        table.add_row("from the page cache", "", rate(link.cached_bytes_per_s))
    return table


def _reading(reading: Reading) -> str:
    who = "1 reader" if reading.readers == 1 else f"{reading.readers} readers"
    where = "; what the page cache has is copied from it" if reading.from_cache else ""
    return f"{who}, blocks of {reading.block_bytes / 2**20:g} MiB{where}"


def new_table(title: str, *, show_footer: bool = False) -> Table:
    """A table in the style of all of them."""
    return Table(
        title=Text(title),
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_footer=show_footer,
        pad_edge=False,
        collapse_padding=True,
    )


def add_numbers(table: Table, *headers: str) -> None:
    """Columns of figures."""
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)


def _setting(candidate: Candidate) -> tuple[str, str, str]:
    return str(candidate.k), str(candidate.k_prime), str(len(candidate.residents))


def _remarks(candidate: Candidate) -> str:
    """The baseline that a candidate is, if it is one; what rests on disk; whose activations do not stay; its group."""
    baseline = "" if candidate.residents else "sliding window"
    if not candidate.ring:
        baseline = "everything resident"
    resting = f"{len(candidate.on_disk)} on disk, {candidate.read_ahead} ahead" if candidate.on_disk else ""
    again = f"{len(candidate.recompute)} computed again" if candidate.recompute else ""
    away = f"{len(candidate.offload)} offloaded" if candidate.offload else ""
    group = f"{candidate.group} microbatches" if candidate.group > 1 else ""
    return ", ".join(filter(None, (baseline, resting, again, away, group)))


def over_floor(latency_s: float | None, floor_s: float) -> str:
    """The ratio, and what it says: nothing beats the floor unless the profile that it rests on is wrong."""
    beaten = latency_s is not None and latency_s < 0.98 * floor_s
    says = "beaten: its profile measured compute too slow" if beaten else "no schedule can take less"
    return f"{ratio(latency_s, floor_s)}, floor {seconds(floor_s)} ({says})"


def _by_outcome(trial: Trial) -> tuple[bool, float, int]:
    found = trial.measurement
    return found.outcome is not Outcome.FITS, found.latency_s or float("inf"), trial.number


def _layers(partition: Partition) -> str:
    periods = f", {partition.repeats} periods of {len(partition.visits)} visits" if partition.repeats > 1 else ""
    return (
        f"{len(partition.layers)} layers of {size(partition.streamable_bytes)} in all, the largest "
        f"{size(max((layer.n_bytes for layer in partition.layers), default=0))}; "
        f"{size(partition.resident_bytes)} beside them never move{periods}"
    )


def _residents(candidate: Candidate, partition: Partition) -> str:
    if not candidate.residents:
        return "none: a sliding window over all layers"
    n_bytes = sum(partition.layers[index].n_bytes for index in candidate.residents)
    return f"{len(candidate.residents)} layers, {size(n_bytes)}: {ranges(candidate.residents)}"


def _on_disk(candidate: Candidate, partition: Partition) -> str:
    n_bytes = sum(partition.layers[index].n_bytes for index in candidate.on_disk)
    ahead = f"read into a ring of {candidate.read_ahead} transfers in host memory"
    return f"{len(candidate.on_disk)} layers, {size(n_bytes)}, {ahead}: {ranges(candidate.on_disk)}" if n_bytes else ""
