"""`autosp demo`: the whole story on a real model, from a budget it does not fit in to an equal output under it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import autosp
from autosp import terminal
from autosp.batch import equal
from autosp.demo.models import load
from autosp.demo.peers import PeerResult, accelerate_offload
from autosp.devices import Device, choose_device
from autosp.report.tables import plan_table, trials_table
from autosp.spec import Plan, Trial
from autosp.store import Repository
from autosp.workload import Workload, parse_budget

PASSES = 5


@dataclass(frozen=True)
class DemoResult:
    """What the demo showed. `rows` holds autosp's own run first, then the peers'."""

    title: str
    weight_bytes: int
    budget_bytes: int
    plain_s: float
    plan: Plan
    trials: list[Trial]
    rows: list[PeerResult]


def run(
    model: str = "minilm",
    *,
    max_gpu_gb: float | str | None = None,
    storage: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] = "plan.json",
    console: Console | None = None,
) -> DemoResult:
    """Tune, show, save, run and compare.

    Raises: SettingError for an unknown model; RuntimeError if the plan did not keep its promises.
    """
    console = console or terminal.console()
    example = load(model)
    device = choose_device(None)
    budget = example.budget_gb if max_gpu_gb is None else max_gpu_gb
    budget_bytes = parse_budget(budget)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in example.model.state_dict().values())
    console.print(f"[bold]{example.title}[/bold]")
    console.print(
        f"weights {weights / 1e9:.3f} GB, budget {budget_bytes / 1e9:.3f} GB on {device.info.name}; "
        f"slow tier: {device.info.slow_tier.value}"
    )
    workload = Workload.of(example.model, example.batch, example.step, "inference", device)
    plain, plain_s = _plain(workload, device)
    plan = autosp.tune(example.model, example.batch, budget, step=example.step, storage=storage)
    with Repository(storage) as repository:
        trials, profile = repository.trials(plan.study_name or ""), repository.profile(plan.study_name or "")
    console.print(trials_table(trials, budget_bytes, plan.floor_s, plan.candidate, profile))
    console.print(plan_table(plan))
    plan.save(output)
    console.print(f"plan written to {output}")

    reloaded = Plan.load(output)
    streamed = autosp.apply(example.model, reloaded)
    try:
        latency_s, same = _streamed(workload, device, plain)
        peak_bytes = streamed.stats().peak_bytes
    finally:
        streamed.remove()
    rows = [PeerResult("autosp, this plan", latency_s, peak_bytes, same)]
    if example.step is None:
        rows.append(accelerate_offload(example.model, example.batch, plain, device))
    console.print(_comparison(plain_s, weights, rows, plan, budget_bytes))
    if example.sentences:
        console.print(_neighbours(plain, example.sentences))
    if not same:
        raise RuntimeError("the streamed output differs from the plain model's")
    if peak_bytes > budget_bytes:
        raise RuntimeError(f"the peak of {peak_bytes / 1e9:.4f} GB is over the budget of {budget_bytes / 1e9:.4f} GB")
    console.print(
        f"[green]outputs equal bit for bit[/green]; peak ÷ budget = {peak_bytes / budget_bytes:.3f}; "
        f"latency ÷ floor = {latency_s / (plan.floor_s or latency_s):.3f}"
    )
    return DemoResult(example.title, weights, budget_bytes, plain_s, plan, trials, rows)


def _plain(workload: Workload, device: Device) -> tuple[Any, float]:
    """The unstreamed model's output and time. The demo's models fit any accelerator: it is the budget that is small."""
    if device.torch_device.type != "cpu":
        workload.model.to(device.torch_device)
    try:
        seconds = _times_s(workload, device)
        return workload.run(), median(seconds)
    finally:
        if device.torch_device.type != "cpu":
            workload.model.to("cpu")


def _streamed(workload: Workload, device: Device, plain: Any) -> tuple[float, bool]:
    same = equal(workload.run(), plain)
    return median(_times_s(workload, device)), same


def _times_s(workload: Workload, device: Device) -> list[float]:
    workload.run()
    device.finish_compute()
    samples = []
    for _ in range(PASSES):
        begin = time.perf_counter()
        workload.run()
        device.finish_compute()
        samples.append(time.perf_counter() - begin)
    return samples


def _comparison(plain_s: float, weights: int, rows: list[PeerResult], plan: Plan, budget_bytes: int) -> Table:
    table = Table(title="the same batch, in this run", title_justify="left")
    for name in ("", "latency", "÷ floor", "memory", "÷ budget", "output"):
        table.add_column(name, justify="left" if not name else "right")
    memory = f"{weights / 1e6:,.1f} MB + activations"
    table.add_row("plain, all weights in memory", f"{plain_s * 1e3:,.1f} ms", "", memory, "", "")
    for row in rows:
        ratio = f"{row.latency_s / plan.floor_s:.3f}" if plan.floor_s else ""
        table.add_row(
            row.name,
            f"{row.latency_s * 1e3:,.1f} ms",
            ratio,
            f"{row.peak_bytes / 1e6:,.1f} MB",
            f"{row.peak_bytes / budget_bytes:.3f}",
            "equal" if row.same_output else "differs",
        )
    return table


def _neighbours(embeddings: torch.Tensor, sentences: tuple[str, ...]) -> Table:
    """The most similar pairs: the embeddings mean something."""
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-1.0)
    table = Table(title="nearest sentences by these embeddings", title_justify="left")
    table.add_column("sentence")
    table.add_column("nearest")
    table.add_column("cosine", justify="right")
    best = similarity.max(dim=1)
    for index in torch.argsort(best.values, descending=True)[:8:2].tolist():
        table.add_row(sentences[index], sentences[int(best.indices[index])], f"{best.values[index]:.3f}")
    return table
