"""Builds a small model of any type that transformers knows, with random weights, and a batch it runs on."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from zoo_inputs import OTHER, PROFILED, Batch, Size, candidates, with_placeholders
from zoo_shrink import shrunk
from zoo_table import GENERIC, TABLE, Entry

MODEL_TYPES = tuple(sorted(CONFIG_MAPPING_NAMES))

_MAPPINGS = ("MODEL_MAPPING", "MODEL_FOR_PRETRAINING_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING")
MOST_BYTES = 250 * 10**6
NOISE = 0.02


class NotBuiltError(Exception):
    """No model of this type, or no batch it runs on; the message says why."""


@dataclass(frozen=True)
class Specimen:
    """A model in eval mode and two batches of unlike sizes; `other` is None if it takes one size only."""

    model_type: str
    model: PreTrainedModel
    batch: Batch
    other: Batch | None


def build(model_type: str) -> Specimen:
    """The small model of this type and its batches, the same at every call.

    Raises: NotBuiltError.
    """
    entry = TABLE.get(model_type, GENERIC)
    reason = ""
    for widths in (True, False) if entry.widths is None else (entry.widths,):
        try:
            return _built(model_type, entry, widths)
        except NotBuiltError as error:
            reason = reason or str(error)
    raise NotBuiltError(reason)


def _built(model_type: str, entry: Entry, widths: bool) -> Specimen:
    try:
        config = shrunk(CONFIG_MAPPING[model_type](), entry.config, widths=widths)
        model_class = _class_of(config, entry.class_name)
        if not widths:
            _require_small(model_class, config)
        torch.manual_seed(0)
        model = model_class(config).eval()
    except Exception as error:  # whatever a constructor raises is the reason
        raise NotBuiltError(_reason("constructor", error)) from error
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    if n_bytes > MOST_BYTES:
        raise NotBuiltError(f"does not get small: {n_bytes / 1e6:.0f} MB")
    _perturb(model)
    batch = first_that_runs(model, PROFILED, entry)
    try:
        other = first_that_runs(model, OTHER, entry)
    except NotBuiltError:
        other = None
    return Specimen(model_type, model, batch, other)


def _require_small(model_class: Any, config: PreTrainedConfig) -> None:
    """Raises: ValueError if the weights, not made yet, would take too much."""
    with torch.device("meta"):
        sketch = model_class(copy.deepcopy(config))
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in sketch.parameters())
    if n_bytes > MOST_BYTES:
        raise ValueError(f"does not get small: {n_bytes / 1e6:.0f} MB")


def first_that_runs(model: Any, size: Size, entry: Entry = GENERIC) -> Batch:
    """The first candidate batch that the plain model takes.

    Raises: NotBuiltError with what it said to the first candidate.
    """
    complaint: Exception | None = None
    for batch in candidates(model, size, entry.inputs):
        for _ in range(4):  # images, then audio, may ask for placeholder tokens
            try:
                with torch.no_grad():
                    model(**batch)
            except Exception as error:  # noqa: BLE001 - a model says in many ways that it does not take a batch
                complaint = complaint or error
                again = with_placeholders(batch, model.config, str(error))
                if again is None:
                    break
                batch = again
            else:
                return batch
    raise NotBuiltError(_reason("forward", complaint))


def _class_of(config: PreTrainedConfig, name: str | None) -> Any:
    """The base model of this config; else a model with a head; else any model in its module that is made from it."""
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    if name is not None:
        return getattr(module, name)
    for mapping in (*_MAPPINGS, *_other_mappings()):
        found = getattr(modeling_auto, mapping).get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, tuple) else found
    return _of_module(module, config)


def _of_module(module: Any, config: PreTrainedConfig) -> Any:
    classes = [
        item
        for _, item in inspect.getmembers(module, inspect.isclass)
        if issubclass(item, PreTrainedModel) and item.config_class is type(config) and "forward" in vars(item)
    ]
    if not classes:
        raise LookupError("no model is made from this configuration")
    stem = type(config).__name__.removesuffix("Config")
    return next((item for item in classes if item.__name__ in (stem, f"{stem}Model")), classes[0])


def _other_mappings() -> Iterator[str]:
    named = (name for name in dir(modeling_auto) if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING"))
    return (name for name in named if name not in _MAPPINGS)


def _perturb(model: torch.nn.Module) -> None:
    """Noise on every weight that its constructor left constant or not finite, so that each one matters."""
    generator = torch.Generator().manual_seed(0)
    for tensor in model.parameters():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        noise = NOISE * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        if not bool(torch.isfinite(tensor).all()):
            tensor.data.copy_(noise)
        elif bool((tensor == tensor.flatten()[0]).all()):
            tensor.data.add_(noise)


def _reason(stage: str, error: BaseException | None) -> str:
    text = " ".join(str(error).split()) or "no message"
    text = re.sub(r" from '[^']*'| but it was not found in your environment.*", "", text)  # paths and advice
    return f"{stage}: {type(error).__name__}: {text[:160]}"
