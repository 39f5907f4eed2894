"""What autograd saves of a streamed layer, while the layer's memory is somebody else's until its backward.

[Note: what autograd saved] A layer's forward saves its weights, or views of them, for its backward. By then the arena's
bytes at that address are most likely another layer's. So what is saved of the arena is looked at only through `unpack`,
which has the layer loaded again first: a layer has one address, so the saved view shows the same weights. Order, early
loads and hints do not matter for that. The hooks see no version counters on torch's behalf, so they check them
themselves: an in-place write between forward and backward is refused as torch refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import _top_saved_tensors_default_hooks as hooks_around
from torch.autograd.graph import saved_tensors_hooks

from autosp.runtime.loader import Loader


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
class _Delegated:
    """What hooks around the layer, such as a checkpoint's, made of a tensor that is not the arena's."""

    packed: Any


class SavedTensors:
    """The hooks under which every streamed layer's forward runs while training."""

    def __init__(
        self,
        loader: Loader,
        needed: Callable[[int], torch.Tensor | None],
        computed_again: Callable[[], Callable[[], Any] | None],
    ) -> None:
        """`needed` has a layer loaded; where its place is in use, it gives the layer's bytes in other memory.

        `computed_again` says, when a layer's weights are saved, what must come before they are needed.
        """
        self._loader = loader
        self._needed = needed
        self._computed_again = computed_again

    def hooks(self) -> saved_tensors_hooks:
        """A context for one forward. Of what is not the arena's, hooks that are around it get to see all."""
        around = hooks_around(True)

        def pack(tensor: torch.Tensor) -> _Saved | _Delegated:
            if self._loader.is_lent(tensor):
                return _Saved(tensor.detach(), tensor._version, self._loader.lender(tensor), self._computed_again())
            return _Saved(tensor.detach(), tensor._version) if around is None else _Delegated(around[0](tensor))

        def unpack(saved: _Saved | _Delegated) -> torch.Tensor:
            if isinstance(saved, _Saved):
                return self._unpack(saved)
            assert around is not None, "only hooks around the layer are delegated to"
            tensor: torch.Tensor = around[1](saved.packed)
            return tensor

        return saved_tensors_hooks(pack, unpack)

    def _unpack(self, saved: _Saved) -> torch.Tensor:
        tensor = saved.tensor
        if tensor._version != saved.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{tensor.dtype}, {list(tensor.shape)}] is at version {tensor._version}; expected version "
                f"{saved.version} instead"
            )
        if saved.layer is None:
            return tensor
        if saved.computed_again is not None:
            saved.computed_again()
        elsewhere = self._needed(saved.layer)
        if elsewhere is not None:
            return self._loader.moved(tensor, saved.layer, elsewhere)
        # A graph of the backward pass itself is built without these hooks.
        return tensor.clone() if torch.is_grad_enabled() else tensor
