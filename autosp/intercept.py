"""Puts a function around a module's `forward`, reversibly.

The wrapper stands in the module's own `__dict__`, so class, identity, `print(model)` and `inspect.signature` stay as
they were. Unlike forward hooks it also runs its `finally` on KeyboardInterrupt, and sees `module.forward(...)`.
A copy or a pickle of the module gets its plain `forward` back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Intercepted:
    """A module whose `forward(*args, **kwargs)` became `around(forward, args, kwargs)`, until `remove()`."""

    def __init__(self, module: nn.Module, around: Around) -> None:
        self._module = module
        self._own = module.__dict__.get("forward")  # another tool's wrapper, say
        self._forward = module.forward
        self._around = around
        self._removed = False
        self.__wrapped__ = self._forward
        module.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._removed:  # somebody's wrapper, put around this one, still calls it
            return self._forward(*args, **kwargs)
        return self._around(self._forward, args, kwargs)

    def remove(self) -> None:
        """Give the module its own `forward` back; where another wrapper is around this one, do nothing from now on."""
        self._removed = True
        if self._module.__dict__.get("forward") is not self:
            return
        own = self._own
        while isinstance(own, Intercepted) and own._removed:
            own = own._own
        if own is None:
            del self._module.__dict__["forward"]
        else:
            self._module.__dict__["forward"] = own

    def __reduce__(self) -> tuple[Any, ...]:
        if self._own is not None:
            return _same, (self._own,)
        # A module under construction has its class's forward only: that is the one the copy gets.
        return getattr, (self._module, "forward")


def is_intercepted(model: nn.Module) -> bool:
    """Whether any module of the model has its forward wrapped right now."""
    return any(isinstance(module.__dict__.get("forward"), Intercepted) for module in model.modules())


def _same(value: Any) -> Any:
    return value
