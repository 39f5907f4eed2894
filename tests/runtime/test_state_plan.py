"""How large the optimizer's state will be, and which layers' rests on disk under a budget."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
import torch
from torch import nn

from autosp.errors import BudgetTooSmallError
from autosp.partition import bind
from autosp.partition.placed import tensors_of
from autosp.runtime.state_plan import SMALL_BYTES, WINDOW, LayerState, layer_states, on_disk
from autosp.spec import Candidate
from models import make
from trained import Apply, backward
from updated import OPTIMIZERS


def states_of(sizes: list[int]) -> list[LayerState]:
    return [LayerState(number, f"layer {number}", (), size, 0) for number, size in enumerate(sizes)]


def in_memory(sizes: list[int], moved: list[int]) -> int:
    """Bytes, if those are on disk."""
    window = WINDOW * max((sizes[number] for number in moved), default=0)
    return sum(sizes) - sum(sizes[number] for number in moved) + window


def chosen(sizes: list[int], room: int, fixed: int = 0) -> list[int]:
    return [state.layer for state in on_disk(states_of(sizes), fixed, fixed + room)]


def test_a_choice_is_found_wherever_there_is_one_and_keeps_the_budget() -> None:
    numbers = random.Random(0)
    refused = 0
    for _ in range(300):
        sizes = [numbers.choice([0, 4, 8, 8, 20]) for _ in range(numbers.randint(1, 7))]
        room = numbers.randint(0, sum(sizes) + 5)
        subsets = [one for count in range(len(sizes) + 1) for one in combinations(range(len(sizes)), count)]
        least = min(in_memory(sizes, list(one)) for one in subsets)
        if least > room:
            refused += 1
            with pytest.raises(BudgetTooSmallError) as caught:
                chosen(sizes, room, 100)
            assert caught.value.least_bytes == 100 + least
            assert chosen(sizes, least, 100) is not None
            continue
        moved = chosen(sizes, room)
        assert in_memory(sizes, moved) <= room
        assert moved == sorted(set(moved))
        assert all(sizes[number] for number in moved)
        assert bool(moved) == (sum(sizes) > room)
    assert 30 < refused < 270


@pytest.mark.parametrize("kept", range(17))
def test_equal_layers_no_more_than_must_spread_evenly(kept: int) -> None:
    count = 20
    moved = chosen([8] * count, 8 * (WINDOW + kept) + 7)
    assert len(moved) == count - kept
    gaps = [after - before for before, after in zip([-1, *moved], [*moved, count], strict=True)]
    assert max(gaps) <= -(-count // len(moved)) + 2


def test_a_state_that_is_far_larger_than_the_others_stays() -> None:
    assert chosen([1000, 10, 10, 10, 10, 10, 10], 1000 + 10 * WINDOW) == [1, 2, 3, 4, 5, 6]


def test_a_budget_that_is_too_small_names_the_layer() -> None:
    with pytest.raises(BudgetTooSmallError, match=r"max_cpu_gb is 2e-08 GB.* layer 1 sets") as caught:
        on_disk(states_of([8, 16, 16, 16, 16, 16, 16]), 5, 20)
    assert caught.value.layer == "layer 1"
    assert caught.value.least_bytes == 5 + 16 * WINDOW


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sizes_are_those_of_a_first_step(name: str, apply: Apply) -> None:
    """And again those of the state that is there then."""
    model, batch = make("stack")
    optimizer = OPTIMIZERS[name](model.train())
    parts = apply(model, batch, Candidate(k=3, k_prime=1))._bound.partition
    layers = bind(model, parts).layers
    order = [layer.layer.index for layer in layers]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    states = layer_states(optimizer, layers, order)
    assert bool(optimizer.state) == name.startswith("adagrad")  # whose state is made with it
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    backward(model, batch)
    optimizer.step()
    streamed = [named.tensor for layer in layers for named in tensors_of(layer.placed)]
    held = [value for one in streamed for value in optimizer.state.get(one, {}).values() if torch.is_tensor(value)]
    large = [one.nbytes for one in held if one.nbytes >= SMALL_BYTES]
    assert sorted(place.n_bytes for state in states for place in state.places) == sorted(large)
    assert sum(state.kept_bytes for state in states) == sum(one.nbytes for one in held) - sum(large)
    again = layer_states(optimizer, layers, order)
    assert [(one.n_bytes, one.kept_bytes) for one in again] == [(one.n_bytes, one.kept_bytes) for one in states]


def test_frozen_parameters_have_none(apply: Apply) -> None:
    model, batch = make("stack")
    optimizer = OPTIMIZERS["adam"](model.train())
    parts = apply(model, batch, Candidate(k=3, k_prime=1))._bound.partition
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)
    layers = bind(model, parts).layers
    states = layer_states(optimizer, layers, [layer.layer.index for layer in layers])
    assert {state.name for state in states if state.places} == {"embed", "head"}
    assert isinstance(states[0].places[0].parameter, nn.Parameter)
