"""Observes every visit of every layer under a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple, Self

from torch import nn

from autosp.batch import tensors_in
from autosp.devices import Device, Stamp
from autosp.runtime.bench import Bench, timed_pass
from autosp.runtime.executor import Observer
from autosp.runtime.streamed_model import StreamedModel
from autosp.spec import BackwardProfile, Candidate, LayerProfile, Measurement, Outcome
from autosp.workload import Workload

MOST_PASSES = 12
GROUP_PASSES = 3
"""For a group's memory: the third was seen to take little more than the second."""
LONG_S = 1.0
"""Few busy moments are all of a pass that is so long: it need not be repeated, unless the cold one contradicts it."""
WITNESS = 0.05
"""A cold pass that was faster by more than this share does."""
DISTURBED_PASSES = 3
"""Of which the median is that of an undisturbed one, where one was not."""


class Repeats(NamedTuple):
    """How often passes are timed: at least so often, and until they fill some seconds."""

    least: int
    enough_s: float


BRIEF = Repeats(1, 0.3)
"""Of the plan that shows each visit's memory: where another fits that overlaps, visits are timed under that."""
ENOUGH = Repeats(2, 0.8)
"""Medians over a busy moment are wrong."""


LEAST_MEMORY = Candidate(k=1, k_prime=1)
"""One layer at a time: nothing is resident that need not be, and no load overlaps compute."""


@dataclass(frozen=True)
class Observation:
    """What a plan showed."""

    visits: tuple[LayerProfile, ...]
    tail_s: float
    least_compute_s: float
    """With each visit at the fastest that it was seen."""
    measurement: Measurement
    backward: tuple[BackwardProfile, ...] = ()


def observe(bench: Bench, candidate: Candidate, run: Callable[[], Any], progress: Callable[[str], None]) -> Observation:
    """Run a plan, wherever its layers rest: a cold pass, and few for time, of which the first shows memory as well."""
    memory = MemoryObserver(bench.device, bench.partition.resident_bytes + bench.arena_bytes(candidate))
    return _observed(bench, candidate, run, memory, BRIEF, progress)


def observe_times(
    bench: Bench, candidate: Candidate, run: Callable[[], Any], progress: Callable[[str], None]
) -> Observation:
    """The same with more passes for time, and without the memory of each visit."""
    return _observed(bench, candidate, run, None, ENOUGH, progress)


def _observed(
    bench: Bench,
    candidate: Candidate,
    run: Callable[[], Any],
    memory: MemoryObserver | None,
    repeats: Repeats,
    progress: Callable[[str], None],
) -> Observation:
    partition = bench.partition
    passes: list[_TimeObserver] = []

    def time_pass(streamed: StreamedModel[nn.Module]) -> tuple[float, Any]:
        timer = _TimeObserver(bench.device, None if passes else memory)
        streamed.observe(timer)
        timer.begin()
        output = run()
        timer.end()
        passes.append(timer)
        return timer.total_s(), output

    measurement = measured_passes(bench, candidate, run, None, time_pass, progress, repeats)
    if memory is not None:
        most_bytes = max(measurement.peak_bytes, memory.peak_bytes)
        measurement = measurement.model_copy(update={"peak_bytes": most_bytes})
    return Observation(
        visits=_visits(partition.visits, partition.repeats, passes, memory.visits if memory else {}),
        tail_s=median(timer.tail_s() for timer in passes),
        least_compute_s=_least_compute_s(passes),
        measurement=measurement,
    )


