"""nn.Module -> ordered layers: `partition` decides, `bind` finds a decided partition in a model again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autosp.errors import PlanMismatchError
from autosp.partition.mapped import locate
from autosp.partition.placed import Layout, Placed, lay_out, pack, packed_bytes
from autosp.partition.split import Unit, choose_units
from autosp.partition.tensors import Extent, ModelTensors, NamedTensor, collect, model_fingerprint
from autosp.partition.trace import Trace, trace
from autosp.spec import Layer, Partition, Tier

__all__ = ["BoundLayer", "BoundModel", "NamedTensor", "Placed", "bind", "model_fingerprint", "partition"]


@dataclass(frozen=True)
class BoundLayer:
    """A layer found in a model, with the size that it has there: its module, and how its extents travel."""

    layer: Layer
    module: nn.Module
    layout: Layout

    @property
    def placed(self) -> tuple[Placed, ...]:
        """All its extents."""
        return self.layout.placed


@dataclass(frozen=True)
class BoundModel:
    """A partition found in a model."""

    model: nn.Module
    partition: Partition
    """With the sizes that the layers have here: a plan's may differ, made where the weights were elsewhere."""
    layers: tuple[BoundLayer, ...]
    residents: tuple[Placed, ...]
    lookups: BoundLayer | None
    opaque: tuple[NamedTensor, ...]

    def stored(self, resident_layers: Collection[int] = ()) -> list[BoundLayer]:
        """What rests on the slow tier: lookup tables, and every layer that is not resident."""
        streamed = [bound for bound in self.layers if bound.layer.index not in resident_layers]
        return [*streamed, self.lookups] if self.lookups else streamed


LOOKUP_SHARE = 1 / 8
"""A table of which lookups read at most this share per pass is read where it rests: moving all of it costs more."""


def partition(
    model: nn.Module,
    run: Callable[[], Any],
    device: torch.device,
    *,
    lookups: bool = False,
    slow_tier: Tier = Tier.HOST,
) -> Partition:
    """Ordered layers of any module, by one observed pass.

    `run` performs the pass. `lookups`: the device's kernels can read host memory, so that tables
    need not move. `slow_tier` decides how layers travel, and so how many bytes. Layers are numbered in the order of
    their first visit; those that the pass never visited come last. The model is left as it was; what it raises passes
    through.

    Raises: EmptyModelError, MetaModelError, ReadError if a file that weights are mapped from was truncated.
    """
    tensors = _collect(model, slow_tier)
    seen = trace(model, tensors, run, device)
    tables = [extent for extent in tensors.extents if lookups and _is_table(extent, seen)]
    units = choose_units(model, tensors, seen, tables)
    sequence = _visits(units, seen)
    period, repeats = _period(sequence)
    by_index = {unit.index: unit for unit in units}
    first_visits = dict.fromkeys(period)
    ordered = [by_index[index] for index in first_visits] + [unit for unit in units if unit.index not in first_visits]
    number = {unit.index: position for position, unit in enumerate(ordered)}
    elsewhere = {*tables, *(extent for unit in units for extent in unit.extents)}
    staying = [extent for extent in tensors.extents if extent not in elsewhere]
    return Partition(
        layers=tuple(_layer(position, unit.name, unit.extents) for position, unit in enumerate(ordered)),
        resident_tensors=tuple(item.name for extent in staying for item in extent.tensors),
        resident_bytes=packed_bytes(staying),
        visits=tuple(number[index] for index in period),
        repeats=repeats,
        lookups=_layer(len(ordered), "lookup tables", tables) if tables else None,
    )


def _layer(index: int, name: str, extents: Sequence[Extent]) -> Layer:
    names = tuple(item.name for extent in extents for item in extent.tensors)
    return Layer(
        index=index,
        name=name,
        tensors=names,
        n_bytes=lay_out(extents).n_bytes,
        weight_bytes=sum(extent.weight_bytes for extent in extents),
    )


