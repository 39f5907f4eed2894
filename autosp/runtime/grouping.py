"""Several microbatches share one pass: what a transfer brings serves all of them before it leaves.

Each microbatch runs in a thread of its own, one at a time. Where it comes to a layer that another transfer brings, it
waits until the others have come to theirs; then those that want what comes first in the schedule go on, in their order.
So a pass moves the weights that one microbatch needs, however many there are. That is Harmony's grouping (arXiv
2202.01306, layer packs over microbatches), and the block schedule of FlexGen.

[Note: order within a group] Microbatches that visit the same layers in the same order come to each of them in the
order of the microbatches, forward and backward: running statistics and sums of gradients have the bits of plain
accumulation. One that goes another way (an early exit, experts of its own) is right, by [Note: prefetch is a hint], but
gradients of layers that it does not share with all others may be added up in another order.

[Note: threads of a group] Where the device is the host, the compute of a group is slower than that of the loop, most of
all of small microbatches. A gradient that is added to another one is made on new pages each time, which the kernel has
to clear ([Note: the heap of a group]); and each thread has OpenMP workers of its own, which sleep between the parts of
a kernel once there are more of them than cores. Sixteen microbatches of 8 tokens, 334 MB of weights, two cores: 2.4 s
in the loop without a plan, 5.5 s in a group with nothing to wait for, 4.3 s with pages that are kept, which doubled the
peak. With such pages, on one core, a group took 4 % longer than the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from autosp.devices.heap import free_idle_buffers
from autosp.runtime.executor import Executor
from autosp.runtime.relay import Relay
from autosp.runtime.thread_state import Generators, ThreadState
from autosp.runtime.transfers import Visit
from autosp.schedule.actions import Kind

Stop = tuple[Kind, tuple[int, ...]]
"""Visits of one kind to the layers of one transfer."""


class Group:
    """The microbatches of one pass. `take_turn` is called by the running one, before each of its visits."""

    def __init__(self, executor: Executor, calls: Sequence[Callable[[], Any]]) -> None:
        """`calls` runs one microbatch each."""
        device = executor.device.torch_device
        self._executor = executor
        self._state = ThreadState(device)
        self._generators = Generators(device)
        self._seeds = torch.randint(2**63 - 1, (len(calls),), device="cpu").tolist()
        self._wanted: list[Visit | None] = [None] * len(calls)
        """The visit that each of them waits for; None before its first."""
        self._visited: Stop | None = None
        """Where the schedule is; None until all microbatches began."""
        self._relay = Relay([partial(self._run, *one) for one in zip(calls, self._seeds, strict=True)], self._following)

    def run(self) -> list[Any]:
        """What the calls return. The caller's generators are as they were."""
        states = self._generators.states()
        try:
            with self._executor.shared_pass(self):
                results = self._relay.run()
                self._executor.end_round()
                return results
        finally:
            self._generators.restore(states)

    def runs_here(self) -> bool:
        """Whether the calling thread is the running microbatch's."""
        return self._relay.runs_here()

    def take_turn(self, visit: Visit) -> None:
        """Wait until it is this visit's turn. Inside a layer nobody waits: its weights stay bound meanwhile.

        Raises: StoppedError if another microbatch failed.
        """
        self._relay.check()
        if self._stop_of(visit) == self._visited or self._turns_at(visit) or self._executor.loader.running:
            return
        number = self._relay.running
        self._wanted[number] = visit
        following = self._following()
        if following != number:
            free_idle_buffers()
            states, owner = self._generators.states(), self._executor.suspend()
            try:
                self._relay.hand_over(following)
            finally:
                self._executor.resume(owner)
                self._generators.restore(states)
        self._executor.cursor.begin_again()

    def _run(self, call: Callable[[], Any], seed: int) -> Any:
        self._generators.seed(seed)
        try:
            with self._state.entered():
                result = call()
        finally:
            free_idle_buffers()
        self._executor.suspend()
        return result

    def _following(self) -> int:
        """The first of those that want what is there. If that is nobody, the next round begins."""
        ready = self._ready()
        if not ready:
            self._executor.end_round()
            wanted = [visit for number in self._relay.left if (visit := self._wanted[number]) is not None]
            self._visited = self._stop_of(min(wanted, key=self._executor.cursor.distance))
            self._executor.cursor.begin_round()
            ready = self._ready()
        self._executor.begin_turn(ready[0], len(ready) > 1)
        return ready[0]

    def _ready(self) -> list[int]:
        return [number for number in self._relay.left if self._stop_of(self._wanted[number]) == self._visited]

    def _stop_of(self, visit: Visit | None) -> Stop | None:
        return None if visit is None else (visit[0], self._executor.loader.group_of[visit[1]].indices)

    def _turns_at(self, visit: Visit) -> bool:
        """Whether a microbatch goes backward, or begins again, in the layers that it has just visited."""
        stop = self._stop_of(visit)
        if stop is None or self._visited is None or stop[1] != self._visited[1]:
            return False
        return self._executor.cursor.distance(visit) <= 2 * (len(stop[1]) - 1)  # some of them may be left out


@contextmanager
def gradients_kept(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """If this raises, `grad` is what it was, bit for bit. What is there meanwhile is kept twice, in host memory."""
    before = [(one, one.grad, _copied(one.grad)) for one in parameters]
    try:
        yield
    except BaseException:
        for parameter, gradient, value in before:
            parameter.grad = gradient
            if gradient is not None and value is not None:
                with torch.no_grad():
                    gradient.copy_(value)
        raise


def _copied(gradient: torch.Tensor | None) -> torch.Tensor | None:
    return None if gradient is None else gradient.detach().to("cpu", copy=True)
