"""Chooses the modules that become layers, from what one observed pass showed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from autosp.partition.tensors import Extent, ModelTensors
from autosp.partition.trace import Trace

SPLIT_ABOVE = 1 / 256
"""A module with more than this share of the model's bytes is split, if its parts really are called: the ring holds two
layers, and what it holds is memory that residents cannot have."""

SMALL_BYTES = 4 * 2**20
SMALL_SHARE = 1 / 32
"""A module within both of these is left whole: below that a transfer's and a call's fixed cost outweigh the memory."""

COMPILED_SHARE = 1 / 8
"""A module that torch.compile compiles is left whole up to here: every layer inside it would break its graph."""

TINY_SHARE = 1 / 1000
TINY_BYTES = 64 * 2**10
"""Modules below both of these (norms, biases) stay on the device: they are not worth a transfer."""


@dataclass(frozen=True)
class Unit:
    """A module whose extents travel together. `index` is its position in `model.modules()`."""

    index: int
    name: str
    extents: tuple[Extent, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of the extents, without alignment."""
        return sum(extent.n_bytes for extent in self.extents)


def choose_units(
    model: nn.Module, tensors: ModelTensors, trace: Trace, elsewhere: Collection[Extent] = ()
) -> list[Unit]:
    """Disjoint modules, in module order. What neither they nor `elsewhere` hold stays resident.

    A unit holds the extents under its module that the pass used only while that module ran: so a tied weight, one read
    by a parent, or one that the pass changes, belongs to no unit unless all its users are inside.
    """
    tree = _Tree(model, tensors, trace, {*trace.mutated, *elsewhere})
    units = tree.split(model)
    tiny = min(TINY_BYTES, tensors.total_bytes * TINY_SHARE)
    return [unit for unit in units if unit.n_bytes > tiny]


def _is_small_buffer(extent: Extent) -> bool:
    """Statistics and the like: another pass may change them though this one did not, so they stay resident."""
    return extent.n_bytes <= TINY_BYTES and all(item.is_buffer for item in extent.tensors)


def _is_compiled(module: nn.Module) -> bool:
    """In place by `module.compile()`, or as the wrapper that `torch.compile(module)` returns."""
    return module._compiled_call_impl is not None or isinstance(getattr(module, "_orig_mod", None), nn.Module)


class _Tree:
    def __init__(self, model: nn.Module, tensors: ModelTensors, trace: Trace, excluded: set[Extent]) -> None:
        self._total = total = tensors.total_bytes
        self._limit = max(total * SPLIT_ABOVE, min(total * SMALL_SHARE, SMALL_BYTES))
        self._called = trace.called
        self._index = {module: index for index, module in enumerate(model.modules())}
        self._path = {module: path for path, module in model.named_modules()}
        # Each extent by the modules that own one of its tensors directly.
        self._owned: dict[nn.Module, list[Extent]] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        self._owners: dict[Extent, set[nn.Module]] = {}
        for extent in tensors.extents:
            if extent in excluded or _is_small_buffer(extent):
                continue
            owners = {modules[name.rpartition(".")[0]] for item in extent.tensors for name in item.names}
            self._owners[extent] = owners
            for owner in owners:
                self._owned.setdefault(owner, []).append(extent)
        self._holders = trace.holders
        self._seen: set[nn.Module] = set()

    def split(self, module: nn.Module) -> list[Unit]:
        """The units at or under `module`. A module reachable by two paths is split once, at the first."""
        if module in self._seen:
            return []
        self._seen.add(module)
        whole = self._unit(module)
        children = list(module.children())
        limit = max(self._limit, self._total * COMPILED_SHARE) if _is_compiled(module) else self._limit
        if whole is not None and (whole.n_bytes <= limit or not children):
            self._seen.update(module.modules())
            return [whole]
        parts = [unit for child in children for unit in self.split(child)]
        if whole is None:
            return parts
        # Kept whole, the module needs all its bytes at once; split, what the parts do not hold and one part at a time.
        lost = whole.n_bytes - sum(part.n_bytes for part in parts)
        largest = max((part.n_bytes for part in parts), default=0)
        if lost + largest < whole.n_bytes:
            return parts
        return [whole]

    def _unit(self, module: nn.Module) -> Unit | None:
        """The module as one unit; None if it cannot be one: nothing to hold, or never called as a whole."""
        inside = set(module.modules())
        index = self._index[module]
        extents = list(dict.fromkeys(extent for part in module.modules() for extent in self._owned.get(part, ())))
        unused = not any(extent in self._holders for extent in extents)
        if index not in self._called and not (unused and module in self._owned):
            return None
        held = tuple(
            extent
            for extent in extents
            if self._owners[extent] <= inside and (extent not in self._holders or index in self._holders[extent])
        )
        return Unit(index, self._path[module], held) if held else None
