"""One measurement of the peers' benchmark, made in a process of its own.

[Note: memory on a CPU] What counts is resident memory beyond the process with its model built but without the model's
weights: anonymous pages, and pages of weight files that are mapped. Page cache that nothing maps is no process's
memory, but a machine with no more RAM than the budget has none to spare: before each pass the files of a system are
dropped from it. `warm_samples_s` are passes without that; they need as much RAM again as the files are long. The heap
is the C library's with its defaults: what a system frees and the heap keeps counts. (MALLOC_MMAP_THRESHOLD_ in the
environment reaches every measurement: with it freed weights go back at once, and every load pays for page faults.)
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peer_models import build
from peer_plans import device_of, load_plan, make_plans
from peer_systems import PACED_SYSTEMS, SYSTEMS, OwnPeak, Setting, System, rehearse, weight_bytes
from torch import nn

from autosp.batch import tensors_in
from autosp.devices import CpuDevice, Device
from autosp.workload import Workload

LEAST_PASSES = 3
MOST_PASSES = 10
ENOUGH_S = 2.0
"""Short passes are repeated until they fill this time."""

TUNE = "tune"
"""The job that makes the plans and the floor for a budget; the others are named as their system."""


@dataclass(frozen=True)
class Job:
    """What to measure. Without `budget_bytes` nothing limits it."""

    model: str
    scale: str
    system: str
    repeat: int
    scratch: str
    """A folder on a real disk, for files of this run."""
    budget_percent: float | None = None
    budget_bytes: int | None = None
    share_bytes: int | None = None
    paced_bytes_per_s: float | None = None
    reference: str | None = None
    """Digest of the plain model's output."""

    @property
    def plans(self) -> Path:
        """Where the plans for this budget are, one file per planned system."""
        return Path(self.scratch) / f"plans_{self.model}_{self.budget_bytes}_{self.repeat}"


@dataclass(frozen=True)
class Row:
    """One line of the raw results. `outcome` is "ok", or says why there are no times."""

    model: str
    scale: str
    system: str
    repeat: int
    budget_percent: float | None
    budget_bytes: int | None
    share_bytes: int | None
    paced_bytes_per_s: float | None
    date: str
    outcome: str = "ok"
    note: str = ""
    title: str = ""
    weight_bytes: int = 0
    first_s: float | None = None
    samples_s: list[float] = field(default_factory=list)
    warm_samples_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    digest: str | None = None
    same_output: bool | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    """Of a `tune` job: the fields of `peer_plans.Figures`."""


def systems_of(paced_bytes_per_s: float | None) -> dict[str, System]:
    """The systems that can be compared on the device."""
    return SYSTEMS if paced_bytes_per_s is None else PACED_SYSTEMS


def row_of(job: Job, **known: Any) -> Row:
    """A row for the job."""
    return Row(
        model=job.model,
        scale=job.scale,
        system=job.system,
        repeat=job.repeat,
        budget_percent=job.budget_percent,
        budget_bytes=job.budget_bytes,
        share_bytes=job.share_bytes,
        paced_bytes_per_s=job.paced_bytes_per_s,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        **known,
    )


def run_job(job: Job, answer: str) -> None:
    """Measure, and write the row to the file `answer`. What a system raises is its row."""
    device = device_of(job.paced_bytes_per_s)
    try:
        row = make_plans_row(job, device) if job.system == TUNE else measure(job, device)
    except Exception as error:  # noqa: BLE001 - it becomes the row's note
        outcome = "out of memory" if device.is_out_of_memory(error) else "failed"
        row = row_of(job, outcome=outcome, note=" ".join(f"{type(error).__name__}: {error}".split()))
    Path(answer).write_text(json.dumps(asdict(row)), encoding="utf-8")


def make_plans_row(job: Job, device: Device) -> Row:
    """Tune at the budget: plans go to files for the planned systems, the floor into the row."""
    assert job.budget_bytes is not None
    example = build(job.model, job.scale, device.torch_device)
    os.environ["AUTOSP_CACHE_DIR"] = job.scratch
    job.plans.mkdir(parents=True, exist_ok=True)
    figures = make_plans(example, device, job.budget_bytes, job.plans, paced=job.paced_bytes_per_s is not None)
    outcome = "ok" if figures.least_bytes is None else "too small"
    return row_of(job, outcome=outcome, title=example.title, figures=asdict(figures))


