"""Trials in a process of their own: what ends that process, or what makes its device unusable, is an outcome."""

from __future__ import annotations

import math
import signal
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing import current_process, get_context
from multiprocessing.connection import wait
from multiprocessing.reduction import send_handle
from pathlib import Path
from time import monotonic
from typing import Any

from autosp.batch import map_tensors
from autosp.cost_model.reading import measured_reading
from autosp.devices import Device
from autosp.errors import IsolationError, SettingError
from autosp.parcel import Parcel
from autosp.search.numerics import numerics
from autosp.search.trial_process import Answer, Job, Said, serve
from autosp.search.validate import ENOUGH_S, LEAST_PASSES, failed
from autosp.spec import Candidate, Measurement, Outcome, Prediction, Profile, Tier
from autosp.workload import Workload

LEAST_TIMEOUT_S = 60.0
TIMEOUT_FACTOR = 20.0
"""A trial may take this many times what its passes were predicted to take, and `LEAST_TIMEOUT_S` besides."""

START_TIMEOUT_S = 600.0
SLOWEST_BYTES_PER_S = 20e6
"""The process starts, makes its reference and puts the weights on the slow tier in no more than the first, and the
time that they take at the second."""

PROCESS_NAME = "autosp-trials"

GUARD = (
    "The process for trials imports the program's main module: a script must call tune under "
    "`if __name__ == '__main__':`, or without isolate=True"
)

STARTS = 3
"""Attempts. A process that somebody kills while it starts has said nothing of any candidate."""


@dataclass(frozen=True)
class Isolation:
    """That trials run in a process of their own, and for how long.

    Raises: SettingError if the time is not positive.
    """

    trial_timeout_s: float | None = None
    """None: as `timeout_s` derives it."""

    def __post_init__(self) -> None:
        seconds = self.trial_timeout_s
        if seconds is not None and not (type(seconds) in (int, float) and 0 < seconds < float("inf")):
            raise SettingError(f"trial_timeout_s={seconds!r}: pass a positive number of seconds, or None")

    @classmethod
    def of(cls, isolate: bool, trial_timeout_s: float | None) -> Isolation | None:
        """What the two arguments of `tune` mean.

        Raises: SettingError if they do not go together; IsolationError in a process that was started for trials.
        """
        if isolate:
            if current_process().name == PROCESS_NAME:
                raise IsolationError(GUARD)
            return cls(trial_timeout_s)
        if trial_timeout_s is not None:
            raise SettingError("trial_timeout_s goes with isolate=True: a trial in this process cannot be stopped")
        return None

    def timeout_s(self, *predictions: Prediction) -> float:
        """When a trial hangs: far beyond what was predicted of it. Of several predictions the slowest counts."""
        if self.trial_timeout_s is not None:
            return self.trial_timeout_s
        cold_s = max(prediction.cold_latency_s or prediction.latency_s for prediction in predictions)
        pass_s = max(prediction.latency_s for prediction in predictions)
        return LEAST_TIMEOUT_S + TIMEOUT_FACTOR * (cold_s + max(ENOUGH_S, LEAST_PASSES * pass_s))


class _EndedError(Exception):
    """The process ended, or was ended, without an answer."""

    def __init__(self, outcome: Outcome, how: str) -> None:
        super().__init__(how)
        self.outcome = outcome


