"""Gradients on their way from the device to host memory."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from autosp.devices import Device
from autosp.devices.memory import anonymous, bytes_of, lend, lying_as
from autosp.runtime.gradient_layout import added, is_plain
from autosp.runtime.loader import Counters
from autosp.runtime.recorder import Recorder


@dataclass(eq=False)
class Gradient:
    """One parameter's, with its run of host memory."""

    parameter: nn.Parameter
    layer: int
    memory: torch.Tensor
    begin: int
    lent: Any = None
    """A weak reference to what was lent of the run last: somebody may still hold an old gradient."""
    aside: torch.Tensor | None = None
    """What the user had in `grad`, while autograd adds up a new one."""
    adding: bool = False
    """Whether torch adds to what the user had: nothing will be new."""
    waits: bool = False
    """On the device, for what other microbatches add."""
    sums: dict[int | None, torch.Tensor] = field(default_factory=dict)
    """By microbatch, what its calls of the layer gave so far: on the device until the backward pass ends."""
    version: int = 0
    """Of what the user finds in `grad`, when it was last written to here."""
    hooks: list[RemovableHandle] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """Of the gradient, which is as large as its parameter."""
        return self.parameter.numel() * self.parameter.element_size()

    @property
    def is_looked_at(self) -> bool:
        """Whether hooks of the user's follow ours."""
        return len(self.parameter._post_accumulate_grad_hooks or ()) > 1

    def target(self, value: torch.Tensor) -> torch.Tensor:
        """Host memory for a gradient that lies as `value` does: the run, unless an old gradient in it is in use."""
        if self.lent is not None and self.lent() is not None:
            return torch.empty_like(value, device="cpu")
        run, self.lent = lend(self.memory, self.begin, self.n_bytes)
        return lying_as(value, run)


@dataclass(frozen=True)
class _Copy:
    """One under way, and the memory that it reads; what it brings is added to `total`, if there is one."""

    gradient: Gradient
    copied: Any
    source: torch.Tensor
    target: torch.Tensor
    total: torch.Tensor | None

    @property
    def result(self) -> torch.Tensor:
        """What the user finds in `grad`."""
        return self.target if self.total is None else self.total


class GradientCopies:
    """Those under way, in their order; and staging, for what is added to something on the host."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._counters = Counters()
        self._recorder = Recorder(device)
        self._under_way: deque[_Copy] = deque()
        self._most_bytes = 0
        self._staging: list[torch.Tensor] = []

    def connect(self, counters: Counters, recorder: Recorder) -> None:
        """Whom bytes and times are told."""
        self._counters, self._recorder = counters, recorder

    def staging_bytes(self, largest: int) -> int:
        """What staging takes anew where gradients of so many bytes come."""
        return 2 * largest if not self._staging or largest > self._staging[0].numel() else 0

    def make_room(self, layer_bytes: int, largest: int) -> None:
        """For a layer's gradients, of which one is the largest."""
        self._most_bytes = max(self._most_bytes, layer_bytes)
        if self.staging_bytes(largest):
            self._staging = [touched(largest, self._device) for _ in range(2)]

    def send(self, gradient: Gradient, value: torch.Tensor, aside: torch.Tensor | None) -> None:
        """From the device to where the user looks for it, beside what the user had."""
        parameter = gradient.parameter
        on_host = value.device != self._device.torch_device
        if on_host or not is_plain(value, parameter) or not (aside is None or is_plain(aside, parameter)):
            self.settle_to(aside)
            parameter.grad = None
            parameter.grad = added(aside, value.to("cpu"))
        elif aside is None:
            self._start(gradient, value, gradient.target(value), None)
        else:
            parameter.grad = aside
            self._start(gradient, value, self._staged(value), aside)

    def settle_to(self, result: torch.Tensor | None) -> None:
        """Wait for a copy to that memory, or what is to be added there, and for those before it."""
        while result is not None and any(one.target is result or one.total is result for one in self._under_way):
            self._settle_oldest()

    def settle(self) -> None:
        """Wait for all of them."""
        while self._under_way:
            self._settle_oldest()

    def abandon(self) -> None:
        """The same some time after the backward pass raised: what the user wrote to meanwhile was zeroed, and stays."""
        while self._under_way:
            one = self._under_way[0]
            if one.result._version == one.gradient.version:
                self._settle_oldest()
                continue
            self._under_way.popleft()
            self._device.settle(one.copied)
            if one.total is None:
                one.result.zero_()

    def close(self) -> None:
        """What is left of a plan may wait for the garbage collector, its memory not."""
        self.settle()
        self._staging = []

    def _start(self, gradient: Gradient, value: torch.Tensor, target: torch.Tensor, total: torch.Tensor | None) -> None:
        result = target if total is None else total
        gradient.parameter.grad, gradient.version = result, result._version
        most = self._most_bytes - value.numel() * value.element_size()  # a layer's with this one
        while self._under_way and (self._device.finished(self._under_way[0].copied) or self._in_flight() > most):
            self._settle_oldest()
        copied = self._device.send(bytes_of(value), bytes_of(target), self._device.record())
        self._recorder.sent(gradient.layer, gradient.begin, copied)
        self._under_way.append(_Copy(gradient, copied, value, target, total))
        self._counters.gradient_bytes += value.numel() * value.element_size()

    def _in_flight(self) -> int:
        return sum(one.source.numel() * one.source.element_size() for one in self._under_way)

    def _staged(self, value: torch.Tensor) -> torch.Tensor:
        """The other half of staging, once what is in it has been added."""
        self._staging.reverse()
        free = self._staging[0]
        while any(one.target.untyped_storage().data_ptr() == free.data_ptr() for one in self._under_way):
            self._settle_oldest()
        return lying_as(value, free)

    def _settle_oldest(self) -> None:
        one = self._under_way.popleft()
        self._device.settle(one.copied)
        if one.total is not None:
            with torch.no_grad():
                one.total.add_(one.target)
            one.gradient.version = one.total._version


def touched(n_bytes: int, device: Device) -> torch.Tensor:
    """Host memory that is pinned for the device, and whose pages are taken before a pass."""
    memory = anonymous(n_bytes)
    memory.zero_()
    device.pin(memory)
    return memory