def measure(job: Job, device: Device) -> Row:
    """Build the model, apply the system, run passes."""
    system = systems_of(job.paced_bytes_per_s)[job.system]
    plan = load_plan(job.plans, job.system) if system.planned else None
    paced = job.paced_bytes_per_s is not None
    if device.torch_device.type == "cpu":
        with TemporaryDirectory(dir=job.scratch) as name:
            os.environ["AUTOSP_CACHE_DIR"] = name
            rehearse(system, Setting(device, Path(name), paced=paced))
    example = build(job.model, job.scale, device.torch_device)
    workload = Workload.of(example.model, example.batch, example.step, "inference", device)
    with TemporaryDirectory(dir=job.scratch, prefix=f"{job.system}-") as name:
        folder = Path(name)
        os.environ["AUTOSP_CACHE_DIR"] = name
        setting = Setting(device, folder, job.share_bytes, plan, paced)
        memory = Memory(device, example.model, folder)
        with device.limit(job.budget_bytes), system.apply(example.model, setting) as own_peak:
            passes = run_passes(workload, device, memory, own_peak, [] if system.planned else files_in(folder))
    same = None if job.reference is None else passes["digest"] == job.reference
    return row_of(job, title=example.title, weight_bytes=memory.weight_bytes, same_output=same, **passes)


def run_passes(
    workload: Workload, device: Device, memory: Memory, own_peak: OwnPeak, files: list[Path]
) -> dict[str, Any]:
    """The first pass and steady ones, back to back; where there are `files`, then some with them in the page cache.

    As in a loop, an output lives until the next pass has made its own. A digest of outputs that differ is None.
    """
    memory.begin_peak()
    drop_from_page_cache(files)
    first_s, output = timed(workload, device)
    first_digest = digest_of(output)
    samples: list[float] = []
    for _ in until_enough(samples):
        drop_from_page_cache(files)
        seconds, output = timed(workload, device)
        samples.append(seconds)
    warm: list[float] = []
    if files:
        workload.run()
        for _ in until_enough(warm):
            warm.append(timed(workload, device)[0])
    peak_bytes = memory.peak_bytes() if own_peak is None else own_peak()
    digest = digest_of(output)
    return {
        "first_s": first_s,
        "samples_s": samples,
        "warm_samples_s": warm,
        "peak_bytes": peak_bytes,
        "digest": digest if digest == first_digest else None,
    }


class Memory:
    """What a system takes beyond the process without the model's weights. See [Note: memory on a CPU].

    On an accelerator: what torch's allocator reserved at most, beyond what it held before the system was applied.
    """

    def __init__(self, device: Device, model: nn.Module, folder: Path | None, *, mapped: bool = False) -> None:
        """When the model's weights are in host memory, or `mapped` from files, before the system is applied.

        `folder`: whose files' mapped pages count too. None: no file's do, as for a plan's budget.
        """
        self.weight_bytes = weight_bytes(model)
        anonymous_bytes = 0 if mapped else self.weight_bytes
        self._folder = folder
        self._on_cpu = device.torch_device.type == "cpu"
        # A CPU's figures are the process's, and a system that measures itself keeps its own beginning on its device.
        self._device = CpuDevice() if self._on_cpu else device
        gc.collect()
        self._device.start_measuring()
        self._baseline = _status_bytes("RssAnon") - anonymous_bytes if self._on_cpu else 0

    def begin_peak(self) -> None:
        """Forget the peak of applying the system."""
        gc.collect()
        if self._on_cpu:
            self._device.start_measuring()
        else:
            self._device.restart_peak()

    def peak_bytes(self) -> int:
        """Since `begin_peak`. Pages of other files (the libraries) do not count."""
        if not self._on_cpu:
            return self._device.peak_bytes()
        peak_bytes = _status_bytes("VmHWM")  # before the maps are read: their text takes some MB itself
        files_bytes = _status_bytes("RssFile") + _status_bytes("RssShmem")
        counted_bytes = 0 if self._folder is None else mapped_bytes(self._folder)
        return max(0, peak_bytes - (files_bytes - counted_bytes) - self._baseline)


def mapped_bytes(folder: Path) -> int:
    """Resident pages of the folder's files that this process maps."""
    total = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024 if inside else 0
        elif "-" in line.split(" ", 1)[0]:
            inside = str(folder) in line
    return total


def files_in(folder: Path) -> list[Path]:
    """All files below."""
    return [path for path in folder.rglob("*") if path.is_file()]


def drop_from_page_cache(files: list[Path]) -> None:
    """Write them back and drop their pages, but for those that are mapped."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def digest_of(output: Any) -> str:
    """Hash of the bytes, shapes and dtypes of all tensors in an output."""
    digest = hashlib.sha256()
    for tensor in tensors_in(output):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def until_enough(samples: list[float]) -> Iterator[None]:
    """Goes on while `samples` has too few of the passes' seconds, or too short ones."""
    while len(samples) < LEAST_PASSES or (sum(samples) < ENOUGH_S and len(samples) < MOST_PASSES):
        yield


def timed(workload: Workload, device: Device) -> tuple[float, Any]:
    """Seconds of one pass, and its output."""
    begin = time.perf_counter()
    output = workload.run()
    device.finish_compute()
    return time.perf_counter() - begin, output


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
