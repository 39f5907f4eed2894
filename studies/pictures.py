"""The pictures and the trace of a real model under a budget: predicted beside measured, on this machine.

python studies/pictures.py minilm [--max-gpu-gb 0.06] [--passes 4]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from record import RESULTS

import autosp
from autosp.answers import draw_front, print_traffic
from autosp.demo.models import load
from autosp.devices import choose_device
from autosp.report.plots import timeline
from autosp.report.trace import save_trace
from autosp.report.traffic import expected, periods_of
from autosp.store import Repository
from autosp.workload import Workload, parse_budget

LARGEST_TRACE_BYTES = 300_000
"""A trace beyond this is not worth keeping beside the code."""


def main() -> None:
    """Tune, run a few passes under the plan, and draw the front, the timeline and the trace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["minilm", "llama-1b"])
    parser.add_argument("--max-gpu-gb", type=float)
    parser.add_argument("--passes", type=int, default=4)
    arguments = parser.parse_args()
    example = load(arguments.model)
    budget = arguments.max_gpu_gb or example.budget_gb
    device = choose_device(None)
    name = f"{arguments.model}_{device.info.kind}"
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Repository(Path(folder) / "study.db") as repository:
        plan = autosp.tune(example.model, example.batch, budget, step=example.step, storage=repository.url)
        profile = repository.profile(plan.study_name or "")
        trials = repository.trials(plan.study_name or "")
    assert profile is not None, "tune stored it"
    draw_front(profile, trials, [parse_budget(budget)], plan.host_budget_bytes, RESULTS / f"front_{name}.png", plan)

    workload = Workload.of(example.model, example.batch, example.step, "inference", device)
    streamed = autosp.apply(example.model, plan)
    with streamed:
        for _ in range(arguments.passes):
            workload.run()
        measured = streamed.timeline()
    timeline(profile, plan.candidate, RESULTS / f"timeline_{name}.png", plan.budget_bytes, measured)
    predicted = expected(profile, plan.candidate, periods_of(measured, plan.partition, plan.candidate))
    print_traffic(plan, predicted, measured)
    trace = RESULTS / f"trace_{name}.json"
    save_trace(trace, plan, predicted, measured)
    n_bytes = trace.stat().st_size
    if n_bytes > LARGEST_TRACE_BYTES:
        trace.unlink()
    print(f"trace of {n_bytes / 1e3:.0f} kB {'kept' if trace.exists() else 'dropped'}; pictures in {RESULTS}")


if __name__ == "__main__":
    main()
