"""The disk tier, measured: one command per table.

python studies/disk_tier.py floors         time ÷ floor, budgets of 5, 12, 25 and 50 % of 4.42 GB of weights
python studies/disk_tier.py window         memory reduction against delay, over window sizes
python studies/disk_tier.py accelerate     beside accelerate's disk_offload
python studies/disk_tier.py readers        what reading costs compute, and the disk by block size
python studies/disk_tier.py plans          only the plans that the others run (they search what is missing)

Every measurement is a process of its own; systems are interleaved. Rows are appended to results/disk_<study>_<scale>
.jsonl one by one, and what is there already is not measured again, unless with --again. The table and the picture are
made beside the rows; --report makes them without measuring. The scratch folder must be on the disk that is meant; the
checkpoint stays there for the next command, and takes 4.4 GB, accelerate's copy as much again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from disk_accelerate import ACCELERATE
from disk_floors import FLOORS
from disk_measure import CHECKPOINT, run_job
from disk_models import SCALES, checkpoint_of
from disk_readers import READING
from disk_results import Case, Job, Results, Row, raw_path
from disk_study import Run
from disk_window import WINDOWS
from kept_rows import Study, add_arguments, write_report

from autosp.settings import settings

STUDIES: dict[str, Study] = {"floors": FLOORS, "window": WINDOWS, "accelerate": ACCELERATE, "readers": READING}
PLANS = "plans"
REPEATS = {"floors": 2, "window": 2, "accelerate": 2, "readers": 1}


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, then write the table and the picture."""
    asked = _parser().parse_args(arguments)
    name = asked.study
    if not asked.report:
        scratch = asked.scratch or settings().cache_dir
        scratch.mkdir(parents=True, exist_ok=True)
        measure(name, asked, scratch.resolve())
    if name != PLANS:
        write_report(STUDIES[name], raw_path(name, asked.scale, asked.output), Row)


def measure(name: str, asked: argparse.Namespace, scratch: Path) -> None:
    """Every missing row of a study.

    Raises: SystemExit if the checkpoint could not be made.
    """

    def kept_in(study: str) -> Results:
        raw = raw_path(study, asked.scale, asked.output)
        return Results(raw, run_job, again=asked.again and study == name, timeout_s=asked.timeout_s)

    plans = kept_in(PLANS)
    known = SCALES[asked.scale]
    repeats = asked.repeats or REPEATS.get(name, 1)
    tokens = _numbers(asked.tokens, known.tokens, int)
    budgets = _numbers(asked.budgets, (5.0, 12.0, 25.0, 50.0), float)
    run = Run(asked.scale, scratch, tokens, budgets, repeats, plans if name == PLANS else kept_in(name), plans)
    if not checkpoint_of(scratch, asked.scale).exists():
        made = plans.fresh(Job(Case(asked.scale, CHECKPOINT), str(scratch)))
        if not made.ok:
            raise SystemExit(f"the checkpoint could not be made: {made.note}")
    if name == PLANS:
        for length in tokens:
            for percent in budgets:
                run.tuned(length, percent)
    else:
        STUDIES[name].run(run)


def _numbers(text: str | None, default: tuple[int, ...] | tuple[float, ...], kind: type) -> tuple:
    return tuple(kind(part) for part in text.split(",")) if text else default


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, PLANS])
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--tokens", help="lengths of the batch; default: those of the scale")
    parser.add_argument("--budgets", help="percent of the weights; default: 5,12,25,50")
    parser.add_argument("--repeats", type=int, help="default: 2, of readers 1")
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
