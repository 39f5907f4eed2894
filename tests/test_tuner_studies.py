"""The tuner's studies on a toy: each runs, resumes, and judges rightly what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import quick_answers
import torch
import tuner
import tuner_regret
import tuner_samplers
from kept_rows import Results, Study, answering
from peer_models import MODELS, PeerModel
from torch import nn
from tuner_accuracy import ACCURACY, BUDGETS_PERCENT, Errors, sample, sizes, under_and_over
from tuner_budget import BUDGET, OUT_OF_MEMORY, in_two_processes, over
from tuner_draws import FAMILIES, Draw, budget_between, build, draw
from tuner_measure import Measured
from tuner_regret import RANKING, REGRET, finalists, regret_of
from tuner_results import DEVICES, TOO_SMALL, Case, Job, Row, Run, raw_path
from tuner_samplers import OURS, SAMPLERS, SAMPLING, STEPS, Table, found_after, with_cost_model, with_optuna
from tuner_targets import targets

from autosp.cost_model.predict import predict
from autosp.search.space import key_of, rank
from autosp.spec import Candidate, Measurement, Outcome
from builders import measurement, prediction, profile

BLOCKS, WIDTH = 8, 512
NUMBERS = {"candidates": 5, "rounds": 2, "top": 1, "random": 1, "draws": 2, "first": 0, "seeds": 1}


def make_toy(scale: str) -> PeerModel:
    return PeerModel("toy", nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))), torch.ones(4, WIDTH))


def at_once(measure: Callable[[Job, str], None], job: Job, folder: Path, timeout_s: float) -> dict[str, Any]:
    """Runs a job in this process."""
    measure(job, str(answer := folder / "answer.json"))
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


@pytest.fixture(autouse=True)
def quick_toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A toy of 8 MB, one thread, short measurements."""
    monkeypatch.setitem(MODELS, "toy", make_toy)
    monkeypatch.setattr("autosp.search.validate.ENOUGH_S", 0.0)
    monkeypatch.setattr("autosp.search.limits.MAX_TRIALS", 2)
    monkeypatch.setattr(tuner_regret, "RANKED_LAYERS", 12)
    monkeypatch.setattr("tuner_targets.RANKED_LAYERS", 12)
    monkeypatch.setattr(quick_answers, "REPEATS", 1)
    monkeypatch.setenv("AUTOSP_CACHE_DIR", str(tmp_path))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., Run]:
    """A run of the toy in this process."""

    def make(study: str, answer: Any = at_once, device: str = "disk") -> Run:
        measure = partial(answering, tuner.WORK[study])
        results = Results(raw_path(study, device, tmp_path), Row, DEVICES[device](), measure, answer=answer)
        return Run(device, "tiny", tmp_path, ("toy",), results, [], (60.0,), NUMBERS)

    return make


def kept(run: Run, study: Study) -> list[Row]:
    """The rows that a study left, all with figures and with what they depend on; a second run measures nothing."""
    study.run(run)
    text = run.results.raw.read_text()
    study.run(run)
    assert run.results.raw.read_text() == text, "what is there is not measured again"
    rows = tuner.latest(run.results.raw)
    assert [row.note for row in rows if not row.ok] == []
    assert all(row.environment["commit"] and row.environment["device"] for row in rows)
    return rows


def is_picture(study: Study, rows: list[Row], path: Path) -> bool:
    study.picture(rows, path)
    return path.read_bytes().startswith(b"\x89PNG")


def test_accuracy(asked: Callable[..., Run], tmp_path: Path) -> None:
    """On the paced link; the other studies are run from the disk."""
    (row,) = kept(asked("accuracy", device="paced"), ACCURACY)
    dumped = row.figures["candidates"]
    assert 2 < len(dumped) <= NUMBERS["candidates"] + 1
    found = [Measured.of(each) for each in dumped]
    assert all(each.ran and len(each.rounds) == NUMBERS["rounds"] for each in found)
    assert len({each.candidate for each in found}) == len(found)
    errors = Errors.of([row])
    assert len(errors.latency) == len(errors.memory_after) == len(found)
    assert len(errors.noise) == len(found) * NUMBERS["rounds"]
    assert max(map(abs, errors.memory)) < 0.5, "the predicted peaks are those of these candidates"
    assert "| toy |" in ACCURACY.table([row])
    assert is_picture(ACCURACY, [row], tmp_path / "accuracy.png")


