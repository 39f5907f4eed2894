"""One observed pass: which module runs when, and under which modules each weight is really used."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from autosp.batch import call_on
from autosp.intercept import Intercepted
from autosp.partition.tensors import Extent, ModelTensors

SNAPSHOT_BYTES = 16 * 2**20
"""Buffers up to this size are compared before and after the pass; larger ones are judged by their version counter."""


@dataclass
class Trace:
    """What was seen. Modules are named by their position in `model.modules()`."""

    calls: list[tuple[int, ...]]
    """Per call, in order: the stack of modules, outermost first; the last one is being called."""
    holders: dict[Extent, frozenset[int]]
    """Per used extent: the modules that were running at every one of its uses."""
    mutated: set[Extent]
    """Extents whose bytes the pass changed."""

    @property
    def called(self) -> set[int]:
        """Modules that were called at all."""
        return {stack[-1] for stack in self.calls}


def trace(model: nn.Module, tensors: ModelTensors, run: Callable[[], Any], device: torch.device) -> Trace:
    """Run one pass on `device` and watch it. The model's buffers are as before afterwards.

    On an accelerator every operation gets device copies of the weights it touches, so that memory is taken for one
    operation's weights at a time. Whatever the model raises passes through, with the model as it was.
    """
    calls: list[tuple[int, ...]] = []
    stack: list[int] = []
    watcher = _Watcher(tensors, stack, device)
    buffers = [item for extent in tensors.extents for item in extent.tensors if item.is_buffer]
    versions = {id(item): item.tensor._version for item in buffers}
    kept = {
        id(item): item.tensor.clone()
        for item in buffers
        if item.tensor.numel() * item.tensor.element_size() <= SNAPSHOT_BYTES
    }
    wrappers = []
    try:
        for index, module in enumerate(model.modules()):
            wrappers.append(Intercepted(module, _record(index, stack, calls, device)))
        with torch.no_grad(), watcher:
            run()
    finally:
        for wrapper in reversed(wrappers):
            wrapper.remove()
        mutated = watcher.written()
        for extent in tensors.extents:
            for item in extent.tensors:
                if not item.is_buffer:
                    continue
                before = kept.get(id(item))
                if item.tensor._version != versions[id(item)] and before is None:
                    mutated.add(extent)
                elif before is not None and not torch.equal(
                    before.contiguous().view(-1).view(torch.uint8),
                    item.tensor.contiguous().view(-1).view(torch.uint8),
                ):
                    mutated.add(extent)
                    item.tensor.data.copy_(before)
    return Trace(calls, watcher.holders, mutated)


def _record(index: int, stack: list[int], calls: list[tuple[int, ...]], device: torch.device) -> Callable[..., Any]:
    def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stack.append(index)
        calls.append(tuple(stack))
        try:
            if len(stack) == 1 and device.type != "cpu":
                return call_on(device, forward, args, kwargs)
            return forward(*args, **kwargs)
        finally:
            stack.pop()

    return around


class _Watcher(TorchDispatchMode):
    """Sees every operation's arguments; lends it device copies of weights that are not there."""

    def __init__(self, tensors: ModelTensors, stack: list[int], device: torch.device) -> None:
        super().__init__()
        self.holders: dict[Extent, frozenset[int]] = {}
        self._stack = stack
        self._device = device
        self._extents = sorted(tensors.extents, key=lambda extent: extent.storage.data_ptr() + extent.begin)
        self._starts = [extent.storage.data_ptr() + extent.begin for extent in self._extents]
        self._opaque = {id(item.tensor) for item in tensors.opaque}
        self._lent_buffers: dict[int, tuple[Extent, torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def see(tensor: torch.Tensor) -> torch.Tensor:
            extent = self._extent_of(tensor)
            if extent is not None:
                self._use(extent)
            if self._device.type == "cpu" or tensor.device == self._device:
                return tensor
            if extent is None and id(tensor) not in self._opaque:
                return tensor
            if id(tensor) in self._lent_buffers:
                return self._lent_buffers[id(tensor)][2]
            copy = tensor.to(self._device)
            if extent is not None and any(item.is_buffer for item in extent.tensors):
                self._lent_buffers[id(tensor)] = extent, tensor, copy  # what a pass writes to a buffer, it reads again
            return copy

        args, kwargs = tree_map_only(torch.Tensor, see, (args, kwargs or {}))
        return func(*args, **kwargs)

    def written(self) -> set[Extent]:
        """Extents of lent buffers whose device copy the pass changed."""
        return {extent for extent, tensor, copy in self._lent_buffers.values() if not torch.equal(copy.cpu(), tensor)}

    def _extent_of(self, tensor: torch.Tensor) -> Extent | None:
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.numel():
            return None
        address = tensor.data_ptr()
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._starts[index] + self._extents[index].n_bytes:
            return None
        return self._extents[index]

    def _use(self, extent: Extent) -> None:
        known = self.holders.get(extent)
        self.holders[extent] = frozenset(self._stack) if known is None else known.intersection(self._stack)
