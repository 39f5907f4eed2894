"""A model under a plan: residents on the device, the rest streamed, undone by `remove()`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum, auto
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from autosp.batch import call_on
from autosp.devices import Device
from autosp.intercept import Intercepted
from autosp.partition import BoundModel, NamedTensor, Placed
from autosp.partition.tensors import EXTENT_ALIGNMENT, align
from autosp.runtime.executor import Executor, Observer
from autosp.runtime.streamed_layer import StreamedLayer, tensors_of, views_on
from autosp.schedule.actions import Schedule
from autosp.tiers import Store

M = TypeVar("M", bound=nn.Module)


class Originals(Enum):
    """What happens to the memory that the weights were in when the plan was applied."""

    KEPT = auto()
    """It stays, and is what the model goes back to: for trials, which end soon."""
    FREED = auto()
    """It is freed: outside a pass the weights rest in the store. `remove()` makes new memory."""


@dataclass(frozen=True)
class Stats:
    """What a streamed model has done so far."""

    passes: int
    visits: int
    loads: int
    moved_bytes: int
    misses: int
    waits: int
    temporary_loads: int
    peak_bytes: int
    """Most device memory in use since the plan was applied, beyond what was in use before."""


class StreamedModel(Generic[M]):
    """The handle of an applied plan. As a context manager it gives the model, and removes itself at the end."""

    def __init__(
        self,
        bound: BoundModel,
        schedule: Schedule,
        device: Device,
        store: Store,
        originals: Originals,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = bound.model
        self._bound = bound
        self._device = device
        self._store = store
        self._originals = originals
        self._on_close = on_close
        self._wrappers: list[Intercepted] = []
        self._removed = False
        resident_layers = set(schedule.residents)
        self._staying = [
            place for layer in bound.layers if layer.layer.index in resident_layers for place in layer.placed
        ]
        self._staying += bound.residents
        streamed = [layer for layer in bound.layers if layer.layer.index not in resident_layers]
        self._kept = (
            [(named, named.tensor.data) for named in _all_tensors(bound)] if originals is Originals.KEPT else []
        )
        self._layers: list[StreamedLayer] = []
        if originals is Originals.FREED:
            for layer in streamed:
                _rebind(layer.placed, store.rest(layer.layer.index))
                for place in layer.placed:
                    place.extent.release()
        device.start_measuring()
        try:
            self._resident_memory = self._take_residents()
            self._layers = [
                StreamedLayer(layer, [named.tensor.data for named in tensors_of(layer.placed)]) for layer in streamed
            ]
            arena = device.allocate(schedule.arena_bytes)
            self._executor = Executor(schedule, self._layers, device, store, arena)
            del arena
            self._intercept()
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> M:
        return self.model  # type: ignore[return-value]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`self.model(*args, **kwargs)`."""
        return self.model(*args, **kwargs)

    def observe(self, observer: Observer | None) -> None:
        """Tell `observer` of every visit of a streamed layer from now on."""
        self._executor.observer = observer

    def stats(self) -> Stats:
        """Counters since the plan was applied."""
        peak_bytes = self._final_peak_bytes if self._removed else self._device.peak_bytes()
        return Stats(**asdict(self._executor.counters), peak_bytes=peak_bytes)

    def remove(self) -> None:
        """Make the model an ordinary one in ordinary memory again, with the values it has now. Twice is harmless."""
        if self._removed:
            return
        self._final_peak_bytes = self._device.peak_bytes()
        self._removed = True
        for wrapper in reversed(self._wrappers):
            wrapper.remove()
        if hasattr(self, "_executor"):
            self._executor.close()
        if self._originals is Originals.KEPT:
            for named, data in self._kept:
                named.tensor.data = data
            self._kept = []
        else:
            self._restore()
        self._layers = []
        self._wrappers = []
        self._resident_memory = torch.empty(0, dtype=torch.uint8)
        self._on_close()

    def _take_residents(self) -> torch.Tensor:
        """Move what never leaves into one piece of device memory, and bind it there for good."""
        offsets = []
        size = 0
        for place in self._staying:
            offsets.append(size)
            size += align(place.extent.n_bytes, EXTENT_ALIGNMENT)
        memory = self._device.allocate(size)
        for place, offset in zip(self._staying, offsets, strict=True):
            target = memory[offset : offset + place.extent.n_bytes]
            with torch.no_grad():
                target.copy_(_current_bytes(place))
            _rebind([Placed(place.extent, 0)], target)
            if self._originals is Originals.FREED:
                place.extent.release()
        if self._originals is Originals.FREED:
            self._device.originals_freed(size)
        for named in self._bound.opaque:
            if self._device.torch_device.type != "cpu":
                named.tensor.data = named.tensor.data.to(self._device.torch_device)
        return memory

    def _intercept(self) -> None:
        """Streamed layers load themselves; whatever contains one begins a pass when it is called from outside."""
        by_module = {layer.module: layer for layer in self._layers}
        holders = {self.model}
        for path in (layer.layer.name for layer in self._layers):
            parts = path.split(".")
            holders.update(self.model.get_submodule(".".join(parts[:length])) for length in range(1, len(parts)))
        holders.difference_update(by_module)
        for module in self.model.modules():
            if module in by_module:
                self._wrappers.append(Intercepted(module, self._around_layer(by_module[module])))
            elif module in holders:
                self._wrappers.append(Intercepted(module, self._around_pass))

    def _around_pass(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = self._device.torch_device
        if device.type == "cpu" or self._executor.running_here():
            return self._executor.run_pass(forward, args, kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            return self._executor.run_pass(forward, args, kwargs)

        return call_on(device, run, args, kwargs)

    def _around_layer(self, layer: StreamedLayer) -> Callable[..., Any]:
        run_layer = self._executor.run_layer

        def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return run_layer(layer, forward, args, kwargs)

        return around

    def _restore(self) -> None:
        """Copy every tensor's bytes, as they are now, to memory of its own; shared memory stays shared."""
        for place in (*self._staying, *self._resting()):
            with torch.inference_mode(False), torch.no_grad():
                memory = torch.empty(place.extent.n_bytes, dtype=torch.uint8)
                memory.copy_(_current_bytes(place))
            _rebind([Placed(place.extent, 0)], memory)
        for named in self._bound.opaque:
            if named.tensor.device.type != "cpu":
                named.tensor.data = named.tensor.data.to("cpu")

    def _resting(self) -> list[Placed]:
        staying = {place.extent for place in self._staying}
        return [place for layer in self._bound.layers for place in layer.placed if place.extent not in staying]


def _all_tensors(bound: BoundModel) -> list[NamedTensor]:
    named = [item for layer in bound.layers for item in tensors_of(layer.placed)]
    return [*named, *tensors_of(bound.residents), *bound.opaque]


def _rebind(placed: Sequence[Placed], base: torch.Tensor) -> None:
    """Point the tensors of packed extents at the packed bytes in `base`."""
    for named, view in zip(tensors_of(placed), views_on(placed, base), strict=True):
        named.tensor.data = view


def _current_bytes(place: Placed) -> torch.Tensor:
    """The extent's bytes where its first tensor has them now, as uint8."""
    named = place.extent.tensors[0]
    data = named.tensor.data
    begin = data.storage_offset() * data.element_size() - named.offset
    return torch.empty(0, dtype=torch.uint8, device=data.device).set_(
        data.untyped_storage(), begin, (place.extent.n_bytes,), (1,)
    )
