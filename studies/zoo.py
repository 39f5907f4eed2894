"""Every architecture of the installed transformers under autosp, bit for bit.

python studies/zoo.py [--types bert,llama,…] [--device cpu] [--jobs 2] [--limit-s 90]

Every model type runs in a process of its own: a crash, a hang or an abort of one is a row of the table.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch
from record import RESULTS, markdown, save

from autosp.devices import choose_device
from zoo_checks import Finding, examine
from zoo_models import MODEL_TYPES, NotBuiltError, Specimen, build

MEMORY_BYTES = 6 * 2**30
SETTINGS = ("window of one", "residents", "two at a time", "all resident")


class Found(Protocol):
    """What an examination comes to."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Failures of autosp."""

    def record(self) -> dict[str, Any]:
        """For JSON."""


@dataclass(frozen=True)
class Row:
    """What became of one model type: a finding, or the reason why there is none."""

    model_type: str
    seconds: float
    finding: Any = None
    """A `Found`."""
    not_built: str = ""
    crashed: str = ""

    @property
    def failed(self) -> bool:
        """Whether autosp is to blame, or may be."""
        return bool(self.crashed) or (self.finding is not None and bool(self.finding.problems))

    @property
    def why(self) -> str:
        """What failed."""
        return self.crashed or "; ".join(self.finding.problems if self.finding else ())

    def record(self) -> dict[str, Any]:
        """For JSON."""
        found = self.finding.record() if self.finding else None
        return {**vars(self), "finding": found, "failed": self.failed}


Examine = Callable[[Specimen], Found]
"""Raises: NotBuiltError if there is nothing to examine."""


def work(examine: Examine, model_type: str, folder: str, pipe: Connection) -> None:
    """Build and examine one type, in a process of its own."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    os.environ |= {"AUTOSP_CACHE_DIR": f"{folder}/{model_type}", "AUTOSP_STORAGE": f"{folder}/{model_type}.db"}
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        answer: Found | str = examine(build(model_type))
    except NotBuiltError as error:
        answer = str(error)
    pipe.send(answer)


def run_all(model_types: Iterable[str], jobs: int, limit_s: float, examine: Examine = examine) -> Iterator[Row]:
    """A row per type, in the order in which they end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "zoo_checks", "transformers.modeling_utils"])
    todo = iter(model_types)
    more = True
    running: dict[Connection, tuple[str, BaseProcess, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while more or running:
            while more and len(running) < jobs:
                model_type = next(todo, None)
                if model_type is None:
                    more = False
                    break
                ours, theirs = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(target=work, args=(examine, model_type, folder, theirs))
                process.start()
                theirs.close()
                running[ours] = model_type, process, time.monotonic()
            ready = wait(list(running), timeout=1.0)
            for pipe, (model_type, process, start) in list(running.items()):
                late = time.monotonic() - start > limit_s
                if pipe not in ready and not late:
                    continue
                row = _row(model_type, process, pipe if pipe in ready else None, time.monotonic() - start)
                del running[pipe]
                pipe.close()
                yield row


def _row(model_type: str, process: BaseProcess, pipe: Connection | None, seconds: float) -> Row:
    if pipe is None:
        process.kill()
        process.join()
        return Row(model_type, seconds, crashed=f"did not end in {seconds:.0f} s")
    try:
        answer = pipe.recv()
    except EOFError:
        process.join()
        return Row(model_type, seconds, crashed=f"the process died with {process.exitcode}")
    process.join()
    if isinstance(answer, str):
        return Row(model_type, seconds, not_built=answer)
    return Row(model_type, seconds, finding=answer)


def report(rows: Sequence[Row]) -> str:
    """Failures first, then the table, then what could not be built."""
    failed = [row for row in rows if row.failed]
    found = [row for row in rows if row.finding]
    not_built = [row for row in rows if row.not_built]
    parts = [summary(rows)]
    if failed:
        lines = [[row.model_type, row.why] for row in failed]
        parts.append("## Failures\n\n" + markdown(["model type", "what failed"], lines))
    columns = ["model type", "class", "inputs", "MB", "layers", *(f"{name}: =, misses" for name in SETTINGS)]
    columns += ["other batch: =, misses", "restored", "remark"]
    parts.append("## Models\n\n" + markdown(columns, [_cells(row.finding) for row in found if row.finding]))
    lines = sorted([kind_of(row.not_built), row.model_type, row.not_built.replace("|", "/")] for row in not_built)
    parts.append("## Not built or not run\n\n" + markdown(["kind", "model type", "why"], lines))
    return "\n\n".join(parts)


def kind_of(reason: str) -> str:
    """Why a type is not in the table, in a few words."""
    package = re.search(r"requires the (\w+) library|No module named '(?!transformers)(\w+)", reason)
    if package:
        return f"needs the package {package[1] or package[2]}"
    if any(
        text in reason for text in ("LookupError", 'missing the required "forward"', "No module named 'transformers")
    ):
        return "no model of its own"
    if reason.startswith("plain pass on"):
        return "does not run on this device by itself"
    if reason.startswith("constructor"):
        return "needs a configuration made by hand"
    return "needs inputs made by hand"


def summary(rows: Sequence[Row]) -> str:
    """How many of how many."""
    found = [row.finding for row in rows if row.finding]
    plans = sum(len(finding.outcomes) for finding in found)
    still = sum(not finding.outcomes[0].misses for finding in found if finding.outcomes)
    return (
        f"{len(rows)} model types, {len(found)} run plainly; under autosp {sum(f.passed for f in found)} of them pass "
        f"under {plans} plans, {sum(row.failed for row in rows)} fail; {still} have no miss under a window of one; "
        f"{sum(f.other_batch == 'equal' for f in found)} are equal on a batch of another size; "
        f"{len(rows) - len(found)} not built or not run"
    )


def _cells(finding: Finding) -> list[str]:
    outcomes = {outcome.setting.name: outcome for outcome in finding.outcomes}
    tried = [outcomes.get(name) for name in SETTINGS]
    plans = [f"{'=' if outcome.equal else '≠'} {outcome.misses}" if outcome else "" for outcome in tried]
    return [
        finding.model_type,
        finding.class_name,
        ", ".join(finding.inputs),
        f"{finding.weight_bytes / 1e6:.2f}",
        f"{finding.visited_layers}/{finding.layers}",
        *plans,
        f"= {finding.other_misses}" if finding.other_batch == "equal" else finding.other_batch,
        "yes" if finding.restored else "no",
        "; ".join(finding.remarks),
    ]


def main() -> None:
    """Run the types, say how it goes, keep the table if all were run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", help="comma-separated model types; default: all")
    parser.add_argument("--device", help="default: an accelerator, if there is one")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=90.0, help="per model type")
    arguments = parser.parse_args()
    chosen = arguments.types.split(",") if arguments.types else MODEL_TYPES
    device = arguments.device or str(choose_device(None).torch_device)
    rows = []
    for row in run_all(chosen, arguments.jobs, arguments.limit_s, partial(examine, device=device)):
        rows.append(row)
        verdict = f"FAILED {row.why}" if row.failed else "passed" if row.finding else f"not run: {row.not_built}"
        print(f"{len(rows)}/{len(chosen)} {row.model_type} {row.seconds:.1f} s {verdict}", file=sys.stderr)
    rows.sort(key=lambda row: row.model_type)
    if arguments.types:
        print(report(rows))
    else:
        name = f"zoo_{torch.device(device).type}"
        save(name, [row.record() for row in rows], report(rows))
        print(Path(RESULTS) / f"{name}.md")
    sys.exit(any(row.failed for row in rows))


if __name__ == "__main__":
    main()
