"""What the commands are told: arguments and options that several of them share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Factory = Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="Makes (model, batch) or (model, batch, step).")]
Study = Annotated[str, typer.Argument(metavar="STUDY", help="`autosp studies` lists them.")]
Storage = Annotated[str | None, typer.Option(help="Path or URL of the database. Default: AUTOSP_STORAGE.")]
DeviceName = Annotated[str | None, typer.Option("--device", help="Default: the accelerator if there is one.")]
Budget = Annotated[str, typer.Option("--max-gpu-gb", help="GB (10^9 bytes), or with a unit: 8GiB, 900MB.")]
BudgetOrAll = Annotated[
    str | None,
    typer.Option("--max-gpu-gb", help="GB (10^9 bytes), or with a unit: 8GiB, 900MB. Default: what the device has."),
]
HostBudget = Annotated[
    str | None,
    typer.Option(
        "--max-cpu-gb", help="The same of host memory; beyond it weights rest on disk. Default: what there is."
    ),
]
Group = Annotated[int, typer.Option("--group", min=1, help="Microbatches that share a pass, each like the batch.")]
GroupOrStudys = Annotated[
    int | None, typer.Option("--group", min=1, help="Microbatches that share a pass. Default: the study's, or 1.")
]
ModeName = Annotated[
    str, typer.Option("--mode", help="inference, or training: forward and backward, where step returns the loss.")
]
MaxTrials = Annotated[int | None, typer.Option(help="Most validations of the study. Default: 8, or 25 passes' time.")]
Timeout = Annotated[float | None, typer.Option("--timeout-s", help="Seconds after which no validation begins.")]
Isolate = Annotated[
    bool,
    typer.Option("--isolate", help="Validate in another process: a crash, hang or kill ends that trial alone."),
]
TrialTimeout = Annotated[
    float | None,
    typer.Option(help="With --isolate: when a trial hangs. Default: from predictions."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", dir_okay=False, help="Write the plan here, as JSON.")]
PlanFile = Annotated[Path, typer.Option("--plan", exists=True, dir_okay=False, help="A plan's JSON.")]
Plot = Annotated[Path | None, typer.Option(dir_okay=False, help="Draw a picture: .png, .svg or .pdf.")]
