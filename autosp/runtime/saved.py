"""What autograd saves of a streamed layer, while the layer's memory is somebody else's until its backward.

[Note: what autograd saved] A layer's forward saves its weights, or views of them, for its backward. By then the arena's
bytes at that address are most likely another layer's. So what is saved of the arena is looked at only through `unpack`,
which has the layer loaded again first: a layer has one address, so the saved view shows the same weights. Order, early
loads and hints do not matter for that. What a layer offloads is looked at through `unpack` likewise. The hooks see no
version counters on torch's behalf, so they check them themselves: an in-place write between forward and backward is
refused as torch refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import _top_saved_tensors_default_hooks as hooks_around
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.graph import saved_tensors_hooks

from autosp.errors import ModelError
from autosp.intercept import Uncompiled
from autosp.runtime.loader import Loader
from autosp.runtime.offload import Activation, Offload, Visit
from autosp.runtime.recompute import Hooks


@dataclass(slots=True)
class _Saved:
    """A tensor as it was saved; detached, for a saved output would hold itself alive."""

    tensor: torch.Tensor
    version: int
    layer: int | None = None
    """Whose weights it shows, if it is a view of the arena."""
    computed_again: Callable[[], Any] | None = None
    """What comes before those weights: see [Note: weights after what is computed again]."""


@dataclass(slots=True)
class _Away:
    """A view of an activation that may leave the device. `counter` has the tensor's version counter, and no memory."""

    activation: Activation
    layer: int
    counter: torch.Tensor
    version: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class _Delegated:
    """What hooks around the layer, such as a checkpoint's, made of a tensor that is not the arena's."""

    packed: Any


class SavedTensors:
    """The hooks under which every streamed layer's forward runs while training."""

    def __init__(
        self,
        loader: Loader,
        offload: Offload,
        needed: Callable[[int], torch.Tensor | None],
        visited: Callable[[int], None],
        computed_again: Callable[[Hooks | None], Callable[[], Any] | None],
    ) -> None:
        """`needed` has a layer loaded; where its place is in use, it gives the layer's bytes in other memory.

        `visited` is told that activations are needed which a layer offloads. `computed_again` says, when a layer's
        weights are saved, what must come before they are needed; it is told what hooks are around the layer.
        """
        self._loader = loader
        self._offload = offload
        self._needed = needed
        self._visited = visited
        self._computed_again = computed_again

    def hooks(self, layer: int, leaving: Visit | None) -> saved_tensors_hooks:
        """A context for one forward of a layer; `leaving` gets what is to be offloaded of it, None: nothing is.

        Of what is not the arena's, hooks that are around it get to see all, and what they keep is theirs.

        Raises: ModelError inside a transform of torch.func, whose tensors no hook may keep.
        """
        if peek_interpreter_stack() is not None:
            raise ModelError(
                f"layer {layer} is called with autograd inside a transform of torch.func, such as vmap, under "
                "which nothing can be kept for the backward pass: leave the transform out of the training step"
            )
        around = hooks_around(True)

        def pack(tensor: torch.Tensor) -> _Saved | _Away | _Delegated:
            if self._loader.is_lent(tensor):
                again = self._computed_again(around)
                return _Saved(tensor.detach(), tensor._version, self._loader.lender(tensor), again)
            if around is not None:
                return _Delegated(around[0](tensor))
            activation = None if leaving is None else self._offload.hold(tensor, leaving)
            if activation is not None:
                return _away(tensor, activation, layer)
            self._offload.stays([tensor])
            return _Saved(tensor.detach(), tensor._version)

        def unpack(saved: _Saved | _Away | _Delegated) -> torch.Tensor:
            if isinstance(saved, _Saved):
                return self._unpack(saved)
            if isinstance(saved, _Away):
                return self._bring_back(saved)
            assert around is not None, "only hooks around the layer are delegated to"
            tensor: torch.Tensor = around[1](saved.packed)
            return tensor

        return saved_tensors_hooks(Uncompiled(pack), Uncompiled(unpack))

    def _unpack(self, saved: _Saved) -> torch.Tensor:
        tensor = saved.tensor
        _check_version(tensor, tensor.shape, saved.version)
        if saved.layer is None:
            return tensor
        if saved.computed_again is not None:
            saved.computed_again()
        elsewhere = self._needed(saved.layer)
        if elsewhere is not None:
            return self._loader.moved(tensor, saved.layer, elsewhere)
        # A graph of the backward pass itself is built without these hooks.
        return tensor.clone() if torch.is_grad_enabled() else tensor

    def _bring_back(self, saved: _Away) -> torch.Tensor:
        _check_version(saved.counter, saved.size, saved.version)
        self._visited(saved.layer)
        memory = self._offload.memory_of(saved.activation, saved.layer)
        with torch.no_grad():
            view = torch.empty(0, dtype=saved.counter.dtype, device=memory.device)
            return view.set_(memory.untyped_storage(), saved.offset, saved.size, saved.stride)


def _away(tensor: torch.Tensor, activation: Activation, layer: int) -> _Away:
    counter = tensor.detach()
    counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return _Away(
        activation, layer, counter, tensor._version, tensor.size(), tensor.stride(), int(tensor.storage_offset())
    )


def _check_version(tensor: torch.Tensor, size: torch.Size, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.dtype}, {list(size)}] is at version {tensor._version}; expected version {version} instead"
        )
