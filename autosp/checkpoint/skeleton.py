"""A module without its parameters' data, and the mapped tensors put in their places."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from autosp.checkpoint.convert import CASTABLE
from autosp.checkpoint.source import Checkpoint, SavedTensors
from autosp.errors import CheckpointError, ModelError, SettingError

NAMED = 3
"""How many tensors a message names."""


def build(factory: Callable[[], Any], name: str) -> nn.Module:
    """Call a factory of a module, or of a tuple that begins with one. Its parameters are on meta, its buffers are real.

    What the factory itself raises passes through.

    Raises: SettingError if it made something else, ModelError for a parameter that cannot be put in later.
    """
    with parameters_on_meta():
        made = factory()
    model = made[0] if isinstance(made, tuple) and made else made
    if not isinstance(model, nn.Module):
        raise SettingError(f"{name} returned a {type(made).__name__}; it must return the module that is to be loaded")
    for key, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ModelError(f"{key} of {name} has no shape yet: give its module all its sizes")
        if is_traceable_wrapper_subclass(parameter):
            raise ModelError(f"{key} of {name} is a {type(parameter).__name__}: quantise the model after loading it")
    return model


class _Building(threading.local):
    """What this thread's innermost `parameters_on_meta` moved, by what it was; None outside of any."""

    moved: WeakTensorKeyDictionary | None = None


_building = _Building()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Every plain parameter that this thread registers in a module goes to meta at once, and is tied as it was.

    Memory for it is taken between its making and its registration only, and by `torch.empty` not really.
    """
    handle = register_module_parameter_registration_hook(_move)
    try:
        with _moving(WeakTensorKeyDictionary()):
            yield
    finally:
        handle.remove()


def parameters_left_alone() -> AbstractContextManager[None]:
    """Undoes `parameters_on_meta` around it: for a model that is loaded while another one is built."""
    return _moving(None)


@contextmanager
def _moving(moved: WeakTensorKeyDictionary | None) -> Iterator[None]:
    outer, _building.moved = _building.moved, moved
    try:
        yield
    finally:
        _building.moved = outer


def _move(_module: nn.Module, _name: str, parameter: nn.Parameter) -> Any:
    """torch's hook: what it returns is registered instead."""
    moved = _building.moved
    if moved is None or parameter.is_meta or is_lazy(parameter) or is_traceable_wrapper_subclass(parameter):
        return None
    if parameter not in moved:
        moved[parameter] = _with_data(parameter, parameter.data.to("meta"))
    return moved[parameter]


def _with_data(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """A parameter of the same class and attributes; `.data` cannot be set across devices."""
    made: nn.Parameter = torch.Tensor._make_subclass(type(parameter), data, parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    return made


def fill(model: nn.Module, checkpoint: Checkpoint, saved: SavedTensors) -> None:
    """Make every parameter and persistent buffer the checkpoint's tensor, not a copy. Tied parameters stay tied.

    One name of tied parameters in the checkpoint is enough. Tensors that the model does not have are warned of.

    Raises: CheckpointError if a tensor is missing or has another shape; the model is of no use then.
    """
    refuse_misfits(model, saved)
    built = dict(_tensors(model))
    found = _load(model, checkpoint, saved)
    missing = set(found.missing_keys) | {name for name, tensor in _tensors(model) if tensor.is_meta}
    missing -= _tie(model, built, missing)
    if missing:
        named = some(name for name in [*built, *missing.difference(built)] if name in missing)
        more = f"; it has {some(found.unexpected_keys)} instead" if found.unexpected_keys else ""
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} of the {len(built)} tensors of {type(model).__name__}: {named}"
            f"{more}. Pass the checkpoint of this very model"
        )
    if found.unexpected_keys:
        warnings.warn(
            f"{checkpoint.path} has {len(found.unexpected_keys)} tensors that {type(model).__name__} does not use: "
            f"{some(found.unexpected_keys)}",
            stacklevel=4,
        )


def _load(model: nn.Module, checkpoint: Checkpoint, saved: SavedTensors) -> Any:
    """torch's own loader, so that what modules do to old checkpoints is done."""
    try:
        return model.load_state_dict(saved.tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.path} does not fit {type(model).__name__}: {error}") from error


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def refuse_misfits(model: nn.Module, saved: SavedTensors) -> None:
    """Raises: CheckpointError for a saved tensor of another shape, or another kind of dtype, than the model's."""
    for name, built in _tensors(model):
        tensor = saved.tensors.get(name)
        if tensor is None:
            continue
        if tensor.shape != built.shape:
            raise CheckpointError(
                f"{saved.files[name]}: tensor {name} has shape {tuple(tensor.shape)}, the model's has "
                f"{tuple(built.shape)}: build the model with the sizes that the checkpoint was made with"
            )
        if tensor.dtype.is_floating_point != built.dtype.is_floating_point:
            raise CheckpointError(
                f"{saved.files[name]}: tensor {name} is {tensor.dtype}, the model's is {built.dtype}: the checkpoint "
                "is quantised, or of another model"
            )


def _tie(model: nn.Module, built: dict[str, torch.Tensor], missing: set[str]) -> set[str]:
    """Give each tensor that was loaded under any of its names to all of them, with what the built one had besides data.

    The names that had none of their own.
    """
    names_of: dict[int, list[str]] = {}
    for name, tensor in built.items():
        names_of.setdefault(id(tensor), []).append(name)
    given: set[str] = set()
    for names in names_of.values():
        loaded = next((name for name in names if name not in missing), None)
        if loaded is None:
            continue
        tensor, old = _get(model, loaded), built[loaded]
        if isinstance(old, nn.Parameter):
            tensor = _with_data(old, tensor.data)
        for name in names:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, tensor)
        given |= set(names) & missing
    return given


def _get(model: nn.Module, name: str) -> torch.Tensor:
    parent, _, own = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(parent), own)
    return found


def cast_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """Do to the buffers that are in no checkpoint what `model.to(dtype)` does."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype in CASTABLE:
                setattr(module, name, buffer.to(dtype))


def tell_dtypes(model: nn.Module, checkpoint: Checkpoint, saved: SavedTensors) -> None:
    """Warn of tensors that the model was built with in another dtype than they are saved in."""
    changes = Counter(
        (built.dtype, saved.tensors[name].dtype)
        for name, built in _tensors(model)
        if name in saved.tensors and saved.tensors[name].dtype != built.dtype
    )
    for (old, new), count in changes.items():
        warnings.warn(
            f"{count} tensors of {type(model).__name__} are {new}, as {checkpoint.path} has them, not {old}, as the "
            f"model was built: pass dtype={new} to say so, or dtype={old} to convert them",
            stacklevel=4,
        )


def some(names: Iterable[str]) -> str:
    """The first of them."""
    known = list(names)
    return ", ".join(known[:NAMED]) + (" …" if len(known) > NAMED else "")
