"""Texts for steps and for what modules are told: the same in every process, others where the work is another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import pytest
import torch
from torch import nn

from autosp.described import behaviour_of, step_name


def plain_step(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def same_but_for_a_constant(constant: int) -> Callable[..., Any]:
    """Steps of one name."""
    return {1: lambda model, batch: model(batch, 1), 2: lambda model, batch: model(batch, 2)}[constant]


def test_step_name_is_its_name_and_code() -> None:
    assert step_name(None) == "call"
    name, _, code = step_name(plain_step).partition("#")
    assert name == f"{__name__}.plain_step"
    assert len(code) == 12
    assert step_name(plain_step) == step_name(plain_step)


def test_step_name_changes_with_the_code() -> None:
    first, second = same_but_for_a_constant(1), same_but_for_a_constant(2)
    assert step_name(first).partition("#")[0] == step_name(second).partition("#")[0]
    assert step_name(first) != step_name(second)
    assert step_name(first) == step_name(same_but_for_a_constant(1))
    assert step_name(lambda model, batch: model.encode(batch)) != step_name(lambda model, batch: model.decode(batch))


def test_step_name_of_a_callable_object() -> None:
    class Step:
        def __call__(self, model: nn.Module, batch: Any) -> Any:
            return model(batch)

    assert step_name(Step()).partition("#")[0] == f"{__name__}.{Step.__qualname__}"
    assert step_name(Step()) == step_name(Step())
    assert " at 0x" not in step_name(Step())


def compiled(body: str) -> FunctionType:
    """A step, compiled anew: its code objects are elsewhere, as in another process."""
    space: dict[str, Any] = {"__name__": "steps"}
    exec(f"def step(model, batch):\n    return {body}", space)
    step = space["step"]
    assert isinstance(step, FunctionType)
    return step


def test_step_name_has_no_address() -> None:
    body = "sorted(batch, key=lambda item: item)"
    first, second = compiled(body), compiled(body)  # both live: their lambdas are two objects
    assert step_name(first) == step_name(second)


def test_step_name_does_not_depend_on_the_order_of_a_set() -> None:
    first, second = compiled("batch in {0, 8}"), compiled("batch in {0, 8}")
    # Equal sets; 0 and 8 take each other's place in a table of 8.
    swapped = [frozenset([8, 0]) if isinstance(one, frozenset) else one for one in second.__code__.co_consts]
    second.__code__ = second.__code__.replace(co_consts=tuple(swapped))
    assert first.__code__.co_consts == second.__code__.co_consts
    assert repr(first.__code__.co_consts) != repr(second.__code__.co_consts)
    assert step_name(first) == step_name(second)


@pytest.mark.parametrize("kind", ["closure", "default", "partial", "inner function"])
def test_step_name_changes_with_what_the_step_does(kind: str) -> None:
    def times(count: int) -> Callable[..., Any]:
        def closure(model: nn.Module, batch: Any) -> None:
            for _ in range(count):
                model(batch)

        def default(model: nn.Module, batch: Any, count: int = count) -> None:
            for _ in range(count):
                model(batch)

        def one(model: nn.Module, batch: Any) -> Any:
            return max(batch, key=lambda item: item + 1)

        def other(model: nn.Module, batch: Any) -> Any:
            return max(batch, key=lambda item: item + 2)

        other.__qualname__ = one.__qualname__
        return {
            "closure": closure,
            "default": default,
            "partial": partial(plain_step, count=count),
            "inner function": one if count == 1 else other,
        }[kind]

    assert step_name(times(1)) != step_name(times(100))


def stepping(**globals_: Any) -> FunctionType:
    """A step that uses globals of its module, one of them in a function that it calls."""
    space: dict[str, Any] = {"__name__": "steps", "times": 1, "others": [1], "size": 2, **globals_}
    exec(
        "def helper(batch):\n    return [batch for _ in range(size)]\n\n"
        "def step(model, batch):\n    others.append(times)\n    return model(helper(batch))",
        space,
    )
    step = space["step"]
    assert isinstance(step, FunctionType)
    return step


def test_step_name_changes_with_the_globals_that_it_names() -> None:
    assert step_name(stepping()) == step_name(stepping(others=[1, 2], unused=3, append=4))
    assert len({step_name(stepping()), step_name(stepping(times=2)), step_name(stepping(size=3))}) == 3


def test_a_step_that_counts_in_a_global_keeps_its_name() -> None:
    space: dict[str, Any] = {"__name__": "steps", "count": 0}
    exec("def step(model, batch):\n    global count\n    count += 1\n    return model(batch)", space)
    before = step_name(space["step"])
    space["step"](lambda batch: batch, 1)
    assert space["count"] == 1
    assert step_name(space["step"]) == before


def test_steps_that_call_each_other_have_a_name() -> None:
    space: dict[str, Any] = {"__name__": "steps"}
    exec("def step(model, batch):\n    return other(model, batch)\n\ndef other(*all):\n    return step(*all)", space)
    assert step_name(space["step"]) == step_name(space["step"])


@dataclass
class Settings:
    heads: int = 2
    kinds: tuple[str, ...] = ("full",)


class ToyConfig:
    """As those of transformers: an object that calls itself one."""

    def __init__(self, implementation: str = "sdpa") -> None:
        self._implementation = implementation
        self.layer_types = ["full", "full"]
        self.inner = Settings()


class Patched:
    """What patches put in the place of a method."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.__wrapped__ = forward

    def __call__(self, *args: Any) -> Any:
        return self.__wrapped__(*args)


class Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.times = 1
        self.config = ToyConfig()
        self.settings = Settings()
        self.seen: list[int] = []
        self.passes = 0
        self._private = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._count()
        return self.linear(x)

    @cached_property
    def scale(self) -> float:
        return 2.0

    def _count(self) -> None:
        self.passes += 1

    def repeat(self, times: int) -> None:
        self.times = times


CHANGES: dict[str, Callable[[Told], Any]] = {
    "attribute": lambda model: model.repeat(2),
    "attribute of a child": lambda model: setattr(model.linear, "out_features", 5),
    "config": lambda model: setattr(model, "config", ToyConfig("eager")),
    "list in a config": lambda model: model.config.layer_types.append("sliding"),
    "dataclass in a config": lambda model: setattr(model.config.inner, "heads", 4),
    "dataclass": lambda model: setattr(model.settings, "kinds", ("full", "sliding")),
    "eval mode": lambda model: model.eval(),
    "a forward of its own": lambda model: setattr(model, "forward", MethodType(lambda self, x: x, model)),
    "a forward of a child's": lambda model: setattr(model.linear, "forward", Patched(lambda x: x)),
}
SAME: dict[str, Callable[[Told], Any]] = {
    "nothing": lambda model: None,
    "a list that passes fill": lambda model: model.seen.append(3),
    "a counter of passes": lambda model: model(torch.ones(1, 4)),
    "a value that is kept": lambda model: model.scale,
    "what a library notes in a config": lambda model: setattr(model.config, "_original_object_hash", hash("x")),
    "where it is from": lambda model: setattr(model.config, "architectures", ["Told"]),
    "a private attribute": lambda model: setattr(model, "_private", 1),
    "weights": lambda model: torch.nn.init.zeros_(model.linear.weight),
    "another object": lambda model: setattr(model, "lock", object()),
}


@pytest.mark.parametrize("change", [*CHANGES, *SAME])
def test_behaviour(change: str) -> None:
    model = Told()
    (CHANGES | SAME)[change](model)
    assert (behaviour_of(model) == behaviour_of(Told())) == (change in SAME)


def test_behaviour_is_of_the_code_that_a_pass_runs() -> None:
    def made(body: str) -> nn.Module:
        space: dict[str, Any] = {"nn": nn}
        exec(
            "class Model(nn.Module):\n"
            "    def forward(self, x):\n        return self.inner(x)\n"
            f"    def inner(self, x):\n        return {body}\n"
            f"    def unused(self):\n        return {len(body)}",
            space,
        )
        model = space["Model"]()
        assert isinstance(model, nn.Module)
        return model

    assert behaviour_of(made("x + 1")) == behaviour_of(made("x +  1"))
    assert behaviour_of(made("x + 1")) != behaviour_of(made("x + 2"))


def test_code_that_is_patched_is_another() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    before = behaviour_of(Model())
    Model.forward = lambda self, x: x + 1  # type: ignore[method-assign]
    assert behaviour_of(Model()) != before


def test_a_forward_that_wraps_itself() -> None:
    model = Told()
    own = Patched(model.linear.forward)
    own.__wrapped__ = own
    model.linear.forward = own  # type: ignore[method-assign]
    assert behaviour_of(model)


SAVED = """
import sys, torch, transformers
from autosp.described import behaviour_of
config = transformers.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                  vocab_size=32)
made = transformers.LlamaForCausalLM(config).eval()
print(behaviour_of(made))
made.save_pretrained(sys.argv[1])
print(behaviour_of(made))
print(behaviour_of(transformers.LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()))
"""


def test_a_transformer_is_the_same_in_every_process_and_from_wherever(tmp_path: Path) -> None:
    found = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        run = [sys.executable, "-c", SAVED, str(tmp_path / "model")]
        found += subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert len(found) == 6
    assert len(set(found)) == 1
