"""What torch and other libraries must be told while a plan is applied on an accelerator.

[Note: who moves a model] transformers' `Trainer` and accelerate's `prepare` move a model to the accelerator before they
train it: all of it, whatever the budget. A streamed model computes there already, so such a move leaves it as it is, as
it leaves a model whose weights are there.

[Note: a scaler's figures] `torch.amp.GradScaler` sends its scale to every device that has gradients, without waiting
until it is there: to the host's by way of pinned memory, which the host then reads at once, before the copy is over.
Streamed gradients are the host's. So while a plan for training is applied, that copy is waited for.

[Note: state follows] An optimizer makes its state where the parameter is at its first step. Residents are elsewhere
before a plan is applied and after it is removed, and their state follows: at the next step, and at `remove()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.amp import grad_scaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autosp.intercept import StandIn
from autosp.partition.located import located
from autosp.spec import Mode


class Settled(StandIn):
    """In place of a module's `_apply`, by which torch moves modules: see [Note: who moves a model]."""

    method = "_apply"

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__(module)
        self._device = device

    def __call__(self, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """The change, unless all it does is to move to the device of the plan. Empty tensors show what it does."""
        if self.stands:
            kinds = {one.dtype for one in (*self._module.parameters(), *self._module.buffers())}
            with torch.no_grad():
                changed = [(kind, change(torch.empty(0, dtype=kind, device="cpu"))) for kind in kinds]
            if all(one.device == self._device and one.dtype == kind for kind, one in changed):
                return self._module
        return type(self._module)._apply(self._module, change, recurse)


@contextmanager
def surrounded(model: nn.Module, device: torch.device, mode: Mode, in_pass: Callable[[], bool]) -> Iterator[None]:
    """While it is open a model stays where it is, and `in_pass` its parameters say that this is the device.

    In training scalers wait, and state follows, at the end too.
    """
    seen: WeakSet[Optimizer] = WeakSet()

    def follow(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        seen.add(optimizer)
        bring_state(optimizer, model.parameters())

    with ExitStack() as opened:
        opened.callback(Settled(model, device).remove)
        for one in located(model, device, in_pass):
            opened.callback(one.remove)
        if mode == "training":
            opened.enter_context(_scalers_wait())
            opened.callback(register_optimizer_step_pre_hook(follow).remove)
        yield
    for optimizer in seen:
        bring_state(optimizer, model.parameters())


def bring_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """State to where its parameters are, but for what is small enough for the host to read: counts of steps."""
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.device != parameter.device:
                state[name] = value.to(parameter.device)


_waiting = 0
"""Plans for which scalers wait."""


@contextmanager
def _scalers_wait() -> Iterator[None]:
    """See [Note: a scaler's figures]."""
    global _waiting
    _waiting += 1
    if _waiting == 1:
        grad_scaler._MultiDeviceReplicator.get = _get_and_wait  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        _waiting -= 1
        if _waiting == 0:
            grad_scaler._MultiDeviceReplicator.get = _get  # type: ignore[method-assign]


_get = grad_scaler._MultiDeviceReplicator.get


def _get_and_wait(replicator: Any, device: torch.device) -> torch.Tensor:
    is_new = device not in replicator._per_device_tensors
    value = _get(replicator, device)
    if is_new and device.type == "cpu" and replicator.master.device.type != "cpu":
        torch.get_device_module(replicator.master.device).current_stream(replicator.master.device).synchronize()
    return value