class IsolatedTrials:
    """Validates candidates in another process: one for all of them, a new one after each that ends it.

    The process is ended, and the next trial gets a new one, when it dies, takes too long, or its device is unusable. A
    new one takes some seconds: it imports torch, makes the plain model's output and puts the weights on the slow tier.
    Where weights rest in host memory, those of the model given move to a file for as long as this is open, as they
    would move to a buffer in this process: there is one copy in RAM. See [Note: parcels].
    """

    def __init__(
        self,
        workload: Workload,
        device: Device,
        profile: Profile,
        cache_dir: Path,
        budgets_bytes: tuple[int, int | None],
        isolation: Isolation,
        ranked: Sequence[Prediction],
        progress: Callable[[str], None],
    ) -> None:
        """`budgets_bytes`: of the device, and of the host if that binds. `ranked`: the candidates, for their timeouts.

        Raises: NotPicklableError; DiskFullError or TierError if the weights cannot be written to `cache_dir`.
        """
        self._isolation = isolation
        self._progress = progress
        self._predictions = {prediction.candidate: prediction for prediction in ranked}
        device.start_measuring()  # what this process keeps of the device and does not use is the trials'
        self._start_timeout_s = START_TIMEOUT_S + profile.partition.total_bytes / SLOWEST_BYTES_PER_S
        self._process: _TrialProcess | None = None
        job = Job(
            model=workload.model,
            batch=map_tensors(lambda tensor: tensor.cpu(), workload.batch),
            step=workload.step,
            mode=workload.mode,
            seed=workload.seed,
            group=workload.group,
            device=device,
            partition=profile.partition,
            reading=measured_reading(profile),
            cache_dir=cache_dir,
            budget_bytes=budgets_bytes[0],
            host_budget_bytes=budgets_bytes[1],
            numerics=numerics(),
        )
        with ExitStack() as opening:
            self._parcel = Parcel(job, cache_dir)
            opening.callback(self._parcel.close)
            if device.info.slow_tier is Tier.HOST:
                opening.enter_context(self._parcel.moved(workload.model))
            opening.callback(self._end)
            self._closing = opening.pop_all()

    def __enter__(self) -> IsolatedTrials:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._closing.close()

    def validate(self, candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
        """What the candidate measured, or how its process ended. What the model raises there is raised here.

        Raises: IsolationError if the process does not start, NotPicklableError if it cannot take what was sent.
        """
        process = self._process = self._process or self._started()
        try:
            answer = process.ask((candidate, hopeless_s), self._timeout_s(candidate), self._progress)
        except _EndedError as ended:
            self._end()
            warnings.warn(
                f"the process of trial {candidate.label()} {ended}: it is recorded as "
                f"{ended.outcome.value!r}, and the next trial gets a new process",
                stacklevel=2,
            )
            return failed(ended.outcome, 0)
        if answer.said is Said.RAISED:
            raise answer.content
        measurement: Measurement = answer.content
        return measurement

    def _timeout_s(self, candidate: Candidate) -> float:
        """A finalist may be of another process's ranking: it gets as long as the slowest of this one's."""
        known = self._predictions.get(candidate)
        return self._isolation.timeout_s(*([known] if known else self._predictions.values()))

    def _started(self) -> _TrialProcess:
        """A process that is ready for a trial."""
        for _ in range(STARTS):
            self._progress("a process for trials")
            process = self._process = _TrialProcess()
            try:
                process.answer(self._start_timeout_s, self._progress)
                process.give(self._parcel)
                answer = process.answer(self._start_timeout_s, self._progress)
            except _EndedError as ended:
                self._end()
                how = str(ended)
                if ended.outcome is Outcome.KILLED:
                    continue
                break
            if answer.said is Said.RAISED:
                raise answer.content
            return process
        raise IsolationError(
            f"the process for trials {how} before the first of them: what it printed says why. {GUARD}"
        )

    def _end(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None


class _TrialProcess:
    """One process, and the pipe to it."""

    def __init__(self) -> None:
        spawn = get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs,), name=PROCESS_NAME, daemon=True)
        self._process.start()
        theirs.close()

    def give(self, parcel: Parcel) -> None:
        """Once it says that it has started: it takes the parcel at once, so that nothing here waits for it."""
        with suppress(OSError):  # it is dead: the next `answer` says how
            send_handle(self._pipe, parcel.descriptor, self._process.pid)
            self._pipe.send(parcel.places)
            self._pipe.send_bytes(parcel.pickled)

    def ask(self, question: Any, timeout_s: float, progress: Callable[[str], None]) -> Answer:
        """Raises: _EndedError."""
        with suppress(OSError):
            self._pipe.send(question)
        return self.answer(timeout_s, progress)

    def answer(self, timeout_s: float, progress: Callable[[str], None]) -> Answer:
        """The next answer; what is said before it is passed on. Raises: _EndedError."""
        deadline = monotonic() + timeout_s
        while True:
            ready = wait([self._pipe, self._process.sentinel], max(0.0, deadline - monotonic()))
            if not ready:
                raise _EndedError(Outcome.TIMED_OUT, f"gave no answer for {timeout_s:.4g} s and was ended")
            if self._pipe not in ready:
                raise self._death()
            try:
                answer: Answer = self._pipe.recv()
            except (EOFError, OSError):
                raise self._death() from None
            if answer.said is Said.PROGRESS:
                progress(answer.content)
            elif answer.said is Said.WARNED:
                message, category = answer.content
                warnings.warn(message, category, stacklevel=2)
            elif answer.said is Said.DEVICE_ERROR:
                raise _EndedError(Outcome.DEVICE_ERROR, f"lost its device ({answer.content})")
            else:
                return answer

    def end(self) -> None:
        """Kill it, whatever it does, and wait for its end."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()

    def _death(self) -> _EndedError:
        self._process.join()
        code = self._process.exitcode or 0
        if code == -signal.SIGKILL:
            return _EndedError(Outcome.KILLED, "was killed (by the kernel, if host memory was exhausted)")
        if code < 0:
            return _EndedError(Outcome.CRASHED, f"ended with {signal.Signals(-code).name}")
        return _EndedError(Outcome.CRASHED, f"exited with status {code}")
