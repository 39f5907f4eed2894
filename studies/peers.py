"""autosp beside other systems that offload weights: same model, same batch, same memory cap, one run, interleaved.

python studies/peers.py --scale cpu [--models llama-prefill,vit] [--budgets 10,25,50,75,90] [--repeats 2]
python studies/peers.py --scale cpu --paced 2            a stand-in for a link, for a machine without an accelerator
python studies/peers.py --report [--paced 2]

Every measurement is a process of its own. Raw results are appended to results/peers_<kind>.jsonl one by one; what is
there already is not measured again. Budgets are in percent of the weights' bytes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from isolation import NoAnswerError, answer_of
from peer_measure import TUNE, Job, Row, row_of, run_job, systems_of
from peer_models import MODELS, SCALES
from peer_points import Key, key_of, read_rows
from peer_report import write_report
from peer_systems import PLAIN
from record import RESULTS, environment

from autosp.devices import choose_device
from autosp.settings import settings

MOST_RUNS = 6
"""In which a share of the budget is sought that keeps a system's peak within it."""

LEFT_FREE = 0.01
"""Of the budget, when a share is lowered by what the peak was over it."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    models: list[str]
    budgets: list[float]
    systems: list[str]
    scale: str
    repeats: int
    timeout_s: float
    paced_bytes_per_s: float | None
    on_cpu: bool
    fresh: bool
    raw: Path


def main() -> None:
    """Measure what is missing, then write the report."""
    arguments = _parser().parse_args()
    paced = None if arguments.paced is None else arguments.paced * 1e9
    kind = choose_device(None).info.kind
    name = f"peers_{kind if paced is None else 'paced'}"
    known = systems_of(paced)
    options = Options(
        models=_chosen(arguments.models, list(MODELS), "--models"),
        budgets=[float(text) for text in arguments.budgets.split(",")],
        systems=_chosen(arguments.systems or ",".join(known), list(known), "--systems"),
        scale=arguments.scale,
        repeats=arguments.repeats,
        timeout_s=arguments.timeout_s,
        paced_bytes_per_s=paced,
        on_cpu=paced is not None or kind == "cpu",
        fresh=arguments.fresh,
        raw=arguments.output / f"{name}.jsonl",
    )
    options.raw.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        run_all(options, arguments.scratch)
    write_report(options.raw, known, options.scale, paced)


def run_all(options: Options, scratch: Path | None) -> None:
    """Every missing measurement, interleaved: each system once, before the next repeat begins."""
    parent = scratch or settings().cache_dir
    parent.mkdir(parents=True, exist_ok=True)
    rows = [] if options.fresh else read_rows(options.raw)
    results = Results(options, {key_of(row): row for row in rows})
    results.append({"environment": environment()})
    for model in options.models:
        with tempfile.TemporaryDirectory(dir=parent, prefix="peers-") as folder:
            for repeat in range(options.repeats):
                first = Job(model, options.scale, PLAIN, repeat, folder, paced_bytes_per_s=options.paced_bytes_per_s)
                run_repeat(first, results)


class Results:
    """The rows so far, in memory and on disk."""

    def __init__(self, options: Options, rows: dict[Key, Row]) -> None:
        self.options = options
        self.rows = rows

    def has(self, job: Job) -> bool:
        """Whether the job was measured already."""
        return key_of(row_of(job)) in self.rows

    def measured(self, job: Job) -> Row:
        """The job's row, measured now if it is not there."""
        if not self.has(job):
            self.keep(in_a_process(job, self.options.timeout_s))
        return self.rows[key_of(row_of(job))]

    def keep(self, row: Row) -> None:
        """Add a row; a line says what it is."""
        self.rows[key_of(row)] = row
        self.append(asdict(row))
        said = row.note
        if row.samples_s:
            said = f"{median(row.samples_s):.4f} s, peak {(row.peak_bytes or 0) / 1e9:.4f} GB {said}"
        at = "" if row.budget_percent is None else f" at {row.budget_percent:g} %"
        print(f"{row.model}{at}, repeat {row.repeat}: {row.system}: {row.outcome} {said}", flush=True)

    def append(self, line: dict[str, Any]) -> None:
        """One line of the raw results."""
        with self.options.raw.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def run_repeat(first: Job, results: Results) -> None:
    """One repeat of one model: the plain model, what no budget changes, then budget by budget."""
    options = results.options
    known = systems_of(options.paced_bytes_per_s)
    systems = [name for name in options.systems if name != PLAIN]
    plain = results.measured(first)
    if plain.outcome != "ok":
        return
    first = replace(first, reference=plain.digest)
    for system in systems:
        if not known[system].budgeted(options.on_cpu):
            results.measured(replace(first, system=system))
    for percent in options.budgets:
        budget = replace(first, budget_percent=percent, budget_bytes=round(plain.weight_bytes * percent / 100))
        jobs = [replace(budget, system=system) for system in systems if known[system].budgeted(options.on_cpu)]
        if not all(results.has(job) for job in jobs):
            tuned = in_a_process(replace(budget, system=TUNE), options.timeout_s)
            results.keep(tuned)
            for job in jobs:
                run_budgeted(job, tuned, results)


