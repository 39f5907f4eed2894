"""The disk tier's studies on a toy: each runs, resumes, and says rightly what it measured."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import disk_tier
import isolation
import pytest
import torch
from disk_accelerate import ACCELERATE, half_resident
from disk_contention import ALONE, ONE_MODEL, WITHOUT_PAUSE
from disk_files import cached_bytes, disk_rates, read_bytes, unlinked_files, warm
from disk_floors import FLOORS, WANTED
from disk_measure import CHECKPOINT, READERS, TUNE, run_job
from disk_models import SCALES, checkpoint_of, load
from disk_readers import READING
from disk_results import Case, Job, Results, Row, raw_path, read_rows
from disk_study import EQUAL, Floor, Run, floor_of, least_read_bytes, output_of
from disk_systems import DAT, PLANNED, SAFETENSORS
from disk_window import THEIRS, WINDOWS, points, windows
from isolation import answer_of
from kept_rows import having
from peer_measure import drop_from_page_cache
from peer_systems import PLAIN, TUNED, WINDOW

from autosp.spec import Candidate, Plan
from builders import profile
from processes import AsHere, forked

pytest.importorskip("accelerate", reason="the peers are no dependencies of autosp")

TOKENS = SCALES["toy"].tokens[1]
BUDGET_PERCENT = SCALES["toy"].narrow_percent
"""What the studies ask for: one search serves them all."""
MIB = 2**20


def at_once(measure: Callable[[Job, str], None], job: Job, folder: Path, timeout_s: float) -> dict[str, Any]:
    """Runs a job in this process; but a search in its own, for what stays mapped here cannot leave the page cache."""
    if job.case.system == TUNE:
        return answer_of(measure, job, folder, timeout_s)
    measure(job, str(answer := folder / "answer.json"))
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy's checkpoint."""
    folder = tmp_path_factory.mktemp("disk")
    made = at_once(run_job, Job(Case("toy", CHECKPOINT), str(folder)), folder, 60)
    assert made["figures"]["file_bytes"] > 30e6
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other tests run beside these; passes of the toy are too short to share cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements' own processes need not import anew what takes seconds."""
    spawned = isolation._answer_of

    def answer(context: object, target: Callable[..., object], *rest: Any) -> dict[str, Any]:
        return spawned(forked, AsHere.of(target), *rest)

    monkeypatch.setattr(isolation, "_answer_of", answer)


