"""What is done to a streamed model between passes: the next pass uses it, and `remove()` keeps it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import call, equal
from autosp.errors import ModelChangedError
from models import EarlyExit, Stack, make, vectors

Stream = Callable[..., autosp.StreamedModel[nn.Module]]


def plain(model: nn.Module, batch: Any) -> Any:
    """The output without a plan."""
    with torch.no_grad():
        return call(model, batch)


def test_new_weights_at_rest_are_used(stream: Stream) -> None:
    model, batch = make("stack")
    other, _ = Stack(), None
    stream(model, batch)
    for state in (other.state_dict(), {name: tensor * 2 for name, tensor in other.state_dict().items()}):
        model(batch)
        model.load_state_dict(state)
        other.load_state_dict(state)
        for _ in range(2):
            assert equal(model(batch), plain(other, batch))


@pytest.mark.parametrize(
    "write", [lambda tensor: tensor.data.mul_(2), lambda tensor: tensor.detach().numpy().fill(0.01)]
)
def test_writes_that_no_version_counter_sees(write: Callable[[torch.Tensor], Any], stream: Stream) -> None:
    model, batch = make("stack")
    twin = copy.deepcopy(model)
    stream(model, batch)
    for _ in range(2):
        model(batch)
        for changed in (model, twin):
            for parameter in changed.parameters():
                write(parameter)
        for _ in range(2):
            assert equal(model(batch), plain(twin, batch))


def test_train_and_eval(stream: Stream) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.BatchNorm1d(64)) for _ in range(5)))
    model.eval()
    twin = copy.deepcopy(model)
    stream(model, vectors())
    for training in (False, True, False, True, True, False):
        assert model.train(training) is model
        twin.train(training)
        torch.manual_seed(1)
        output = model(vectors())
        torch.manual_seed(1)
        assert equal(output, plain(twin, vectors()))
        assert equal(dict(model.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize(
    "replace",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: setattr(model.blocks[3].up.weight, "data", torch.zeros(256, 64)),
    ],
    ids=["to(bfloat16)", "half()", "weight.data ="],
)
def test_replaced_weights_are_refused_and_remove_keeps_them(replace: Callable[..., Any], stream: Stream) -> None:
    model, batch = make("stack")
    twin = copy.deepcopy(model)
    streamed = stream(model, batch)
    model(batch)
    replace(model)
    replace(twin)
    for _ in range(2):
        with pytest.raises(ModelChangedError, match=r"remove\(\)"):
            model(batch)
    streamed.remove()
    assert equal(dict(model.state_dict()), dict(twin.state_dict()))
    assert equal(plain(model, batch), plain(twin, batch))


def test_a_refused_layer_is_left_at_rest(stream: Stream) -> None:
    model, batch = make("stack")
    weight = model.blocks[3].up.weight.detach().clone()
    streamed = stream(model, batch)
    model.blocks[3].up.bias.data = torch.zeros(256)
    with pytest.raises(ModelChangedError, match=r"blocks\.3\.up\.bias was replaced"):
        model(batch)
    for block in model.blocks[4:]:
        block(vectors())
    assert equal(model.blocks[3].up.weight.detach(), weight)
    streamed.remove()
    assert equal(model.blocks[3].up.weight.detach(), weight)


@pytest.mark.parametrize("how", ["assign", "new parameter", "new module"])
def test_a_replaced_object_is_what_the_next_pass_uses(how: str, stream: Stream) -> None:
    model, batch = make("stack")
    twin = copy.deepcopy(model)
    streamed = stream(model, batch)
    model(batch)
    torch.manual_seed(1)
    new = Stack()
    for changed in (model, twin):
        if how == "assign":
            changed.load_state_dict(copy.deepcopy(new.state_dict()), assign=True)
        elif how == "new parameter":
            changed.blocks[3].up.weight = nn.Parameter(new.blocks[3].up.weight.detach().clone())
        else:
            changed.blocks[3] = copy.deepcopy(new.blocks[3])
    for _ in range(2):
        assert equal(model(batch), plain(twin, batch))
    streamed.remove()
    assert equal(dict(model.state_dict()), dict(twin.state_dict()))
    assert equal(plain(model, batch), plain(twin, batch))


def test_a_copy_can_be_streamed_too(stream: Stream) -> None:
    model = EarlyExit()
    expected = plain(model, vectors())
    stream(model, (vectors(),))
    twin = copy.deepcopy(model)
    stream(twin, (vectors(),))
    for _ in range(2):
        assert equal(model(vectors()), expected)
        assert equal(twin(vectors()), expected)
