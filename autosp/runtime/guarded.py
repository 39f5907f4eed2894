"""Parameters that wait before they are used: whose data something else is writing to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._C import DisableTorchFunctionSubclass


def guarded(settle: Callable[[], None]) -> type[nn.Parameter]:
    """A class that a parameter can be given: torch calls `settle` before anything is done with it, or read of it.

    `settle` gives it its own class back, unless what follows is known to be safe. Setting `grad` to None always is, for
    who reads the gradient holds it, and so is finding that it is None. Looking a parameter up in a dict, such as an
    optimizer's state, counts as a use.
    """

    class Parameter(nn.Parameter):
        @classmethod
        def __torch_function__(
            cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            with DisableTorchFunctionSubclass():
                safe = (func == _set_grad and args[1] is None) or (func == _get_grad and func(*args) is None)
            if not safe:
                settle()
            with DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

        def __hash__(self) -> int:
            settle()
            return id(self)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            settle()
            return copy.deepcopy(self, memo)

        def __reduce_ex__(self, protocol: Any) -> Any:
            settle()
            return self.__reduce_ex__(protocol)

    return Parameter


_set_grad, _get_grad = (getattr(vars(torch._C.TensorBase)["grad"], name) for name in ("__set__", "__get__"))
