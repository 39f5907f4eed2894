"""The demo's figures: latency / floor, peak / budget, the peer, and every validated candidate's prediction.

python studies/end_to_end.py minilm
python studies/end_to_end.py llama-1b [--max-gpu-gb 0.55]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

from record import RESULTS, markdown, save
from rich.console import Console

from autosp.demo import DemoResult, run
from autosp.devices import choose_device
from autosp.report.plots import timeline
from autosp.store import Repository


def report(result: DemoResult) -> str:
    """The comparison and the trials, as two tables with the prediction error under them."""
    floor_s = result.plan.floor_s or 0.0
    rows = [
        [
            "plain, all weights in memory",
            f"{result.plain_s:.4f}",
            "",
            f"{result.weight_bytes / 1e6:.1f} + activations",
            "",
            "",
        ]
    ]
    for row in result.rows:
        rows.append(
            [
                row.name,
                f"{row.latency_s:.4f}",
                f"{row.latency_s / floor_s:.3f}",
                f"{row.peak_bytes / 1e6:.1f}",
                f"{row.peak_bytes / result.budget_bytes:.3f}",
                "equal" if row.same_output else "differs",
            ]
        )
    head = f"{result.title}; budget {result.budget_bytes / 1e6:.1f} MB; floor {floor_s:.4f} s"
    table = markdown(["", "latency, s", "÷ floor", "peak, MB", "÷ budget", "output"], rows)
    trials = []
    errors = []
    for trial in result.trials:
        predicted, measured = trial.prediction, trial.measurement
        if measured.latency_s:
            errors.append(abs(predicted.latency_s / measured.latency_s - 1))
        trials.append(
            [
                str(trial.number),
                predicted.candidate.label(),
                f"{predicted.latency_s:.4f}",
                f"{measured.latency_s:.4f}",
                f"{predicted.latency_s / measured.latency_s - 1:+.1%}" if measured.latency_s else "",
                f"{predicted.peak_bytes / 1e6:.1f}",
                f"{measured.peak_bytes / 1e6:.1f}",
                measured.outcome.value,
            ]
        )
    columns = ["trial", "candidate", "predicted, s", "measured, s", "error", "predicted, MB", "measured, MB", "outcome"]
    summary = f"prediction error: median {median(errors):.1%}, worst {max(errors):.1%}, of {len(errors)} trials"
    return f"{head}\n\n{table}\n\n{markdown(columns, trials)}\n\n{summary}\n\nwhy: {result.plan.why}"


def main() -> None:
    """Run the demo with a database of its own and keep what it showed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["minilm", "llama-1b"])
    parser.add_argument("--max-gpu-gb")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(
            arguments.model,
            max_gpu_gb=float(arguments.max_gpu_gb) if arguments.max_gpu_gb else None,
            storage=Path(folder) / "study.db",
            output=Path(folder) / "plan.json",
            console=Console(width=120),
        )
        with Repository(Path(folder) / "study.db") as repository:
            profile = repository.profile(result.plan.study_name or "")
    budget = f"_{arguments.max_gpu_gb}gb" if arguments.max_gpu_gb else ""
    name = f"end_to_end_{arguments.model}{budget}_{choose_device(None).info.kind}"
    if profile is not None:
        timeline(profile, result.plan.candidate, RESULTS / f"{name}.png", budget_bytes=result.budget_bytes)
    figures = {
        "title": result.title,
        "weight_bytes": result.weight_bytes,
        "budget_bytes": result.budget_bytes,
        "plain_s": result.plain_s,
        "plan": result.plan.model_dump(mode="json"),
        "trials": [trial.model_dump(mode="json") for trial in result.trials],
        "systems": [vars(row) for row in result.rows],
    }
    save(name, figures, report(result))


if __name__ == "__main__":
    main()
