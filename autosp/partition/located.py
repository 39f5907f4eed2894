"""Where a model says that it is, while a pass runs on an accelerator.

[Note: where a model is] Models make tensors where their first parameter is: `next(self.parameters()).device`, which is
`self.device` in transformers. Under a plan that parameter may be on the host, waiting for its turn, while the pass
computes on the accelerator. So within a pass the parameters of a module begin with one that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from autosp.intercept import StandIn


class Located(StandIn):
    """In place of a module's `parameters`: see [Note: where a model is]."""

    method = "parameters"

    def __init__(self, module: nn.Module, device: torch.device, in_pass: Callable[[], bool]) -> None:
        """`in_pass`: whether the calling thread is inside one."""
        super().__init__(module)
        self._device = device
        self._in_pass = in_pass

    def __call__(self, recurse: bool = True) -> Iterator[torch.Tensor]:
        """The module's. Within a pass one on the device comes first, or where none is, an empty tensor there."""
        parameters = type(self._module).parameters(self._module, recurse)
        if not (self.stands and self._in_pass()):
            yield from parameters
            return
        waiting: list[nn.Parameter] = []
        for parameter in parameters:
            if parameter.device == self._device:
                yield parameter
                break
            waiting.append(parameter)
        else:
            if waiting:
                yield torch.empty(0, dtype=waiting[0].dtype, device=self._device)
        yield from waiting
        yield from parameters


def located(model: nn.Module, device: torch.device, in_pass: Callable[[], bool]) -> list[Located]:
    """Every module that others are part of. A weight that a module has itself is on the device while that runs."""
    parents = [module for module in model.modules() if next(module.children(), None) is not None]
    return [Located(module, device, in_pass) for module in parents]