def test_regret(asked: Callable[..., Run], tmp_path: Path) -> None:
    rows = kept(asked("regret"), REGRET)
    assert [row.case.model for row in rows] == ["toy", RANKING]
    figures = rows[0].figures
    assert 1 <= figures["trials"] <= 2
    assert figures["wall_s"] > max(figures["again_s"]), "the second answer is the database's"
    found = [Measured.of(each) for each in figures["candidates"]]
    assert len(found) == 1 + NUMBERS["top"] + NUMBERS["random"]
    again = finalists(found, figures["budget_bytes"])
    assert [each["candidate"] for each in figures["finals"]] == [each.dump()["candidate"] for each in again]
    assert all(len(each["rounds"]) == 2 * NUMBERS["rounds"] for each in figures["finals"])
    regret = regret_of(rows[0])
    assert regret is None or 1 <= regret.low <= regret.high
    assert rows[1].figures["fitting"] > 0
    text = REGRET.table(rows)
    assert "| toy | 60 % |" in text
    assert "`rank` of 12 layers" in text
    assert is_picture(REGRET, rows, tmp_path / "regret.png")


def test_budget_from_the_command_line(tmp_path: Path) -> None:
    """A small draw in forked processes; the report again without measuring."""
    words = ["budget", *["--scale", "tiny", "--first", "474", "--draws", "1"]]
    words += ["--scratch", str(tmp_path), "--output", str(tmp_path)]
    script = Path(tuner.__file__)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, str(script), *words], check=True, capture_output=True, timeout=120, env=environment)
    raw = raw_path("budget", "disk", tmp_path)
    rows = tuner.latest(raw)
    assert [row.case for row in rows] == [Case("tiny", draw(474).family, number=474)]
    assert rows[0].outcome in ("ok", TOO_SMALL), rows[0].note
    text, lines = raw.with_suffix(".md").read_text(), raw.read_text()
    tuner.main([*words, "--report"])
    assert (raw.with_suffix(".md").read_text(), raw.read_text()) == (text, lines)


def test_a_refused_budget_is_asked_again(asked: Callable[..., Run]) -> None:
    """Of three layers the largest is beyond 30 % of the weights; the second budget is above the least for it."""
    run = asked("budget", partial(in_two_processes, at_once), "paced")
    drawn = Draw("mlp", seed=1, layers=3, width=3, batch=1, length=1, share=0.25)
    row = run.measured("mlp", number=1, numbers={"draw": asdict(drawn)})
    assert row.ok, row.note
    refused = row.figures["refused"]
    assert refused["budget_bytes"] == pytest.approx(0.3 * row.figures["weight_bytes"], abs=1)
    assert refused["budget_bytes"] < refused["least_bytes"] < row.figures["budget_bytes"]
    assert row.figures["peak_bytes"] > 0
    assert sum(row.figures["trials"].values()) <= 2
    assert "plan" not in row.figures
    assert "| mlp | 1 | 1 | 1 | 0 |" in BUDGET.table([row])


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_are_questions(family: str) -> None:
    drawn = Draw(family, seed=1, layers=3, width=1, batch=2, length=1, share=0.5)
    first, second = build(drawn, "tiny"), build(drawn, "tiny")
    states = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in states), "the other process has the same model"
    with torch.no_grad():
        first.model(**first.batch) if isinstance(first.batch, dict) else first.model(first.batch)


def test_budgets_are_between_the_least_and_all() -> None:
    assert [budget_between(100, 1000, share) for share in (0.0, 0.5, 1.0)] == [100, 650, 1200]
    assert budget_between(5000, 1000, 1.0) == 5000
    assert draw(7) == draw(7) != draw(8)


def made_budget_row(number: int, outcome: str = "ok", **figures: Any) -> Row:
    known = {"budget_bytes": 100, "weight_bytes": 200, "tune_peak_bytes": 90, "peak_bytes": 95, "tune_s": 1.0}
    known |= {"trials": {"fits": 2, "over budget": 1}, "refused": None, "setting": "k=1"}
    return Row(Case("tiny", "mlp", number=number), outcome, figures=known | figures, environment={"commit": "c"})


def test_what_is_over_is_counted(tmp_path: Path) -> None:
    rows = [
        made_budget_row(0),
        made_budget_row(1, tune_peak_bytes=101),
        made_budget_row(2, peak_bytes=150),
        made_budget_row(3, OUT_OF_MEMORY),
        made_budget_row(4, TOO_SMALL),
        made_budget_row(5, "crashed"),
    ]
    assert [over(row) for row in rows] == [False, True, True, True, False, False]
    text = BUDGET.table(rows)
    assert "| **all** | 6 | 3 | 0 | 1 | 1 | 2 | 1 | 6 | 1.500 |" in text
    assert "| mlp, 2 | k=1 | 100 B | 90 B | 150 B |" in text
    assert is_picture(BUDGET, rows, tmp_path / "budget.png")
    lines = targets({"accuracy": [], "regret": [], "budget": rows, "samplers": []})
    assert "3 of 6 (1 as `tune` measured, 2 in a fresh process); 3 had a plan | **missed** |" in lines
    assert "6 recorded; 1 draws failed | **missed** |" in lines


