"""Trials in a process of their own, and what may become of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.devices import CpuDevice
from autosp.errors import NotPicklableError, SettingError
from autosp.profiler import measure
from autosp.runtime.bench import Bench
from autosp.search.isolated import IsolatedTrials, Isolation
from autosp.search.validate import LEAST_PASSES, Reference, validate
from autosp.spec import Candidate, Outcome, Tier, Trial
from autosp.store import Repository
from autosp.workload import Workload
from builders import prediction
from models import EarlyExit, vectors
from trial_models import BUDGET_GB, WIDTH, fragile

BUDGET_BYTES = 200_000_000


def big() -> tuple[nn.Module, torch.Tensor]:
    """Large enough for its memory to stand out from the process's own."""
    torch.manual_seed(0)
    return EarlyExit(blocks=8, width=WIDTH).eval(), vectors(4, WIDTH)


def trials_of(study_name: str) -> list[Trial]:
    with Repository() as repository:
        return repository.trials(study_name)


def test_what_ends_a_process_is_the_outcome_of_its_trial_alone(tmp_path: Path) -> None:
    # The first pass of each process is the plain one, the second the first of a trial.
    ends = {
        2: ("kill", Outcome.KILLED, "was killed"),
        4: ("segfault", Outcome.CRASHED, "ended with SIGSEGV"),
        6: ("exit", Outcome.CRASHED, "exited with status 3"),
        8: ("hang", Outcome.TIMED_OUT, "gave no answer for 8 s"),
    }
    deeds = {number: deed for number, (deed, _, _) in ends.items()} | {10: "out of memory"}
    counter = tmp_path / "passes"
    model, batch = fragile(deeds, counter)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        plan = autosp.tune(
            model, batch, BUDGET_GB, device="cpu", progress=False, isolate=True, trial_timeout_s=8, study_name="frail"
        )
    outcomes = [trial.measurement.outcome for trial in trials_of("frail")]
    assert outcomes[:5] == [*(outcome for _, outcome, _ in ends.values()), Outcome.OUT_OF_MEMORY]
    assert set(outcomes[5:]) <= {Outcome.FITS, Outcome.OVER_BUDGET}
    assert plan.measurement is not None and plan.measurement.outcome is Outcome.FITS
    told = [str(warning.message) for warning in warned]
    for _, _, how in ends.values():
        assert any(how in text for text in told), told
    # One process per trial that ended it, and one for all the others.
    assert len(set(counter.read_text().split())) == len(ends) + 1
    constraints = constraints_of("frail")
    assert [values["process"] > 0 for values in constraints] == [outcome.cut_short for outcome in outcomes]


def constraints_of(study_name: str) -> list[dict[str, float]]:
    import optuna

    with Repository() as repository:
        study = optuna.load_study(study_name=study_name, storage=repository.optuna_storage())
        return [trial.constraints for trial in study.trials]


