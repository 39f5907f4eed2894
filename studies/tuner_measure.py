"""What the tuner's studies do in their processes: tune for real, then measure candidates in interleaved rounds."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from peer_models import PeerModel
from tuner_results import Job

import autosp
from autosp.cost_model.predict import predict
from autosp.devices import Device
from autosp.partition import partition
from autosp.profiler.host import binding_host_budget
from autosp.runtime.bench import Bench
from autosp.search.learned import Learned, Lessons
from autosp.search.validate import Reference, validate
from autosp.spec import Candidate, Measurement, Plan, Prediction, Profile, Trial
from autosp.store import Repository
from autosp.workload import Workload


@dataclass(frozen=True)
class Tuned:
    """A study of `autosp.tune` from its first question to its answer."""

    plan: Plan
    profile: Profile
    trials: list[Trial]
    wall_s: float

    def learned(self, candidates: Sequence[Candidate]) -> Learned:
        """What the study's trials say of these candidates."""
        return Lessons(self.profile, predict(self.profile, candidates)).learned(self.trials)


@contextmanager
def run_folder(job: Job) -> Iterator[Path]:
    """A folder of this process in the scratch one, where autosp's own files go as well."""
    with TemporaryDirectory(dir=job.scratch, prefix="run-") as name:
        os.environ["AUTOSP_CACHE_DIR"] = name
        yield Path(name)


def ask(example: PeerModel, device: Device, budget_bytes: int, folder: Path) -> Plan:
    """`autosp.tune` as a user calls it; the database is in the folder."""
    return autosp.tune(
        example.model,
        example.batch,
        f"{budget_bytes}B",
        step=example.step,
        device=device,
        storage=storage_in(folder),
        progress=False,
    )


def storage_in(folder: Path) -> Path:
    """The database of `ask`."""
    return folder / "study.db"


def tune(example: PeerModel, device: Device, budget_bytes: int, folder: Path) -> Tuned:
    """Ask, timed, and read what the study left in the database.

    Raises: BudgetTooSmallError.
    """
    begin = time.perf_counter()
    plan = ask(example, device, budget_bytes, folder)
    wall_s = time.perf_counter() - begin
    with Repository(storage_in(folder)) as repository:
        name = plan.study_name or ""
        profile = repository.profile(name)
        assert profile is not None, "a finished study has its profile"
        return Tuned(plan, profile, repository.trials(name), wall_s)


Validated = Callable[[Candidate], Measurement]


@contextmanager
def on_bench(example: PeerModel, device: Device, profile: Profile, folder: Path) -> Iterator[Validated]:
    """Measures any candidate as a trial of `tune` is measured, with all of the device's memory for a budget."""
    workload = Workload.of(example.model, example.batch, example.step, "inference", device)
    output = _plain_output(workload, device)
    reference = Reference(output, lambda: _plain_output(workload, device))
    host_bytes = binding_host_budget(profile.partition, device, None)
    with Bench(workload.model, profile.partition, device, folder, host_bytes) as bench:
        most_bytes = device.info.memory_bytes
        yield lambda candidate: validate(bench, workload, reference, most_bytes, candidate)


def in_rounds(validated: Validated, candidates: Sequence[Candidate], rounds: int, seed: int = 0) -> list[Measured]:
    """Each candidate once a round, the rounds each in an order of their own: the machine drifts."""
    rng = random.Random(seed)
    found: dict[int, list[Measurement]] = {index: [] for index in range(len(candidates))}
    for _ in range(rounds):
        for index in rng.sample(list(found), len(found)):
            found[index].append(validated(candidates[index]))
    return [Measured(candidate, tuple(found[index])) for index, candidate in enumerate(candidates)]


@dataclass(frozen=True)
class Measured:
    """A candidate with a measurement per round."""

    candidate: Candidate
    rounds: tuple[Measurement, ...]

    @property
    def ran(self) -> bool:
        """Whether every round has its times."""
        return all(measurement.samples_s for measurement in self.rounds)

    def keeps(self, budget_bytes: int) -> bool:
        """Whether no round was over it."""
        return self.ran and self.peak_bytes <= budget_bytes

    @property
    def latency_s(self) -> float:
        """The median of all its passes."""
        return median(sample for measurement in self.rounds for sample in measurement.samples_s)

    @property
    def peak_bytes(self) -> int:
        """The most of any round."""
        return max(measurement.peak_bytes for measurement in self.rounds)

    def noise(self) -> list[float]:
        """How far each round's median is off the median of the others: what a perfect prediction would be off."""
        medians = [measurement.latency_s for measurement in self.rounds]
        if len(medians) < 2:
            return []
        return [abs(one / median(medians[:at] + medians[at + 1 :]) - 1) for at, one in enumerate(medians)]

    def dump(self) -> dict[str, Any]:
        """For a row."""
        rounds = [measurement.model_dump(mode="json") for measurement in self.rounds]
        return {"candidate": self.candidate.model_dump(mode="json"), "rounds": rounds}

    @classmethod
    def of(cls, dumped: dict[str, Any]) -> Measured:
        """From a row."""
        rounds = tuple(Measurement.model_validate(each) for each in dumped["rounds"])
        return cls(Candidate.model_validate(dumped["candidate"]), rounds)


def by_candidate(predictions: Sequence[Prediction]) -> dict[Candidate, Prediction]:
    """For a lookup."""
    return {prediction.candidate: prediction for prediction in predictions}


def _plain_output(workload: Workload, device: Device) -> Any:
    """What the unstreamed model gives, run as `tune` runs it: on a device that it may not fit, layer by layer."""
    outputs: list[Any] = []
    slow_tier = device.info.slow_tier
    run = lambda: outputs.append(workload.run_seeded())  # noqa: E731
    partition(workload.model, run, device.torch_device, lookups=device.reads_host, slow_tier=slow_tier)
    return outputs[0]