PROFILE = profile([100] * 10, bytes_per_s=100.0, forward_s=0.5)
HALF = 500 + PROFILE.workspace_bytes


def made_table(slower: Callable[[Candidate], float] = lambda candidate: 1.0) -> dict[str, Any]:
    """Figures of the accuracy study: every setting of ten layers, measured as predicted, or slower."""
    dumped = []
    for each in rank(PROFILE, 10**6):
        rounds = tuple(
            measurement(latency_s=each.latency_s * slower(each.candidate) * factor, peak_bytes=each.peak_bytes)
            for factor in (0.999, 1.0, 1.001)
        )
        own = {"predicted_s": each.latency_s, "predicted_bytes": each.peak_bytes}
        own |= {"predicted_after_s": each.latency_s * 1.02, "predicted_after_bytes": round(each.peak_bytes * 1.02)}
        dumped.append(Measured(each.candidate, rounds).dump() | own)
    return {
        "title": "made",
        "weight_bytes": 1000,
        "profile": PROFILE.model_dump(mode="json"),
        "candidates": dumped,
    }


def test_samplers(tmp_path: Path, asked: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tuner_samplers.NEEDS, "GP", "no_such_package")
    base = asked("samplers")
    source = Row(Case("tiny", "toy", 50.0), figures=made_table(), environment={"commit": "c"})
    run = Run(base.device, base.scale, base.scratch, base.models, base.results, [source], (60.0,), NUMBERS)
    SAMPLING.run(run)
    rows = tuner.latest(base.results.raw)
    outcomes = {row.case.setting: row.outcome for row in rows}
    assert outcomes == dict.fromkeys((OURS, *SAMPLERS), "ok") | {"GP": "not installed"}
    found = {row.case.setting: row.figures["seeds"] for row in rows if row.ok}
    assert found[OURS][0]["found"][-1] == pytest.approx(1), "its model is right, so it finds the best at once"
    assert all(seed["trials"] == STEPS[-1] for name in found for seed in found[name] if name != OURS)
    text = SAMPLING.table(rows)
    assert f"| {OURS} |" in text
    assert "pip install 'autosp[studies]'" in text
    assert is_picture(SAMPLING, rows, tmp_path / "samplers.png")


@pytest.mark.parametrize("name", SAMPLERS)
def test_proposals_stand_for_measured_candidates(name: str) -> None:
    if name == "GP":
        pytest.importorskip("scipy")
    table = Table.of(made_table(), 50.0)
    tried = with_optuna(table, name, seed=1, trials=4)
    assert len(tried) == 4
    assert {key for key, _ in tried} <= set(table.measured)
    assert all((m.outcome is Outcome.FITS) == (m.peak_bytes <= table.most_bytes) for _, m in tried)
    assert with_optuna(table, name, seed=1, trials=4) == tried, "a seed names a study"


def test_a_measured_candidate_stands_for_itself() -> None:
    table = Table.of(made_table(), 50.0)
    for key in table.measured:
        assert table.nearest(dict(zip(tuner_samplers.PARAMETERS, key, strict=True))) == key


def test_the_incumbent_is_what_was_seen_to_be_fastest() -> None:
    table = Table.of(made_table(), 50.0)
    fitting = sorted((each.latency_s, key) for key, each in table.measured.items() if each.peak_bytes <= 500)
    (best_s, best), (worst_s, worst) = fitting[0], fitting[-1]
    over_budget = measurement(latency_s=0.001, peak_bytes=501, outcome=Outcome.OVER_BUDGET)
    tried = [(best, over_budget), (worst, measurement(latency_s=2.0)), (best, measurement(latency_s=1.0))]
    assert table.best_s == best_s
    assert found_after(table, tried)[:3] == [None, worst_s / best_s, 1.0]
    assert with_cost_model(Table.of(made_table(), 1.0), seed=0, trials=3) == [], "nothing fits, nothing is tried"


def test_samples_are_spread_and_have_the_best() -> None:
    known = [
        (percent, prediction(Candidate(k=k, k_prime=1), latency_s=100 - k, peak_bytes=k))
        for k, percent in ((k, next(p for p in (*BUDGETS_PERCENT, 200) if p >= k)) for k in range(1, 100))
    ]
    chosen = sample(known, 20)
    assert len(chosen) <= 20
    assert {1, 99, *BUDGETS_PERCENT} <= {candidate.k for candidate in chosen}
    assert len(sample(known, 99)) == 99


