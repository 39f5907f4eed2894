"""Layers in one flat host buffer, pinned where an accelerator will copy from it."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autosp.partition import BoundLayer
from autosp.partition.tensors import LAYER_ALIGNMENT

_memmove = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


@dataclass(frozen=True)
class HostRegion:
    """A run of bytes in RAM."""

    host: torch.Tensor
    n_bytes: int

    def read_into(self, target: memoryview) -> None:
        """A plain copy; the GIL is free meanwhile."""
        if self.n_bytes:
            _memmove(ctypes.addressof(ctypes.c_char.from_buffer(target)), self.host.data_ptr(), self.n_bytes)


class HostStore:
    """One flat buffer. Pinning that fails is announced, and the buffer is pageable: right, but slower to copy."""

    def __init__(self, layers: Sequence[BoundLayer], *, pin: bool) -> None:
        self._places: dict[int, tuple[int, int]] = {}
        offset = 0
        for bound in layers:
            self._places[bound.layer.index] = (offset, bound.layer.n_bytes)
            offset += bound.layer.n_bytes
        with torch.inference_mode(False), torch.no_grad():
            self._buffer = _allocate(offset, pin)
            for bound in layers:
                base = self.rest(bound.layer.index)
                for placed in bound.placed:
                    base[placed.offset : placed.offset + placed.extent.n_bytes].copy_(placed.extent.raw())

    def regions(self, layers: Sequence[int]) -> tuple[HostRegion, ...]:
        """Adjacent layers are one region."""
        runs: list[tuple[int, int]] = []
        for layer in layers:
            offset, n_bytes = self._places[layer]
            if runs and runs[-1][0] + runs[-1][1] == offset:
                runs[-1] = (runs[-1][0], runs[-1][1] + n_bytes)
            else:
                runs.append((offset, n_bytes))
        return tuple(HostRegion(self._buffer[offset : offset + n_bytes], n_bytes) for offset, n_bytes in runs)

    def window(self, offset: int, n_bytes: int) -> HostRegion:
        """A run of the buffer."""
        offset = offset // LAYER_ALIGNMENT * LAYER_ALIGNMENT
        return HostRegion(self._buffer[offset : offset + n_bytes], n_bytes)

    def rest(self, layer: int) -> torch.Tensor:
        """A view of the buffer."""
        offset, n_bytes = self._places[layer]
        return self._buffer[offset : offset + n_bytes]

    def close(self) -> None:
        """Let go of the buffer."""
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._places = {}


def _allocate(n_bytes: int, pin: bool) -> torch.Tensor:
    if pin:
        try:
            return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            warnings.warn(
                f"could not pin {n_bytes / 1e9:.2f} GB of host memory ({error}); copies will come from pageable "
                "memory, which is slower and makes the host wait",
                stacklevel=2,
            )
    return torch.empty(n_bytes, dtype=torch.uint8)
