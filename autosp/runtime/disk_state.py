"""The optimizer's state on disk: read ahead of a layer's update, written back after it, at rest a view of the file.

[Note: state on disk] An entry of the state that rests on disk is an ordinary tensor in a shared map of the file, so
`state_dict()`, `load_state_dict()` and whoever else looks at it need not know. The update gets stand-ins in a slot of
memory, which are the entries' bytes: a thread reads them from the file past the map, another writes them back, and the
update of one layer runs while others are read and written. What appears in the state, or was put there by the user,
moves to the file after the update, and frees the memory that it was in. The file has no name: it goes with the last
tensor in it, after `remove()`, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.optim import Optimizer

from autosp.devices.memory import anonymous, lying_as, memory_of
from autosp.devices.worker import CopyEvent, Settling, Worker
from autosp.partition import BoundLayer
from autosp.runtime.state_plan import SLOTS, LayerState, StatePlace, bytes_of, can_rest, layer_states, on_disk
from autosp.tiers.host import check_free
from autosp.tiers.state_file import StateFile

Pairs = Sequence[tuple[nn.Parameter, nn.Parameter]]
"""Parameters of the user's, each with its stand-in."""


class _Slot:
    """Memory for one layer's state at a time."""

    def __init__(self, n_bytes: int) -> None:
        self.memory = anonymous(n_bytes)
        self.memory.zero_()  # its pages are taken before anything is measured
        self.written: CopyEvent | None = None
        """When what was in it last is in the file again."""


@dataclass(eq=False)
class StateBytes:
    """That were asked for so far."""

    read: int = 0
    written: int = 0


class Move:
    """The state of one layer, from the file to a slot, and back when it has been updated."""

    def __init__(self, state: LayerState, begin: int, file: StateFile, slot: _Slot) -> None:
        """`begin`: of the layer's run in the file."""
        self.state = state
        self.slot = slot
        self._begin = begin
        self._file = file
        self._resting: list[tuple[torch.Tensor, StatePlace]] = []
        """Entries of the user's that are in the file."""
        self._changed = False
        self.read_job: CopyEvent | None = None
        self.written: CopyEvent | None = None

    # -- on the user's thread -------------------------------------------------------------------------------------

    def lend(self, optimizer: Optimizer, pairs: Pairs, one: Optimizer) -> bool:
        """Give stand-ins, in `one`, the entries of their parameters. Whether the slot needs what is in the file."""
        for parameter, stand_in in pairs:
            if optimizer.state[parameter]:
                one.state[stand_in] = dict(optimizer.state[parameter])
        stand_ins = _by_parameter(pairs)
        for value, place in self._found(optimizer):
            if self._is_at(value, place):
                self._resting.append((value, place))
                if id(place.parameter) in stand_ins:
                    one.state[stand_ins[id(place.parameter)]][place.key] = self._in_slot(value, place)
        return bool(self._resting)

    def give_back(self, optimizer: Optimizer, pairs: Pairs, one: Optimizer) -> None:
        """Once it is written: the user's state gets what the update made or replaced."""
        for parameter, stand_in in pairs:
            entries = one.state.get(stand_in, {})
            made = {key: value for key, value in entries.items() if not self._is_in_slot(value)}
            if made:
                optimizer.state[parameter].update(made)

    def settle(self, optimizer: Optimizer) -> None:
        """All at once, without an update: what is not in the file yet moves there. Raises: TierError."""
        found = list(self._found(optimizer))
        self._resting = [(value, place) for value, place in found if self._is_at(value, place)]
        if len(self._resting) == len(found):
            return
        if self._resting:
            self.read()
        self._changed = True
        self.take_up([(place.parameter, place.parameter) for place in self.state.places], optimizer)
        self.write()

    # -- on the thread of updates ---------------------------------------------------------------------------------

    def wait_for_read(self) -> None:
        """Before the update. Raises: ReadError."""
        if self.read_job is not None:
            self.read_job.wait()
        self._changed = True

    def take_up(self, pairs: Pairs, one: Optimizer) -> None:
        """After it: what is in other memory moves to the slot, and becomes a view of the file."""
        stand_ins = _by_parameter(pairs)
        for place in self.state.places:
            stand_in = stand_ins.get(id(place.parameter))
            value = None if stand_in is None else one.state.get(stand_in, {}).get(place.key)
            if self._is_in_slot(value) or not _fits(value, place) or self._is_at(value, place):
                continue
            self._in_slot(value, place).copy_(value)
            value.data = lying_as(value, self._file.view(self._begin + place.offset, place.n_bytes))
            self._resting.append((value, place))

    # -- on threads of their own ----------------------------------------------------------------------------------

    def read(self) -> None:
        """Raises: ReadError."""
        self._file.read(memory_of(self.slot.memory[: self.state.n_bytes]), self._begin, self.state.name)

    def write(self) -> None:
        """Nothing, if the update did not run. Raises: TierError; the state is in RAM then."""
        if not self._changed:
            return
        try:
            self._file.write(memory_of(self.slot.memory[: self.state.n_bytes]), self._begin)
        except BaseException:
            for value, place in self._resting:
                value.data = self._in_slot(value, place).clone()
            raise

    def _found(self, optimizer: Optimizer) -> list[tuple[torch.Tensor, StatePlace]]:
        """Entries that can be in the file."""
        entries = (
            (optimizer.state.get(place.parameter, {}).get(place.key), place)  # a state may have other keys now
            for place in self.state.places
        )
        return [(value, place) for value, place in entries if _fits(value, place)]

    def _in_slot(self, value: torch.Tensor, place: StatePlace) -> torch.Tensor:
        return lying_as(value, self.slot.memory, place.offset)

    def _is_at(self, value: torch.Tensor, place: StatePlace) -> bool:
        return self._file.offset_of(value) == self._begin + place.offset

    def _is_in_slot(self, value: Any) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and value.layout is torch.strided
            and value.untyped_storage().data_ptr() == self.slot.memory.untyped_storage().data_ptr()
        )


