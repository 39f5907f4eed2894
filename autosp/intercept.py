"""Puts a function around a module's `forward`, reversibly.

The wrapper stands in the module's own `__dict__`, so class, identity, `print(model)` and `inspect.signature` stay as
they were. Unlike forward hooks it also runs its `finally` on KeyboardInterrupt, and sees `module.forward(...)`.
A copy or a pickle of the module gets its plain `forward` back.

[Note: compiled models] torch.compile must not look into `around`: it would compile the runtime's own bookkeeping, and
again for every value of a counter. So a wrapper is a graph break: `around` runs uncompiled, and inside it the module's
forward is compiled as it would have been, in one graph if nothing below it is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any, ClassVar

from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame

from autosp.errors import SettingError

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Intercepted:
    """A module whose `forward(*args, **kwargs)` became `around(forward, args, kwargs)`, until `remove()`."""

    def __init__(self, module: nn.Module, around: Around) -> None:
        hide_from_compiler()
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
        compiler = set_eval_frame(None)
        try:
            forward = self._forward if compiler is None else _under(compiler, self._forward)
            return self._around(forward, args, kwargs)
        finally:
            set_eval_frame(compiler)

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


class StandIn:
    """In place of a method of a module's class, until `remove()`. A copy of the module gets its class's."""

    method: ClassVar[str]

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        vars(module)[self.method] = self

    @property
    def stands(self) -> bool:
        """Whether nobody put anything else there."""
        return vars(self._module).get(self.method) is self

    def remove(self) -> None:
        """The module's own again."""
        if self.stands:
            del vars(self._module)[self.method]

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, self.method)


class Uncompiled:
    """A function that compiled code may call, as it calls the hooks of what it saves: the compiler looks at none of it.

    For modules, see [Note: compiled models].
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        hide_from_compiler()
        self._function = function

    def __call__(self, *args: Any) -> Any:
        compiler = set_eval_frame(None)
        try:
            return self._function(*args)
        finally:
            set_eval_frame(compiler)


def to_its_end(undo: Callable[[], None]) -> None:
    """Call what may be called twice: where Ctrl-C comes in the middle, once more before that goes on."""
    try:
        undo()
    except KeyboardInterrupt:
        undo()
        raise


def call_all(undo: Sequence[Callable[[], None]]) -> None:
    """Call them from the last to the first, whatever one raises; where Ctrl-C came in the middle, call it again."""
    with ExitStack() as undoing:
        for one in undo:
            undoing.callback(one)


def check_plain(model: nn.Module) -> None:
    """Raises: SettingError if it is no module, or if a plan is applied to it."""
    if not isinstance(model, nn.Module):
        raise SettingError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if is_intercepted(model):
        raise SettingError(f"a plan is applied to this {type(model).__name__} already: remove() it first")


def is_intercepted(model: nn.Module) -> bool:
    """Whether any module of the model has its forward wrapped right now."""
    return any(isinstance(module.__dict__.get("forward"), Intercepted) for module in model.modules())


@cache
def hide_from_compiler() -> None:
    """No frame of `Intercepted.__call__` or `Uncompiled.__call__` is compiled, and none is inlined.

    Those that they call may be: what `torch.compiler.disable(recursive=False)` promises; it compiles the disabled
    function when called by itself. The first call takes a second and 70 MB, for the compiler is imported; whoever
    measures memory calls it before.
    """
    from torch._dynamo.decorators import skip

    skip(Intercepted.__call__)
    skip(Uncompiled.__call__)
    Intercepted.__call__._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
        "autosp loads this module's weights when it is called, and no graph can reach across that: compile the blocks "
        "inside it, or leave fullgraph off"
    )


def _under(compiler: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, its frames seen by `compiler` again."""

    def compiled(*args: Any, **kwargs: Any) -> Any:
        set_eval_frame(compiler)
        try:
            return forward(*args, **kwargs)
        finally:
            set_eval_frame(None)

    return compiled


def _same(value: Any) -> Any:
    return value