def measured_passes(
    bench: Bench,
    candidate: Candidate,
    run: Callable[[], Any],
    memory: MemoryObserver | None,
    time_pass: Callable[[StreamedModel[nn.Module]], tuple[float, Any]],
    progress: Callable[[str], None],
    repeats: Repeats,
) -> Measurement:
    """Run a plan: a cold pass, one that `memory` observes, and some through `time_pass`, which gives time and output.

    As in a loop, an output lives until the next pass has made its own. Memory is that of all passes but the cold one.
    """
    streamed = bench.apply(candidate)
    try:
        samples: list[float] = []
        progress("cold pass")
        cold_s, output = timed_pass(bench.device, run)
        bench.device.restart_peak()
        if memory is not None:
            progress("memory pass")
            streamed.observe(memory)
            with memory:
                output = run()
            streamed.observe(None)
        moved_before = streamed.stats().moved_bytes
        while not enough(samples, repeats, cold_s):
            progress(f"timed pass {len(samples) + 1}")
            seconds, output = time_pass(streamed)
            samples.append(seconds)
        del output
        stats = streamed.stats()
        usage = streamed.usage(len(samples))
    finally:
        streamed.remove()
    return Measurement(
        outcome=Outcome.FITS,
        latency_s=median(samples),
        samples_s=tuple(samples),
        cold_latency_s=cold_s,
        peak_bytes=max(stats.peak_bytes, memory.peak_bytes if memory else 0) + bench.state_bytes(candidate),
        moved_bytes=(stats.moved_bytes - moved_before) // len(samples),
        misses=stats.misses,
        usage=usage,
    )


def group_peak_bytes(bench: Bench, candidate: Candidate, workload: Workload, progress: Callable[[str], None]) -> int:
    """Most memory of a workload's group under a plan, over some passes: answers live until the next ones are there."""
    with workload.trial():
        streamed = bench.apply(candidate)
        try:
            for number in range(GROUP_PASSES):
                progress(f"pass {number + 1} of {candidate.group} microbatches")
                output = workload.run_under(streamed)
            del output
            return streamed.stats().peak_bytes + bench.state_bytes(candidate)
        finally:
            streamed.remove()


def enough(samples: Sequence[float], repeats: Repeats, cold_s: float = math.inf) -> bool:
    """Whether passes of so many seconds tell what one takes. `cold_s`: of the cold one before them, if any."""
    if len(samples) >= MOST_PASSES:
        return True
    least = repeats.least
    if least > 1 and samples and samples[0] >= LONG_S:
        least = 1 if samples[0] <= cold_s * (1 + WITNESS) else DISTURBED_PASSES
    return len(samples) >= least and sum(samples) >= repeats.enough_s


@dataclass
class _Visit:
    layer: int
    arrive: Stamp
    wait: Stamp = None
    start: Stamp = None
    finish: Stamp = None
    leave: Stamp = None


class _TimeObserver(Observer):
    """Stamps of one pass. A layer called inside its own call is part of the outer visit.

    `memory` observes the same pass; what that takes is left out of all times.
    """

    def __init__(self, device: Device, memory: MemoryObserver | None = None) -> None:
        self._device = device
        self._memory = memory
        self.visits: list[_Visit] = []
        self._open: list[_Visit] = []
        self._depth: dict[int, int] = {}
        self._begin: Stamp = None
        self._end: Stamp = None

    def begin(self) -> None:
        """The pass starts."""
        self._begin = self._device.stamp()

    def end(self) -> None:
        """The pass is over. Loads for the next one go on, as in a loop."""
        self._end = self._device.stamp()

    def arrive(self, layer: int, inputs: Any) -> None:
        """Before the weights are waited for."""
        self._depth[layer] = self._depth.get(layer, 0) + 1
        outermost = self._depth[layer] == 1
        if outermost:
            self._open.append(_Visit(layer, self._device.stamp()))
        if self._memory is not None:
            self._memory.arrive(layer, inputs)
        if outermost:
            self._open[-1].wait = self._device.stamp() if self._memory else self._open[-1].arrive

    def start(self, layer: int) -> None:
        """The weights are there."""
        if self._depth[layer] == 1:
            self._open[-1].start = self._device.stamp()

    def finish(self, layer: int, output: Any) -> None:
        """The forward returned."""
        self._depth[layer] -= 1
        if self._depth[layer] == 0:
            self.visits.append(self._open.pop())
            self.visits[-1].finish = self.visits[-1].leave = self._device.stamp()
        if self._memory is not None:
            self._memory.finish(layer, output)
            if self._depth[layer] == 0:
                self.visits[-1].leave = self._device.stamp()

    def times_s(self) -> list[tuple[int, float, float, float]]:
        """Per visit: its layer, the compute before it, its own compute, the wait for its weights."""
        seconds = self._device.seconds
        previous = self._begin
        times = []
        for visit in self.visits:
            before_s, wait_s = seconds(previous, visit.arrive), seconds(visit.wait, visit.start)
            times.append((visit.layer, before_s, seconds(visit.start, visit.finish), wait_s))
            previous = visit.leave
        return times

    def tail_s(self) -> float:
        """Compute after the last visit."""
        return self._device.seconds(self.visits[-1].leave if self.visits else self._begin, self._end)

    def total_s(self) -> float:
        """The pass."""
        observing_s = 0.0
        if self._memory is not None:
            seconds = self._device.seconds
            observing_s = sum(seconds(one.arrive, one.wait) + seconds(one.finish, one.leave) for one in self.visits)
        return self._device.seconds(self._begin, self._end) - observing_s


