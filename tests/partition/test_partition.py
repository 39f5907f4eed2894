"""Layers are what really runs, in the order in which it runs, every byte once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from autosp.batch import call
from autosp.errors import EmptyModelError, MetaModelError, ModelError, PlanMismatchError
from autosp.partition import BoundModel, bind, model_fingerprint, partition
from autosp.partition.tensors import collect
from autosp.spec import Block, Layer, Leaf, Partition
from models import MAKERS, EarlyExit, FusedViews, Shared, Stack, TwoTowers, make, tokens, vectors

CPU = torch.device("cpu")


def parts_of(model: nn.Module, batch: object) -> Partition:
    return partition(model, lambda: call(model, batch), CPU)


def names(parts: Partition) -> list[str]:
    return [layer.name for layer in parts.layers]


@pytest.mark.parametrize("name", MAKERS)
def test_every_tensor_is_in_one_layer_or_resident(name: str) -> None:
    model, batch = make(name)
    parts = parts_of(model, batch)
    placed = [tensor for layer in parts.layers for tensor in layer.tensors] + list(parts.resident_tensors)
    assert len(placed) == len(set(placed))
    every = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.numel()]
    assert set(placed) == set(every)
    bound: BoundModel = bind(model, parts)
    ends = [[(p.offset, p.offset + p.extent.n_bytes) for p in layer.placed] for layer in bound.layers]
    for layer, ranges in zip(parts.layers, ends, strict=True):
        assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False))
        assert ranges[-1][1] <= layer.n_bytes
        assert layer.n_bytes % 4096 == 0


def test_containers_that_are_not_called_are_split_and_order_is_execution() -> None:
    model, batch = make("stack")
    parts = parts_of(model, batch)
    assert names(parts)[0] == "embed"
    assert names(parts)[-1] == "head"
    assert "blocks" not in names(parts)
    assert parts.visits == tuple(range(len(parts.layers)))
    assert parts.repeats == 1


def test_oversized_modules_are_split() -> None:
    model = nn.Sequential(Stack(blocks=1, width=256), nn.Identity())
    parts = parts_of(model, tokens(2, 5))
    assert "0.blocks.0.up" in names(parts)


def test_tied_weights_are_counted_once_and_resident() -> None:
    model, batch = make("tied")
    parts = parts_of(model, batch)
    assert "embed.weight" in parts.resident_tensors
    assert "head.weight" not in parts.resident_tensors
    assert all("embed.weight" not in layer.tensors for layer in parts.layers)
    assert parts.total_bytes < sum(p.numel() * 4 for p in model.parameters()) * 1.1


def test_a_weight_used_without_its_module_s_forward_is_resident() -> None:
    model, batch = make("borrowed")
    parts = parts_of(model, batch)
    assert "head.weight" in parts.resident_tensors
    assert "scale" in parts.resident_tensors
    assert "body.0.weight" in parts.layers[0].tensors


def test_shared_layer_is_one_layer_with_several_visits() -> None:
    parts = parts_of(Shared(), vectors())
    up = names(parts).index("block.up")
    assert parts.visits.count(up) == 4
    assert parts.repeats == 1


def test_a_loop_of_calls_is_repeats_of_one_period() -> None:
    model, batch = make("stack")
    parts = partition(model, lambda: [model(batch) for _ in range(5)], CPU)
    assert parts.repeats == 5
    assert parts.visits == tuple(range(len(parts.layers)))


def test_two_towers_are_ordered_by_execution() -> None:
    parts = parts_of(TwoTowers(), {"left": vectors(), "right": vectors(5)})
    assert names(parts) == ["left.0", "left.2", "right.0", "right.2"]


def test_fused_views_travel_together_only_if_one_layer_uses_them() -> None:
    model = FusedViews()
    parts = parts_of(model, vectors())
    # Three neighbours in one storage do not overlap: each is an extent of its own.
    assert {"query", "key", "value"} <= set(names(parts))
    assert len(collect(model).opaque) == 1  # the empty parameter


def test_overlapping_views_are_one_extent() -> None:
    model = nn.Module()
    base = torch.randn(10, 8)
    model.whole = nn.Parameter(base)
    model.part = nn.Parameter(base[2:5])
    (extent,) = collect(model).extents
    assert extent.n_bytes == base.numel() * 4
    assert [item.offset for item in extent.tensors] == [0, 2 * 8 * 4]


def test_the_transformer_fast_path_keeps_its_layers_whole() -> None:
    model, batch = make("fast_path")
    assert names(parts_of(model, batch)) == ["layers.0", "layers.1", "layers.2"]


def test_layers_never_visited_come_last_and_are_not_in_the_order() -> None:
    model = EarlyExit()
    parts = partition(model, lambda: model(vectors(), [0, 2]), CPU)
    visited = {name.split(".")[1] for name in names(parts)[: len(parts.visits)]}
    assert visited == {"0", "2"}
    assert len(parts.layers) > len(parts.visits)


def test_buffers_that_a_pass_changes_are_resident_and_restored() -> None:
    model, batch = make("convolutions")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = parts_of(model, batch)
    assert "1.running_mean" in parts.resident_tensors
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_model_is_as_it_was_when_the_pass_raises() -> None:
    model, _ = make("stack")
    with pytest.raises(IndexError):
        parts_of(model, torch.tensor([[10_000]]))
    assert "forward" not in model.__dict__
    assert model(tokens(1, 3)).shape == (1, 3, 500)


def test_no_parameters() -> None:
    with pytest.raises(EmptyModelError, match="nothing to stream"):
        parts_of(nn.Sequential(nn.ReLU()), vectors())


def test_meta_tensors_are_named() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(MetaModelError, match="weight first") as caught:
        parts_of(model, vectors())
    assert isinstance(caught.value, ModelError)


def test_bind_refuses_another_model() -> None:
    model, batch = make("stack")
    parts = parts_of(model, batch)
    with pytest.raises(PlanMismatchError, match="no tensor"):
        bind(Shared(), parts)
    with pytest.raises(PlanMismatchError, match="bytes, the plan says"):
        bind(Stack(width=32), parts)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"layers": (Layer(index=0, name="nowhere", tensors=(), n_bytes=0, weight_bytes=0),)}, id="layer"),
        pytest.param({"leaves": (Leaf(path="nowhere", inputs=()),)}, id="leaf"),
        pytest.param({"blocks": (Block(path="nowhere", layers=(1,)),)}, id="block"),
        pytest.param({"called_again": ("nowhere",)}, id="part of a layer"),
    ],
)
def test_bind_refuses_a_module_that_is_not_there(change: dict[str, Any]) -> None:
    model, batch = make("stack")
    with pytest.raises(PlanMismatchError, match="Stack has no module 'nowhere'"):
        bind(model, parts_of(model, batch).model_copy(update=change))


def test_fingerprint_is_of_structure_not_of_values() -> None:
    torch.manual_seed(0)
    one, two = Stack(), Stack()
    assert model_fingerprint(one) == model_fingerprint(two)
    assert model_fingerprint(one) != model_fingerprint(make("tied")[0])
    assert model_fingerprint(one) != model_fingerprint(Stack().half())
    assert model_fingerprint(one) != model_fingerprint(Stack(blocks=5))


def test_a_weight_that_its_parent_reads_too_is_resident() -> None:
    class Peeking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) + x @ self.body[2].weight

    parts = parts_of(Peeking(), vectors())
    assert "body.2.weight" in parts.resident_tensors
    assert "body.1.weight" not in parts.resident_tensors


class Lookups(nn.Module):
    """A large table of which a pass reads a few rows; `peek` reads it in another way too."""

    def __init__(self, *, peek: bool = False, bag: bool = False) -> None:
        super().__init__()
        self.table = (nn.EmbeddingBag if bag else nn.Embedding)(5000, 64)
        self.body = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.peek = peek

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for layer in self.body:
            x = layer(x)
        return x @ self.table.weight.T if self.peek else x


FEW, MANY = torch.randint(0, 5000, (2, 8)), torch.randint(0, 5000, (2, 2000))


@pytest.mark.parametrize("bag", [False, True])
def test_a_table_of_which_few_rows_are_read_is_no_layer(bag: bool) -> None:
    parts = parted(Lookups(bag=bag), FEW, lookups=True)
    assert parts.lookups is not None
    assert parts.lookups.tensors == ("table.weight",)
    assert parts.lookups.index == len(parts.layers)
    assert "table.weight" not in {name for layer in parts.layers for name in layer.tensors}
    assert parts.total_bytes >= 5000 * 64 * 4


@pytest.mark.parametrize(
    "model, batch, lookups",
    [(Lookups(), FEW, False), (Lookups(), MANY, True), (Lookups(peek=True), FEW, True)],
    ids=["the device cannot", "most rows are read", "it is also multiplied with"],
)
def test_other_tables_are_not_looked_up_in_place(model: nn.Module, batch: torch.Tensor, lookups: bool) -> None:
    assert parted(model, batch, lookups=lookups).lookups is None


def parted(model: nn.Module, batch: torch.Tensor, *, lookups: bool) -> Partition:
    return partition(model, lambda: model(batch), torch.device("cpu"), lookups=lookups)
