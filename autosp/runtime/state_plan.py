"""How large the optimizer's state is, layer by layer, and the state of which layers rests on disk.

[Note: window] Of the layers on disk no more state is in memory than `SLOTS` of the largest: while the update of one
runs, the one before it is written back, and then the one after it read ahead. A third slot would let a layer be read
while another is written, which a disk seldom does faster than one after the other. State that appears, in a layer's
first update, is beside its slot until it was copied there: so a window is of one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.optim import Optimizer, SparseAdam

from autosp.errors import BudgetTooSmallError
from autosp.partition import BoundLayer
from autosp.partition.placed import tensors_of
from autosp.partition.tensors import EXTENT_ALIGNMENT, LAYER_ALIGNMENT, align
from autosp.runtime.stepwise import alone, options_of, step_unhooked

SLOTS = 2
WINDOW = SLOTS + 1
"""In sizes of the largest layer's state."""

SMALL_BYTES = LAYER_ALIGNMENT
"""State tensors below this, such as the number of the step, stay in RAM."""


@dataclass(frozen=True, eq=False)
class StatePlace:
    """Where one state tensor rests in its layer's run of the file."""

    parameter: nn.Parameter
    key: str
    offset: int
    n_bytes: int


@dataclass(frozen=True, eq=False)
class LayerState:
    """The state of a layer that is updated by itself, as far as it can rest on disk."""

    layer: int
    name: str
    places: tuple[StatePlace, ...]
    n_bytes: int
    """A multiple of LAYER_ALIGNMENT."""
    kept_bytes: int
    """Of state that stays in RAM in any case."""


def can_rest(value: Any, parameter: nn.Parameter) -> TypeGuard[torch.Tensor]:
    """Whether an entry of the state is a tensor of host memory without gaps."""
    return (
        type(value) is torch.Tensor
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.requires_grad
        and (value.is_contiguous() or (value.shape == parameter.shape and value.stride() == parameter.stride()))
    )


def bytes_of(value: torch.Tensor) -> int:
    """Of a tensor without gaps."""
    return value.numel() * value.element_size()


def layer_states(optimizer: Optimizer, layers: Sequence[BoundLayer], order: Sequence[int]) -> list[LayerState]:
    """Of streamed layers, in the order of their updates.

    What a parameter's state will be is seen of a step over zeros in its shape, whose state is in memory meanwhile.
    """
    by_index = {one.layer.index: one for one in layers}
    states = _States(optimizer)
    return [_layer_state(by_index[index], states) for index in order]


def _layer_state(bound: BoundLayer, states: _States) -> LayerState:
    places: list[StatePlace] = []
    end = kept = 0
    for one in tensors_of(bound.placed):
        parameter = one.tensor
        if type(parameter) is not nn.Parameter or not parameter.requires_grad:
            continue
        for key, n_bytes in states.of(parameter).items():
            if n_bytes < SMALL_BYTES:
                kept += n_bytes
                continue
            places.append(StatePlace(parameter, key, end, n_bytes))
            end += align(n_bytes, EXTENT_ALIGNMENT)
    return LayerState(bound.layer.index, bound.layer.name, tuple(places), align(end, LAYER_ALIGNMENT), kept)


class _States:
    """Sizes of parameters' states under one optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}
        self._alike: dict[Any, dict[str, int]] = {}

    def of(self, parameter: nn.Parameter) -> dict[str, int]:
        """Bytes by key, the first time it is asked for: of the state that is there, else of what a first step makes."""
        group = self._groups.pop(id(parameter), None)
        if group is None:
            return {}
        if self._optimizer.state.get(parameter):
            return _sizes(self._optimizer.state[parameter], parameter)
        alike = (id(group), parameter.shape, parameter.stride(), parameter.dtype)
        if alike not in self._alike:
            self._alike[alike] = _sizes_after_a_step(self._optimizer, group, parameter)
        return self._alike[alike]


def _sizes_after_a_step(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> dict[str, int]:
    one = alone(optimizer)
    stand_in = nn.Parameter(torch.zeros_like(parameter, device="cpu"))
    stand_in.grad = torch.zeros_like(stand_in)
    if isinstance(optimizer, SparseAdam):
        stand_in.grad = stand_in.grad.to_sparse()
    one.param_groups.append({**options_of(group), "params": [stand_in]})
    step_unhooked(one)
    return _sizes(one.state[stand_in], stand_in)


def _sizes(state: dict[str, Any], parameter: nn.Parameter) -> dict[str, int]:
    return {key: bytes_of(value) for key, value in state.items() if can_rest(value, parameter)}


def on_disk(states: Sequence[LayerState], fixed_bytes: int, budget_bytes: int) -> list[LayerState]:
    """Those that rest on disk so that the rest, with `fixed_bytes` and the window, is within the budget.

    As few bytes as can be, evenly spread, so that every read and write has updates to hide behind. Whatever is larger
    than a slot stays in RAM.

    Raises: BudgetTooSmallError naming the least that works, and the largest state on disk then.
    """
    fixed_bytes += sum(state.kept_bytes for state in states)
    sizes = [state.n_bytes for state in states]
    room_bytes = budget_bytes - fixed_bytes
    choices = [(0, sum(sizes)), *((slot, _least_bytes(sizes, slot)) for slot in sorted(set(sizes) - {0}))]
    fitting = [_moved(sizes, slot, room_bytes) for slot, least_bytes in choices if least_bytes <= room_bytes]
    if not fitting:
        slot, least_bytes = min(choices, key=lambda choice: choice[1])
        name = next((state.name for state in states if slot and state.n_bytes == slot), "(weights and gradients)")
        raise BudgetTooSmallError(
            f"max_cpu_gb is {budget_bytes / 1e9:.4g} GB: streamed weights, their gradients and what of the optimizer's "
            f"state stays in memory take {(fixed_bytes + least_bytes) / 1e9:.4g} GB at least, of which {name} sets "
            f"{least_bytes / 1e9:.4g} GB; give that much, or keep more layers on the device",
            budget_bytes=budget_bytes,
            least_bytes=fixed_bytes + least_bytes,
            layer=name,
        )
    moved = min(fitting, key=lambda chosen: sum(sizes[number] for number in chosen))
    return [states[number] for number in sorted(moved)]


def _least_bytes(sizes: Sequence[int], slot: int) -> int:
    """In memory, if all states up to a slot's size are on disk."""
    return WINDOW * slot + sum(size for size in sizes if size > slot)


def _moved(sizes: Sequence[int], slot: int, room_bytes: int) -> set[int]:
    """Numbers of those on disk, where `slot` is the largest that can be: as few bytes as the room allows."""
    moved = {number for number, size in enumerate(sizes) if 0 < size <= slot}
    room_bytes -= _least_bytes(sizes, slot)
    share = room_bytes / max(1, sum(sizes[number] for number in moved))
    kept_bytes, wanted_bytes = 0, 0.0
    for number in sorted(moved):
        wanted_bytes += share * sizes[number]
        if kept_bytes + sizes[number] <= wanted_bytes:
            moved.discard(number)
            kept_bytes += sizes[number]
    for number in sorted(moved):  # what rounding left
        if kept_bytes + sizes[number] <= room_bytes:
            moved.discard(number)
            kept_bytes += sizes[number]
    return moved
