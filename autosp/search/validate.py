"""One candidate on the real device: its time, its peak, and whether its output is the plain model's."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any, Protocol

import torch

from autosp.batch import equal
from autosp.devices import Device
from autosp.errors import HostMemoryError
from autosp.runtime.bench import Bench, timed_pass
from autosp.schedule.training import least_training
from autosp.spec import Candidate, Measurement, Outcome
from autosp.workload import Workload

LEAST_PASSES = 3
MOST_PASSES = 15
ENOUGH_S = 0.5
"""Short passes are repeated until they fill this time: their median needs it."""


class Validate(Protocol):
    """What measures candidates."""

    def __call__(self, candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
        """`hopeless_s`: once a pass has taken longer, and none less, the candidate is timed no more."""


class Reference:
    """The plain model's output, and a way to have it again. In training: loss and gradients."""

    @classmethod
    def of_inference(cls, device: Device, workload: Workload) -> Reference:
        """The output of a pass of the unstreamed model."""
        return cls(workload.observed_pass(device)[1], lambda: workload.observed_pass(device)[1])

    @classmethod
    def of_training(cls, bench: Bench, workload: Workload) -> Reference:
        """The loss and the gradients of one pass: a plain one on a CPU.

        On an accelerator plain training may not fit, and a CPU's kernels give other bits: there it is a pass of the
        least-memory plan, which has each layer compute alone with freshly loaded weights. A plan that differs from
        that, in what is loaded ahead, kept or computed again, is found; what all plans had in common would not be.
        """

        def run() -> Any:
            with workload.leaving_no_trace(), ExitStack() as applied:
                if bench.device.torch_device.type != "cpu":
                    applied.callback(bench.apply(least_training(bench.partition)).remove)
                return workload.run_seeded()

        return cls(run(), run)

    def __init__(self, output: Any, plain_pass: Callable[[], Any]) -> None:
        self._output = output
        self._plain_pass = plain_pass
        self._deterministic: bool | None = None

    def is_given_by(self, output: Any) -> bool:
        """Whether every bit is the same."""
        return equal(output, self._output)

    def repeats(self) -> bool:
        """Whether a model without a plan gives it again; one that differs from itself can be compared with nothing."""
        if self._deterministic is not False:  # some differ from themselves only now and then: asked at each difference
            self._deterministic = equal(self._plain_pass(), self._output)
            if not self._deterministic:
                warnings.warn(
                    "two plain passes of the model gave different outputs from the same seed: "
                    "streamed outputs cannot be verified",
                    stacklevel=2,
                )
        return self._deterministic


def validate(
    bench: Bench,
    workload: Workload,
    reference: Reference,
    budget_bytes: int,
    candidate: Candidate,
    hopeless_s: float = math.inf,
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Run the candidate: a cold pass, compared with `reference`, then timed ones. `hopeless_s`: see `Validate`.

    Out of memory, the device's or the host's, and a differing output are outcomes, not errors. The model is restored in
    every case; what it raises passes through.
    """
    device, state_bytes = bench.device, bench.state_bytes(candidate)
    try:
        with device.limit(max(0, budget_bytes - state_bytes)), workload.trial():
            streamed = bench.apply(candidate)
            try:
                streamed.keep_within(max(0, budget_bytes - state_bytes))
                progress("cold")
                begin = time.perf_counter()
                with torch.compiler.set_stance("force_eager"):  # as the reference was run
                    output = workload.run_seeded(streamed)
                device.finish_compute()  # loads for the next pass go on, as in a loop
                cold_s = time.perf_counter() - begin
                same = reference.is_given_by(output)
                moved_before = streamed.stats().moved_bytes
                samples: list[float] = []
                while not _enough(samples, hopeless_s):
                    progress(f"pass {len(samples) + 1}")
                    # as in a loop, the last output lives meanwhile
                    seconds, output = timed_pass(device, partial(workload.run_under, streamed))
                    samples.append(seconds)
                stats = streamed.stats()
                usage = streamed.usage(len(samples))
            finally:
                streamed.remove()
    except HostMemoryError:
        return failed(Outcome.HOST_OUT_OF_MEMORY, 0)
    except BaseException as error:
        if not device.is_out_of_memory(error):
            raise
        return failed(Outcome.OUT_OF_MEMORY, budget_bytes + 1)
    peak_bytes = stats.peak_bytes + state_bytes
    if not same and reference.repeats():
        return failed(Outcome.OUTPUT_DIFFERS, peak_bytes)
    return Measurement(
        outcome=Outcome.FITS if peak_bytes <= budget_bytes else Outcome.OVER_BUDGET,
        latency_s=median(samples),
        samples_s=tuple(samples),
        cold_latency_s=cold_s,
        peak_bytes=peak_bytes,
        moved_bytes=(stats.moved_bytes - moved_before) // len(samples),
        misses=stats.misses,
        usage=usage,
    )


def timed(validated: Validate) -> Validate:
    """What it measures, with the time that it took by the clock."""

    def measured(candidate: Candidate, hopeless_s: float = math.inf) -> Measurement:
        begin = time.perf_counter()
        found = validated(candidate, hopeless_s)
        return found.model_copy(update={"taken_s": time.perf_counter() - begin})

    return measured


def is_brief(measured: Measurement) -> bool:
    """Whether passes were timed, but fewer than usual: it was hopeless."""
    return 0 < len(measured.samples_s) < LEAST_PASSES


def failed(outcome: Outcome, peak_bytes: int) -> Measurement:
    """What is known of a trial without timed passes."""
    return Measurement(
        outcome=outcome,
        latency_s=0.0,
        samples_s=(),
        cold_latency_s=0.0,
        peak_bytes=peak_bytes,
        moved_bytes=0,
        misses=0,
    )


def _enough(samples: Sequence[float], hopeless_s: float) -> bool:
    if samples and min(samples) > hopeless_s:
        return True
    return len(samples) >= LEAST_PASSES and (sum(samples) >= ENOUGH_S or len(samples) >= MOST_PASSES)