class MemoryObserver(Observer):
    """Peak and output bytes of every visit."""

    def __init__(self, device: Device, plan_bytes: int) -> None:
        self._device = device
        self._plan_bytes = plan_bytes
        self.peak_bytes = 0
        self.visits: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        """The pass that is observed begins."""
        return self

    def arrive(self, layer: int, inputs: Any) -> None:
        """A new peak begins."""
        self._device.restart_peak()

    def start(self, layer: int) -> None:
        """The load is part of the visit's peak."""

    def finish(self, layer: int, output: Any) -> None:
        """Read the peak."""
        peak = self._device.peak_bytes()
        self.peak_bytes = max(self.peak_bytes, peak)
        out = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(output))
        known = self.visits.get(layer, (0, 0))
        self.visits[layer] = (max(known[0], peak - self._plan_bytes), max(known[1], out))

    def __exit__(self, *_: object) -> None:
        """It is over, or raised."""


def _least_compute_s(passes: list[_TimeObserver]) -> float:
    """A pass's compute, each visit and the tail at its least over the passes that had it."""
    per_pass = [[before + forward for _, before, forward, _ in timer.times_s()] for timer in passes]
    shortest = min(len(times) for times in per_pass)
    visits_s = sum(min(times[index] for times in per_pass) for index in range(shortest))
    return visits_s + min(timer.tail_s() for timer in passes)


def _visits(
    period: tuple[int, ...], repeats: int, passes: list[_TimeObserver], memory: dict[int, tuple[int, int]]
) -> tuple[LayerProfile, ...]:
    """Medians over passes, means over a pass's periods. Where a pass ran otherwise than planned, means per layer."""
    per_pass = [timer.times_s() for timer in passes]
    planned = list(period) * repeats
    regular = all([entry[0] for entry in times] == planned for times in per_pass)
    profiles = []
    for position, layer in enumerate(period):
        before, forward = [], []
        for times in per_pass:
            if regular:
                mine = times[position :: len(period)]
            else:
                mine = [entry for entry in times if entry[0] == layer] or [(layer, 0.0, 0.0, 0.0)]
            before.append(sum(entry[1] for entry in mine) / len(mine))
            forward.append(sum(entry[2] for entry in mine) / len(mine))
        peak, output = memory.get(layer, (0, 0))
        profiles.append(
            LayerProfile(
                layer=layer,
                before_s=max(0.0, median(before)),
                forward_s=max(0.0, median(forward)),
                peak_bytes=max(0, peak),
                output_bytes=output,
            )
        )
    return tuple(profiles)
