"""Architectures of the installed transformers, trained under autosp, bit for bit.

python studies/train_zoo.py [--types bert,llama,…] [--device cpu] [--minutes 9] [--jobs 2] [--limit-s 120]

Three steps in training mode (with dropout) of SGD or Adam, by turns, under five plans. Every model type runs in a
process of its own: a crash or a hang of one is a row of the table. A run of all types can be made in pieces: each adds
to the results what is not in them yet, and with `--minutes` it begins nothing more after so long.

Streamed layers are updated on the host: where an accelerator's own update rounds otherwise than the host's, weights and
the gradients of later steps are not those of training that is all on it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from record import RESULTS, markdown, save

from autosp.devices import choose_device
from train_zoo_checks import STEPS, examine
from zoo import kind_of, run_all
from zoo_models import MODEL_TYPES

SETTINGS = ("window of one", "half, a quarter at a time", "residents", "all recomputed", "updates beside")
Record = dict[str, Any]
"""A row, as in the results."""


def known(name: str) -> list[Record]:
    """What was run before and came to an end: a crash, or a process that took too long, is tried again."""
    path = RESULTS / f"{name}.json"
    records: list[Record] = json.loads(path.read_text())["figures"] if path.exists() else []
    return [one for one in records if not one["crashed"]]


def report(records: Sequence[Record]) -> str:
    """Failures first, then the table, then what could not be trained."""
    failed = [[one["model_type"], one["why"]] for one in records if one["failed"]]
    trained = [one for one in records if one["finding"]]
    others = sorted(
        [kind_of(one["not_built"]), one["model_type"], one["not_built"].replace("|", "/")]
        for one in records
        if one["not_built"]
    )
    parts = [summary(records)]
    if failed:
        parts.append("## Failures\n\n" + markdown(["model type", "what failed"], failed))
    columns = ["model type", "class", "optimizer", "MB", "layers", "backward", *SETTINGS, "remark"]
    parts.append(
        "## Models\n\nUnder each plan: whether the gradients of every step, and the weights after the last, have the "
        "bits of plain training; and how many loads were missed.\n\n"
        + markdown(columns, [_cells(one["finding"]) for one in trained])
    )
    parts.append("## Not trained\n\n" + markdown(["kind", "model type", "why"], others))
    return "\n\n".join(parts)


def summary(records: Sequence[Record]) -> str:
    """How many of how many."""
    found = [one["finding"] for one in records if one["finding"]]
    passed = [one for one in found if not one["problems"]]
    bound = [one for one in passed if not one["remarks"]]
    plans = sum(len(one["outcomes"]) for one in passed)
    return (
        f"{len(records)} of {len(MODEL_TYPES)} model types tried, {len(found)} train plainly; under autosp "
        f"{len(passed)} of them pass under {plans} plans of {STEPS} steps, {len(bound)} of "
        f"these bitwise equal, {len(passed) - len(bound)} that do not repeat themselves in plain training; "
        f"{sum(one['failed'] for one in records)} fail"
    )


def _cells(finding: Record) -> list[str]:
    outcomes = {outcome["setting"]: outcome for outcome in finding["outcomes"]}
    plans = []
    for name in SETTINGS:
        outcome = outcomes.get(name)
        signs = outcome and ["=" if outcome[key] else "≠" for key in ("gradients_equal", "weights_equal")]
        plans.append(f"{''.join(signs)} {outcome['misses']}" if outcome and signs else "")
    return [
        finding["model_type"],
        finding["class_name"],
        finding["optimizer"],
        f"{finding['weight_bytes'] / 1e6:.2f}",
        str(finding["layers"]),
        str(finding["backward_layers"]),
        *plans,
        "; ".join(finding["remarks"]),
    ]


def main() -> None:
    """Run the types, say how it goes, add them to the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="comma-separated model types; default: all")
    parser.add_argument("--device", help="default: an accelerator, if there is one")
    parser.add_argument("--minutes", type=float, default=None, help="begin no type after so long; default: all of them")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=120.0, help="per model type")
    arguments = parser.parse_args()
    device = arguments.device or str(choose_device(None, "training").torch_device)
    name = f"train_zoo_{torch.device(device).type}"
    records = known(name)
    chosen = arguments.types.split(",") if arguments.types else list(MODEL_TYPES)
    done = {one["model_type"] for one in records}
    left = [one for one in chosen if one not in done]
    end = time.monotonic() + 60 * (arguments.minutes or float("inf"))
    todo = (one for one in left if time.monotonic() < end)
    for number, row in enumerate(run_all(todo, arguments.jobs, arguments.limit_s, partial(examine, device=device)), 1):
        records.append({**row.record(), "why": row.why})
        verdict = "FAILED " + row.why if row.failed else "passed" if row.finding else f"not trained: {row.not_built}"
        print(f"{number}/{len(left)} {row.model_type} {row.seconds:.1f} s {verdict}", file=sys.stderr)
    records.sort(key=lambda one: one["model_type"])
    save(name, records, report(records))
    sys.exit(any(one["failed"] for one in records))


if __name__ == "__main__":
    main()
