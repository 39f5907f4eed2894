"""A model under a plan: residents on the device, the rest streamed, undone by `remove()`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from autosp.batch import call_on
from autosp.devices import Device
from autosp.devices.memory import anonymous
from autosp.intercept import Intercepted
from autosp.partition import BoundModel, NamedTensor
from autosp.partition.placed import Placed, tensors_of
from autosp.runtime.executor import Executor, Observer
from autosp.runtime.gradients import Gradients, follow
from autosp.runtime.guests import Guests
from autosp.runtime.loader import Loader
from autosp.runtime.lookups import Lookups
from autosp.runtime.residents import Residents
from autosp.runtime.streamed_layer import StreamedLayer
from autosp.runtime.training import TrainingExecutor
from autosp.schedule.actions import Schedule
from autosp.schedule.timeline import Timeline
from autosp.spec import Mode, Tier
from autosp.tiers import Originals, Store, forget_pages

M = TypeVar("M", bound=nn.Module)


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
    reads: int
    read_bytes: int
    """From disk to host, where layers rest behind it."""
    gradient_bytes: int
    """From device to host, while training."""
    link_bytes: dict[str, int]
    """Bytes moved over each link, such as "host->device"."""
    pass_s: tuple[float, ...]
    """The last passes, oldest first."""
    stall_s: dict[str, float]
    """Layer -> how long compute waited for its weights: mean per pass of the last passes. Zeros are left out."""
    over_floor: float | None
    """The median of `pass_s` over the least time that the plan's budget allows; None if the plan does not know it."""


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
        floor_s: float | None = None,
        mode: Mode = "inference",
    ) -> None:
        """`on_close` frees the store once the model is at rest. `floor_s`: the least that one pass can take."""
        self.model = bound.model
        self._bound = bound
        self._device = device
        self._store = store
        self._originals = originals
        self._on_close = on_close
        self._floor_s = floor_s
        self._disk_layers = schedule.on_disk
        self._wrappers: list[Intercepted] = []
        self._guests: Guests | None = None
        self._lookups: Lookups | None = None
        self._removed = False
        resident_layers = set(schedule.residents)
        staying = [place for layer in bound.layers if layer.layer.index in resident_layers for place in layer.placed]
        staying += bound.residents
        streamed = [layer for layer in bound.layers if layer.layer.index not in resident_layers]
        kept = [*bound.opaque, *tensors_of(bound.lookups.placed if bound.lookups else ())]
        if originals is Originals.KEPT:
            kept += tensors_of(staying)
        self._kept = [(named, named.tensor.data) for named in kept]
        self._addresses: list[int | None] = []
        self._layers: list[StreamedLayer] = []
        forget_pages(source for place in _all_placed(bound) if (source := place.extent.source) is not None)
        staging = anonymous(schedule.staging_bytes)
        staging.zero_()  # its pages are taken before anything is measured, and before a pass
        device.pin(staging)
        gradients = Gradients(streamed if mode == "training" else (), device)
        device.start_measuring()
        try:
            self._residents = Residents(staying, device)
            self._residents.move_in()
            self._move_opaque()
            if originals is Originals.FREED:
                device.originals_freed(self._residents.n_bytes)
            self._lookups = Lookups(bound.lookups, device, store) if bound.lookups else None
            self._addresses = [_address(named.tensor) for named in kept]
            self._layers = [StreamedLayer(layer) for layer in streamed]
            arena = device.allocate(schedule.arena_bytes)
            loader = Loader(schedule, self._layers, device, store, arena, staging)
            del arena, staging
            if mode == "training":
                self._executor: Executor = TrainingExecutor(schedule, loader, gradients)
            else:
                self._executor = Executor(schedule, loader)
            self._executor.before_pass = store.check
            self._intercept()
            if mode == "training":
                follow(self.model.parameters())
            if device.torch_device.type != "cpu":
                known = [named.tensor for named in _all_tensors(bound)]
                self._guests = Guests(bound.model, known, lambda data: data.to(device.torch_device))
                self._executor.before_pass = self._guests.move_in
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
        """Counters since the plan was applied, and times of the last passes. Waits for the device."""
        peak_bytes = self._final_peak_bytes if self._removed else self._device.peak_bytes()
        counters, recorder = self._executor.counters, self._executor.recorder
        pass_s = tuple(recorder.pass_s())
        names = {layer.layer.index: layer.layer.name for layer in self._bound.layers}
        link_bytes = {f"{self._device.info.slow_tier}->{Tier.DEVICE}": counters.moved_bytes}
        if counters.gradient_bytes:
            link_bytes[f"{Tier.DEVICE}->{self._device.info.slow_tier}"] = counters.gradient_bytes
        if self._disk_layers:
            link_bytes[f"{Tier.DISK}->{Tier.HOST}"] = counters.read_bytes
        return Stats(
            **asdict(counters),
            peak_bytes=peak_bytes,
            link_bytes=link_bytes,
            pass_s=pass_s,
            stall_s={names[layer]: seconds for layer, seconds in recorder.stall_s().items() if seconds > 0},
            over_floor=median(pass_s) / self._floor_s if pass_s and self._floor_s else None,
        )

    @property
    def backward_visits(self) -> tuple[int, ...]:
        """Layers whose weights the last backward pass needed, in the order of need."""
        return tuple(self._executor.backward_visits)

    def timeline(self) -> Timeline:
        """When everything happened in the last passes, in seconds from the first one's beginning. Waits for the device.

        Layers that are resident are not watched. Empty before the first pass.
        """
        return self._executor.recorder.timeline()

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
        if self._guests is not None:
            self._guests.close()
        if self._lookups is not None:
            self._lookups.forget()
        for (named, data), address in zip(self._kept, self._addresses or [None] * len(self._kept), strict=True):
            if address is None or _address(named.tensor) == address:  # else somebody replaced it: theirs stays
                named.tensor.data = data
        self._kept = []
        if hasattr(self, "_residents"):
            if self._originals is Originals.FREED:
                self._residents.give_back()
            self._residents.forget()
        self._layers = []
        self._wrappers = []
        self._on_close()
        follow(self.model.parameters())

    def _move_opaque(self) -> None:
        """What cannot be packed goes to the device as it is."""
        for named in self._bound.opaque:
            if self._device.torch_device.type != "cpu":
                named.tensor.data = named.tensor.data.to(self._device.torch_device)

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


def _all_placed(bound: BoundModel) -> list[Placed]:
    """Every extent that the plan places."""
    return [*(place for layer in bound.stored() for place in layer.placed), *bound.residents]


def _all_tensors(bound: BoundModel) -> list[NamedTensor]:
    """Everything that the plan places."""
    return [*tensors_of(_all_placed(bound)), *bound.opaque]


def _address(tensor: torch.Tensor) -> int | None:
    return tensor.data_ptr() if tensor.layout is torch.strided else None
