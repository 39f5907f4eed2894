"""A sample batch: how it is passed, what its signature is, and how it moves between devices."""

from __future__ import annotations

import copy
import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import nn

from autosp.errors import SettingError

Step = Callable[[nn.Module, Any], Any]

_TWICE_BACKWARD = ("does not require grad and does not have a grad_fn", "through the graph a second time")
"""What torch says of a step that goes backward: without autograd, and once autosp does, too."""


def call(model: nn.Module, batch: Any) -> Any:
    """`model(batch)` for a tensor, `model(*batch)` for a tuple or list, `model(**batch)` for a mapping.

    Raises: SettingError for anything else.
    """
    if isinstance(batch, torch.Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        unnamed = next((key for key in batch if not isinstance(key, str)), None)
        if unnamed is not None:
            raise SettingError(
                f"sample_batch has the key {unnamed!r}, which names no argument: give step(model, batch)"
            )
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    raise SettingError(
        f"sample_batch is a {type(batch).__name__}; pass a tensor, a tuple of positional arguments, a mapping of "
        "keyword arguments, or give step(model, batch)"
    )


def backward(step: Step, model: nn.Module, batch: Any) -> torch.Tensor:
    """A training step, without its update. Returns its loss, detached.

    Raises: SettingError if the step's answer is no loss, or the step called `backward()` itself.
    """
    loss = step(model, batch)
    if not isinstance(loss, torch.Tensor):
        found = f"a {type(loss).__name__}"
    else:
        found = f"a tensor of shape {tuple(loss.shape)}" + ("" if loss.requires_grad else " that requires no gradient")
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise SettingError(
            f"step returned {found}: with mode='training' it returns the loss, a tensor of one element that depends on "
            "a parameter that requires a gradient"
        )
    with no_backward_of_its_own():
        loss.backward()
    return loss.detach()


@contextmanager
def no_backward_of_its_own() -> Iterator[None]:
    """Raises: SettingError where torch says that a step calls `backward()` itself, or goes back into an earlier pass.

    The former fails without autograd, as layers are found; both leave nothing to go back through.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(told in str(error) for told in _TWICE_BACKWARD):
            raise
        raise SettingError(
            "step, or the model in it, calls backward() itself: with mode='training' it computes the loss and returns "
            "it, and autosp goes backward. Or the model keeps tensors of an earlier pass: detach() them"
        ) from error


PLAIN = (bool, int, float, complex, str, bytes)
"""Types of values that are what they say."""


def signature(batch: Any, looks_inside: bool = True) -> str:
    """Names, dtypes and shapes: what a plan's timings depend on. Keys may be in any order.

    Of an object that is no container its attributes count, of objects among these the class; of arrays of other
    libraries dtype and shape.
    """
    if isinstance(batch, torch.Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}[{','.join(map(str, batch.shape))}]"
    if isinstance(batch, Mapping):
        items = (f"{key}: {signature(batch[key], looks_inside)}" for key in sorted(batch, key=str))
        return "{" + ", ".join(items) + "}"
    if isinstance(batch, tuple | list):
        return "(" + ", ".join(signature(item, looks_inside) for item in batch) + ")"
    if batch is None or isinstance(batch, PLAIN):
        return repr(batch)
    name = type(batch).__qualname__
    if is_dataclass(batch) and not isinstance(batch, type):
        return name + signature({field.name: getattr(batch, field.name) for field in fields(batch)}, looks_inside)
    if hasattr(batch, "shape") and hasattr(batch, "dtype"):
        return f"{name} of {batch.dtype}[{','.join(map(str, batch.shape))}]"
    if looks_inside and getattr(batch, "__dict__", None) and not isinstance(batch, type | FunctionType):
        return name + signature(vars(batch), looks_inside=False)
    return name


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with every tensor in its tuples, lists, mappings and dataclasses replaced. Other objects are kept."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        return _like(value, (map_tensors(function, item) for item in value))
    if isinstance(value, list):
        mapped = copy.copy(value)
        mapped[:] = [map_tensors(function, item) for item in value]
        return mapped
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.init]
        return replace(value, **{name: map_tensors(function, getattr(value, name)) for name in names})
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)
        for key, item in value.items():
            changed[key] = map_tensors(function, item)
        return changed
    return value


def _like(value: tuple[Any, ...], items: Iterable[Any]) -> tuple[Any, ...]:
    """A tuple of the same class, with its attributes, whatever its constructor asks for."""
    own = type(value).__new__
    if own is not tuple.__new__ and not isinstance(own, FunctionType):  # of C, as torch.Size: nothing else makes one
        return type(value)(items)
    made = tuple.__new__(type(value), items)
    if hasattr(value, "__dict__"):
        vars(made).update(vars(value))
    return made


def call_on(device: torch.device, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`function(*args, **kwargs)` on `device`: tensors from elsewhere are moved there, and then so is the answer back.

    With every tensor on the device already, which is the usual case, nothing is moved.
    """
    origin = next((tensor.device for tensor in tensors_in((args, kwargs)) if tensor.device != device), None)
    if origin is None:
        return function(*args, **kwargs)
    args, kwargs = map_tensors(lambda tensor: tensor.to(device), (args, kwargs))
    return map_tensors(lambda tensor: tensor.to(origin), function(*args, **kwargs))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors that `map_tensors` would visit, in order. Nothing is rebuilt."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        parts: Iterable[Any] = value
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in fields(value) if field.init]
    elif isinstance(value, MutableMapping):
        parts = value.values()
    else:
        return []
    return [tensor for part in parts for tensor in tensors_in(part)]


def equal(left: Any, right: Any) -> bool:
    """Bitwise equality of two outputs: their tensors and plain values, in the same places. NaNs count by their bits.

    Objects of other kinds (a cache, say) are not looked into.
    """
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and _same_bits(left, right)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(equal(mine, yours) for mine, yours in zip(left, right, strict=True))
    if is_dataclass(left) and not isinstance(left, type) and type(left) is type(right):
        return all(equal(getattr(left, field.name), getattr(right, field.name)) for field in fields(left))
    if isinstance(left, float) and isinstance(right, float):
        return struct.pack("d", left) == struct.pack("d", right)
    if left is None or right is None or isinstance(left, PLAIN) or isinstance(right, PLAIN):
        return bool(type(left) is type(right) and left == right)
    return True


DIGESTED_BYTES = 2**20
"""What is copied at a time to be digested."""


def digest(tensor: torch.Tensor) -> str:
    """Of a tensor's bits: tensors that are `equal` have the same one, sparse ones if their entries are in one order."""
    tensor = tensor.detach()
    found = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}".encode(), digest_size=16)
    for part in [tensor._indices(), tensor._values()] if tensor.layout is torch.sparse_coo else [tensor]:
        rows = part.reshape(1) if part.dim() == 0 else part
        row_bytes = rows[:1].numel() * rows.element_size()
        for piece in rows.split(max(1, DIGESTED_BYTES // max(1, row_bytes))):
            plain = piece.cpu().resolve_conj().resolve_neg().contiguous().view(-1)
            found.update(plain.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape or left.layout != right.layout:
        return False
    left, right = left.detach().cpu(), right.detach().cpu()
    if left.is_quantized:
        return bool(torch.equal(left, right))
    if left.layout is not torch.strided:
        left, right = left.to_dense(), right.to_dense()
    mine, yours = (tensor.resolve_conj().resolve_neg().contiguous().view(-1) for tensor in (left, right))
    return bool(torch.equal(mine.view(torch.uint8), yours.view(torch.uint8)))
