"""What one observed pass shows, and that it leaves no trace of its own."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from autosp.errors import MetaModelError, ModelError
from autosp.partition import partition
from autosp.partition.tensors import collect
from autosp.partition.trace import trace
from autosp.spec import Partition
from models import vectors

CPU = torch.device("cpu")


def parts_of(model: nn.Module) -> Partition:
    """Its partition, by a pass over the usual vectors."""
    return partition(model, lambda: model(vectors()), CPU)


def moving(parts: Partition) -> set[str]:
    """Names of the tensors that are in layers."""
    return {name for layer in parts.layers for name in layer.tensors}


class Half(nn.Module):
    """Reads the last elements of a weight that is half of a buffer."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight[-1].float()


def test_neighbours_in_one_buffer_are_told_apart_to_the_byte() -> None:
    flat = torch.zeros(2 * 40_001, dtype=torch.int16)
    model = nn.Sequential(Half(flat[:40_001]), Half(flat[40_001:]))
    assert {layer.name: layer.tensors for layer in parts_of(model).layers} == {"0": ("0.weight",), "1": ("1.weight",)}


class Returns(nn.Module):
    """Uses its weight, and returns it, or a part of it, inside something."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: torch.Tensor) -> Any:
        y = x @ self.weight
        return {"nothing": y, "itself": (y, self.weight), "a view": {"y": y, "rows": [self.weight[2:4]]}}[self.how]


@pytest.mark.parametrize(("how", "moves"), [("nothing", True), ("itself", False), ("a view", False)])
def test_what_a_layer_returns_its_caller_holds(how: str, moves: bool) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)), Returns(how))
    assert ("4.weight" in moving(parts_of(model))) == moves


class Stateful(nn.Module):
    """Changes everything about itself that a module can change."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.register_buffer("replaced", torch.zeros(300, 64))
        self.register_buffer("written", torch.zeros(300, 64))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        self.written += 1
        self.weight.data.mul_(2)
        self.register_buffer("new", x.clone())
        self.head = nn.Linear(64, 64)
        if x.isnan().any():
            raise ValueError("not a number")
        return x @ self.weight


@pytest.mark.parametrize("fails", [False, True])
def test_a_module_that_changes_itself_is_as_it_was(fails: bool) -> None:
    model = Stateful()
    tensors = collect(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replaced, attributes = model.replaced, set(vars(model))
    x = vectors() * (float("nan") if fails else 1)
    if fails:
        with pytest.raises(ValueError, match="not a number"):
            trace(model, tensors, lambda: model(x), CPU)
    else:
        assert {extent.name for extent in trace(model, tensors, lambda: model(x), CPU).mutated} == {
            "weight",
            "replaced",
            "written",
        }
    assert model.calls == 0
    assert model.replaced is replaced
    assert set(vars(model)) == attributes
    assert not list(model.children())
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_lazy_modules_are_named() -> None:
    with pytest.raises(MetaModelError, match=r"1\.weight has no shape yet: call the model once"):
        collect(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)))


def test_parameters_made_under_inference_mode_are_named() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"0\.weight was made under torch\.inference_mode"):
        collect(model)


class AsksWhere(nn.Module):
    """Looks rows up, and notes where its weight was."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 64))
        self.register_buffer("calls", torch.zeros(2))
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(self.weight.data_ptr())
        return x + nn.functional.embedding(torch.arange(len(x), device=self.weight.device), self.weight) * self.calls[0]


class Shares(nn.Module):
    """Multiplies with the weight of a module that it does not call, and calls another one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(64))
        self.positions = AsksWhere()
        self.other = nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.positions(self.positions(x)) @ self.other.weight + self.bias


@pytest.mark.parametrize("inference", [False, True])
def test_a_running_module_s_weights_are_lent(inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies stand in for a device's: what is seen and what comes out is the same, and all is where it was."""
    model = nn.Sequential(Shares(), nn.LayerNorm(64), Shares())
    own = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def seen() -> tuple[Any, ...]:
        outputs = []

        def run() -> None:
            with torch.inference_mode(inference):
                outputs.append(model(torch.ones(8, 64)))

        found = trace(model, collect(model), run, CPU)
        holders = {extent.name: modules for extent, modules in found.holders.items()}
        names = {extent.name for extent in found.mutated}, {extent.name: n for extent, n in found.looked_up.items()}
        return holders, names, outputs[0].tolist()

    expected = seen()
    assert expected[1][0] == {"0.positions.calls", "2.positions.calls"}
    monkeypatch.setitem(trace.__globals__, "copying_to", lambda device: torch.clone)
    assert seen() == expected
    for index in (0, 2):
        addresses = model[index].positions.seen
        assert [address == own[f"{index}.positions.weight"] for address in addresses] == [True, True, False, False]
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == own
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_raises_has_its_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(AsksWhere(), nn.Linear(63, 64))
    own = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    monkeypatch.setitem(trace.__globals__, "copying_to", lambda device: torch.clone)
    with pytest.raises(RuntimeError):
        trace(model, collect(model), lambda: model(torch.zeros(8, 64)), CPU)
    assert model[0].seen != [own["0.weight"]]
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == own


def test_what_was_observed_is_let_go_of_at_once() -> None:
    """Weights that rest elsewhere by then would stay in memory, or files mapped, until somebody collects garbage."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    tensors = collect(model)
    gc.disable()
    try:
        trace(model, tensors, lambda: model(vectors()), CPU)
        kept = [weakref.ref(extent) for extent in tensors.extents]
        del tensors
        assert not any(extent() for extent in kept)
    finally:
        gc.enable()
