"""One layer's share of an optimizer's step, taken by itself: see [Note: updates under way]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autosp.runtime.disk_state import Move
from autosp.runtime.stepwise import step_unhooked


@dataclass(eq=False)
class Failure:
    """Of one step's updates: what follows the first that fails is not updated, as in a plain step."""

    error: BaseException | None = None
    told: bool = False


@dataclass(eq=False)
class LayerUpdate:
    """One layer's: the user's optimizer with stand-ins for the layer's parameters."""

    optimizer: Optimizer
    failure: Failure
    parameters: list[tuple[nn.Parameter, nn.Parameter]] = field(default_factory=list)
    """The user's, each with its stand-in."""
    job: Any = None
    entries: list[dict[str, Any]] = field(default_factory=list)
    """Of the user's state, one per parameter, as the step found them."""
    move: Move | None = None
    """Of its state, if that rests on disk."""

    def run(self, n_threads: int) -> None:
        """On the host's thread, with as many threads as the user has: what they share may depend on their number."""
        if self.failure.error is not None:
            return
        try:
            if torch.get_num_threads() != n_threads:
                torch.set_num_threads(n_threads)
            if self.move is None:
                step_unhooked(self.optimizer)
            else:
                self._run_moved(self.move)
        except BaseException as error:  # noqa: BLE001 - raised where the layer is used next
            self.failure.error = error

    def _run_moved(self, move: Move) -> None:
        move.wait_for_read()
        try:
            step_unhooked(self.optimizer)
        finally:
            move.take_up(self.parameters, self.optimizer)

    def settle(self) -> None:
        """Wait until it is over, and until its state is where it rests."""
        self.job.settle()
        if self.move is not None and self.move.written is not None:
            self.move.written.settle()

    def enter_state(self, optimizer: Optimizer) -> None:
        """Before it: every parameter has an entry in the user's optimizer, if an empty one."""
        self.entries = [optimizer.state.setdefault(parameter, {}) for parameter, _ in self.parameters]

    def share_state(self) -> None:
        """Where its state is in RAM: stand-ins have the very entries of their parameters, but for empty ones."""
        for (_, stand_in), entry in zip(self.parameters, self.entries, strict=True):
            if entry:
                self.optimizer.state[stand_in] = entry

    def give_back(self, optimizer: Optimizer) -> None:
        """Once it is over: the user's parameters are ordinary ones, and their state is in the user's optimizer.

        But for entries that the user has removed or replaced since: these stay as they are.
        """
        for parameter, _ in self.parameters:
            parameter.__class__ = nn.Parameter
        of_entries = zip(self.parameters, self.entries, strict=True)
        pairs = [pair for pair, entry in of_entries if optimizer.state.get(pair[0]) is entry]
        if self.move is not None:
            self.move.give_back(optimizer, pairs, self.optimizer)
        else:
            for parameter, stand_in in pairs:
                if stand_in in self.optimizer.state:
                    optimizer.state[parameter] = self.optimizer.state[stand_in]
        for parameter, _ in pairs:
            if not optimizer.state[parameter]:
                del optimizer.state[parameter]

    def raise_once(self) -> None:
        """Raises: what it, or one before it, raised, if nobody was told; else what writing its state raised."""
        if self.failure.error is not None and not self.failure.told:
            self.failure.told = True
            raise self.failure.error
        if self.move is not None and self.move.written is not None and self.move.written.error is not None:
            raise self.move.written.error