@pytest.fixture
def asked(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A run of the toy in this process."""
    monkeypatch.setattr("peer_measure.ENOUGH_S", 0.0)

    def make(study: str, budgets: tuple[float, ...] = (BUDGET_PERCENT,)) -> Run:
        results = Results(raw_path(study, "toy", tmp_path), run_job, answer=at_once)
        plans = Results(raw_path("plans", "toy", scratch), run_job, answer=at_once)
        return Run("toy", scratch, (TOKENS,), budgets, 1, results, plans)

    return make


def rows_of(run: Run) -> list[Row]:
    """What a run kept, as a report reads it."""
    rows = read_rows(run.results.raw)
    assert {row.case for row in rows} == set(run.results.rows)
    assert all(row.environment["commit"] and row.environment["device"] for row in rows)
    return rows


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_floors_from_the_command_line(asked: Callable[..., Run], scratch: Path, tmp_path: Path) -> None:
    """In processes of their own, a budget that is too small and one that is not; then again, with nothing to do.

    The plan for the latter is known: what was searched for one study is there for all.
    """
    asked("floors").tuned(TOKENS, BUDGET_PERCENT)
    shutil.copy(raw_path("plans", "toy", scratch), raw_path("plans", "toy", tmp_path))
    words = ["floors", "--scale", "toy", "--tokens", str(TOKENS), "--budgets", f"1,{BUDGET_PERCENT}", "--repeats", "1"]
    words += ["--scratch", str(scratch), "--output", str(tmp_path)]
    disk_tier.main(words)
    raw = raw_path("floors", "toy", tmp_path)
    rows = read_rows(raw)
    assert [(row.case.system, row.case.budget_percent, row.outcome) for row in rows] == [
        (PLAIN, None, "ok"),
        (TUNED, 1.0, "too small"),
        (TUNED, BUDGET_PERCENT, "ok"),
    ], [row.note for row in rows]
    tuned = rows[2]
    assert output_of([(tuned, rows[0])]) == EQUAL
    assert tuned.figures["weight_bytes"] == rows[0].figures["weight_bytes"]
    for phase in ("cold", "warm"):
        assert 0 < tuned.phase(phase)["peak_bytes"] < tuned.figures["weight_bytes"]
    assert tuned.phase("cold")["read_bytes"] >= tuned.figures["streamed_bytes"] * 0.7, "past the page cache"
    assert rows[0].phase("cold")["peak_bytes"] >= tuned.figures["weight_bytes"], "there all weights are in RAM"
    text = raw.with_suffix(".md").read_text()
    assert "too small: the least that works is" in text
    assert is_picture(raw.with_suffix(".png"))
    before = raw.read_text()
    disk_tier.main(words)
    assert raw.read_text() == before, "what is there is not measured again"
    raw.with_suffix(".md").unlink()
    disk_tier.main([*words, "--report"])
    assert raw.with_suffix(".md").read_text() == text
    assert raw.read_text() == before


def test_window(asked: Callable[..., Run], tmp_path: Path) -> None:
    run = asked("window")
    WINDOWS.run(run)
    rows = rows_of(run)
    assert [row.note for row in rows if not row.ok] == []
    settings = [row.case.setting for row in having(rows, system=PLANNED)]
    assert settings == ["k=2 k'=1 residents=0", "k=4 k'=1 residents=0", "k=4 k'=2 residents=0"]
    found = list(points(rows))
    assert len(found) == 2 * (len(settings) + 1), "cold and warm, and what was searched"
    assert {point.output for point in found} == {EQUAL}
    smallest = [point for point in found if point.setting == settings[0]]
    assert all(point.reduction > 0.5 for point in smallest), "two of its many layers are in RAM"
    assert all(point.reserved_bytes < 0.2 * rows[0].figures["weight_bytes"] for point in smallest)
    text = WINDOWS.table(rows)
    assert "96.5% less memory at 14.8% delay" in text
    assert "| Demand Layering's paper |  |  | +14.8% |  |  | 96.5% |" in text
    assert "| Demand Layering's paper |  |  | about none |  |  | 88.4% |" in text
    assert "| k=4 k'=2 residents=0 | warm |" in text
    WINDOWS.picture(rows, tmp_path / "window.png")
    assert is_picture(tmp_path / "window.png")


def test_accelerate(asked: Callable[..., Run], tmp_path: Path) -> None:
    run = asked("accelerate")
    ACCELERATE.run(run)
    rows = rows_of(run)
    assert [row.note for row in rows if not row.ok] == []
    for system in (DAT, SAFETENSORS):
        (row,) = having(rows, system=system)
        assert output_of([(row, having(rows, system=PLAIN)[0])]) == EQUAL
        assert row.phase("cold")["read_bytes"] > row.phase("warm")["read_bytes"], "the cache was dropped"
        assert row.phase("warm")["cached_before_bytes"] >= row.figures["weight_bytes"]
        assert row.phase("cold")["cached_before_bytes"] < row.figures["weight_bytes"] / 2
    (window,) = having(rows, setting=WINDOW)
    assert not window.figures["candidate"]["residents"]
    (half,) = having(rows, setting=half_resident(run.layers(TOKENS)).label())
    assert half.figures["streamed_bytes"] < 0.6 * half.figures["weight_bytes"]
    text = ACCELERATE.table(rows)
    assert text.count("| not measured |") == 6, "three targets are of other lengths"
    assert sum(text.count(f"| {verdict}") for verdict in ("met", "missed")) == 4
    ACCELERATE.picture(rows, tmp_path / "accelerate.png")
    assert is_picture(tmp_path / "accelerate.png")


def test_readers(asked: Callable[..., Run], tmp_path: Path) -> None:
    run = asked("readers")
    READING.run(run)
    rows = rows_of(run)
    assert [row.note for row in rows if not row.ok] == []
    assert len(having(rows, system=READERS)) == 4, "two block sizes, one reader and two"
    for row in rows:
        figures = row.figures
        assert set(figures["samples_s"]) == {ALONE, ONE_MODEL, WITHOUT_PAUSE}
        assert figures["read_bytes"][ALONE] == [0, 0, 0]
        assert [place for place, _ in figures["rates"]] == list(SCALES["toy"].place_bytes)
        assert all(rate > 0 for _, rate in figures["rates"])
    text = READING.table(rows)
    assert "| 2 MiB | 2 |" in text
    READING.picture(rows, tmp_path / "readers.png")
    assert is_picture(tmp_path / "readers.png")


def test_the_page_cache_is_what_it_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(8 * MIB))
    if not disk_rates([path], 4 * MIB):
        pytest.skip("no O_DIRECT here: files have no place but the page cache")
    drop_from_page_cache([path])
    assert cached_bytes([path]) == 0
    before = read_bytes()
    warm([path])
    assert cached_bytes([path]) == 8 * MIB
    assert read_bytes() - before >= 8 * MIB
    before = read_bytes()
    rates = disk_rates([path], 16 * MIB)
    assert read_bytes() - before >= 16 * MIB, "past the page cache"
    assert all(rate > 0 for rate in rates)


def test_files_without_a_name_are_found(tmp_path: Path) -> None:
    assert unlinked_files(tmp_path) == []
    with (tmp_path / "packed").open("w+b") as file:
        file.write(bytes(5))
        file.flush()
        assert unlinked_files(tmp_path) == []
        (tmp_path / "packed").unlink()
        (link,) = unlinked_files(tmp_path)
        assert link.stat().st_size == 5
        assert unlinked_files(tmp_path / "else") == []


def test_the_model_is_mapped_or_refused(scratch: Path, tmp_path: Path) -> None:
    first = load(scratch, "toy", TOKENS)
    assert first.batch["input_ids"].shape == (1, TOKENS)
    (tmp_path / "checkpoint-toy").mkdir()
    for path in checkpoint_of(scratch, "toy").iterdir():
        (tmp_path / "checkpoint-toy" / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "checkpoint-toy" / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    with pytest.raises(RuntimeError, match="are not mapped from"):
        load(tmp_path, "toy", TOKENS)


def crash(job: Job, answer: str) -> None:
    os._exit(3)


def test_a_crash_is_a_row_and_again_measures_again(tmp_path: Path) -> None:
    job = Job(Case("toy", PLAIN, TOKENS), str(tmp_path))
    raw = tmp_path / "rows.jsonl"
    row = Results(raw, crash).measured(job)
    assert (row.outcome, row.note) == ("crashed", "the process ended with 3")
    asked: list[Job] = []

    def answer(measure: object, job: Job, folder: Path, timeout_s: float) -> dict[str, Any]:
        asked.append(job)
        return {"figures": {"digest": "a"}}

    Results(raw, crash, answer=answer).measured(job)
    assert asked == []
    again = Results(raw, crash, answer=answer, again=True)
    assert again.measured(job) == again.measured(job)
    assert asked == [job]
    assert [row.outcome for row in read_rows(raw)] == ["crashed", "ok"]


def made_row(system: str, pass_s: float, **more: Any) -> Row:
    """A row at half of 1 GB with a disk of 1 GB/s."""
    percent = 50.0 if system == TUNED else None
    phase = {
        "samples_s": [pass_s] * 3,
        "peak_bytes": 490_000_000,
        "mapped_bytes": 0,
        "cached_before_bytes": 0,
        "cached_bytes": 0,
        "read_bytes": 600_000_000,
    }
    figures = {
        "digest": "a",
        "weight_bytes": 10**9,
        "budget_bytes": 500_000_000,
        "disk_bytes_per_s": [1e9, 2e8, 1e9],
        "least_read_bytes": 500_000_000,
        "setting": "k=2 k'=1 residents=0",
        "phases": {"ram": phase} if system == PLAIN else {"cold": phase, "warm": phase},
    }
    return Row(Case("toy", system, TOKENS, budget_percent=percent), figures=figures | more, environment={"commit": "c"})


@pytest.mark.parametrize(("plain_s", "binds"), [(0.4, "disk"), (0.54, "compute")])
def test_the_floor_is_the_larger_term(plain_s: float, binds: str) -> None:
    rows = [made_row(PLAIN, plain_s), made_row(TUNED, 0.55)]
    floor = floor_of(rows[1], rows[0], 500_000_000, "cold")
    assert floor == Floor(compute_s=plain_s, read_s=0.5)
    assert floor.binds == binds
    text = FLOORS.table(rows)
    assert f"| {binds} | **{0.55 / max(plain_s, 0.5):.2f}** |" in text
    assert f"T ÷ floor is at most {WANTED:.2f} in 2 of 2 points; the budget was kept in 2 of 2." in text


def test_what_misses_is_said() -> None:
    over = made_row(TUNED, 0.9, budget_bytes=480_000_000, digest=None)
    text = FLOORS.table([made_row(PLAIN, 0.4), over])
    assert "in 0 of 2 points; the budget was kept in 0 of 2." in text
    assert "1.02, over | varies from pass to pass |" in text
    other = replace(over, figures=over.figures | {"digest": "b"})
    assert output_of([(other, made_row(PLAIN, 0.4))]) == "differs"
    nameless = made_row(TUNED, 0.9, disk_bytes_per_s=[])
    assert floor_of(nameless, made_row(PLAIN, 0.4), 1, "cold") is None, "a filesystem without O_DIRECT"
    assert "The disk's rate was not measured" in FLOORS.table([made_row(PLAIN, 0.4, disk_bytes_per_s=[]), nameless])


def test_bytes_that_no_plan_can_keep() -> None:
    of = profile([100] * 10)
    plan = Plan.model_construct(partition=of.partition, budget_bytes=450 + of.partition.resident_bytes)
    assert least_read_bytes(plan, workspace_bytes=50) == 600 * of.partition.repeats
    assert least_read_bytes(plan, workspace_bytes=10**6) == 1000 * of.partition.repeats


def test_windows_are_of_the_models_layers() -> None:
    assert list(windows((2, 3, 4, 64), 5)) == [
        Candidate(k=2, k_prime=1),
        Candidate(k=3, k_prime=1),
        Candidate(k=4, k_prime=1),
        Candidate(k=4, k_prime=2),
    ]
    assert THEIRS[0] == (0.965, 0.148), "what the caption says"
