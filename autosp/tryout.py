"""`autosp doctor` and `autosp demo`: the commands for which nobody has to bring a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autosp.options import DeviceName, Storage
from autosp.terminal import budget_of, check_folder, console


def doctor(
    storage: Storage = None,
    device: DeviceName = None,
    probe_mb: Annotated[float, typer.Option(min=0, help="Megabytes of the link's probe; 0 leaves it out.")] = 256,
) -> None:
    """Say what autosp finds here: versions, device, memory, disk, database, and the link's measured bandwidth."""
    from autosp.devices import choose_device
    from autosp.doctor import facts, probe_link
    from autosp.report.tables import facts_table, link_table

    chosen = choose_device(device)
    console().print(facts_table("autosp doctor", facts(chosen, storage)))
    if probe_mb:
        console().print(link_table(probe_link(chosen, round(probe_mb * 1e6))))
    chosen.close()


def demo(
    model: Annotated[str, typer.Option(help="minilm, or llama-1b.")] = "minilm",
    max_gpu_gb: Annotated[str | None, typer.Option("--max-gpu-gb", help="Default: what the demo suggests.")] = None,
    storage: Storage = None,
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="Where the plan goes.")] = Path(
        "plan.json"
    ),
) -> None:
    """Tune a well-known model and see what streaming makes of it."""
    from autosp.demo import run as run_demo

    check_folder(output)
    budget = None if max_gpu_gb is None else budget_of(max_gpu_gb)
    run_demo(model, max_gpu_gb=budget, storage=storage, output=output)
