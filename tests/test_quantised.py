"""Quantised weights: subclasses that wrap plain tensors. Those move; the wrappers stay the objects that they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autosp
from autosp.batch import equal
from autosp.partition import model_fingerprint, partition
from autosp.partition.tensors import collect, held_by
from models import Stack, tokens

torchao = pytest.importorskip("torchao.quantization")

CONFIGS: dict[str, Callable[[], tuple[Any, torch.dtype]]] = {
    "int8 weights": lambda: (torchao.Int8WeightOnlyConfig(), torch.float32),
    "int8 weights and activations": lambda: (torchao.Int8DynamicActivationInt8WeightConfig(), torch.float32),
    "int4 weights": lambda: (torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4), torch.bfloat16),
    "float8 weights": lambda: (torchao.Float8WeightOnlyConfig(), torch.bfloat16),
}
CPU = torch.device("cpu")
SETTINGS = [
    pytest.param({"k": 1, "k_prime": 1}, id="k=1 k'=1"),
    pytest.param({"k": 4, "k_prime": 1, "residents": 2}, id="ring and residents"),
]


def quantised(config: str = "int8 weights", model: nn.Module | None = None) -> nn.Module:
    """A model with its linear layers' weights wrapped."""
    torch.manual_seed(0)
    settings, dtype = CONFIGS[config]()
    model = (model or Stack()).to(dtype).eval()
    torchao.quantize_(model, settings)
    return model


def plain(model: nn.Module, batch: Any) -> Any:
    """The output without a plan."""
    with torch.no_grad():
        return model(batch)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that holds bytes, cloned."""
    return {item.name: item.tensor.detach().clone() for extent in collect(model).extents for item in extent.tensors}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("config", CONFIGS)
def test_same_output_and_everything_restored(config: str, setting: dict[str, int]) -> None:
    model = quantised(config)
    expected, before = plain(model, tokens(3, 11)), bits(model)
    weight = model.blocks[1].up.weight
    plan = autosp.plan(model, tokens(3, 11), device="cpu", **setting)
    streamed = autosp.apply(model, plan)
    for _ in range(3):
        assert equal(model(tokens(3, 11)), expected)
    assert equal(bits(model), before)
    moving = {name for layer in streamed._bound.layers for name in layer.layer.tensors}
    assert {"blocks.1.up.weight:qdata", "blocks.1.up.weight:scale", "blocks.1.up.bias"} <= moving
    assert (streamed.stats().misses, streamed.stats().passes) == (0, 3)
    streamed.remove()
    assert model.blocks[1].up.weight is weight
    assert equal(bits(model), before)
    assert equal(plain(model, tokens(3, 11)), expected)


def test_the_codes_are_what_moves_and_what_is_counted() -> None:
    torch.manual_seed(0)
    whole, model = Stack(), quantised()
    wide, narrow = (
        {layer.name: layer.n_bytes for layer in partition(m, lambda m=m: m(tokens(3, 11)), CPU).layers}
        for m in (whole, model)
    )
    assert wide.keys() <= narrow.keys()
    assert narrow["blocks.0.up"] < 0.4 * wide["blocks.0.up"]
    assert not [item.name for item in collect(model).opaque]


class Borrows(nn.Module):
    """A parent that uses a layer's quantised weight in three ways of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.body = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
        self.lent = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lent(self.body(x))
        if self.how == "linear":
            return F.linear(x, self.lent.weight)
        if self.how == "dequantised":
            return x + self.lent.weight.dequantize().sum(0)
        return x + self.lent.weight.qdata[0] if self.how == "codes" else x


@pytest.mark.parametrize("how", ["not at all", "linear", "dequantised", "codes"])
def test_a_use_of_the_wrapper_or_of_what_it_holds_is_seen(how: str) -> None:
    model = quantised(model=Borrows(how))
    x = torch.linspace(-1, 1, 5 * 64).reshape(5, 64)
    parts = partition(model, lambda: model(x), CPU)
    assert ("lent.weight:qdata" in parts.resident_tensors) == (how != "not at all")
    assert "body.3.weight:qdata" in {name for layer in parts.layers for name in layer.tensors}


def test_weights_tied_by_their_wrapper_or_by_what_it_holds() -> None:
    model = quantised(model=nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6))))
    model[3].weight = model[0].weight
    model[4].weight = nn.Parameter(model[1].weight.detach(), requires_grad=False)
    names = [item.names for extent in collect(model).extents for item in extent.tensors]
    assert ["0.weight:qdata", "3.weight:qdata"] in names
    x = torch.linspace(-1, 1, 5 * 64).reshape(5, 64)
    expected = plain(model, x)
    plan = autosp.plan(model, x, k=2, k_prime=1, device="cpu")
    assert {"0.weight:qdata", "1.weight:qdata", "4.weight:qdata"} <= set(plan.partition.resident_tensors)
    with autosp.apply(model, plan):
        assert equal(model(x), expected)


def test_the_fingerprint_tells_quantisations_apart() -> None:
    prints = [model_fingerprint(quantised(config)) for config in ("int8 weights", "int4 weights", "float8 weights")]
    prints.append(model_fingerprint(Stack()))
    assert len(set(prints)) == 4
    assert model_fingerprint(quantised()) == prints[0]
    narrower = quantised()
    held = dict(held_by(narrower.head.weight))
    held[":scale"].data = held[":scale"].data.to(torch.float64)
    assert model_fingerprint(narrower) != prints[0]


def test_new_values_loaded_at_rest_are_used() -> None:
    model = quantised()
    torch.manual_seed(5)
    other = Stack()
    torchao.quantize_(other, CONFIGS["int8 weights"]()[0])
    plan = autosp.plan(model, tokens(3, 11), k=4, k_prime=1, residents=2, device="cpu")
    with autosp.apply(model, plan):
        model(tokens(3, 11))
        model.load_state_dict(other.state_dict())
        for _ in range(2):
            assert equal(model(tokens(3, 11)), plain(other, tokens(3, 11)))
    assert equal(plain(model, tokens(3, 11)), plain(other, tokens(3, 11)))


def test_a_copy_is_a_plain_model() -> None:
    model = quantised()
    expected = plain(model, tokens(3, 11))
    with autosp.apply(model, autosp.plan(model, tokens(3, 11), k=2, k_prime=1, device="cpu")) as streamed:
        streamed(tokens(3, 11))
        twin = copy.deepcopy(streamed)
    assert equal(plain(twin, tokens(3, 11)), expected)


def test_tune(tmp_path: Any) -> None:
    model = quantised(model=Stack(blocks=4, width=256))
    expected = plain(model, tokens(3, 11))
    plan = autosp.tune(model, tokens(3, 11), "1GB", device="cpu", max_trials=2, progress=False)
    with autosp.apply(model, plan):
        assert equal(model(tokens(3, 11)), expected)
