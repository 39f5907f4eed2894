"""A function around a module's forward."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from autosp.intercept import Intercepted, is_intercepted


class Scale(nn.Module):
    """Times its weight."""

    def __init__(self, weight: float = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: torch.Tensor, *, times: int = 1) -> torch.Tensor:
        return x * self.weight * times


class Nested(nn.Module):
    """Two of them, one inside the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Scale(3.0)
        self.outer = Scale(5.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x))


def passing(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Does nothing of its own."""
    return forward(*args, **kwargs)


def adding(number: float) -> Callable[..., Any]:
    """Adds to the output."""
    return lambda forward, args, kwargs: forward(*args, **kwargs) + number


ONE = torch.tensor(1.0)


def value(module: nn.Module, x: torch.Tensor = ONE, **kwargs: Any) -> float:
    """The output's only number."""
    return float(module(x, **kwargs).detach())


def is_plain(module: nn.Module) -> bool:
    """Whether nothing of this library is in the way."""
    return not isinstance(module.__dict__.get("forward"), Intercepted)


def test_calls_through() -> None:
    module, calls = Scale(), []

    def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls.append((args, kwargs))
        return forward(*args, **kwargs)

    Intercepted(module, around)
    assert value(module, times=3) == 6
    assert calls == [((ONE,), {"times": 3})]


def test_around_decides() -> None:
    module = Scale()
    Intercepted(module, lambda forward, args, kwargs: forward(args[0] + 1, times=10))
    assert value(module) == 40


def test_sees_forward_called_by_its_name() -> None:
    module = Scale()
    Intercepted(module, adding(100))
    assert float(module.forward(ONE).detach()) == 102


def test_runs_inside_the_modules_hooks() -> None:
    module, order = Scale(), []
    module.register_forward_pre_hook(lambda *_: order.append("before"))
    module.register_forward_hook(lambda *_: order.append("after"))
    Intercepted(module, lambda forward, args, kwargs: (order.append("around"), forward(*args, **kwargs))[1])
    value(module)
    assert order == ["before", "around", "after"]


def test_only_that_module() -> None:
    one, other = Scale(), Scale()
    Intercepted(one, adding(100))
    assert (value(one), value(other)) == (102, 2)


def test_remove() -> None:
    module = Scale()
    intercepted = Intercepted(module, adding(100))
    intercepted.remove()
    assert value(module) == 2
    assert "forward" not in module.__dict__
    intercepted.remove()
    assert value(module) == 2


def test_nesting() -> None:
    module = Scale()
    inner = Intercepted(module, adding(1))
    outer = Intercepted(module, lambda forward, args, kwargs: forward(*args, **kwargs) * 10)
    assert value(module) == 30
    outer.remove()
    assert value(module) == 3
    inner.remove()
    assert value(module) == 2
    assert "forward" not in module.__dict__


def test_nesting_removed_from_the_inside() -> None:
    module = Scale()
    inner = Intercepted(module, adding(1))
    outer = Intercepted(module, adding(10))
    inner.remove()
    outer.remove()
    assert value(module) == 2


def test_another_tools_wrapper_is_called_and_restored() -> None:
    module = Scale()
    own = module.forward
    module.forward = lambda x, **kwargs: own(x, **kwargs) + 1  # type: ignore[method-assign]
    theirs = module.forward
    intercepted = Intercepted(module, adding(10))
    assert value(module) == 13
    intercepted.remove()
    assert module.forward is theirs
    assert value(module) == 3


def test_a_wrapper_put_on_top_is_left_alone() -> None:
    module = Scale()
    intercepted = Intercepted(module, adding(10))
    below = module.forward
    module.forward = lambda x: below(x) * 2  # type: ignore[method-assign]
    theirs = module.forward
    intercepted.remove()
    assert module.forward is theirs


def test_is_intercepted() -> None:
    model = Nested()
    assert not is_intercepted(model)
    intercepted = Intercepted(model.inner, passing)
    assert is_intercepted(model)
    assert not is_intercepted(model.outer)
    assert not is_intercepted(copy.deepcopy(model))
    intercepted.remove()
    assert not is_intercepted(model)


def test_class_identity_and_print_stay() -> None:
    module = Scale()
    printed, keys = repr(module), list(module.state_dict())
    Intercepted(module, passing)
    assert type(module) is Scale
    assert (repr(module), list(module.state_dict())) == (printed, keys)
    assert list(module.modules()) == [module]


def test_signature_stays() -> None:
    module = Scale()
    plain = inspect.signature(module.forward)
    Intercepted(module, passing)
    Intercepted(module, passing)
    assert inspect.signature(module.forward) == plain
    assert list(plain.parameters) == ["x", "times"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_whatever_is_raised_passes_finally(error: type[BaseException]) -> None:
    order: list[str] = []

    class Raising(Scale):
        def forward(self, x: torch.Tensor, *, times: int = 1) -> torch.Tensor:
            raise error

    def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return forward(*args, **kwargs)
        finally:
            order.append("finally")

    module = Raising()
    Intercepted(module, around)
    with pytest.raises(error):
        module(ONE)
    assert order == ["finally"]


def through_torch_save(module: nn.Module) -> nn.Module:
    """Saved whole, and loaded."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


@pytest.fixture(
    params=[copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def copied(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    """A way to copy a module."""
    way: Callable[[nn.Module], nn.Module] = request.param
    return way


@pytest.mark.parametrize("depth", [1, 2])
def test_a_copy_is_a_plain_module(copied: Callable[[nn.Module], nn.Module], depth: int) -> None:
    module = Scale()
    for _ in range(depth):
        Intercepted(module, adding(100))
    twin = copied(module)
    assert type(twin) is Scale
    assert is_plain(twin)
    assert value(twin, times=2) == 4
    with torch.no_grad():
        module.weight.fill_(50.0)
        twin.weight.fill_(7.0)
    assert value(twin) == 7  # bound to itself
    assert value(module) == 50 + 100 * depth  # still intercepted


def test_a_copy_of_a_tree_is_plain(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = Nested()
    for module in model.modules():
        Intercepted(module, adding(1))
    assert value(model) == (3 + 1) * 5 + 1 + 1
    twin = copied(model)
    assert isinstance(twin, Nested)
    assert all(is_plain(module) for module in twin.modules())
    assert value(twin) == 15
    with torch.no_grad():
        twin.inner.weight.fill_(0.0)
    assert value(twin) == 0
    assert value(model) == 22


def test_a_copy_of_a_copy_is_bound_to_itself(copied: Callable[[nn.Module], nn.Module]) -> None:
    module = Scale()
    Intercepted(module, adding(100))
    first = copied(module)
    second = copied(first)
    with torch.no_grad():
        first.weight.fill_(50.0)
        second.weight.fill_(7.0)
    assert (value(first), value(second)) == (50, 7)


def doubled_by_another_tool(module: Scale, x: torch.Tensor) -> torch.Tensor:
    """A wrapper that copies with its module."""
    return Scale.forward(module, x) * 2


def test_a_copy_keeps_another_tools_wrapper(copied: Callable[[nn.Module], nn.Module]) -> None:
    module = Scale()
    module.forward = partial(doubled_by_another_tool, module)  # type: ignore[method-assign]
    Intercepted(module, adding(100))
    Intercepted(module, adding(1000))
    twin = copied(module)
    with torch.no_grad():
        twin.weight.fill_(7.0)
    assert (value(twin), value(module)) == (14, 1104)


def test_a_copy_can_be_intercepted() -> None:
    module = Scale()
    Intercepted(module, adding(100))
    twin = copy.deepcopy(module)
    intercepted = Intercepted(twin, adding(1))
    assert value(twin) == 3
    intercepted.remove()
    assert value(twin) == 2
