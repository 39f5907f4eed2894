"""The tuner, measured against its targets: one command per table.

python studies/tuner.py accuracy     predicted latency and memory against measurements, over the range of plans
python studies/tuner.py regret       the chosen plan against the best there is; how long and how many trials it took
python studies/tuner.py budget       random models, batches and budgets: is the budget kept?
python studies/tuner.py samplers     our sampler beside optuna's, on the candidates that accuracy measured
python studies/tuner.py all          the targets and what the other commands found, from their rows

--device disk (default) streams from disk to RAM, paced from RAM at the pace of a link, accelerator from host memory.
Every measurement is a process of its own. Rows are appended to results/tuner_<study>_<device>.jsonl one by one, and
what is there already is not measured again, unless with --again. The table and the picture are made beside the rows;
--report makes them without measuring. The scratch folder must be on the disk that is meant. A machine that does
something else meanwhile spoils all figures but the budget's.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import tuner_accuracy
import tuner_budget
import tuner_regret
import tuner_samplers
from isolation import answer_of, forked_answer_of
from kept_rows import Answer, Results, Study, add_arguments, answering, head_of, rows_in, write_report
from tuner_accuracy import ACCURACY
from tuner_budget import BUDGET, in_two_processes
from tuner_models import DEFAULT, NAMES, SCALES
from tuner_regret import REGRET
from tuner_results import DEVICES, Row, Run, raw_path
from tuner_samplers import SAMPLING
from tuner_targets import targets

from autosp.settings import settings

ALL = "all"

STUDIES: dict[str, Study] = {"accuracy": ACCURACY, "regret": REGRET, "budget": BUDGET, "samplers": SAMPLING}

WORK = {
    "accuracy": tuner_accuracy.measure,
    "regret": tuner_regret.measure,
    "budget": tuner_budget.measure,
    "samplers": tuner_samplers.measure,
}
"""What a study's processes do."""

BUDGETS = {"samplers": (50.0,)}

COUNTS = ("candidates", "rounds", "top", "random", "draws", "first", "seeds")


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, then write the table and the picture."""
    asked = _parser().parse_args(arguments)
    if asked.study == ALL:
        write_targets(asked.device, asked.output)
        return
    if not asked.report:
        scratch = asked.scratch or settings().cache_dir
        scratch.mkdir(parents=True, exist_ok=True)
        measure(asked.study, asked, scratch.resolve())
    write_report(STUDIES[asked.study], raw_path(asked.study, asked.device, asked.output), Row)


def measure(name: str, asked: argparse.Namespace, scratch: Path) -> None:
    """Every missing row of a study."""
    results = Results(
        raw_path(name, asked.device, asked.output),
        Row,
        DEVICES[asked.device](),
        partial(answering, WORK[name]),
        again=asked.again,
        timeout_s=asked.timeout_s,
        answer=answer_for(name, asked.device),
    )
    run = Run(
        device=asked.device,
        scale=asked.scale or ("gpu" if asked.device == "accelerator" else "cpu"),
        scratch=scratch,
        models=tuple(asked.models.split(",")),
        results=results,
        sources=latest(raw_path("accuracy", asked.device, asked.output)),
        budgets=_numbers(asked.budgets) or BUDGETS.get(name, Run.budgets),
        numbers={count: getattr(asked, count) for count in COUNTS},
    )
    STUDIES[name].run(run)


def answer_for(name: str, kind: str) -> Answer:
    """How a study's processes are started. The many small ones of the budget are forked, where no driver forbids it."""
    if name != "budget":
        return answer_of
    return partial(in_two_processes, answer_of if kind == "accelerator" else forked_answer_of)


def write_targets(kind: str, folder: Path) -> None:
    """The table of the targets, from the rows of all studies on that kind of device."""
    rows = {name: latest(raw_path(name, kind, folder)) for name in STUDIES}
    text = targets(rows)
    known = [row for study in rows.values() for row in study]
    if known:
        path = folder / f"tuner_{kind}.md"
        path.write_text(f"# The tuner's targets\n\n{head_of(known)}\n\n{text}\n", encoding="utf-8")
    print(text)


def latest(raw: Path) -> list[Row]:
    """Of each case its last row."""
    return list({row.case: row for row in rows_in(raw, Row)}.values())


def _numbers(text: str | None) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",")) if text else ()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, ALL])
    parser.add_argument("--device", choices=DEVICES, default="disk")
    parser.add_argument("--models", default=",".join(DEFAULT), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--scale", choices=SCALES, help="default: cpu, on an accelerator gpu")
    parser.add_argument("--budgets", help="percent of the weights; default: 25,50,75, of samplers 50")
    parser.add_argument("--candidates", type=int, default=40, help="accuracy: how many are measured, at most")
    parser.add_argument("--rounds", type=int, default=5, help="accuracy, regret: measurements of each candidate")
    parser.add_argument("--top", type=int, default=8, help="regret: best predicted candidates beside the plan")
    parser.add_argument("--random", type=int, default=8, help="regret: random candidates beside these")
    parser.add_argument("--draws", type=int, default=300, help="budget: how many")
    parser.add_argument("--first", type=int, default=0, help="budget: number of the first draw")
    parser.add_argument("--seeds", type=int, default=20, help="samplers: studies of each")
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
