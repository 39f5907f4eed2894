"""What torch keeps for each thread, carried to other threads; and the generators that microbatches take turns with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch._C._autograd import _top_saved_tensors_default_hooks as hooks_around
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _python_dispatch as dispatch


def backward_task() -> int | None:
    """The backward pass that this thread is in."""
    task: int = torch._C._current_graph_task_id()
    return None if task == -1 else task


class ThreadState:
    """The modes of the thread that makes this: gradients, inference, autocast, devices and streams, user's modes."""

    def __init__(self, device: torch.device) -> None:
        """`device` is where the model computes."""
        self._threads = torch.get_num_threads()
        self._with_gradients = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in sorted({"cpu", device.type})
        ]
        self._autocast_cache = torch.is_autocast_cache_enabled()
        self._saved_hooks = hooks_around(True)
        self._function_modes = _get_current_function_mode_stack()
        self._dispatch_modes = dispatch._get_current_dispatch_mode_stack()
        self._stream = torch.accelerator.current_stream(device) if device.type != "cpu" else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Another thread is in these modes. It runs all of its backward passes itself, those of accelerators too.

        Its kernels use as many threads as the other's: how a sum is split may depend on that.
        """
        torch.set_num_threads(self._threads)
        if self._stream is not None:
            torch.accelerator.set_stream(self._stream)  # and its device
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(self._inference))
            modes.enter_context(torch.set_grad_enabled(self._with_gradients))
            modes.enter_context(torch.autograd.set_multithreading_enabled(False))
            for kind, dtype, enabled in self._autocast:
                modes.enter_context(torch.autocast(kind, dtype, enabled, self._autocast_cache))
            if self._saved_hooks is not None:
                modes.enter_context(saved_tensors_hooks(*self._saved_hooks))
            for mode in self._function_modes:  # as they are: entering them once more is for their owner
                _push_mode(mode)
                modes.callback(_pop_mode)
            for mode in self._dispatch_modes:
                dispatch._push_mode(mode)
                modes.callback(dispatch._pop_mode)
            yield


class Generators:
    """torch's default generators of the CPU and of one device."""

    def __init__(self, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type != "cpu":
            module = torch.get_device_module(device)
            index = module.current_device() if device.index is None else device.index
            self._generators.append(module.default_generators[index])

    def seed(self, seed: int) -> None:
        """As `torch.manual_seed`."""
        for generator in self._generators:
            generator.manual_seed(seed)

    def states(self) -> list[torch.Tensor]:
        """For `restore`."""
        return [generator.get_state() for generator in self._generators]

    def restore(self, states: list[torch.Tensor]) -> None:
        """Go on from there."""
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
