"""Gradients of streamed parameters: they leave the device as soon as autograd has added them up.

[Note: where gradients are] While autograd adds up a parameter's gradient, `grad` is on the device and new; what the
user had there is put aside. After that it goes to host memory: as it is where the user had nothing, else by way of
staging memory into what was put aside, as plain torch adds to it. `grad` is complete when `backward()` returns. Where
the device's tensors are host tensors, torch adds to what is there, and only what is new goes to its place.

Autograd takes what it is given as `grad` if nobody else holds that, and it lies as the parameter does; else it makes a
copy where the parameter is, which is at rest then, and the host waits for it. So what lies otherwise is laid anew
before; of what somebody else holds, the copy is the gradient, in host memory already.

[Note: gradients of a group] Where the user had nothing, what the first microbatch of a group gives stays on the device
until the others, which visit the same layers next, have added theirs, and leaves once. Where the user had something
each leaves by itself: sums are made in the order of plain accumulation, for their bits.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from autosp.devices import Device
from autosp.devices.memory import anonymous, bytes_of, lend, lying_as
from autosp.partition import BoundLayer
from autosp.partition.placed import tensors_of
from autosp.partition.tensors import EXTENT_ALIGNMENT, align
from autosp.runtime.gradient_layout import added, is_plain, laid_as
from autosp.runtime.loader import Counters
from autosp.runtime.recorder import Recorder
from autosp.tiers.host import check_free


@dataclass(eq=False)
class _Gradient:
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
    hooks: list[Any] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """Of the gradient, which is as large as its parameter."""
        return self.parameter.numel() * self.parameter.element_size()

    def target(self, value: torch.Tensor) -> torch.Tensor:
        """Host memory for a gradient that lies as `value` does: the run, unless an old gradient in it is in use."""
        if self.lent is not None and self.lent() is not None:
            return torch.empty_like(value, device="cpu")
        run, self.lent = lend(self.memory, self.begin, self.n_bytes)
        return lying_as(value, run)


@dataclass(frozen=True)
class _Leaving:
    """A copy under way, and the memory that it reads; what it brings is added to `total`, if there is one."""

    copied: Any
    source: torch.Tensor
    target: torch.Tensor
    total: torch.Tensor | None


class Gradients:
    """Those of one model's streamed parameters. Host memory for them is taken, and pinned, once."""

    def __init__(self, layers: Sequence[BoundLayer], device: Device, one_at_a_time: bool = False) -> None:
        """Of the parameters that require one now; of others when they do.

        `one_at_a_time`: a visit backward begins once those of the one before have left.

        Raises: HostMemoryError if RAM has no room for them.
        """
        self._layers = layers
        self._device = device
        self._one_at_a_time = one_at_a_time
        self._counters = Counters()
        self._recorder = Recorder(device)
        self._on_gradient: Callable[[], None] = lambda: None
        self._known: dict[int, _Gradient] = {}
        self._calls: Counter[tuple[int | None, int]] = Counter()
        """By microbatch, and by None for all of them, and layer."""
        self._microbatch: int | None = None
        self._others_follow = False
        self._waiting: list[_Gradient] = []
        self._leaving: deque[_Leaving] = deque()
        self._most_in_flight = 0
        self._staging: list[torch.Tensor] = []
        self._find()

    def connect(self, counters: Counters, recorder: Recorder, on_gradient: Callable[[], None]) -> None:
        """`on_gradient` is called before anything is done with one."""
        self._counters, self._recorder, self._on_gradient = counters, recorder, on_gradient

    def watch(self) -> None:
        """Before a pass: hooks on every parameter that requires a gradient."""
        self._find()
        for gradient in self._known.values():
            if not gradient.hooks and gradient.parameter.requires_grad:
                before = gradient.parameter.register_hook(partial(self._before, gradient))
                after = gradient.parameter.register_post_accumulate_grad_hook(partial(self._after, gradient))
                gradient.hooks = [before, after]

    def called(self, layer: int) -> None:
        """A layer's forward runs with autograd.

        Gradients of a layer that ran twice before its backward stay on the device until that ends: where parameters
        change devices, autograd gives one gradient per call, and their sum must not depend on that.
        """
        for microbatch in {None, self._microbatch}:
            self._calls[microbatch, layer] += 1

    def begin_turn(self, microbatch: int | None, others_follow: bool) -> None:
        """Whose gradients come next, and whether others give theirs of the same layers after it."""
        self._microbatch, self._others_follow = microbatch, others_follow

    def make_room(self) -> None:
        """A visit backward begins."""
        while self._one_at_a_time and self._leaving:
            self._settle_oldest()

    def let_go(self) -> None:
        """Nobody adds to what waits on the device."""
        for gradient in self._waiting:
            gradient.waits = False
            self._leave(gradient, gradient.parameter.grad, None)
        self._waiting = []

    def trains(self, layers: Iterable[int]) -> bool:
        """Whether a parameter of these layers requires a gradient."""
        wanted = set(layers)
        return any(one.layer in wanted and one.parameter.requires_grad for one in self._known.values())

    def finish(self) -> None:
        """The backward pass is over: every gradient is where its user looks for it."""
        self.let_go()
        for gradient in self._known.values():
            while gradient.sums:
                self._leave(gradient, gradient.sums.pop(next(iter(gradient.sums))), gradient.parameter.grad)
        self.settle()
        for gradient in self._known.values():
            if gradient.aside is not None:  # asked for by autograd.grad, which leaves `grad` alone
                gradient.parameter.grad, gradient.aside = gradient.aside, None

    def abandon(self) -> None:
        """The backward pass raised some time ago: what it had put aside is as lost as what it would have added."""
        self.settle()
        self._waiting = []
        for gradient in self._known.values():
            gradient.aside, gradient.waits, gradient.sums = None, False, {}
        follow(gradient.parameter for gradient in self._known.values())

    def settle(self) -> None:
        """Wait for copies under way."""
        while self._leaving:
            self._settle_oldest()
        self._calls.clear()

    def close(self) -> None:
        """Stop watching. Gradients stay where they are."""
        self.settle()
        for gradient in self._known.values():
            for hook in gradient.hooks:
                hook.remove()
        self._known = {}
        self._layers = ()
        self._staging = []  # what is left of a plan may wait for the garbage collector, its memory not

    def _find(self) -> None:
        found = [(layer, new) for layer in self._layers if (new := self._new_in(layer))]
        if found:
            self._check_room([_aligned_bytes(one) for _, new in found for one in new])
        for layer, new in found:
            sizes = [_aligned_bytes(one) for one in new]
            memory = self._take(sum(sizes))
            for position, parameter in enumerate(new):
                begin = sum(sizes[:position])
                self._known[id(parameter)] = _Gradient(parameter, layer.layer.index, memory, begin)
            self._most_in_flight = max(self._most_in_flight, sum(sizes))
            if not self._staging or max(sizes) > self._staging[0].numel():
                self._staging = [self._take(max(sizes)) for _ in range(2)]

    def _new_in(self, layer: BoundLayer) -> list[nn.Parameter]:
        found = [named.tensor for named in tensors_of(layer.placed) if isinstance(named.tensor, nn.Parameter)]
        return [one for one in found if one.requires_grad and id(one) not in self._known]

    def _check_room(self, sizes: Sequence[int]) -> None:
        """Before any is taken. Raises: HostMemoryError."""
        largest = max(sizes, default=0)
        staging = 2 * largest if not self._staging or largest > self._staging[0].numel() else 0
        check_free(
            sum(sizes) + staging,
            f"room for the gradients of {len(sizes)} streamed parameters",
            "close other programs, train fewer parameters, or keep more layers on the device",
        )

    def _take(self, n_bytes: int) -> torch.Tensor:
        memory = anonymous(n_bytes)
        memory.zero_()  # its pages are taken before a pass
        self._device.pin(memory)
        return memory

    def _before(self, gradient: _Gradient, value: torch.Tensor) -> torch.Tensor | None:
        """Autograd is about to add `value`, or what this returns, to the parameter's `grad`."""
        self._on_gradient()
        parameter = gradient.parameter
        if self._device.is_host:
            gradient.adding = parameter.grad is not None and not gradient.waits
            self._settle_to(parameter.grad)
            return None
        if not gradient.waits:
            parameter.grad, gradient.aside = None, parameter.grad
        return None if torch.is_grad_enabled() else laid_as(value, parameter)

    def _after(self, gradient: _Gradient, parameter: torch.Tensor) -> None:
        """Autograd has added it."""
        if self._device.is_host:
            if not gradient.adding and not torch.is_grad_enabled():
                self._leave_or_wait(gradient)
        elif torch.is_grad_enabled():  # create_graph: what can be differentiated again is not copied to a place
            aside, gradient.aside = gradient.aside, None
            assert parameter.grad is not None
            value = parameter.grad.to("cpu")
            parameter.grad = value if aside is None else aside + value
        elif self._calls[self._microbatch, gradient.layer] > 1 and not gradient.waits:
            assert parameter.grad is not None
            sums, value = gradient.sums, parameter.grad
            parameter.grad, gradient.aside = gradient.aside, None
            sums[self._microbatch] = added(sums.get(self._microbatch), value)
        else:
            self._leave_or_wait(gradient)

    def _leave_or_wait(self, gradient: _Gradient) -> None:
        """See [Note: gradients of a group]."""
        aside, gradient.aside = gradient.aside, None
        assert gradient.parameter.grad is not None
        is_there = gradient.parameter.grad.device == self._device.torch_device
        if self._others_follow and aside is None and is_there:
            if not gradient.waits:
                gradient.waits = True
                self._waiting.append(gradient)
            return
        if gradient.waits:
            gradient.waits = False
            self._waiting.remove(gradient)
        self._leave(gradient, gradient.parameter.grad, aside)

    def _leave(self, gradient: _Gradient, value: torch.Tensor | None, aside: torch.Tensor | None) -> None:
        """From the device to where the user looks for it, beside what the user had."""
        parameter = gradient.parameter
        assert value is not None
        on_host = value.device != self._device.torch_device
        if on_host or not is_plain(value, parameter) or not (aside is None or is_plain(aside, parameter)):
            self._settle_to(aside)
            parameter.grad = None
            parameter.grad = added(aside, value.to("cpu"))
        elif aside is None:
            target = gradient.target(value)
            parameter.grad = target
            self._send(gradient, value, target, None)
        else:
            parameter.grad = aside
            self._send(gradient, value, self._staged(value), aside)

    def _send(self, gradient: _Gradient, value: torch.Tensor, target: torch.Tensor, total: torch.Tensor | None) -> None:
        most = self._most_in_flight - value.numel() * value.element_size()  # a layer's with this one
        while self._leaving and (self._device.finished(self._leaving[0].copied) or self._in_flight() > most):
            self._settle_oldest()
        copied = self._device.send(bytes_of(value), bytes_of(target), self._device.record())
        self._recorder.sent(gradient.layer, gradient.begin, copied)
        self._leaving.append(_Leaving(copied, value, target, total))
        self._counters.gradient_bytes += value.numel() * value.element_size()

    def _in_flight(self) -> int:
        return sum(one.source.numel() * one.source.element_size() for one in self._leaving)

    def _staged(self, value: torch.Tensor) -> torch.Tensor:
        """The other half of staging, once what is in it has been added."""
        self._staging.reverse()
        free = self._staging[0]
        while any(one.target.untyped_storage().data_ptr() == free.data_ptr() for one in self._leaving):
            self._settle_oldest()
        return lying_as(value, free)

    def _settle_to(self, target: torch.Tensor | None) -> None:
        """Wait for a copy to that memory, or what is to be added there, and for those before it."""
        while target is not None and any(one.target is target or one.total is target for one in self._leaving):
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        one = self._leaving.popleft()
        self._device.settle(one.copied)
        if one.total is not None:
            with torch.no_grad():
                one.total.add_(one.target)


def follow(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients to where their parameters are now."""
    for parameter in parameters:
        value = parameter.grad
        if value is not None and value.device != parameter.device:
            parameter.grad = None
            parameter.grad = value.to(parameter.device)


def gradient_bytes(layers: Sequence[BoundLayer]) -> int:
    """Host memory that `Gradients` takes at first for these layers."""
    found = {id(one.tensor): one.tensor for layer in layers for one in tensors_of(layer.placed)}
    sizes = [_aligned_bytes(one) for one in found.values() if isinstance(one, nn.Parameter) and one.requires_grad]
    return sum(sizes) + 2 * max(sizes, default=0)


def _aligned_bytes(parameter: nn.Parameter) -> int:
    return align(parameter.numel() * parameter.element_size(), EXTENT_ALIGNMENT)