def _collect(model: nn.Module, slow_tier: Tier) -> ModelTensors:
    """The model's tensors. A disk tier reads those mapped from a file in place; RAM takes all of them packed.

    Raises: ReadError if a file that they are mapped from was truncated, before anything touches them.
    """
    tensors = collect(model)
    locate(tensors.extents)
    if slow_tier is not Tier.DISK:
        for extent in tensors.extents:
            extent.source = None
    return tensors


def _is_table(extent: Extent, seen: Trace) -> bool:
    """Whether all that the pass did with it was to look up a few rows of it."""
    return 0 < seen.looked_up.get(extent, 0) <= extent.n_bytes * LOOKUP_SHARE and extent not in seen.mutated


def bind(model: nn.Module, plan: Partition, slow_tier: Tier = Tier.HOST) -> BoundModel:
    """Find a partition's modules and tensors in `model`, and lay them out for the tier that they will rest on.

    A plan made from weights in RAM holds for the same weights mapped from a file, and the reverse.

    Raises: PlanMismatchError naming the first layer that is not there, or not of the planned size; ReadError if a file
    that weights are mapped from was truncated.
    """
    tensors = _collect(model, slow_tier)
    extent_of = {item.name: extent for extent in tensors.extents for item in extent.tensors}

    def extents(names: Sequence[str], owner: str) -> list[Extent]:
        missing = next((name for name in names if name not in extent_of), None)
        if missing is not None:
            raise PlanMismatchError(f"{owner}: the model has no tensor {missing!r} that can be streamed")
        return list(dict.fromkeys(extent_of[name] for name in names))

    def bound(layer: Layer, path: str) -> BoundLayer:
        parts = extents(layer.tensors, f"layer {layer.index} ({layer.name})")
        _check_size(layer, parts)
        layout = lay_out(parts)
        return BoundLayer(layer.model_copy(update={"n_bytes": layout.n_bytes}), model.get_submodule(path), layout)

    layers = tuple(bound(layer, layer.name) for layer in plan.layers)
    lookups = bound(plan.lookups, "") if plan.lookups else None
    sizes = {"layers": tuple(found.layer for found in layers), "lookups": lookups.layer if lookups else None}
    return BoundModel(
        model=model,
        partition=plan.model_copy(update=sizes),
        layers=layers,
        residents=pack(extents(plan.resident_tensors, "resident tensors")),
        lookups=lookups,
        opaque=tuple(tensors.opaque),
    )


def _check_size(layer: Layer, parts: Sequence[Extent]) -> None:
    """Raises: PlanMismatchError if the layer's tensors are not of the planned size."""
    planned = layer.weight_bytes
    found = sum(extent.weight_bytes for extent in parts)
    if planned is None:  # of a version in which every layer travelled packed
        planned, found = layer.n_bytes, packed_bytes(parts)
    if found != planned:
        raise PlanMismatchError(f"layer {layer.index} ({layer.name}) has {found} bytes, the plan says {planned}")


def _visits(units: Sequence[Unit], seen: Trace) -> list[int]:
    """The units' module indices, once per call that is not inside another call of the same unit."""
    indices = {unit.index for unit in units}
    return [stack[-1] for stack in seen.calls if stack[-1] in indices and stack[-1] not in stack[:-1]]


def _period(sequence: Sequence[int]) -> tuple[list[int], int]:
    """The shortest sequence that, repeated, gives `sequence`, and how often. A loop of model calls has a short one."""
    length = len(sequence)
    border = [0] * length  # longest proper prefix that is also a suffix, per position (Knuth, Morris, Pratt)
    for position in range(1, length):
        match = border[position - 1]
        while match and sequence[position] != sequence[match]:
            match = border[match - 1]
        border[position] = match + (sequence[position] == sequence[match])
    shortest = length - border[-1] if length else 0
    if not shortest or length % shortest:
        return list(sequence), 1
    return list(sequence[:shortest]), length // shortest
