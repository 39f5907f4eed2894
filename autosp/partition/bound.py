"""A decided partition, found again in a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from autosp.errors import PlanMismatchError
from autosp.partition.mapped import locate
from autosp.partition.placed import Layout, Placed, lay_out, lay_out_packed, pack, packed_bytes, tensors_of
from autosp.partition.rows import is_cut, is_linear
from autosp.partition.tensors import Extent, ModelTensors, NamedTensor, collect
from autosp.spec import Layer, Leaf, Partition, Tier


@dataclass(frozen=True, eq=False)
class BoundLeaf:
    """A linear module whose weight's rows are several layers, see [Note: runs of rows]."""

    module: nn.Linear
    weight: Extent
    """The whole."""
    inputs: tuple[str, ...]
    """Keys of the inputs for which the runs' outputs are known to be the whole's."""


@dataclass(frozen=True)
class BoundLayer:
    """A layer found in a model, with the size that it has there: its module, and how its extents travel."""

    layer: Layer
    module: nn.Module
    layout: Layout
    disk_layout: Layout
    """How they are read from disk; `layout` itself where that is the slow tier, or where none of them is in a file."""
    leaf: BoundLeaf | None = None
    """If it is a run of a weight's rows."""

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

    def stored(self, elsewhere: Collection[int] = ()) -> list[BoundLayer]:
        """What rests on the slow tier: lookup tables, and every layer that is not resident or otherwise `elsewhere`.

        A weight rests as a whole: where some of its rows are resident and others are not, all of them rest.
        """
        resting = self.partition.whole([one.layer.index for one in self.layers if one.layer.index not in elsewhere])
        stored = [bound for bound in self.layers if bound.layer.index in resting]
        return [*stored, self.lookups] if self.lookups else stored

    def placed(self) -> list[Placed]:
        """Every extent that a plan places."""
        return [*(place for layer in self.stored() for place in layer.placed), *self.residents]

    def tensors(self) -> list[NamedTensor]:
        """Everything that a plan places."""
        return [*tensors_of(self.placed()), *self.opaque]


@dataclass(frozen=True, eq=False)
class Resting:
    """What rests in one piece: a layer, or the runs of rows of one weight, one after another."""

    layers: tuple[BoundLayer, ...]

    @property
    def leaf(self) -> BoundLeaf | None:
        """What the runs are of."""
        return self.layers[0].leaf

    @property
    def indices(self) -> list[int]:
        """Of its layers."""
        return [bound.layer.index for bound in self.layers]

    @property
    def placed(self) -> tuple[Placed, ...]:
        """Its extents at rest."""
        return (Placed(self.leaf.weight, 0),) if self.leaf else self.layers[0].placed

    @property
    def packed(self) -> tuple[Placed, ...]:
        """Those that are in no file."""
        if self.leaf is None:
            return self.layers[0].disk_layout.packed
        return self.placed if self.leaf.weight.source is None else ()


def at_rest(layers: Sequence[BoundLayer]) -> list[Resting]:
    """Layers by what rests in one piece."""
    return [Resting(tuple(members)) for _, members in groupby(layers, lambda bound: bound.leaf or bound)]


