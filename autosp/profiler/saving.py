"""What autograd saves in a forward pass, as it saves it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._autograd import _top_saved_tensors_default_hooks as hooks_around
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from autosp.intercept import Uncompiled
from autosp.runtime.executor import Observer
from autosp.runtime.offload import can_be_offloaded
from autosp.runtime.recompute import MARKER
from autosp.runtime.thread_state import backward_task

Storages = dict[StorageWeakRef, int]
"""Bytes of each. A weak reference keeps the identity from being used twice, and no memory."""


def storages_of(tensors: Iterable[torch.Tensor]) -> Storages:
    """What the tensors are views of."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided)
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}


def watching(saw: Callable[[torch.Tensor], object]) -> saved_tensors_hooks:
    """Tells of each tensor that a forward saves for its backward. What hooks around make of it stays theirs."""
    around = hooks_around(True)

    def pack(tensor: torch.Tensor) -> Any:
        if backward_task() is None and tensor is not MARKER:
            saw(tensor)
        return tensor if around is None else around[0](tensor)

    def unpack(packed: Any) -> torch.Tensor:
        tensor: torch.Tensor = packed if around is None else around[1](packed)
        return tensor

    return saved_tensors_hooks(Uncompiled(pack), Uncompiled(unpack))


class ForwardOrder(Observer):
    """The layers that a pass visits, and what can be offloaded of what each visit is the first to save.

    One that is called inside its own call is part of the outer visit.
    """

    def __init__(self, there: Iterable[torch.Tensor], device: torch.device) -> None:
        """What is `there` is none of the pass's activations."""
        self.visits: list[int] = []
        self.saved_bytes: list[int] = []
        self._open: list[int] = []
        self._device = device
        self._known = set(storages_of(there))

    def watching(self) -> saved_tensors_hooks:
        """A context for the pass. What hooks inside it keep, such as a checkpoint's, is neither seen nor offloaded."""
        return watching(self._saved)

    def arrive(self, layer: int, inputs: Any) -> None:
        """A visit begins, unless a checkpoint computes again for a backward that is under way."""
        if layer not in self._open and backward_task() is None:
            self.visits.append(layer)
            self.saved_bytes.append(0)
        self._open.append(layer)

    def finish(self, layer: int, output: Any) -> None:
        """It is over."""
        self._open.remove(layer)

    def _saved(self, tensor: torch.Tensor) -> None:
        if not self._open or not can_be_offloaded(tensor, self._device):
            return
        for storage, n_bytes in storages_of([tensor]).items():
            if storage not in self._known:
                self._known.add(storage)
                self.saved_bytes[-1] += n_bytes
