"""Calls of which autograd keeps the inputs only: the backward pass computes their activations again.

[Note: weights after what is computed again] A backward node may ask for a streamed weight before it asks for an
activation of its block. If computing the block again began after that, it could load another layer over the weight that
the node already holds. So whatever a block saves of the arena has the block computed again first; and so does what a
layer saves inside a checkpoint of the user's, which may go on to layers whose backward is not under way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._C._autograd import _top_saved_tensors_default_hooks as hooks_around
from torch.utils.checkpoint import checkpoint

from autosp.errors import ModelChangedError
from autosp.partition import Inputs
from autosp.partition.trace import Attributes, attributes_of, restore_attributes
from autosp.runtime.executor import Observer

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]
"""What packs, and what unpacks, the tensors that autograd saves."""


MARKER = torch.zeros(1, device="cpu")
"""Saved for what it stands for. It has an element: hooks of others may look for the largest."""


@dataclass(frozen=True)
class _Here:
    """The call of a block that a thread is in."""

    last: int
    """The last layer that it visits."""
    again: bool
    hooks: Hooks
    """Of its checkpoint."""


class Recomputed:
    """Calls of blocks and layers, which may be inside each other and in several threads."""

    def __init__(self, in_group: Callable[[], bool]) -> None:
        """`in_group`: whether calls of several microbatches come between one another. Buffers stay as they are then."""
        self._threads = threading.local()
        self._in_group = in_group

    def block(
        self,
        module: nn.Module,
        name: str,
        last: int,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
        observer: Observer | None,
    ) -> Any:
        """Call a block whose last layer is `last`, seen by `observer`. Otherwise as `layer`."""
        seen = forward if observer is None else partial(_observed, observer, forward)

        def run(again: bool) -> Any:
            with self._entered(last, again):
                return (forward if again else seen)(*args, **kwargs)

        inputs = Inputs(args, kwargs)
        return self._checkpointed(module, name, inputs, run) if inputs.plain else seen(*args, **kwargs)

    def layer(self, module: nn.Module, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a layer. With inputs that may change, such as a cache, it is called as is.

        Its backward raises: ModelChangedError if they changed nevertheless.
        """
        inputs = Inputs(args, kwargs)
        if not inputs.plain:
            return forward(*args, **kwargs)
        return self._checkpointed(module, name, inputs, lambda again: forward(*args, **kwargs))

    def before_last(self, layer: int) -> bool:
        """Whether this thread computes a block again, and the layer is not the last one of it."""
        here = self._here()
        return here is not None and here.again and here.last != layer

    def at_last(self, layer: int) -> bool:
        """The same of the layer that is the last one of it."""
        here = self._here()
        return here is not None and here.again and here.last == layer

    def beginning(self, around: Hooks | None) -> Callable[[], Any] | None:
        """Of what is saved of the arena now: what computes that again which this thread is in. None if that is nothing.

        `around`: the hooks around the layer, which may be those of a checkpoint of the user's. See [Note: weights after
        what is computed again]. The first pass and the second must save as many tensors.
        """
        here = self._here()
        hooks = around if here is None else here.hooks
        if hooks is None:
            return None
        pack, unpack = hooks
        return partial(unpack, pack(MARKER))

    def _checkpointed(self, module: nn.Module, name: str, inputs: Inputs, run: Callable[[bool], Any]) -> Any:
        """`run(again)`, now and in the backward pass. What the module's buffers and attributes count, they do once.

        Random numbers, autocast, attributes and buffers are as they were the first time.
        """
        first: Attributes | None = None
        buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

        def first_or_again(_: Any) -> Any:
            nonlocal first
            if first is None:
                first = attributes_of(module)
                buffers.extend(() if self._in_group() else _values_of(module))
                return run(False)
            if not inputs.untouched():
                raise ModelChangedError(
                    f"{name} cannot be computed again in the backward pass: its inputs were written to after it was "
                    "called; make the plan with recompute=0, or write to a copy of them"
                )
            with _as_it_was(module, first, buffers):
                return run(True)

        return checkpoint(first_or_again, inputs.given, use_reentrant=False)

    def _here(self) -> _Here | None:
        return getattr(self._threads, "here", None)

    @contextmanager
    def _entered(self, last: int, again: bool) -> Iterator[None]:
        hooks = hooks_around(True)
        assert hooks is not None, "a checkpoint has hooks"
        around, self._threads.here = self._here(), _Here(last, again, hooks)
        try:
            yield
        finally:
            self._threads.here = around


def in_checkpoint() -> bool:
    """Whether this thread is in a checkpoint, which will compute again what it calls, or does so now."""
    hooks = hooks_around(True)
    return hooks is not None and hooks[0].__module__ == checkpoint.__module__


def _observed(observer: Observer, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    observer.enter((args, kwargs))
    try:
        return forward(*args, **kwargs)
    finally:
        observer.leave()


@contextmanager
def _as_it_was(
    module: nn.Module, first: Attributes, buffers: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[None]:
    """With the attributes and buffers of then; afterwards as it is now. No version counter sees what is written."""
    now, values = attributes_of(module), _values_of(module)
    restore_attributes(first)
    try:
        _write(buffers)
        yield
    finally:
        restore_attributes(now)
        _write(values)


def _values_of(module: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(buffer, buffer.detach().clone()) for buffer in module.buffers()]


def _write(values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for buffer, value in values:
        buffer.data.copy_(value)
