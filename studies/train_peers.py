"""autosp beside other systems that train with weights or optimizer state in host memory: training steps, one run.

python studies/train_peers.py [--models vit,llama,mlp] [--optimizers SGD,AdamW] [--repeats 2] [--cap-gb 8]

A step is forward, backward and the optimizer's step, from the same initial weights on the same batch. Each system takes
the device memory that it takes with its own settings; then autosp is tuned under exactly that, and runs with
`apply(..., optimizer=)`. With --cap-gb all of them are held to that cap on an accelerator, and autosp is tuned under it
as well. On a machine without an accelerator device and host are both RAM: studies/train_peer_measure.py says how they
are told apart.

Every measurement is a process of its own, interleaved: each system and autosp beside it, before the next repeat begins.
Rows are appended to results/train_peers_<kind>_<scale>.jsonl one by one, and what is there already is not measured
again, unless with --again. The table and the picture are made beside the rows; --report makes them without measuring.
To have DeepSpeed among the systems, run this in an environment that has it beside autosp.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import kept_rows
from kept_rows import Results, Study, add_arguments, write_report
from train_peer_measure import Job, run_job
from train_peer_report import picture, table
from train_peer_systems import OPTIMIZERS, PLAIN, SYSTEMS, TUNED
from training_models import MODELS, SCALES

from autosp.devices import choose_device
from autosp.report.units import seconds, size
from autosp.settings import settings


@dataclass(frozen=True)
class Case:
    """What is measured. autosp is tuned under the peak of the system `beside`; without one, under the cap."""

    model: str
    scale: str
    optimizer: str
    system: str
    repeat: int
    beside: str | None = None
    cap_gb: float | None = None

    def __str__(self) -> str:
        cap = "" if self.cap_gb is None else f" under {self.cap_gb:g} GB"
        beside = "" if self.beside is None else f" with the memory of {self.beside}"
        return f"{self.model}, {self.optimizer}{cap}, repeat {self.repeat}: {self.system}{beside}"


@dataclass(frozen=True)
class Row(kept_rows.Row):
    """One line of the raw results."""

    case_type: ClassVar[type] = Case

    def said(self) -> str:
        """What came of it, in a line."""
        if not self.ok:
            return super().said()
        return f"{seconds(self.figures['step_s'])}, peak {size(self.figures['peak_bytes'])}"


@dataclass(frozen=True)
class Run:
    """What the command line asks for."""

    scale: str
    models: list[str]
    optimizers: list[str]
    systems: list[str]
    repeats: int
    cap_gb: float | None
    scratch: Path
    results: Results[Row]


def run(asked: Run) -> None:
    """Every missing row; a repeat has each system once, and autosp right after it."""
    for model in asked.models:
        for repeat in range(asked.repeats):
            for optimizer in asked.optimizers:
                run_systems(asked, partial(Case, model, asked.scale, optimizer, repeat=repeat, cap_gb=asked.cap_gb))


def run_systems(asked: Run, case: Callable[..., Case]) -> None:
    """One model and optimizer, once."""
    cap_bytes = None if asked.cap_gb is None else round(asked.cap_gb * 1e9)
    job = partial(Job, scratch=str(asked.scratch))
    for system in asked.systems:
        if system == TUNED:
            continue
        row = asked.results.measured(job(case(system), cap_bytes=cap_bytes))
        if row.ok and system != PLAIN and TUNED in asked.systems:
            asked.results.measured(job(case(TUNED, beside=system), cap_bytes=row.figures["peak_bytes"]))
    if cap_bytes is not None and TUNED in asked.systems:
        asked.results.measured(job(case(TUNED), cap_bytes=cap_bytes))


STUDY = Study("Training steps beside other systems that offload", run, table, picture)


def main(arguments: list[str] | None = None, answer: Callable[..., Any] | None = None) -> None:
    """Measure what is missing, then write the table and the picture. `answer` runs a measurement otherwise."""
    asked = _parser().parse_args(arguments)
    device = choose_device(None, "training")
    raw = asked.output / f"train_peers_{device.info.kind}_{asked.scale}.jsonl"
    if not asked.report:
        scratch = asked.scratch or settings().cache_dir
        scratch.mkdir(parents=True, exist_ok=True)
        made = partial(Results, answer=answer) if answer else Results
        results = made(raw, Row, device, run_job, again=asked.again, timeout_s=asked.timeout_s)
        models, optimizers = _chosen(asked.models, MODELS), _chosen(asked.optimizers, OPTIMIZERS)
        systems = _chosen(asked.systems, SYSTEMS)
        run(Run(asked.scale, models, optimizers, systems, asked.repeats, asked.cap_gb, scratch.resolve(), results))
    device.close()
    write_report(STUDY, raw, Row)


def _chosen(text: str, known: dict[str, Any]) -> list[str]:
    names = text.split(",")
    wrong = [name for name in names if name not in known]
    if wrong:
        raise SystemExit(f"{', '.join(wrong)}: there are {', '.join(known)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="default: all")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cap-gb", type=float, help="device memory of every system; default: what each takes")
    add_arguments(parser)
    parser.set_defaults(timeout_s=900.0)
    return parser


if __name__ == "__main__":
    main()
