"""One observed pass: which module runs when, and under which modules each weight is really used."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from autosp.batch import call_on, tensors_in
from autosp.intercept import Intercepted
from autosp.partition.blocks import Inputs
from autosp.partition.lender import Lender, copying_to
from autosp.partition.located import located
from autosp.partition.rows import Runs, input_key, same_in_runs, the_input
from autosp.partition.tensors import Extent, ModelTensors, held_by

SNAPSHOT_BYTES = 16 * 2**20
"""Extents with a buffer are compared before and after the pass up to this size: some kernels (batch norm) write to an
argument without saying so. Larger ones are believed."""

LOOKUPS = {
    torch.ops.aten.embedding.default,
    torch.ops.aten._embedding_bag.default,
    torch.ops.aten._embedding_bag_forward_only.default,
}
"""Operations that read a few rows of their first argument."""


@dataclass
class Trace:
    """What was seen. Modules are named by their position in `model.modules()`."""

    calls: list[tuple[int, ...]]
    """Per call, in order: the stack of modules, outermost first; the last one is being called."""
    holders: dict[Extent, frozenset[int]]
    """Per used extent: the modules that were running at every one of its uses. A caller uses what it is returned."""
    mutated: set[Extent]
    """Extents that the pass wrote to, or whose buffer it replaced."""
    looked_up: dict[Extent, int]
    """Extents of which the pass did nothing but look up rows, or multiply with them: the bytes of those rows."""
    same_in_runs: dict[int, tuple[str, ...]]
    """Modules whose output was the same by runs of rows in every call, and the keys of their inputs."""
    multiplied: dict[Extent, set[int]]
    """Weights of the modules that were tried so, and which of those used them in their forward."""

    repeatable: set[int]
    """Modules that were called with plain inputs every time, which stayed as they were to the end of the pass."""

    @property
    def called(self) -> set[int]:
        """Modules that were called at all."""
        return {stack[-1] for stack in self.calls}


def trace(
    model: nn.Module,
    tensors: ModelTensors,
    run: Callable[[], Any],
    device: torch.device,
    runs: Mapping[nn.Module, Runs] | None = None,
) -> Trace:
    """Run one pass on `device` and watch it. The modules' attributes and tensors are as before afterwards.

    `runs`: linear modules to try by runs of rows, see [Note: runs of rows].

    On an accelerator a module, or an operation, is lent device copies of the weights it touches, so that memory is
    taken for few of them at a time. Whatever the model raises passes through, with the model as it was.
    """
    watcher = _Watcher(tensors, device)
    attributes = attributes_of(model)
    before = {
        extent: extent.raw().clone()
        for extent in tensors.extents
        if extent.n_bytes <= SNAPSHOT_BYTES and any(item.is_buffer for item in extent.tensors)
    }
    wrappers = []
    try:
        for index, module in enumerate(model.modules()):
            wrappers.append(Intercepted(module, watcher.around(index, module, (runs or {}).get(module))))
        if device.type != "cpu":
            located(model, device, in_pass=lambda: True)
        with torch.compiler.set_stance("force_eager"), torch.no_grad(), watcher:
            run()
    finally:
        for wrapper in reversed(wrappers):
            wrapper.remove()
        mutated = watcher.written() | _replaced(model, tensors)
        restore_attributes(attributes)
        for extent, snapshot in {**before, **watcher.overwritten}.items():
            if not torch.equal(extent.raw(), snapshot):
                mutated.add(extent)
                with torch.inference_mode(False), torch.no_grad():
                    extent.raw().copy_(snapshot)
    return Trace(
        watcher.calls,
        watcher.holders,
        mutated,
        watcher.looked_up(),
        watcher.same_in_runs(),
        watcher.multiplied,
        {stack[-1] for stack in watcher.calls} - watcher.touching,
    )


Attributes = list[tuple[dict[str, Any], dict[str, Any]]]


def attributes_of(model: nn.Module) -> Attributes:
    """Every module's own attributes, tensors and children: the dictionary and what is in it now.

    A counter or a flag goes with the tensors that it speaks of, so whoever restores the one restores the other.
    """
    own = [vars(module) for module in model.modules()]
    held = [attributes[kind] for attributes in own for kind in ("_parameters", "_buffers", "_modules")]
    return [(known, dict(known)) for known in (*own, *held)]


def restore_attributes(attributes: Attributes) -> None:
    """As `attributes_of` found them."""
    for known, values in attributes:
        known.clear()
        known.update(values)


def _replaced(model: nn.Module, tensors: ModelTensors) -> set[Extent]:
    """The extents of buffers that the model does not have any more: the pass put other tensors in their place."""
    present = {id(held) for buffer in model.buffers() for _, held in held_by(buffer)}
    return {
        extent
        for extent in tensors.extents
        if any(item.is_buffer and id(item.tensor) not in present for item in extent.tensors)
    }


class _Watcher(TorchDispatchMode):
    """Sees every operation's arguments, and has the weights among them lent.

    [Note: made where a weight is] A module may make tensors where a weight of another module is. Under a plan that is
    on the accelerator, for weights that others use stay there; here it is on the host. So what an operation takes from
    the host beside tensors of the accelerator is moved there.
    """

    def __init__(self, tensors: ModelTensors, device: torch.device) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []
        self.holders: dict[Extent, frozenset[int]] = {}
        self.touching: set[int] = set()
        """Modules that were given what they may write to, or tensors that were written to then or later."""
        self._given: dict[StorageWeakRef, set[int]] = {}
        """The modules that were called with each storage."""
        self.overwritten: dict[Extent, torch.Tensor] = {}
        """The bytes of extents before the first operation that said it writes to them."""
        self._looked_up: Counter[Extent] = Counter()
        self._read_whole: set[Extent] = set()
        self.multiplied: dict[Extent, set[int]] = {}
        self._tried_weights: dict[int, torch.Tensor] = {}
        self._tried: dict[int, dict[str, bool]] = {}
        self._stack: list[int] = []
        self._device = device
        self._extents = sorted(tensors.extents, key=_address)
        self._addresses = [_address(extent) for extent in self._extents]
        self._lender = Lender(copying_to(device), tensors.opaque)

    def around(self, index: int, module: nn.Module, runs: Runs | None) -> Callable[..., Any]:
        """What stands around the forward of the module at `index`: it is on the stack while it runs."""
        if runs is not None and isinstance(module.weight, torch.Tensor):
            self._tried_weights[index] = module.weight

        def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._stack.append(index)
            self.calls.append(tuple(self._stack))
            inputs = Inputs(args, kwargs)
            for storage in _storages((args, kwargs)):
                self._given.setdefault(storage, set()).add(index)
            try:
                with self._lender.lent_to(module, self._extents_of, self.overwritten):
                    if len(self._stack) == 1 and self._device.type != "cpu":
                        output = call_on(self._device, forward, args, kwargs)
                    else:
                        output = forward(*args, **kwargs)
                    if runs is not None:
                        self._try(index, module, runs, the_input(args, kwargs), output)
            finally:
                self._stack.pop()
            if not inputs.plain or not inputs.untouched():
                self.touching.add(index)
            for tensor in tensors_in(output):
                self._use(self._extents_of(tensor))
                self._read_whole.update(self._extents_of(tensor))
            return output

        return around

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = self._written_by(func, args, kwargs)
        self._note_reads(func, args, kwargs)

        def see(tensor: torch.Tensor) -> torch.Tensor:
            extents = self._extents_of(tensor)
            self._use(extents)
            return self._lender.lend(tensor, extents, written)

        args, kwargs = tree_map_only(torch.Tensor, see, (args, kwargs))
        if self._device.type != "cpu" and not func._schema.is_mutable:
            args, kwargs = self._brought_together(args, kwargs)
        return func(*args, **kwargs)

    def written(self) -> set[Extent]:
        """Extents of lent tensors whose device copy the pass changed."""
        return self._lender.changed()

    def looked_up(self) -> dict[Extent, int]:
        """Bytes of the rows that were looked up, of the extents that nothing else read than a product."""
        return {extent: count for extent, count in self._looked_up.items() if extent not in self._read_whole}

    def same_in_runs(self) -> dict[int, tuple[str, ...]]:
        """What was tried by runs of rows, and was the same every time."""
        return {index: tuple(tried) for index, tried in self._tried.items() if all(tried.values())}

    def _try(self, index: int, module: nn.Module, runs: Runs, x: torch.Tensor, output: Any) -> None:
        """Once per key: what it says is which kernels run."""
        assert isinstance(module, nn.Linear)
        tried, key = self._tried.setdefault(index, {}), input_key(x)
        if key not in tried:
            tried[key] = x.device.type == self._device.type and same_in_runs(module, runs, x, output)

    def _brought_together(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See [Note: made where a weight is]."""
        tensors = tensors_in((args, kwargs))
        if not any(tensor.device == self._device for tensor in tensors):
            return args, kwargs
        return tree_map_only(
            torch.Tensor, lambda tensor: tensor.to(self._device) if tensor.dim() else tensor, (args, kwargs)
        )

    def _note_reads(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell looking up rows of a table (its first argument; the indices are the second) from reading all of it.

        A tried module's own use of its weight is told apart, too.
        """
        if func in LOOKUPS and len(args) > 1 and type(args[0]) in (torch.Tensor, nn.Parameter):
            table, indices = args[:2]
            rows = indices.numel() * table.stride(0) * table.element_size()
            self._looked_up.update(dict.fromkeys(self._extents_of(table), rows))
            args = args[1:]
        module = self._stack[-1] if self._stack else -1
        own = self._extents_of(self._tried_weights[module]) if module in self._tried_weights else []
        for extent in {extent for tensor in tensors_in((args, kwargs)) for extent in self._extents_of(tensor)}:
            if extent in own:
                self.multiplied.setdefault(extent, set()).add(module)
            else:
                self._read_whole.add(extent)

    def _written_by(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[Extent]:
        """Extents that an operation says it writes to. Their bytes are kept."""
        if not func._schema.is_mutable:
            return set()
        arguments = func._schema.arguments
        values = [
            args[position] if position < len(args) else kwargs.get(argument.name)
            for position, argument in enumerate(arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for storage in _storages(values):
            self.touching |= self._given.get(storage, set())
        extents = {extent for tensor in tensors_in(values) for extent in self._extents_of(tensor)}
        for extent in extents:
            if extent not in self.overwritten:
                self.overwritten[extent] = extent.raw().clone()
        return extents

    def _extents_of(self, tensor: torch.Tensor) -> list[Extent]:
        """The extents that a tensor's first byte is in: one, or for a wrapper those of all tensors that it holds."""
        found = []
        for _, held in held_by(tensor):
            if held.layout is not torch.strided or not held.numel():
                continue
            copied = self._lender.extents_in(held)
            if copied or held.device.type != "cpu":
                found += copied
                continue
            address = held.data_ptr()
            index = bisect.bisect_right(self._addresses, address) - 1
            if index >= 0 and address < self._extents[index].storage.data_ptr() + self._extents[index].end:
                found.append(self._extents[index])
        return found

    def _use(self, extents: list[Extent]) -> None:
        for extent in extents:
            known = self.holders.get(extent)
            self.holders[extent] = frozenset(self._stack) if known is None else known.intersection(self._stack)


def _address(extent: Extent) -> int:
    """Of its first tensor: an extent may begin up to 15 bytes earlier, within its neighbour."""
    return extent.storage.data_ptr() + extent.begin + extent.tensors[0].offset


def _storages(value: Any) -> list[StorageWeakRef]:
    """Of all tensors in it. A weak reference keeps the identity from being used twice, and no memory."""
    held = (held for tensor in tensors_in(value) for _, held in held_by(tensor) if held.layout is torch.strided)
    return [StorageWeakRef(one.untyped_storage()) for one in held]
