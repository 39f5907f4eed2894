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

[Note: hooks of the user] Of the hooks that autograd calls before it adds to `grad`, those here are the last: whatever
others raise, the user has what there was. Of those that it calls afterwards they are the first, and where there are
others the gradient is brought home at once, for they look at it, and may update the parameter and drop it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from autosp.batch import tensors_in
from autosp.devices import Device
from autosp.partition import BoundLayer
from autosp.partition.placed import tensors_of
from autosp.partition.tensors import EXTENT_ALIGNMENT, align
from autosp.runtime.gradient_copies import Gradient, GradientCopies, touched
from autosp.runtime.gradient_layout import added, laid_as
from autosp.runtime.loader import Counters
from autosp.runtime.recorder import Recorder
from autosp.tiers.host import check_free


class _Call:
    """A call of a layer, for as long as there is its graph."""


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
        self._copies = GradientCopies(device)
        self._on_gradient: Callable[[], None] = lambda: None
        self._known: dict[int, Gradient] = {}
        self._calls: defaultdict[tuple[int | None, int], WeakSet[_Call]] = defaultdict(WeakSet)
        """By microbatch, and by None for all of them, and layer."""
        self._kept_calls: list[_Call] = []
        self._microbatch: int | None = None
        self._others_follow = False
        self._waiting: list[Gradient] = []
        self._find()

    def connect(self, counters: Counters, recorder: Recorder, on_gradient: Callable[[], None]) -> None:
        """`on_gradient` is called before anything is done with one."""
        self._copies.connect(counters, recorder)
        self._on_gradient = on_gradient

    def watch(self) -> None:
        """Before a pass: hooks on every parameter that requires a gradient. See [Note: hooks of the user]."""
        self._find()
        for gradient in self._known.values():
            parameter = gradient.parameter
            if not gradient.hooks and parameter.requires_grad:
                before = parameter.register_hook(partial(self._before, gradient))
                after = parameter.register_post_accumulate_grad_hook(partial(self._after, gradient))
                gradient.hooks = [before, after]
            if gradient.hooks:
                before, after = gradient.hooks
                _place_last(parameter._backward_hooks, before)
                _place_first(parameter._post_accumulate_grad_hooks, after)

    def called(self, layer: int, output: Any) -> None:
        """A layer's forward ran with autograd, and gave this.

        Gradients of a layer that ran twice before its backward stay on the device until that ends: where parameters
        change devices, autograd gives one gradient per call, and their sum must not depend on that. A call whose graph
        is gone, as of a loss that was dropped, counts no more.
        """
        call = _Call()
        nodes = [tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None]
        for metadata in [cast(dict[Any, Any], node.metadata) for node in nodes]:
            metadata.setdefault(_Call, []).append(call)
        if not nodes:  # nothing says where its graph is, nor when it is gone
            self._kept_calls.append(call)
        for microbatch in {None, self._microbatch}:
            self._calls[microbatch, layer].add(call)

    def begin_turn(self, microbatch: int | None, others_follow: bool) -> None:
        """Whose gradients come next, and whether others give theirs of the same layers after it."""
        self._microbatch, self._others_follow = microbatch, others_follow

    def make_room(self) -> None:
        """A visit backward begins."""
        if self._one_at_a_time:
            self._copies.settle()

    def let_go(self) -> None:
        """Nobody adds to what waits on the device."""
        for gradient in self._waiting:
            gradient.waits = False
            self._send(gradient, None)
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
                self._copies.send(gradient, gradient.sums.pop(next(iter(gradient.sums))), gradient.parameter.grad)
        self.settle()
        for gradient in self._known.values():
            if gradient.aside is not None:  # asked for by autograd.grad, which leaves `grad` alone
                gradient.parameter.grad, gradient.aside = gradient.aside, None

    def abandon(self) -> None:
        """The backward pass raised some time ago: what autograd was adding then is lost.

        What it had added before arrives, unless the user wrote to that gradient meanwhile: it was zeroed.
        """
        self._copies.abandon()
        self._forget_calls()
        self._waiting = []
        for gradient in self._known.values():
            gradient.aside, gradient.waits, gradient.sums = None, False, {}
        follow(gradient.parameter for gradient in self._known.values())

    def settle(self) -> None:
        """Wait for copies under way."""
        self._copies.settle()
        self._forget_calls()

    def close(self) -> None:
        """Stop watching. Gradients stay where they are."""
        self.settle()
        self._copies.close()
        for gradient in self._known.values():
            for hook in gradient.hooks:
                hook.remove()
        self._known = {}
        self._layers = ()

    def _forget_calls(self) -> None:
        self._calls.clear()
        self._kept_calls.clear()

    def _find(self) -> None:
        found = [(layer, new) for layer in self._layers if (new := self._new_in(layer))]
        if found:
            self._check_room([_aligned_bytes(one) for _, new in found for one in new])
        for layer, new in found:
            sizes = [_aligned_bytes(one) for one in new]
            memory = touched(sum(sizes), self._device)
            for position, parameter in enumerate(new):
                begin = sum(sizes[:position])
                self._known[id(parameter)] = Gradient(parameter, layer.layer.index, memory, begin)
            self._copies.make_room(sum(sizes), max(sizes))

    def _new_in(self, layer: BoundLayer) -> list[nn.Parameter]:
        found = [named.tensor for named in tensors_of(layer.placed) if isinstance(named.tensor, nn.Parameter)]
        return [one for one in found if one.requires_grad and id(one) not in self._known]

    def _check_room(self, sizes: Sequence[int]) -> None:
        """Before any is taken. Raises: HostMemoryError."""
        check_free(
            sum(sizes) + self._copies.staging_bytes(max(sizes, default=0)),
            f"room for the gradients of {len(sizes)} streamed parameters",
            "close other programs, train fewer parameters, or keep more layers on the device",
        )

    def _before(self, gradient: Gradient, value: torch.Tensor) -> torch.Tensor | None:
        """Autograd is about to add `value`, or what this returns, to the parameter's `grad`."""
        self._on_gradient()
        parameter = gradient.parameter
        if self._device.is_host:
            gradient.adding = parameter.grad is not None and not gradient.waits
            self._copies.settle_to(parameter.grad)
            return None
        if not gradient.waits:
            parameter.grad, gradient.aside = None, parameter.grad
        return None if torch.is_grad_enabled() else laid_as(value, parameter)

    def _after(self, gradient: Gradient, parameter: torch.Tensor) -> None:
        """Autograd has added it."""
        self._take_up(gradient, parameter)
        if gradient.is_looked_at:
            self._copies.settle_to(parameter.grad)

    def _take_up(self, gradient: Gradient, parameter: torch.Tensor) -> None:
        """What is new leaves, or waits until it may."""
        if self._device.is_host:
            if not gradient.adding and not torch.is_grad_enabled():
                self._leave_or_wait(gradient)
        elif torch.is_grad_enabled():  # create_graph: what can be differentiated again is not copied to a place
            aside, gradient.aside = gradient.aside, None
            assert parameter.grad is not None
            value = parameter.grad.to("cpu")
            parameter.grad = value if aside is None else aside + value
        elif len(self._calls[self._microbatch, gradient.layer]) > 1 and not (gradient.waits or gradient.is_looked_at):
            assert parameter.grad is not None
            sums, value = gradient.sums, parameter.grad
            parameter.grad, gradient.aside = gradient.aside, None
            sums[self._microbatch] = added(sums.get(self._microbatch), value)
        else:
            self._leave_or_wait(gradient)

    def _leave_or_wait(self, gradient: Gradient) -> None:
        """See [Note: gradients of a group]."""
        aside, gradient.aside = gradient.aside, None
        assert gradient.parameter.grad is not None
        is_there = gradient.parameter.grad.device == self._device.torch_device
        if self._others_follow and aside is None and is_there and not gradient.is_looked_at:
            if not gradient.waits:
                gradient.waits = True
                self._waiting.append(gradient)
            return
        if gradient.waits:
            gradient.waits = False
            self._waiting.remove(gradient)
        self._send(gradient, aside)

    def _send(self, gradient: Gradient, aside: torch.Tensor | None) -> None:
        value = gradient.parameter.grad
        assert value is not None
        self._copies.send(gradient, value, aside)


def _place_last(hooks: Any, one: RemovableHandle) -> None:
    """Of those of a tensor. Autograd calls them as they were entered, whatever `move_to_end` says."""
    if next(reversed(hooks)) != one.id:
        hooks[one.id] = hooks.pop(one.id)


def _place_first(hooks: Any, one: RemovableHandle) -> None:
    """The same."""
    if next(iter(hooks)) != one.id:
        for other in [key for key in hooks if key != one.id]:
            hooks[other] = hooks.pop(other)


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
