"""Tensors that the model got while a plan was applied: adapters, replaced parameters, new buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registration

from autosp.partition.tensors import held_by


class Guests:
    """Brings new tensors to where compute happens, before the first pass that may use them, and back at the end.

    They stay there between passes: the plan knows nothing of them, so they come on top of its memory.
    """

    def __init__(self, model: nn.Module, known: Iterable[torch.Tensor], place: Callable[[torch.Tensor], torch.Tensor]):
        """`place` gives a tensor's data where compute happens. `known` tensors are the plan's."""
        self._model = model
        self._known = {id(tensor): tensor for tensor in known}
        self._place = place
        self._moved: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._changed = False
        self._hooks = [
            registration.register_module_parameter_registration_hook(self._note),
            registration.register_module_buffer_registration_hook(self._note),
            registration.register_module_module_registration_hook(self._note),
        ]

    def move_in(self) -> None:
        """Find and place what is new. Costs nothing unless something was registered in some module since."""
        if not self._changed:
            return
        self._changed = False
        with torch.inference_mode(False):  # whatever the pass runs in, tensors stay ordinary ones
            for outer in (*self._model.parameters(), *self._model.buffers()):
                for _, tensor in held_by(outer):
                    if id(tensor) not in self._known:
                        self._known[id(tensor)] = tensor
                        data = tensor.data
                        tensor.data = self._place(data)
                        self._moved.append((tensor, data))

    def close(self) -> None:
        """Bring them back, with the values they have now, and watch no longer."""
        for hook in self._hooks:
            hook.remove()
        for tensor, data in self._moved:
            data.copy_(tensor.data)
            tensor.data = data
        self._moved = []
        self._known = {}

    def _note(self, *of_no_interest: Any) -> None:
        """Called for every registration in the process: any of them may be the model's, found out when it matters."""
        self._changed = True
