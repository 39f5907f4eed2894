"""nn.Module -> ordered layers: `partition` decides, `bind` finds a decided partition in a model again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autosp.partition.blocks import Inputs, find_blocks, follows
from autosp.partition.bound import (
    BoundLayer,
    BoundLeaf,
    BoundModel,
    Resting,
    at_rest,
    bind,
    collect_located,
    layouts,
)
from autosp.partition.placed import Placed, packed_bytes
from autosp.partition.rows import Runs, find_runs
from autosp.partition.split import Unit, choose_units
from autosp.partition.tensors import Extent, NamedTensor, model_fingerprint
from autosp.partition.trace import Trace, trace
from autosp.spec import Layer, Leaf, Mode, Partition, Tier

__all__ = [
    "BoundLayer",
    "BoundLeaf",
    "BoundModel",
    "Inputs",
    "NamedTensor",
    "Placed",
    "Resting",
    "at_rest",
    "bind",
    "follows",
    "model_fingerprint",
    "partition",
]


LOOKUP_SHARE = 1 / 8
"""A table of which lookups read at most this share per pass is read where it rests: moving all of it costs more."""


def partition(
    model: nn.Module,
    run: Callable[[], Any],
    device: torch.device,
    *,
    lookups: bool = False,
    slow_tier: Tier = Tier.HOST,
    mode: Mode = "inference",
) -> Partition:
    """Ordered layers of any module, by one observed pass.

    `run` performs the pass. `lookups`: the device's kernels can read host memory, so that tables
    need not move. `slow_tier` decides how layers travel, and so how many bytes. Layers are numbered in the order of
    their first visit; those that the pass never visited come last. In training no weight is cut into runs of rows: a
    run is computed with as a tensor of its own, so that the parameter would get no gradient; and blocks are found. The
    model is left as it was; what it raises passes through.

    Raises: EmptyModelError, MetaModelError, ReadError if a file that weights are mapped from was truncated.
    """
    tensors = collect_located(model)
    runs = find_runs(model, tensors) if mode == "inference" else {}
    seen = trace(model, tensors, run, device, runs)
    tables = [extent for extent in tensors.extents if lookups and _is_table(extent, seen)]
    unknown = [extent for extent in tensors.extents if mode == "training" and _is_unseen_buffer(extent, model)]
    units = choose_units(model, tensors, seen, [*tables, *unknown])
    if lookups and device.type == "cpu":
        units = _with_tied_heads(units, model, seen)
    period, repeats = _period(_visits(units, seen))
    by_index = {unit.index: unit for unit in units}
    modules = list(model.modules())
    pieces: list[_Piece] = []
    numbers: dict[int, range] = {}
    for index in dict.fromkeys([*period, *by_index]):
        begin = len(pieces)
        pieces += _pieces(by_index[index], modules[index], runs if index in seen.same_in_runs else {})
        numbers[index] = range(begin, len(pieces))
    elsewhere = {*tables, *(extent for piece in pieces for extent in piece.holds)}
    staying = [extent for extent in tensors.extents if extent not in elsewhere]
    return Partition(
        layers=tuple(_layer(position, piece.name, piece.extents, slow_tier) for position, piece in enumerate(pieces)),
        resident_tensors=tuple(item.name for extent in staying for item in extent.tensors),
        resident_bytes=packed_bytes(staying),
        visits=tuple(number for index in period for number in numbers[index]),
        repeats=repeats,
        lookups=_layer(len(pieces), "lookup tables", tables, slow_tier) if tables else None,
        leaves=tuple(
            Leaf(path=by_index[index].name, inputs=seen.same_in_runs[index])
            for index, cut in numbers.items()
            if len(cut) > 1
        ),
        stateful=tuple(cut[0] for index, cut in numbers.items() if index in seen.called - seen.repeatable)
        if mode == "training"
        else (),
        blocks=find_blocks(model, seen.calls, seen.repeatable, {index: cut[0] for index, cut in numbers.items()})
        if mode == "training"
        else (),
    )


@dataclass(frozen=True)
class _Piece:
    """What becomes a layer: a unit, or a run of its rows."""

    name: str
    extents: tuple[Extent, ...]
    holds: tuple[Extent, ...]
    """Of the model's own extents."""


def _pieces(unit: Unit, module: nn.Module, runs: Mapping[nn.Module, Runs]) -> list[_Piece]:
    """The unit; or the runs of rows to cut it into. Its bias, which each of them needs, is resident then."""
    weight = next((held for held in unit.extents if held.tensors[0].tensor is module._parameters.get("weight")), None)
    if weight is None or module not in runs:
        return [_Piece(unit.name, unit.extents, unit.extents)]
    return [_Piece(f"{unit.name}[{begin}:{end}]", (weight.rows(begin, end),), (weight,)) for begin, end in runs[module]]


def _layer(index: int, name: str, extents: Sequence[Extent], slow_tier: Tier) -> Layer:
    layout, disk_layout = layouts(extents, slow_tier)
    return Layer(
        index=index,
        name=name,
        tensors=tuple(item.name for extent in extents for item in extent.tensors),
        n_bytes=layout.n_bytes,
        disk_bytes=disk_layout.n_bytes,
        weight_bytes=sum(extent.weight_bytes for extent in extents),
        rows=extents[0].tensors[0].rows,
    )


def _is_unseen_buffer(extent: Extent, model: nn.Module) -> bool:
    """Whether it is a buffer of a module in eval mode: no pass shows whether training writes to it.

    Statistics and codebooks are written to where no version counter sees it, so they stay resident.
    """
    owners = [model.get_submodule(name.rpartition(".")[0]) for item in extent.tensors for name in item.names]
    return all(item.is_buffer for item in extent.tensors) and not all(owner.training for owner in owners)


def _is_table(extent: Extent, seen: Trace) -> bool:
    """Whether all that the pass did with it was to look up a few rows of it."""
    return seen.looked_up.get(extent, 0) > 0 and extent not in seen.multiplied and _rests(extent, seen)


def _rests(extent: Extent, seen: Trace) -> bool:
    """Whether it can be read where it rests: the pass looked up a few rows of it, and did not write to it."""
    return seen.looked_up.get(extent, 0) <= extent.n_bytes * LOOKUP_SHARE and extent not in seen.mutated


def _with_tied_heads(units: list[Unit], model: nn.Module, seen: Trace) -> list[Unit]:
    """The units, and every leaf to be cut whose weight is a lookup table's, too.

    The runs of its rows stream, while the table's rows are read where the weight rests: in memory that compute can read
    as it is, so on a CPU.
    """
    held = {extent for unit in units for extent in unit.extents}
    chosen = {unit.index for unit in units}
    paths = [path for path, _ in model.named_modules()]
    heads = {}
    for extent, (user, *others) in seen.multiplied.items():
        tied = extent in seen.looked_up and extent not in held and not others and _rests(extent, seen)
        inside = any(stack[-1] == user and not chosen.isdisjoint(stack[:-1]) for stack in seen.calls)
        if tied and not inside and user in seen.same_in_runs:
            heads[user] = Unit(user, paths[user], (extent,))
    return [unit for unit in units if unit.index not in heads] + list(heads.values())


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
