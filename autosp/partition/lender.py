"""Lends a model's tensors to an accelerator for one pass, a module's or an operation's at a time.

[Note: whose weights are lent] While a module runs its own weights are on the device, as they are under a plan: what
autocast converts is decided by where a weight is, before any operation is seen, and a module may ask where its weight
is to make other tensors there. What an operation takes of other modules' weights is lent to it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from autosp.batch import equal
from autosp.partition.tensors import Extent, NamedTensor, held_by

Extents = Callable[[torch.Tensor], list[Extent]]
Copying = Callable[[torch.Tensor], torch.Tensor]


def copying_to(device: torch.device) -> Copying | None:
    """What gives a tensor's copy on a device. On a CPU there is nothing to lend."""
    return None if device.type == "cpu" else lambda tensor: tensor.to(device)


class Lender:
    """Copies of a model's tensors."""

    def __init__(self, copying: Copying | None, opaque: Collection[NamedTensor]) -> None:
        """`opaque`: what is in no extent, and is lent as well."""
        self._copying = copying
        self._opaque = {id(item.tensor) for item in opaque}
        self._kept: dict[int, tuple[list[Extent], torch.Tensor, torch.Tensor]] = {}
        """What the pass may write to: its extents, the tensor itself, and its copy, the same all along."""
        self._away: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Tensors whose data is a copy now, and their own data."""
        self._copied: dict[StorageWeakRef, list[Extent]] = {}
        """What copies are of."""

    @contextmanager
    def lent_to(self, module: nn.Module, extents_of: Extents, written: Collection[Extent]) -> Iterator[None]:
        """See [Note: whose weights are lent].

        `extents_of`: those that a tensor of the model is in. It is not kept: a cycle would hold the model's memory.
        `written`: what the pass has written to, once the module has run.
        """
        brought: list[torch.Tensor] = []
        try:
            if self._copying is not None:
                for tensor in [*module._parameters.values(), *module._buffers.values()]:
                    if tensor is not None and self._bring(tensor, extents_of, self._copying):
                        brought.append(tensor)
            yield
        finally:
            for tensor in brought:
                self._take_back(tensor, written)

    def lend(self, tensor: torch.Tensor, extents: list[Extent], written: Collection[Extent]) -> torch.Tensor:
        """What an operation gets in a tensor's place. `written`: what it, or one before it, says it writes to."""
        if self._copying is None or self.extents_in(tensor) or not (extents or id(tensor) in self._opaque):
            return tensor
        if id(tensor) in self._kept:
            return self._kept[id(tensor)][2]
        copy = self._copying(tensor)
        if _may_be_written(extents, written):
            self._kept[id(tensor)] = extents, tensor, copy
        return copy

    def extents_in(self, copy: torch.Tensor) -> list[Extent]:
        """The extents that a tensor is a copy, or a part of a copy, of: of what a module was lent."""
        if not self._copied or copy.layout is not torch.strided:
            return []
        return self._copied.get(StorageWeakRef(copy.untyped_storage()), [])

    def changed(self) -> set[Extent]:
        """Extents of kept tensors whose copy the pass changed."""
        changed = [extents for extents, tensor, copy in self._kept.values() if not _same(tensor, copy)]
        return {extent for extents in changed for extent in extents}

    def _bring(self, tensor: torch.Tensor, extents_of: Extents, copying: Copying) -> bool:
        """Whether a tensor was brought: it is in one extent, and is not there already for a call around this one."""
        if id(tensor) in self._away or any(held is not tensor for _, held in held_by(tensor)):
            return False
        extents = extents_of(tensor)
        if not extents:
            return False
        with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
            data = tensor.data
            kept = self._kept.get(id(tensor))
            copy = kept[2] if kept else copying(data)
            self._away[id(tensor)] = tensor, data
            self._copied[StorageWeakRef(copy.untyped_storage())] = extents
            tensor.data = copy
        return True

    def _take_back(self, tensor: torch.Tensor, written: Collection[Extent]) -> None:
        with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
            _, data = self._away.pop(id(tensor))
            copy = tensor.data
            tensor.data = data
        extents = self._copied.get(StorageWeakRef(copy.untyped_storage()))
        if extents is not None and _may_be_written(extents, written):
            self._kept[id(tensor)] = extents, data, copy


def _may_be_written(extents: Collection[Extent], written: Collection[Extent]) -> bool:
    """What a pass writes, it reads again."""
    return any(extent in written or any(item.is_buffer for item in extent.tensors) for extent in extents)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return all(equal(mine, yours) for (_, mine), (_, yours) in zip(held_by(left), held_by(right), strict=True))