def bind(model: nn.Module, plan: Partition, slow_tier: Tier = Tier.HOST) -> BoundModel:
    """Find a partition's modules and tensors in `model`, and lay them out for the tiers that they will rest on.

    A plan made from weights in RAM holds for the same weights mapped from a file, and the reverse.

    Raises: PlanMismatchError naming the first layer that is not there, or not of the planned size; ReadError if a file
    that weights are mapped from was truncated.
    """
    tensors = collect_located(model)
    extent_of = {item.name: extent for extent in tensors.extents for item in extent.tensors}

    def extents(names: Sequence[str], owner: str) -> list[Extent]:
        missing = next((name for name in names if name not in extent_of), None)
        if missing is not None:
            raise PlanMismatchError(f"{owner}: the model has no tensor {missing!r} that can be streamed")
        return list(dict.fromkeys(extent_of[name] for name in names))

    leaves = {leaf.path: _bind_leaf(model, leaf, plan, extents) for leaf in plan.leaves}

    def bound(layer: Layer, path: str) -> BoundLayer:
        parts = extents(layer.tensors, f"layer {layer.index} ({layer.name})")
        leaf = leaves.get(path) if layer.rows else None
        if leaf and layer.rows:
            parts = [leaf.weight.rows(*layer.rows)]
        _check_size(layer, parts)
        layout, disk_layout = layouts(parts, slow_tier)
        found = layer.model_copy(update={"n_bytes": layout.n_bytes, "disk_bytes": disk_layout.n_bytes})
        return BoundLayer(found, _module(model, path, f"layer {layer.index}"), layout, disk_layout, leaf)

    layers = tuple(bound(layer, layer.path) for layer in plan.layers)
    lookups = bound(plan.lookups, "") if plan.lookups else None
    for path in (*(block.path for block in plan.blocks), *plan.called_again):
        _module(model, path, "what is computed again")
    sizes = {"layers": tuple(found.layer for found in layers), "lookups": lookups.layer if lookups else None}
    return BoundModel(
        model=model,
        partition=plan.model_copy(update=sizes),
        layers=layers,
        residents=pack(extents(plan.resident_tensors, "resident tensors")),
        lookups=lookups,
        opaque=tuple(tensors.opaque),
    )


def _bind_leaf(
    model: nn.Module, leaf: Leaf, plan: Partition, extents: Callable[[Sequence[str], str], list[Extent]]
) -> BoundLeaf:
    """Raises: PlanMismatchError if its module is no linear one here, or the plan's runs are not all of its rows."""
    module = _module(model, leaf.path, "a weight that is cut into rows")
    runs = [layer for layer in plan.layers if layer.rows and layer.path == leaf.path]
    whole = extents([name for layer in runs for name in layer.tensors], f"leaf {leaf.path}")
    if not is_linear(module) or len(whole) != 1 or whole[0].tensors[0].tensor is not module.weight:
        raise PlanMismatchError(
            f"the plan cuts the weight of {leaf.path} into rows, which only a plain torch.nn.Linear can do without; "
            "make a new plan for the model as it is now"
        )
    weight = whole[0].trimmed()
    rows = [layer.rows or (0, 0) for layer in runs]
    indices = [layer.index for layer in runs]
    if not is_cut(rows, weight) or indices != list(range(indices[0], indices[0] + len(indices))):
        raise PlanMismatchError(f"the plan's runs of rows of {leaf.path} are not one after another all that it has")
    assert isinstance(module, nn.Linear)
    return BoundLeaf(module, weight, leaf.inputs)


def _module(model: nn.Module, path: str, owner: str) -> nn.Module:
    """Raises: PlanMismatchError if there is none at that path."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise PlanMismatchError(
            f"{owner}: {type(model).__name__} has no module {path!r}; make a new plan for the model as it is now"
        ) from error


def _check_size(layer: Layer, parts: Sequence[Extent]) -> None:
    """Raises: PlanMismatchError if the layer's tensors are not of the planned size."""
    planned = layer.weight_bytes
    found = sum(extent.weight_bytes for extent in parts)
    if planned is None:  # of a version in which every layer travelled packed
        planned, found = layer.n_bytes, packed_bytes(parts)
    if found != planned:
        raise PlanMismatchError(f"layer {layer.index} ({layer.name}) has {found} bytes, the plan says {planned}")


def collect_located(model: nn.Module) -> ModelTensors:
    """The model's tensors, and where in files those are that are mapped from one.

    Raises: ReadError if a file that they are mapped from was truncated, before anything touches them.
    """
    tensors = collect(model)
    locate(tensors.extents)
    return tensors


def layouts(extents: Sequence[Extent], slow_tier: Tier) -> tuple[Layout, Layout]:
    """How a layer's extents travel to the device, and how they are read from disk.

    [Note: two layouts] From a disk tier they travel as they are read. Behind a host they are read as they lie in their
    files, and the copy to the device leaves out what was read beside them: the link, the device and whatever rests on
    the host have them packed, the same bytes wherever the layer rests.
    """
    as_read = lay_out(extents)
    if slow_tier is Tier.DISK or not as_read.runs:
        return as_read, as_read
    return lay_out_packed(extents), as_read