class DiskState:
    """The states of some layers of one model, in one file."""

    def __init__(self, states: Sequence[LayerState], file: StateFile) -> None:
        """`file` has the bytes of all of them; it is closed with this. Raises: HostMemoryError."""
        self._file = file
        self._states = {state.layer: state for state in states}
        self._begins = dict(zip(self._states, accumulate((one.n_bytes for one in states), initial=0), strict=False))
        slot_bytes = max(state.n_bytes for state in states)
        check_free(SLOTS * slot_bytes, "updating what of the optimizer's state is on disk", "close other programs")
        self._slots = deque(_Slot(slot_bytes) for _ in range(SLOTS))
        self._reader = Worker("autosp-state-reader")
        self._writer = Worker("autosp-state-writer")
        self.moved_bytes = StateBytes()

    @property
    def layers(self) -> frozenset[int]:
        """Whose state is on disk."""
        return frozenset(self._states)

    def begin(self, layer: int, optimizer: Optimizer, pairs: Pairs, one: Optimizer) -> Move | None:
        """A layer's update is the next to be asked for: its state is read, once a slot is free, and `one` has it.

        None, and `one` has nothing, if it is not on disk.
        """
        state = self._states.get(layer)
        if state is None:
            return None
        slot = self._slots[0]
        self._slots.rotate(-1)
        move = Move(state, self._begins[layer], self._file, slot)
        reads = move.lend(optimizer, pairs, one)
        free = () if slot.written is None else (slot.written,)
        move.read_job = self._reader.start(move.read if reads else _nothing, free)
        self.moved_bytes.read += state.n_bytes if reads else 0
        return move

    def end(self, move: Move, updated: Settling) -> None:
        """Have it written after that job, its update."""
        assert move.read_job is not None
        move.slot.written = move.written = self._writer.start(move.write, (move.read_job, updated))
        self.moved_bytes.written += move.state.n_bytes

    def rest(self, optimizer: Optimizer) -> None:
        """All of it that there is moves to the file, and out of RAM. No update may be under way.

        Raises: TierError; what could not be written is in RAM.
        """
        for layer, state in self._states.items():
            Move(state, self._begins[layer], self._file, self._slots[0]).settle(optimizer)
        self._file.drop()

    def close(self) -> None:
        """No update may be under way. What is in the file stays there, as long as anybody has it."""
        self._reader.close()
        self._writer.close()
        self._slots.clear()
        self._file.close()


def open_disk_state(
    optimizer: Optimizer,
    layers: Sequence[BoundLayer],
    order: Sequence[int],
    fixed_bytes: int,
    budget_bytes: int,
    cache_dir: Path,
) -> DiskState | None:
    """Room on disk for what of these layers' state the budget has no room for beside `fixed_bytes`; None: for nothing.

    Raises: BudgetTooSmallError, DiskFullError, TierError, HostMemoryError.
    """
    states = on_disk(layer_states(optimizer, layers, order), fixed_bytes, budget_bytes)
    if not states:
        return None
    file = StateFile(sum(state.n_bytes for state in states), cache_dir)
    try:
        return DiskState(states, file)
    except BaseException:
        file.close()
        raise


def _fits(value: Any, place: StatePlace) -> TypeGuard[torch.Tensor]:
    return can_rest(value, place.parameter) and bytes_of(value) == place.n_bytes


def _by_parameter(pairs: Pairs) -> dict[int, nn.Parameter]:
    """Stand-ins by their parameters, which hash as they please meanwhile."""
    return {id(parameter): stand_in for parameter, stand_in in pairs}


def _nothing() -> None:
    """The slot is free: that is all that is waited for."""
