"""The peers' benchmark on a toy: every system runs or says why not, results resume, and the report judges rightly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peer_measure
import peers
import pytest
import torch
from peer_measure import TUNE, Job, Row, digest_of, mapped_bytes, row_of, run_job
from peer_models import MODELS, PeerModel, build
from peer_plans import Figures, policies
from peer_points import collect, key_of, read_rows
from peer_report import summary, table, write_report
from peer_systems import PACED_SYSTEMS, PLAIN, SYSTEMS, TUNED, WINDOW, block_modules, weight_bytes
from torch import nn

from autosp.devices import CpuDevice
from autosp.spec import Tier
from autosp.workload import Workload
from builders import profile

BLOCKS = 16
WIDTH = 1024
TOY_BYTES = BLOCKS * WIDTH * WIDTH * 4
BUDGET_BYTES = TOY_BYTES * 3 // 4
PACE = 2e9


class Toy(nn.Module):
    """A list of blocks inside a child, as in most models."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS))
        self.body.forward = self._run  # type: ignore[method-assign]

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.body.blocks:  # type: ignore[union-attr]
            x = torch.tanh(block(x))
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[4, WIDTH] to the same."""
        y: torch.Tensor = self.body(x)
        return y


def make_toy(scale: str) -> PeerModel:
    return PeerModel("toy", Toy(), torch.ones(4, WIDTH) / 10)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Row]]:
    """Runs a job on the toy in this process, on the CPU. The plans for the budget are there, for a paced link too."""
    scratch = tmp_path_factory.mktemp("peers")

    def run(system: str, paced_bytes_per_s: float | None = None, **options: Any) -> Row:
        folder = scratch / ("paced" if paced_bytes_per_s else "plain")
        folder.mkdir(exist_ok=True)
        job = Job("toy", "tiny", system, 0, str(folder), 50.0, BUDGET_BYTES, paced_bytes_per_s=paced_bytes_per_s)
        run_job(replace(job, **options), str(answer := scratch / "answer.json"))
        return Row(**json.loads(answer.read_text()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "toy", make_toy)
        patch.setattr(peer_measure, "device_of", on_cpu)
        patch.setattr(peer_measure, "ENOUGH_S", 0.0)
        patch.setattr("autosp.search.limits.MAX_TRIALS", 1)
        patch.setenv("AUTOSP_CACHE_DIR", str(scratch))
        for paced in (None, PACE):
            tuned = run(TUNE, paced)
            assert tuned.outcome == "ok", tuned.note
            assert tuned.figures["floor_s"] > 0
        yield run


def on_cpu(paced_bytes_per_s: float | None) -> CpuDevice:
    return CpuDevice() if paced_bytes_per_s is None else CpuDevice(slow_tier=Tier.HOST, paced_bytes_per_s=PACE)


@pytest.fixture(scope="module")
def plain(measured: Callable[..., Row]) -> Row:
    return measured(PLAIN, budget_bytes=None)


def test_the_plain_model(plain: Row) -> None:
    assert (plain.outcome, plain.note, plain.same_output) == ("ok", "", None)
    assert plain.weight_bytes == TOY_BYTES
    assert plain.peak_bytes is not None
    assert plain.peak_bytes >= TOY_BYTES
    assert not plain.warm_samples_s


@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if not system.accelerator_only])
def test_a_system_on_a_cpu(measured: Callable[..., Row], plain: Row, name: str) -> None:
    if name.startswith("diffusers"):
        pytest.importorskip("diffusers.hooks", reason="the peers are no dependencies of autosp", exc_type=ImportError)
    share = TOY_BYTES // 3 if SYSTEMS[name].shares else None
    row = measured(name, reference=plain.digest, share_bytes=share)
    assert (row.outcome, row.note, row.same_output) == ("ok", "", True)
    assert row.weight_bytes == TOY_BYTES
    assert row.first_s is not None
    assert row.first_s > 0
    assert len(row.samples_s) == peer_measure.LEAST_PASSES
    assert bool(row.warm_samples_s) == name.startswith(("accelerate", "diffusers")), "those that have files"
    assert row.peak_bytes


@pytest.mark.parametrize("name", [name for name in PACED_SYSTEMS if name != PLAIN])
def test_a_policy_on_a_paced_link(measured: Callable[..., Row], plain: Row, name: str) -> None:
    row = measured(name, PACE, reference=plain.digest)
    assert (row.outcome, row.note, row.same_output) == ("ok", "", True)
    assert row.peak_bytes is not None
    assert TOY_BYTES // BLOCKS <= row.peak_bytes < TOY_BYTES
    if name == "policy-sequential":
        assert min(row.samples_s) >= TOY_BYTES / PACE, "every pass waits for all layers at the link's pace"


def test_another_output_is_seen(measured: Callable[..., Row]) -> None:
    assert measured(PLAIN, reference="of another model").same_output is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on an accelerator")
@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if system.accelerator_only])
def test_what_needs_an_accelerator_says_so(measured: Callable[..., Row], name: str) -> None:
    module = "mmgp" if name == "mmgp" else "diffusers.hooks"
    pytest.importorskip(module, reason="the peers are no dependencies of autosp", exc_type=ImportError)
    row = measured(name)
    assert row.outcome == "failed"
    assert row.note
    assert not row.samples_s


def test_a_budget_that_is_too_small(measured: Callable[..., Row]) -> None:
    row = measured(TUNE, budget_bytes=10**5)
    assert row.outcome == "too small"
    assert row.figures["least_bytes"] > 10**5
    assert row.figures["floor_s"] > 0


def test_a_crash_and_a_hang_are_rows(tmp_path: Path) -> None:
    job = Job("toy", "tiny", PLAIN, 0, str(tmp_path / "no such folder"))
    crashed = peers.in_a_process(job, timeout_s=120)
    assert (crashed.outcome, crashed.note) == ("crashed", "the process ended with 1")
    assert peers.in_a_process(job, timeout_s=0.01).outcome == "timed out"


@pytest.mark.parametrize("name", [*MODELS])
def test_a_model_does_the_same_in_every_pass_and_build(name: str) -> None:
    if name == "dit":
        pytest.importorskip("diffusers", reason="the peers are no dependencies of autosp", exc_type=ImportError)
    digests = set()
    for _ in range(2):
        made = build(name, "tiny", torch.device("cpu"))
        workload = Workload.of(made.model, made.batch, made.step, "inference", CpuDevice())
        digests |= {digest_of(workload.run()), digest_of(workload.run())}
    assert len(digests) == 1


@pytest.mark.parametrize("kept", [True, False])
def test_memory_is_counted_without_the_weights(tmp_path: Path, kept: bool) -> None:
    model = nn.Linear(
        4096, 4096, bias=False
    )  # an allocation of its own, which goes back to the kernel when it is freed
    memory = peer_measure.Memory(CpuDevice(), model, tmp_path)
    if not kept:
        model.weight.data = torch.empty(0)
    memory.begin_peak()
    assert memory.weight_bytes == 4096 * 4096 * 4
    assert (memory.peak_bytes() > memory.weight_bytes * 0.9) == kept


def test_block_modules_are_the_way_to_every_list() -> None:
    model = nn.Module()
    model.head = nn.Linear(2, 2)
    model.outer = nn.Module()
    model.outer.inner = nn.Module()
    model.outer.inner.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
    model.flat = nn.ModuleList([nn.Linear(2, 2)])
    assert block_modules(model) == ["inner", "outer"]


def test_shared_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert weight_bytes(model) == 8 * 8 * 4


def test_mapped_files_count_while_they_are_mapped(tmp_path: Path) -> None:
    size = 5 * 2**20
    (tmp_path / "weights").write_bytes(bytes(size))
    mapped = np.memmap(tmp_path / "weights", mode="r")
    assert mapped.sum() == 0
    assert mapped_bytes(tmp_path) == size
    del mapped
    assert mapped_bytes(tmp_path) == 0


def test_policies_do_what_the_peers_do() -> None:
    of = profile([100] * 10)
    made = dict(policies(of, usable=of.workspace_bytes + of.partition.resident_bytes + 450))
    assert (made["policy-sequential"].k, made["policy-sequential"].residents) == (1, ())
    assert (made["policy-first-fit"].residents, made["policy-first-fit"].ring) == ((0, 1, 2), 1)
    assert [made[f"policy-stream-{group}"].k for group in (1, 2)] == [2, 4]
    assert "policy-stream-4" not in made, "eight layers do not fit"


class Measured:
    """Stands for the processes: a row for every job, with the peak that `peak_bytes` says for its share."""

    def __init__(self, peak_bytes: Callable[[int], int] = lambda share: share, **outcome: Any) -> None:
        self.jobs: list[Job] = []
        self._peak_bytes = peak_bytes
        self._outcome = outcome

    def __call__(self, job: Job, timeout_s: float) -> Row:
        self.jobs.append(job)
        if job.system == TUNE:
            job.plans.mkdir()
            (job.plans / f"{TUNED}.json").write_text("a plan")
            return row_of(job, figures={"floor_s": 1.0, "compute_s": 0.5, "least_bytes": None})
        peak = self._peak_bytes(job.share_bytes or 0)
        known = {"samples_s": [1.0], "first_s": 2.0, "peak_bytes": peak, "weight_bytes": 1000, "same_output": True}
        return row_of(job, **known, **(self._outcome if job.share_bytes is not None and job.share_bytes < 600 else {}))


@pytest.fixture
def options(tmp_path: Path) -> peers.Options:
    raw = tmp_path / "peers_cpu.jsonl"
    systems = [PLAIN, TUNED, WINDOW, "accelerate-map", "accelerate-offload"]
    return peers.Options(["toy"], [50.0, 100.0], systems, "tiny", 2, 60, None, True, False, raw)


def test_a_share_is_lowered_until_the_peak_is_within_the_budget(
    options: peers.Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("toy", "tiny", "accelerate-map", 0, str(tmp_path), 50.0, 1000)
    monkeypatch.setattr(peers, "in_a_process", run := Measured(lambda share: share + 300))
    row = peers.with_share(job, peers.Results(options, {}))
    assert [job.share_bytes for job in run.jobs] == [1000, 690]
    assert row.peak_bytes == 990
    assert row.note == "weights' share 0.69 of the budget, run 2"
    later = peers.with_share(replace(job, repeat=1), peers.Results(options, {key_of(row): row}))
    assert later.share_bytes == 690
    assert len(run.jobs) == 3
    monkeypatch.setattr(peers, "in_a_process", Measured(lambda share: share + 700, outcome="failed"))
    row = peers.with_share(job, peers.Results(options, {}))
    assert (row.outcome, row.share_bytes, row.peak_bytes) == ("ok", 1000, 1700), "the last share that could be run"


def test_what_is_measured_is_not_measured_again(options: peers.Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "in_a_process", run := Measured())
    peers.run_all(options, options.raw.parent)
    order = [(job.system, job.budget_percent) for job in run.jobs[: len(run.jobs) // 2]]
    per_budget = [TUNE, TUNED, "accelerate-map"]
    expected = [(PLAIN, None), ("accelerate-offload", None)]
    assert order == expected + [(system, percent) for percent in (50.0, 100.0) for system in per_budget]
    assert [job.repeat for job in run.jobs] == sorted(job.repeat for job in run.jobs), "repeats are interleaved"
    windows = [row for row in read_rows(options.raw) if row.system == WINDOW]
    assert {row.outcome for row in windows} == {"too small"}, "there was no plan for it"
    first = len(run.jobs)
    peers.run_all(options, options.raw.parent)
    assert len(run.jobs) == first
    peers.run_all(replace(options, fresh=True), options.raw.parent)
    assert len(run.jobs) == 2 * first


def rows_at_half(floor_s: float = 0.9, **of_autosp: Any) -> list[Row]:
    """One repeat at 50 % of 1 GB: autosp, its sliding window at twice its time, and a peer over the budget."""
    job = Job("toy", "tiny", PLAIN, 0, "", 50.0, 500_000_000)
    known = {"samples_s": [1.0, 1.1, 0.9], "first_s": 2.0, "peak_bytes": 490_000_000, "same_output": True}
    figures = {"floor_s": floor_s, "compute_s": 0.5, "least_bytes": None}
    no_budget = replace(job, budget_percent=None, budget_bytes=None)
    return [
        row_of(no_budget, title="a toy", weight_bytes=10**9, **known),
        row_of(replace(job, system=TUNE), figures=figures),
        row_of(replace(job, system=TUNED), **(known | of_autosp)),
        row_of(replace(job, system=WINDOW), **(known | {"samples_s": [2.0]})),
        row_of(
            replace(no_budget, system="accelerate-offload"), **(known | {"samples_s": [0.5], "peak_bytes": 6 * 10**8})
        ),
        row_of(replace(job, system="accelerate-map"), outcome="failed", note="ValueError: a | b"),
    ]


def test_the_report_judges_who_kept_the_budget() -> None:
    (model,) = collect(rows_at_half())
    text = table(model, SYSTEMS)
    assert "| **1.00 s** | 900 ms – 1.10 s | 1.11 |" in text, "the fastest that kept the budget"
    assert "| 500 ms |" in text
    assert "1.20, over" in text
    assert "failed: ValueError: a / b" in text
    targets = summary([model], SYSTEMS)
    assert "| toy | 1.11 |" in targets
    assert "never slower than a system that kept the budget and the output: 1 comparisons" in targets
    assert "sliding window, no residents 2.00" in targets


def test_the_report_names_who_was_faster() -> None:
    (model,) = collect(rows_at_half(samples_s=[3.0]))
    assert "toy at 50 %: sliding window, no residents, 2.00 s against 3.00 s" in summary([model], SYSTEMS)
    (model,) = collect(rows_at_half(peak_bytes=10**9))
    assert "| toy | 1.11, over budget |" in summary([model], SYSTEMS)
    (model,) = collect([row for row in rows_at_half() if row.system != WINDOW])
    assert "there is nothing to compare" in summary([model], SYSTEMS)
    (model,) = collect(rows_at_half(floor_s=0.4))
    assert "no such point" in summary([model], SYSTEMS), "compute limits this pass, not the link"


def test_the_report_is_written(options: peers.Options) -> None:
    results = peers.Results(options, {})
    results.append({"environment": {"device": "a machine"}})
    for row in rows_at_half():
        results.keep(row)
    write_report(options.raw, SYSTEMS, "tiny", None)
    assert options.raw.with_suffix(".md").read_text().startswith("device a machine")
    assert options.raw.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {key_of(row) for row in read_rows(options.raw)} == {key_of(row) for row in rows_at_half()}
    assert set(Figures.__annotations__) >= {"floor_s", "compute_s", "least_bytes"}, "what the rows above stand for"
