"""`torch.simulated`, with what torch.cuda has of the same names, and autosp's accelerator on it.

Environment: SIMULATED_MEMORY (bytes, 4e9), SIMULATED_GBPS and SIMULATED_COPY_US (pace of copies to and from the host, 0:
at once), SIMULATED_SANITIZE (0: off, 1: races are kept in `torch.simulated.races()`, 2: they raise), SIMULATED_POISON
(1: fresh memory is 0xFF).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

import autosp.devices
from autosp.devices import AcceleratorDevice, memory
from simulated.build import load

KIND = "simulated"
DEVICE = f"{KIND}:0"

GB_PER_S, LATENCY_US = float(os.environ.get("SIMULATED_GBPS", 2.0)), 20.0
"""Of the link, for autosp: slow enough that what does not wait for a copy comes before it."""

backend = load()
module = ModuleType(f"torch.{KIND}")


def new_stream(device: Any = None, priority: int = 0, **known: int) -> torch.Stream:
    """As `torch.cuda.Stream`."""
    return torch.Stream(**known) if known else torch.Stream(torch.device(device or DEVICE), priority=priority)


def new_event(enable_timing: bool = False, blocking: bool = False) -> torch.Event:
    """As `torch.cuda.Event`."""
    return torch.Event(DEVICE, enable_timing=enable_timing, blocking=blocking)


@contextmanager
def on_stream(stream: torch.Stream | None) -> Iterator[None]:
    """As `torch.cuda.stream`."""
    if stream is None:
        yield
        return
    before = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)


def _memory(index: int) -> Any:
    return lambda device=None: backend.memory()[index]


_fraction = 1.0


def _set_fraction(fraction: float) -> None:
    global _fraction
    _fraction = fraction
    backend.set_fraction(fraction)


def _properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(name=f"{KIND}, {GB_PER_S:g} GB/s", total_memory=backend.memory()[0], major=0, minor=0)


def _generator() -> torch.Generator:
    found: torch.Generator = vars(module)["default_generators"][0]
    return found


vars(module).update(
    Stream=new_stream,
    Event=new_event,
    stream=on_stream,
    is_available=lambda: True,
    is_initialized=lambda: True,
    _initialized=True,
    _is_in_bad_fork=lambda: False,
    _lazy_init=lambda: None,
    device_count=lambda: 1,
    current_device=lambda: 0,
    set_device=lambda device: None,
    device=nullcontext,
    current_stream=lambda device=None: torch.accelerator.current_stream(torch.device(DEVICE)),
    set_stream=torch.accelerator.set_stream,
    synchronize=lambda device=None: backend.synchronize(),
    empty_cache=backend.empty_cache,
    memory_reserved=_memory(1),
    max_memory_reserved=_memory(2),
    memory_allocated=_memory(3),
    max_memory_allocated=_memory(4),
    mem_get_info=lambda device=None: (backend.memory()[0] - backend.memory()[1], backend.memory()[0]),
    reset_peak_memory_stats=lambda device=None: backend.reset_peak(),
    set_per_process_memory_fraction=lambda fraction, device=None: _set_fraction(fraction),
    get_per_process_memory_fraction=lambda device=None: _fraction,
    get_device_properties=_properties,
    get_device_name=lambda device=None: _properties().name,
    get_device_capability=lambda device=None: (9, 0),
    get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    is_bf16_supported=lambda *_, **__: True,
    manual_seed=lambda seed: _generator().manual_seed(seed) and None,
    manual_seed_all=lambda seed: _generator().manual_seed(seed) and None,
    initial_seed=lambda: _generator().initial_seed(),
    get_rng_state=lambda device=None: _generator().get_state(),
    set_rng_state=lambda state, device=None: _generator().set_state(state),
    races=backend.races,
)
torch.utils.rename_privateuse1_backend(KIND)
torch._register_device_module(KIND, module)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
vars(module)["default_generators"] = (backend.default_generator(),)


def _pin(pages: torch.Tensor, device: torch.device) -> bool:
    address = pages.data_ptr()
    backend.register_host(address, pages.numel())
    memory._PAGES[address].unpin = lambda: backend.unregister_host(address)
    return True


def _host_view(_: AcceleratorDevice, pages: torch.Tensor) -> torch.Tensor:
    assert memory.is_pinned(pages), "lookup tables need pinned memory"
    viewed: torch.Tensor = backend.host_view(pages)
    return viewed


def stand_in() -> None:
    """Have autosp stream to it: its type is known, and what CUDA's runtime does with host memory is done by it."""
    backend.set_link(GB_PER_S, LATENCY_US)
    autosp.devices.STREAMING_TYPES = (*autosp.devices.STREAMING_TYPES, KIND)
    memory.pin = _pin
    AcceleratorDevice._can_read_host = lambda self: True
    AcceleratorDevice.host_view = _host_view