def run_budgeted(job: Job, tuned: Row, results: Results) -> None:
    """One system at one budget: with its plan if it runs one, with the share that holds the budget if it takes one."""
    system = systems_of(job.paced_bytes_per_s)[job.system]
    if results.has(job):
        return
    if system.planned and not (job.plans / f"{job.system}.json").exists():
        note = tuned.note or f"the least that works is {(tuned.figures['least_bytes'] or 0) / 1e9:.3f} GB"
        note = note if tuned.outcome != "ok" else "no such setting is predicted to fit"
        results.keep(row_of(job, outcome="too small" if tuned.outcome == "ok" else tuned.outcome, note=note))
    elif system.shares:
        results.keep(with_share(job, results))
    else:
        results.measured(job)


def with_share(job: Job, results: Results) -> Row:
    """As a user would by hand: lower the share of the budget that weights may take by what the peak was over it.

    It is never lowered by more than half at once: the peak need not follow the share. A later repeat begins with the
    share that the first one found. The last run counts, within the budget or not; where a still smaller share cannot
    be run, the one before it.
    """
    assert job.budget_bytes is not None
    before = results.rows.get(key_of(row_of(replace(job, repeat=0))))
    share = before.share_bytes if before is not None and before.share_bytes is not None else job.budget_bytes
    ran: Row | None = None
    for run in range(1, MOST_RUNS + 1):
        row = in_a_process(replace(job, share_bytes=share), results.options.timeout_s)
        if row.outcome not in ("ok", "out of memory"):
            return ran or row
        ran = replace(row, note=row.note or f"weights' share {share / job.budget_bytes:.2f} of the budget, run {run}")
        over_bytes = share // 4 if row.peak_bytes is None else row.peak_bytes - job.budget_bytes
        if over_bytes <= 0:
            return ran
        share = max(share - over_bytes - round(LEFT_FREE * job.budget_bytes), share // 2)
    assert ran is not None, "there is at least one run"
    return ran


def in_a_process(job: Job, timeout_s: float) -> Row:
    """Run the job in a fresh process: memory is comparable, and a crash is a row."""
    try:
        return Row(**answer_of(run_job, job, Path(job.scratch), timeout_s))
    except NoAnswerError as error:
        return row_of(job, outcome=error.outcome, note=str(error))


def _chosen(text: str, known: list[str], option: str) -> list[str]:
    names = text.split(",")
    wrong = [name for name in names if name not in known]
    if wrong:
        raise SystemExit(f"{option} {','.join(wrong)}: there are {', '.join(known)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--budgets", default="10,25,50,75,90", help="percent of the weights")
    parser.add_argument("--systems", help="default: all")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--paced", type=float, metavar="GBPS", help="compare policies over a link paced to so many GB/s"
    )
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="of one measurement")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--report", action="store_true", help="only make the tables and the picture")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--scratch", type=Path, help="folder on a real disk for offloaded weights; default: the cache")
    return parser


if __name__ == "__main__":
    main()
