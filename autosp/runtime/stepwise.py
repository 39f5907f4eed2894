"""Optimizers whose step can be taken of some of their parameters: by one like it, that holds nothing but these."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autosp.errors import SettingError

INDEPENDENT = (
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adafactor,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.Muon,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
    torch.optim.SparseAdam,
)
"""Optimizers whose step treats every parameter by itself."""


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Raises: SettingError if a step cannot be taken layer by layer, or is none of this model's weights."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise SettingError(f"optimizer is a {name}; pass a torch.optim.Optimizer")
    known = {inspect.unwrap(one.step) for one in INDEPENDENT}
    if inspect.unwrap(type(optimizer).step) not in known:
        names = ", ".join(one.__name__ for one in INDEPENDENT)
        raise SettingError(
            f"{name} cannot be stepped layer by layer: only {names} are known to treat every parameter by itself; "
            "leave optimizer= out, and its step() works as it is"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise SettingError(f"a differentiable {name} cannot be stepped layer by layer: leave optimizer= out")
    weights = {id(parameter) for parameter in model.parameters()}
    if not any(id(one) in weights for group in optimizer.param_groups for one in group["params"]):
        raise SettingError(
            f"the {name} holds no parameter of this {type(model).__name__}: optimizer= is for the one that updates the "
            "weights that stream; where it updates copies of them, leave optimizer= out"
        )


def alone(optimizer: Optimizer) -> Optimizer:
    """One like it, without parameters."""
    made: Optimizer = object.__new__(type(optimizer))
    made.__dict__.update(optimizer.__dict__)
    made.param_groups, made.state = [], defaultdict(dict)
    return made


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a group of parameters as they are now. They may change later, those in tensors in place."""
    options = {name: value for name, value in group.items() if name != "params"}
    return {key: one.clone() if isinstance(one, torch.Tensor) else one for key, one in options.items()}


def step_unhooked(optimizer: Optimizer) -> None:
    """Its class's step. Hooks are called by the user's own call of `step()`."""
    inspect.unwrap(type(optimizer).step, stop=lambda step: not getattr(step, "hooked", False))(optimizer)
