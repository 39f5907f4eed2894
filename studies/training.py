"""Training, measured: one command per table.

python studies/training.py floors [--paced 2]     time ÷ floor, budgets of 25, 50 and 75 % of plain training's peak
python studies/training.py headline [--paced 2]   time ÷ plain training's, in 40 % of its peak, by microbatches

A machine without an accelerator stands in for one: device and host are both RAM, and each direction of the link
between them is paced to so many GB/s. A pass is forward and backward, without an optimizer. Every measurement is a
process of its own. Rows are appended to results/training_<study>_<scale>.jsonl one by one, and what is there already is
not measured again, unless with --again. The table and the picture are made beside the rows; --report makes them without
measuring.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from kept_rows import Results, add_arguments, write_report
from training_floors import FLOORS
from training_headline import HEADLINE
from training_measure import Run, TrainingRow, run_job
from training_models import SCALES

from autosp.devices import CpuDevice
from autosp.settings import settings
from autosp.spec import Tier

STUDIES = {"floors": FLOORS, "headline": HEADLINE}


def main(arguments: list[str] | None = None, answer: Callable[..., Any] | None = None) -> None:
    """Measure what is missing, then write the table and the picture. `answer` runs a measurement otherwise."""
    asked = _parser().parse_args(arguments)
    raw = asked.output / f"training_{asked.study}_{asked.scale}.jsonl"
    if not asked.report:
        scratch = asked.scratch or settings().cache_dir
        scratch.mkdir(parents=True, exist_ok=True)
        device = CpuDevice(slow_tier=Tier.HOST, paced_bytes_per_s=asked.paced * 1e9)
        made = partial(Results, answer=answer) if answer else Results
        results = made(raw, TrainingRow, device, run_job, again=asked.again, timeout_s=asked.timeout_s)
        run = Run(
            asked.scale,
            models=asked.models.split(",") if asked.models else [],
            budgets=[float(part) for part in asked.budgets.split(",")],
            microbatches=[int(part) for part in asked.microbatches.split(",")],
            repeats=asked.repeats,
            paced_gb_per_s=asked.paced,
            scratch=scratch,
            results=results,
        )
        STUDIES[asked.study].run(run)
    write_report(STUDIES[asked.study], raw, TrainingRow)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--models", help="default: all that the study is about")
    parser.add_argument("--budgets", default="25,50,75", help="of floors: percent of plain training's peak")
    parser.add_argument("--microbatches", default="1,2,4,8,16", help="of headline")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--paced", type=float, default=2.0, metavar="GBPS", help="each direction of the link, in GB/s")
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
