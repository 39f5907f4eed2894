"""A sample batch: how it is passed, what its signature is, and how it moves between devices."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from autosp.errors import SettingError

Step = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Any) -> Any:
    """`model(batch)` for a tensor, `model(*batch)` for a tuple or list, `model(**batch)` for a mapping.

    Raises: SettingError for anything else.
    """
    if isinstance(batch, torch.Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    raise SettingError(
        f"sample_batch is a {type(batch).__name__}; pass a tensor, a tuple of positional arguments, a mapping of "
        "keyword arguments, or give step(model, batch)"
    )


def signature(batch: Any) -> str:
    """Names, dtypes and shapes: what a plan's timings depend on. Equal for batches of equal shape."""
    if isinstance(batch, torch.Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}[{','.join(map(str, batch.shape))}]"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {signature(batch[key])}" for key in batch) + "}"
    if isinstance(batch, tuple | list):
        return "(" + ", ".join(signature(item) for item in batch) + ")"
    if batch is None or isinstance(batch, bool | int | float | str):
        return repr(batch)
    return type(batch).__qualname__


def step_name(step: Step | None) -> str:
    """What runs a pass: `call`, or the step's qualified name with a hash of its code."""
    if step is None:
        return "call"
    name = f"{getattr(step, '__module__', '')}.{getattr(step, '__qualname__', type(step).__qualname__)}"
    code = getattr(step, "__code__", None)
    if code is None:
        return name
    constants = [constant for constant in code.co_consts if not hasattr(constant, "co_code")]
    digest = hashlib.sha256(repr((code.co_code, constants, code.co_names)).encode()).hexdigest()
    return f"{name}#{digest[:12]}"


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with every tensor in its tuples, lists, mappings and dataclasses replaced. Other objects are kept."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(function, item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.init]
        return replace(value, **{name: map_tensors(function, getattr(value, name)) for name in names})
    if type(value) is dict:
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, Mapping):
        try:
            return type(value)({key: map_tensors(function, item) for key, item in value.items()})  # type: ignore[call-arg]
        except TypeError:
            return value
    return value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors that `map_tensors` would visit, in order."""
    found: list[torch.Tensor] = []

    def find(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(find, value)
    return found


def equal(left: Any, right: Any) -> bool:
    """Bitwise equality of every tensor in two outputs of the same structure. NaNs of equal place are equal."""
    ours, theirs = tensors_in(left), tensors_in(right)
    return len(ours) == len(theirs) and all(_same_bits(mine, yours) for mine, yours in zip(ours, theirs, strict=True))


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    left, right = left.detach().cpu(), right.detach().cpu()
    if left.is_sparse or left.is_quantized:
        return bool(torch.equal(left, right))
    return bool(
        torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))
    )
