"""One measurement of the disk tier, made in a process of its own.

[Note: memory and mapped pages] A row has two figures, both of the kernel. `peak_bytes` is the most resident memory
beyond the process with its model mapped and untouched, without pages that stay mapped from weight files: what a budget
is about. `mapped_bytes` is those pages as they are after the passes: page cache that this process looks at. Weights
that a system maps for the moment of their use, and computes from in place, are in the peak: they must be in RAM then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from disk_contention import measure_readers
from disk_files import cached_bytes, disk_rates, read_bytes, unlinked_files, warm
from disk_models import SCALES, checkpoint_of, load, write_checkpoint
from disk_results import Job
from disk_systems import DISK_SYSTEMS, PLAIN, folder_of
from kept_rows import answering
from peer_measure import Memory, digest_of, drop_from_page_cache, files_in, mapped_bytes, timed, until_enough
from peer_plans import make_plans
from peer_systems import Setting, rehearse

import autosp
from autosp.devices import CpuDevice
from autosp.spec import Plan
from autosp.workload import Workload

CHECKPOINT = "checkpoint"
TUNE = "tune"
LAYERS = "layers"
READERS = "readers"
"""Jobs that run no system; the others are named as theirs."""


def run_job(job: Job, answer: str) -> None:
    """Measure, and write the answer. What a system raises is its answer too."""
    answering(WORK.get(job.case.system, run_system), job, answer)


def make_checkpoint(job: Job) -> dict[str, Any]:
    """Write the model's files."""
    write_checkpoint(Path(job.scratch), job.case.scale)
    files = files_in(checkpoint_of(Path(job.scratch), job.case.scale))
    return {"figures": {"file_bytes": sum(path.stat().st_size for path in files)}}


def tune(job: Job) -> dict[str, Any]:
    """autosp's plan for the budget and its best sliding window, and what the floor is made of."""
    assert job.budget_bytes is not None
    example = load(Path(job.scratch), job.case.scale, job.case.tokens)
    with _folder(job) as folder:
        trials = SCALES[job.case.scale].max_trials
        figures = make_plans(example, CpuDevice(), job.budget_bytes, folder, paced=False, max_trials=trials)
        plans = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    found = {**vars(figures), "plans": plans, "budget_bytes": job.budget_bytes}
    if figures.least_bytes is None:
        return {"figures": found, "note": figures.why}
    note = f"the least that works is {figures.least_bytes / 1e9:.4g} GB"
    return {"outcome": "too small", "note": note, "figures": found}


def observe_layers(job: Job) -> dict[str, Any]:
    """A plan of one layer at a time: others set by hand differ from it in their setting only."""
    example = load(Path(job.scratch), job.case.scale, job.case.tokens)
    plan = autosp.plan(example.model, example.batch, k=1, k_prime=1, step=example.step, device=CpuDevice())
    return {"figures": {"plan": plan.model_dump_json()}}


def run_readers(job: Job) -> dict[str, Any]:
    """See `disk_contention`."""
    example = load(Path(job.scratch), job.case.scale, job.case.tokens)
    with _folder(job) as folder:
        figures = measure_readers(example, folder, **job.numbers)
    return {"figures": {**figures, "block_bytes": job.numbers["block_bytes"], "readers": job.numbers["readers"]}}


def run_system(job: Job) -> dict[str, Any]:
    """Load the model, apply the system, run passes with the page cache cold, then warm."""
    system = DISK_SYSTEMS[job.case.system]
    device = CpuDevice()
    plan = None if job.plan is None else Plan.model_validate_json(job.plan)
    scratch = Path(job.scratch)
    home = folder_of(job.case.system, scratch, job.case.scale)
    home.mkdir(exist_ok=True)
    with _folder(job) as folder:
        rehearse(system, Setting(device, folder))
    example = load(scratch, job.case.scale, job.case.tokens)
    workload = Workload.of(example.model, example.batch, example.step, "inference", device)
    probed = files_in(checkpoint_of(scratch, job.case.scale))
    probe_bytes = SCALES[job.case.scale].probe_bytes
    with _folder(job):
        memory = Memory(device, example.model, scratch, mapped=True)
        with system.apply(example.model, Setting(device, home, plan=plan)):
            files = [] if job.case.system == PLAIN else [*files_in(home), *unlinked_files(scratch)]
            rates = disk_rates(probed, probe_bytes)
            phases = {}
            for name, phase in Passes(workload, device, memory, scratch, files, system.planned).phases():
                phases[name] = phase
                rates += disk_rates(probed, probe_bytes)
        at_rest = digest_of(workload.run()) if system.planned else None
    digests = {phase.pop("digest") for phase in phases.values()}
    figures = {
        "title": example.title,
        "weight_bytes": memory.weight_bytes,
        "phases": phases,
        "disk_bytes_per_s": rates,
        "digest": digests.pop() if len(digests) == 1 else None,
        "at_rest_digest": at_rest,
        "setting": "" if plan is None else plan.candidate.label(),
        "candidate": None if plan is None else plan.candidate.model_dump(),
        **job.numbers,
    }
    return {"figures": figures}


@dataclass(frozen=True)
class Passes:
    """What runs, and the files that are dropped from the page cache or put into it.

    A system that reads ahead into the next pass gets no pause between passes: reads in a pause would not be timed. So
    its files are dropped once; that it leaves none of them in the page cache is seen after its passes.
    """

    workload: Workload
    device: CpuDevice
    memory: Memory
    scratch: Path
    files: list[Path]
    reads_ahead: bool

    def phases(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Passes with a cold page cache, then with all files in it; without files neither: "ram"."""
        if not self.files:
            yield "ram", self._phase(lambda: None)
            return
        yield "cold", self._phase(lambda: drop_from_page_cache(self.files))
        warm(self.files)
        yield "warm", self._phase(lambda: None)

    def _phase(self, prepare: Callable[[], None]) -> dict[str, Any]:
        """A first pass and steady ones. As in a loop, an output lives until the next pass has made its own."""
        self.memory.begin_peak()
        prepare()
        cached_before = cached_bytes(self.files)
        first_s, output = timed(self.workload, self.device)
        digest = digest_of(output)
        samples: list[float] = []
        before = read_bytes()
        for _ in until_enough(samples):
            if not self.reads_ahead:
                prepare()
                cached_before = max(cached_before, cached_bytes(self.files))
            seconds, output = timed(self.workload, self.device)
            samples.append(seconds)
        n_read = (read_bytes() - before) // len(samples)
        mapped = mapped_bytes(self.scratch)
        peak_bytes = self.memory.peak_bytes()
        return {
            "first_s": first_s,
            "samples_s": samples,
            "peak_bytes": max(0, peak_bytes - mapped),
            "mapped_bytes": mapped,
            "cached_before_bytes": cached_before,
            "cached_bytes": cached_bytes(self.files),
            "read_bytes": n_read,
            "digest": digest if digest == digest_of(output) else None,
        }


@contextmanager
def _folder(job: Job) -> Iterator[Path]:
    """A folder of this run in the scratch one, where autosp's own files go as well."""
    with TemporaryDirectory(dir=job.scratch, prefix="run-") as name:
        os.environ["AUTOSP_CACHE_DIR"] = name
        yield Path(name)


WORK: dict[str, Callable[[Job], dict[str, Any]]] = {
    CHECKPOINT: make_checkpoint,
    TUNE: tune,
    LAYERS: observe_layers,
    READERS: run_readers,
}
