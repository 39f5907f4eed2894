"""Modules inside layers that a checkpoint of the model's own calls again in the backward pass.

[Note: checkpoints inside layers] `torch.utils.checkpoint` around a layer, or around what contains it, calls the layer
again, whose weights then come as they came before. One inside a layer calls a part of it, which is no layer: so such
parts are watched for in the pass that shows the order of the backward, and wrapped where a plan is applied. Others are
not: a wrapper is a graph break for `torch.compile`. What a checkpoint inside a layer computes with the layer's own
weights, rather than in a module that it calls, is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from autosp.intercept import Around
from autosp.runtime.executor import Executor
from autosp.runtime.streamed_layer import StreamedLayer
from autosp.runtime.thread_state import backward_task
from autosp.runtime.training import TrainingExecutor


def parts_of(model: nn.Module, layers: Iterable[str]) -> tuple[str, ...]:
    """Paths of all modules inside the layers at these paths."""
    return tuple(
        ".".join(filter(None, (path, name)))
        for path in layers
        for name, _ in model.get_submodule(path).named_modules()
        if name
    )


def around_parts(
    model: nn.Module, paths: Sequence[str], layers: Iterable[StreamedLayer], executor: Executor
) -> Iterator[tuple[nn.Module, Around]]:
    """What stands around the forwards of those of the parts that are in these layers."""
    parts = {model.get_submodule(path): path for path in paths}
    for layer in layers if parts else ():
        for module in layer.module.modules():
            if module in parts and module is not layer.module:
                yield module, partial(_run_part, executor, layer, parts[module])


def _run_part(
    executor: Executor,
    layer: StreamedLayer,
    path: str,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Within its layer's visit, where it is called outside of the layer's own call.

    What it saves is the checkpoint's: nothing is put around that, or it would count less than in the forward.
    """
    assert isinstance(executor, TrainingExecutor), "only training computes anything again"
    if layer.running or backward_task() is None or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    executor.called_again.add(path)
    return executor.compute_again(layer, forward, args, kwargs)
