"""Tensors that come to a model while a plan is applied are found, placed once, and brought back with their values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from autosp.runtime.guests import Guests
from models import Stack


class Elsewhere:
    """Stands for a device: remembers what was placed there."""

    def __init__(self) -> None:
        self.placed: list[torch.Size] = []

    def __call__(self, data: torch.Tensor) -> torch.Tensor:
        self.placed.append(data.shape)
        return data.clone()


@pytest.fixture
def model() -> Stack:
    return Stack(blocks=2)


@pytest.fixture
def elsewhere() -> Elsewhere:
    return Elsewhere()


@pytest.fixture
def guests(model: Stack, elsewhere: Elsewhere) -> Iterator[Guests]:
    made = Guests(model, [*model.parameters(), *model.buffers()], elsewhere)
    yield made
    made.close()


def test_what_the_plan_knows_stays_where_it_is(guests: Guests, elsewhere: Elsewhere) -> None:
    guests.move_in()
    nn.Linear(3, 3)  # registers parameters, though not in this model
    guests.move_in()
    assert elsewhere.placed == []


@pytest.mark.parametrize("way", ["a submodule", "a parameter", "a buffer"])
def test_what_is_new_is_placed_once(way: str, model: Stack, guests: Guests, elsewhere: Elsewhere) -> None:
    if way == "a submodule":
        model.blocks[0].adapter = nn.Linear(4, 5)
    elif way == "a parameter":
        model.head.weight = nn.Parameter(torch.ones(5, 4))
    else:
        model.register_buffer("seen", torch.ones(5, 4))
    guests.move_in()
    guests.move_in()
    assert torch.Size((5, 4)) in elsewhere.placed
    assert len(elsewhere.placed) == (2 if way == "a submodule" else 1)


def test_a_model_that_lost_its_guests_forgets_nothing(model: Stack) -> None:
    moved: list[torch.Tensor] = []

    def place(data: torch.Tensor) -> torch.Tensor:
        moved.append(data.clone())
        return moved[-1]

    guests = Guests(model, model.parameters(), place)
    model.head.bias = nn.Parameter(torch.zeros(500))
    guests.move_in()
    assert model.head.bias.data_ptr() == moved[0].data_ptr()
    with torch.no_grad():
        model.head.bias.add_(1)
    guests.close()
    assert bool((model.head.bias == 1).all())
    model.late = nn.Linear(2, 2)
    guests.move_in()
    assert len(moved) == 1
