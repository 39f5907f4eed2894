"""A checkpoint becomes a model without ever being in RAM whole."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn
from tqdm.auto import tqdm

from autosp.apply import apply
from autosp.checkpoint.cache import Conversion, converted, remove_unreferenced
from autosp.checkpoint.convert import CASTABLE
from autosp.checkpoint.pretrained import Pretrained, pretrained_folder
from autosp.checkpoint.skeleton import build, cast_buffers, fill, parameters_left_alone, refuse_misfits, tell_dtypes
from autosp.checkpoint.source import Checkpoint, Format, SavedTensors, exists, find_checkpoint, open_tensors
from autosp.errors import CheckpointError, SettingError
from autosp.factory import find_factory, names_factory
from autosp.runtime.streamed_model import StreamedModel
from autosp.spec import Plan

PathLike = str | os.PathLike[str]
Factory = Callable[[], Any]


@overload
def load(
    source: PathLike | Factory,
    plan: None = None,
    *,
    weights: PathLike | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module: ...


@overload
def load(
    source: PathLike | Factory,
    plan: Plan,
    *,
    weights: PathLike | None = None,
    dtype: torch.dtype | None = None,
) -> StreamedModel[nn.Module]: ...


def load(
    source: PathLike | Factory,
    plan: Plan | None = None,
    *,
    weights: PathLike | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module | StreamedModel[nn.Module]:
    """A model in eval mode whose parameters are memory maps of their checkpoint; with a plan, `apply(model, plan)`.

    Args:
        source: a Hugging Face directory, or a file in it; or what builds the model, "module:factory" or a callable. It
            may return a tuple that begins with the model. Its parameters are made on the meta device, its buffers are
            real.
        weights: with a factory, its checkpoint: a safetensors file, an index of shards, a folder, or a state dict
            saved by torch.
        dtype: of the floating-point tensors; default: a directory's config says it, else they are as saved. The model
            is the one that `from_pretrained(dtype=...)` gives, or a factory's after `.to(dtype)`.

    Another dtype or another format than safetensors is converted once, a chunk at a time, to `AUTOSP_CACHE_DIR`; that
    conversion is used until its source changes or goes. A write to a parameter never reaches a file.

    Raises: CheckpointError naming what is missing, damaged, or not the model's; SettingError for arguments that do not
    go together; DiskFullError or TierError if a conversion cannot be kept; what `apply` raises.
    """
    if dtype is not None and dtype not in CASTABLE:
        known = ", ".join(map(str, CASTABLE))
        raise SettingError(f"dtype={dtype!r}: pass one of {known}")
    if weights is not None and not isinstance(weights, str | os.PathLike):
        raise SettingError(f"weights is a {type(weights).__name__}; pass the path of a checkpoint")
    remove_unreferenced()
    with torch.inference_mode(False), parameters_left_alone():
        found = _find(source)
        if isinstance(found, Path):
            model = _pretrained(found, weights, dtype)
        else:
            name = source if isinstance(source, str) else getattr(source, "__qualname__", repr(source))
            model = _built(found, name, weights, dtype)
    return model if plan is None else apply(model, plan)


def _find(source: PathLike | Factory) -> Path | Factory:
    """Where the model is, or what builds it. What exists as a file is not taken for module:factory."""
    if isinstance(source, nn.Module):
        raise SettingError(f"pass what builds the {type(source).__name__}, not the module itself")
    if not isinstance(source, str | os.PathLike):
        if not callable(source):
            raise SettingError(f"source is a {type(source).__name__}; pass a path, module:factory, or a function")
        return source
    path = Path(source)
    if exists(path):
        return path
    name = os.fspath(source)
    if names_factory(name):
        return find_factory(name)
    raise CheckpointError(f"there is no {path}: pass a Hugging Face directory, or module:factory and weights=")


def _built(factory: Factory, name: str, weights: PathLike | None, dtype: torch.dtype | None) -> nn.Module:
    if weights is None:
        raise SettingError(f"{name} builds a model without weights: pass weights= with its checkpoint")
    checkpoint = find_checkpoint(Path(weights))
    saved = open_tensors(checkpoint)
    model = build(factory, name)
    refuse_misfits(model, saved)
    if dtype is None:
        tell_dtypes(model, checkpoint, saved)
        dtypes = {}
    else:
        cast_buffers(model, dtype)
        floats = {key: tensor.dtype for key, tensor in saved.tensors.items() if tensor.dtype in CASTABLE}
        dtypes = {key: dtype for key, found in floats.items() if found is not dtype}
    conversion = _conversion(checkpoint, saved, dtypes)
    try:
        if conversion is not None:
            found = open_tensors(find_checkpoint(conversion.weights))
            saved = SavedTensors(found.tensors, saved.files)
        fill(model, checkpoint, saved)
    except BaseException:
        _let_go(conversion)
        raise
    return _holding(model.eval(), conversion)


def _pretrained(path: Path, weights: PathLike | None, dtype: torch.dtype | None) -> nn.Module:
    folder = pretrained_folder(path)
    if folder is None:
        checkpoint = find_checkpoint(path)
        raise CheckpointError(
            f"{checkpoint.path} names tensors but no modules: pass the directory with its config.json, or what builds "
            f"the model, autosp.load('module:factory', weights={str(path)!r})"
        )
    if weights is not None:
        raise SettingError(f"{folder} has weights of its own: weights= goes with a factory")
    pretrained = Pretrained(folder)
    checkpoint = find_checkpoint(folder)
    saved = open_tensors(checkpoint)
    conversion = _conversion(checkpoint, saved, pretrained.dtypes(saved, dtype))
    try:
        model = pretrained.load(folder if conversion is None else conversion.folder, dtype)
    except BaseException:
        _let_go(conversion)
        raise
    return _holding(model, conversion)


def _conversion(checkpoint: Checkpoint, saved: SavedTensors, dtypes: dict[str, torch.dtype]) -> Conversion | None:
    """None if the checkpoint can be mapped as it is."""
    if checkpoint.format is Format.SAFETENSORS and not dtypes:
        return None
    n_bytes = sum(tensor.numel() * dtypes.get(name, tensor.dtype).itemsize for name, tensor in saved.tensors.items())
    bar = tqdm(
        desc=f"autosp: converting {checkpoint.path.name}", total=n_bytes, unit="B", unit_scale=True, disable=None
    )
    with bar:
        return converted(checkpoint, saved, dtypes, bar.update)


def _holding(model: nn.Module, conversion: Conversion | None) -> nn.Module:
    """No process removes the conversion as long as the model lives."""
    if conversion is not None:
        weakref.finalize(model, conversion.close)
    return model


def _let_go(conversion: Conversion | None) -> None:
    if conversion is not None:
        conversion.close()
