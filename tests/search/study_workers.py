"""What the workers of one study run: everything is real but the device."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autosp.search.limits import Limits
from autosp.search.space import Key, key_of
from autosp.search.study import Verdict, run_study
from autosp.spec import Candidate, Measurement, Outcome, Prediction, Profile
from autosp.store import Repository
from builders import measurement, prediction, profile, study_key
from processes import forked

NAME = "shared"
BUDGET_BYTES = 10**6
PROFILE: Profile = profile([1])
KEY = study_key(budget_bytes=BUDGET_BYTES)


def candidates(count: int) -> list[Prediction]:
    """Plain windows, each predicted to be slower than the one before."""
    return [
        prediction(Candidate(k=k, k_prime=1), latency_s=1 + k / 1000, stall_s=0.1, peak_bytes=k)
        for k in range(1, count + 1)
    ]


class Counted:
    """A device on which every plan gives another output, so that all have to be tried; it notes what it ran."""

    def __init__(self) -> None:
        self.ran: list[Key] = []

    def validate(self, candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
        """One trial, in no time."""
        self.ran.append(key_of(candidate))
        return measurement(outcome=Outcome.OUTPUT_DIFFERS)


class Noisy:
    """A device far from its predictions, the same at each run; it notes what it begins in a file."""

    def __init__(self, log: Path | None = None, trial_s: float = 0.0) -> None:
        self._log = log
        self._trial_s = trial_s

    def validate(self, candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
        """One trial."""
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(f"{candidate.k}\n")
        time.sleep(self._trial_s)
        factor = 0.6 + random.Random(candidate.k).random()
        return measurement(latency_s=factor * (1 + candidate.k / 1000), peak_bytes=candidate.k)


def work(storage: str, ranked: Sequence[Prediction], device: Any, max_trials: int = 10_000) -> Verdict:
    """One worker's whole life."""
    with Repository(storage) as repository:
        repository.create_study(NAME, KEY)
        return run_study(
            repository,
            NAME,
            PROFILE,
            ranked,
            BUDGET_BYTES,
            device.validate,
            limits=Limits(max_trials=max_trials),
            progress=lambda text: None,
        )


def worker(storage: str, count: int, start: Any, answers: Any) -> None:
    """Begin with the others; say what was run, and the verdict."""
    device = Counted()
    start.wait(timeout=240)
    verdict = work(storage, candidates(count), device)
    answers.put((device.ran, verdict))


def noisy_worker(storage: str, count: int, log: Path, ready: Any) -> None:
    """To be killed at any moment."""
    ready.set()
    work(storage, candidates(count), Noisy(log, trial_s=0.02))


def work_together(storage: str, processes: int, count: int) -> list[tuple[list[Key], Verdict]]:
    """What each of the workers ran, and their verdicts."""
    start, answers = forked.Barrier(processes), forked.Queue()
    workers = [forked.Process(target=worker, args=(storage, count, start, answers)) for _ in range(processes)]
    for process in workers:
        process.start()
    found = [answers.get(timeout=250) for _ in workers]
    for process in workers:
        process.join(60)
        assert process.exitcode == 0
    return found