def made_regret_row(*medians: tuple[float, ...], peaks: tuple[int, ...] = (), **figures: Any) -> Row:
    """A row at a budget of 100: the plan's medians by round, then the others'."""
    dumped = []
    for index, rounds in enumerate(medians):
        peak = peaks[index] if peaks else 100
        times: tuple[Measurement, ...] = tuple(measurement(latency_s=one, peak_bytes=peak) for one in rounds)
        dumped.append(Measured(Candidate(k=index + 1, k_prime=1), times).dump())
    known = {"title": "made", "budget_bytes": 100, "wall_s": 20.0, "pass_s": 1.0, "trials": 4, "again_s": [0.01]}
    return Row(Case("tiny", "toy", 50.0), figures=known | {"candidates": dumped} | figures, environment={"commit": "c"})


def test_regret_is_against_the_best_that_kept_the_budget() -> None:
    worse = regret_of(made_regret_row((1.1,) * 3, (1.0,) * 3, (0.5,) * 3, peaks=(100, 100, 101)))
    assert worse is not None
    assert (worse.of_best, worse.low, worse.high, worse.held_out) == pytest.approx((1.1,) * 4)
    assert (worse.verdict, worse.measured, worse.best.k, worse.noise) == ("**missed**", 2, 2, 0)
    noisy = regret_of(made_regret_row((1.0, 1.2, 1.1), (1.2, 1.0, 1.05)))
    assert noisy is not None
    assert noisy.verdict == "within noise"
    best = regret_of(made_regret_row((1.0,) * 3, (1.1,) * 3))
    assert best is not None
    assert (best.of_best, best.verdict) == (1, "met")
    assert regret_of(made_regret_row((1.0,) * 3, peaks=(101,))) is None


def test_finals_alone_count() -> None:
    """A rival that was lucky among many is not what the plan is held against, nor one that was not measured again."""
    heat = made_regret_row((1.0,), (0.8,), (1.2,), (1.3,), (1.1,), (1.4,), (0.5,), peaks=(100,) * 6 + (101,)).figures
    found = [Measured.of(dumped) for dumped in heat["candidates"]]
    assert [each.candidate.k for each in finalists(found, 100)] == [1, 2, 5, 3, 4]
    assert finalists(found[-1:], 100) == []
    finals = made_regret_row((1.0, 1.0), (1.02, 1.02)).figures["candidates"]
    regret = regret_of(made_regret_row((1.0,), (0.8,), (0.9,), finals=finals))
    assert regret is not None
    assert (regret.of_best, regret.high, regret.measured) == (1, 1, 3)


def test_targets_say_what_was_met() -> None:
    nothing = targets({name: [] for name in tuner.STUDIES})
    assert nothing.count("| not measured |") == 9
    broken = Row(Case("tiny", "toy", 25.0), "crashed", "the process ended with 3")
    text = targets({name: [] for name in tuner.STUDIES} | {"regret": [broken]})
    assert text.endswith("Without figures: regret of toy, 25 % (crashed).")
    accurate = Row(Case("tiny", "toy", 50.0), figures=made_table(), environment={"commit": "c"})
    ranking = Row(Case("tiny", RANKING), figures={"rank_s": [1.5]}, environment={"commit": "c"})
    slow = made_regret_row((1.0,) * 3, wall_s=31.0, trials=7)
    text = targets({"accuracy": [accurate], "regret": [slow, ranking], "budget": [made_budget_row(0)], "samplers": []})
    told = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()[2:]}
    assert {name: line.split(" | ")[-1].strip(" |*") for name, line in told.items()} == {
        "latency prediction, profile alone": "met",
        "latency prediction, after a study": "met",
        "memory prediction, profile alone": "met",
        "memory prediction, after a study": "met",
        "regret": "met",
        "trials on the device": "missed",
        "wall time of tune": "missed",
        "same fingerprint again": "met",
        "ranking 12 layers": "missed",
        "budget": "missed",
        "trials out of memory or over the budget": "met",
    }, "one draw is not 300"


def test_errors_have_their_signs() -> None:
    errors = Errors.of([Row(Case("tiny", "toy"), figures=made_table(lambda candidate: 1.25))])
    assert sizes(errors.latency) == pytest.approx((0.2, 0.2))
    assert under_and_over(errors.memory_after)[0] == 0
    assert under_and_over([-0.04, 0.01, 0.02]) == (0.04, 0.01)
    assert max(errors.noise) < 0.003


def test_the_table_is_of_every_setting() -> None:
    """What the tests above rest on."""
    table = Table.of(made_table(), 50.0)
    assert len(table.measured) > 50
    predictions = predict(PROFILE, [each.candidate for each in table.measured.values()])
    for each in predictions:
        assert table.measured[key_of(each.candidate)].latency_s == pytest.approx(each.latency_s)