@pytest.mark.parametrize("slow_tier", [Tier.DISK, Tier.HOST])
def test_a_process_of_its_own_measures_what_this_one_does(slow_tier: Tier, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = EarlyExit(blocks=8, width=2 * WIDTH).eval(), vectors(4, 2 * WIDTH)
    values = {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters()}
    device = CpuDevice(slow_tier=slow_tier)
    workload = Workload.of(model, batch, None, "inference", device)
    parts, output = workload.observed_pass(device)
    candidates = [Candidate(k=3, k_prime=1, residents=(2,)), Candidate(k=2, k_prime=2)]
    cache_dir = tmp_path / "trials"
    with Bench(model, parts, device, cache_dir) as bench:
        reference = Reference(output, lambda: output)
        profile = measure(bench, workload)
        here = [validate(bench, workload, reference, BUDGET_BYTES, candidate) for candidate in candidates]
        brief = [validate(bench, workload, reference, BUDGET_BYTES, candidates[0], hopeless_s=0.0)]
    steps: list[str] = []
    ranked = [prediction(candidates[0])]  # the other one is a finalist of another process's ranking
    opened = IsolatedTrials(
        workload, device, profile, cache_dir, (BUDGET_BYTES, None), Isolation(), ranked, steps.append
    )
    with opened as trials:
        there = [trials.validate(candidate) for candidate in candidates]
        brief.append(trials.validate(candidates[0], hopeless_s=0.0))
    device.close()
    for mine, theirs in zip(here, there, strict=True):
        assert (theirs.outcome, theirs.moved_bytes, theirs.misses) == (Outcome.FITS, mine.moved_bytes, mine.misses)
        assert theirs.peak_bytes == pytest.approx(mine.peak_bytes, abs=3_000_000)  # the heap's noise
    assert steps.count("a process for trials") == 1
    assert steps.count("cold") == len(candidates) + 1
    assert all(len(one.samples_s) >= LEAST_PASSES for one in (*here, *there))
    assert [(one.outcome, len(one.samples_s)) for one in brief] == [(Outcome.FITS, 1)] * 2
    assert all(
        (id(tensor), True) == (values[name][0], torch.equal(tensor, values[name][1]))
        for name, tensor in model.named_parameters()
    )
    assert list(cache_dir.iterdir()) == []


def test_what_the_model_raises_there_is_raised_here(tmp_path: Path) -> None:
    model, batch = fragile({2: "raise"}, tmp_path / "passes")
    with pytest.raises(ArithmeticError, match="their own mistake") as caught:
        autosp.tune(model, batch, BUDGET_GB, device="cpu", progress=False, isolate=True)
    assert "in the process of isolated trials:" in caught.value.__notes__[0]
    assert "trial_models.py" in caught.value.__notes__[0]
    plan = autosp.resume(autosp.list_studies()[0].name, model, batch, device="cpu", progress=False, max_trials=1)
    assert plan.measurement is not None and plan.measurement.outcome is Outcome.FITS


def test_what_cannot_be_sent_is_told_before_any_trial() -> None:
    model, batch = big()
    with pytest.raises(NotPicklableError, match="lambda"):
        autosp.tune(model, batch, BUDGET_GB, step=lambda m, b: m(b), device="cpu", progress=False, isolate=True)
    with pytest.raises(SettingError, match="goes with isolate=True"):
        autosp.tune(model, batch, BUDGET_GB, device="cpu", progress=False, trial_timeout_s=3)
    with pytest.raises(SettingError, match="trial_timeout_s=-3"):
        autosp.tune(model, batch, BUDGET_GB, device="cpu", progress=False, isolate=True, trial_timeout_s=-3)


def test_a_trial_hangs_when_it_takes_far_longer_than_predicted() -> None:
    slow = prediction(Candidate(k=1, k_prime=1), latency_s=100.0)
    assert Isolation().timeout_s(slow) == 60 + 20 * (100 + 300)
    assert Isolation().timeout_s(slow.model_copy(update={"cold_latency_s": 200.0})) == 60 + 20 * (200 + 300)
    assert Isolation().timeout_s(prediction(Candidate(k=2, k_prime=1)), slow) == Isolation().timeout_s(slow)
    assert Isolation(5.0).timeout_s(slow) == 5.0


UNGUARDED = """
from pathlib import Path
import trial_models, autosp
model, batch = trial_models.fragile({}, Path("no passes"))
autosp.tune(model, batch, trial_models.BUDGET_GB, device="cpu", progress=False, isolate=True, max_trials=1)
"""


def run_script(text: str, path: Path, *arguments: str) -> subprocess.Popen[str]:
    """A program of a user's, whose main module is a file."""
    path.write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(path), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT)


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    said, _ = run_script(UNGUARDED, tmp_path / "script.py").communicate(timeout=120)
    assert "IsolationError: the process for trials exited with status 1 before the first of them" in said
    assert "a script must call tune under `if __name__ == '__main__':`" in said


HANGS = """
import sys
from pathlib import Path
import trial_models, autosp

if __name__ == "__main__":
    model, batch = trial_models.fragile({2: "hang"}, Path(sys.argv[1]))
    autosp.tune(model, batch, trial_models.BUDGET_GB, device="cpu", progress=False, isolate=True, study_name="orphan")
"""


def test_the_process_dies_with_its_parent(tmp_path: Path) -> None:
    counter = tmp_path / "passes"
    parent = run_script(HANGS, tmp_path / "script.py", str(counter))
    wait_until(lambda: counter.exists() and len(counter.read_text().split()) == 2)
    child = int(counter.read_text().split()[0])
    assert not is_gone(child)
    parent.kill()
    parent.communicate(timeout=60)
    wait_until(lambda: is_gone(child))


def is_gone(process: int) -> bool:
    """Ended, though nobody may have asked yet how."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(reached: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.2)
