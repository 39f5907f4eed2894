"""Runs an action list while the model runs: a cursor over the compute actions, loads issued when their turn comes.

[Note: prefetch is a hint] The schedule says when to load what, never what is right. Whether a layer's weights are on
the device is decided by the state of its group, so a layer that runs out of order, twice or not at all is right too: it
is loaded on the spot (a miss) if it is not there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from autosp.batch import map_tensors, tensors_in
from autosp.devices import Copied, Device
from autosp.runtime.recorder import Recorder
from autosp.runtime.staging import Staging
from autosp.runtime.streamed_layer import StreamedLayer
from autosp.runtime.transfers import Prefetch, State, TransferGroup, build_groups, prefetches
from autosp.schedule.actions import Kind, Schedule
from autosp.tiers import Store


@dataclass
class Counters:
    """What the executor did. Only ever grows."""

    passes: int = 0
    visits: int = 0
    loads: int = 0
    moved_bytes: int = 0
    misses: int = 0
    waits: int = 0
    """Visits that found their group still loading."""
    temporary_loads: int = 0
    """Misses whose place was in use, served from memory taken for the occasion."""
    reads: int = 0
    read_bytes: int = 0
    """From disk to host, of what rests behind it."""


class Observer(Protocol):
    """Told of every visit; the profiler is one."""

    def arrive(self, layer: int) -> None:
        """Before anything is waited for."""

    def start(self, layer: int) -> None:
        """The weights are there."""

    def finish(self, layer: int, output: Any) -> None:
        """The layer's forward returned."""


class Executor:
    """Streams the layers of one model through one arena. One pass at a time: other threads wait for their turn."""

    def __init__(
        self,
        schedule: Schedule,
        layers: Sequence[StreamedLayer],
        device: Device,
        store: Store,
        arena: torch.Tensor,
        staging: torch.Tensor,
    ) -> None:
        """`arena` and `staging` hold what the schedule says that they must."""
        self.counters = Counters()
        self.recorder = Recorder(device)
        self.observer: Observer | None = None
        self.before_pass: Callable[[], None] = lambda: None
        self._device = device
        self._store = store
        self._arena = arena
        self._by_index = {layer.layer.index: layer for layer in layers}
        self._present: list[TransferGroup] = []
        self._staging = Staging(staging, device, self._was_read)
        groups = build_groups(schedule, self._by_index, store, arena)
        self._group_of = {index: group for group in groups.values() for index in group.indices}
        for layer in layers:
            layer.place(self._group_of[layer.layer.index].place_of(layer))
        self._visits = [a.layers[0] for a in schedule.forwards if a.layers[0] in self._group_of]
        self._start, self._after = prefetches(schedule, groups, self._visits)
        self._cursor = 0
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._primed = False

    # -- passes ---------------------------------------------------------------------------------------------------

    def run_pass(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an outermost call of the model, without autograd. Nested calls run as they are.

        If it raises, every layer is at rest again and the next pass starts from the schedule's beginning.
        """
        if self.running_here():
            return forward(*args, **kwargs)
        with self._lock:
            self._owner = threading.get_ident()
            try:
                with torch.no_grad(), _uncached_autocast(self._device.torch_device.type):
                    self._begin_pass()
                    output = forward(*args, **kwargs)
                    self.recorder.end_pass()
                    return output
            except BaseException:
                self._abort()
                raise
            finally:
                self._end_pass()
                self._owner = None

    def run_layer(
        self, layer: StreamedLayer, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one layer's forward with its weights on the device."""
        if self._owner != threading.get_ident():
            return self.run_pass(lambda *a, **k: self.run_layer(layer, forward, a, k), args, kwargs)
        observer, recorder = self.observer, self.recorder
        index = layer.layer.index
        if observer is not None:
            observer.arrive(index)
        recorder.arrive(index)
        visit = self._advance(index)
        group = self._acquire(layer)
        try:
            recorder.start()
            if observer is not None:
                observer.start(index)
            output = self._own(forward(*args, **kwargs))
            recorder.finish()
            if observer is not None:
                observer.finish(index, output)
        finally:
            self._release(layer, group)
        if visit is not None:
            for prefetch in self._after[visit]:
                self._issue(prefetch)
        return output

    def running_here(self) -> bool:
        """Whether this thread is inside a pass."""
        return self._owner == threading.get_ident()

    def close(self) -> None:
        """Bring every layer to rest and let go of the arena, so that its memory is free when this returns."""
        self._device.synchronize()
        self._abort()
        self._staging.close()
        for layer in self._by_index.values():
            layer.leave()
        self._by_index.clear()
        self._group_of.clear()
        self._present.clear()
        self._start.clear()
        self._after.clear()
        self._arena = torch.empty(0, dtype=torch.uint8)

    # -- the cursor -----------------------------------------------------------------------------------------------

    def _begin_pass(self) -> None:
        self.before_pass()
        self.counters.passes += 1
        self.recorder.begin_pass()
        if not self._primed:
            self._primed = True
            for prefetch in self._start:
                self._issue(prefetch)
        # Written at rest since they were prefetched:
        for group in self._staging.ahead():
            if group.written_since(group.read_version):
                group.read = None
        for group in tuple(self._present):
            if group.written_since(group.loaded_version):
                self._evict(group)

    def _end_pass(self) -> None:
        """Until the next pass anybody may write to the weights, also where no version counter sees it (`.data`)."""
        for group in {*self._present, *self._staging.ahead()}:
            group.take_sample()

    def _advance(self, index: int) -> int | None:
        """Move the cursor past this visit and return its position; None if the schedule has no such visit."""
        self.counters.visits += 1
        visits = self._visits
        period = len(visits)
        position = self._cursor
        if position < period and visits[position] == index:
            self._cursor = (position + 1) % period
            return position
        return self._resynchronise(index)

    def _resynchronise(self, index: int) -> int | None:
        """The order differs from the profiled one. Skipped visits' loads are issued if their user is still to come."""
        period = len(self._visits)
        for skipped in range(1, period):
            position = (self._cursor + skipped) % period
            if self._visits[position] != index:
                continue
            if skipped <= period // 2:
                for passed in range(skipped):
                    for prefetch in self._after[(self._cursor + passed) % period]:
                        if passed + prefetch.needed_in > skipped:
                            self._issue(prefetch)
            self._cursor = (position + 1) % period
            return position
        return None

    # -- groups ---------------------------------------------------------------------------------------------------

    def _acquire(self, layer: StreamedLayer) -> TransferGroup | None:
        """Order compute after the layer's load and bind its tensors. None: it got temporary memory."""
        group = self._group_of[layer.layer.index]
        if layer.running:  # a call inside a call of the same layer
            layer.running += 1
            return group
        if group.state is State.ABSENT:
            self.counters.misses += 1
            if not self._load(group):
                self._load_temporarily(layer)
                return None
        if group.state is State.LOADING:
            self.counters.waits += 1
            try:
                self._device.wait(group.ready)
            except BaseException:
                self._evict(group)
                raise
            group.state = State.READY
            group.ready = None
        layer.bind_device()
        layer.running = 1
        group.running += 1
        return group

    def _release(self, layer: StreamedLayer, group: TransferGroup | None) -> None:
        layer.running -= 1
        if layer.running:
            return
        layer.bind_rest()
        if group is not None:
            group.running -= 1
        else:
            layer.place(self._group_of[layer.layer.index].place_of(layer))

    def _issue(self, prefetch: Prefetch) -> None:
        if prefetch.kind is Kind.READ:
            self._staging.read(prefetch.group)
        else:
            self._load(prefetch.group)

    def _load(self, group: TransferGroup) -> bool:
        """Start the group's copy if it is not there. False if a layer that is running needs the place."""
        if group.state is not State.ABSENT:
            return True
        rivals = [other for other in self._present if other.begin < group.end and group.begin < other.end]
        if any(rival.running for rival in rivals):
            return False
        for rival in rivals:
            self._evict(rival)
        group.loaded_version = group.version()
        group.ready = self._copy(group)
        group.state = State.LOADING
        self._present.append(group)
        self.recorder.loaded(group.indices, group.begin, group.ready, tuple(rival.indices for rival in rivals))
        self.counters.loads += 1
        self.counters.moved_bytes += group.n_bytes
        return True

    def _copy(self, group: TransferGroup) -> Copied:
        """To its target, once that is free: what can read the old bytes was launched before this point of compute."""
        free = self._device.record()
        if group.staging_offset is None:
            return self._device.copy(group.regions, group.target, free)
        return self._staging.load(group, free)

    def _was_read(self, group: TransferGroup) -> None:
        self.recorder.was_read(group.indices, group.staging_offset or 0, group.n_bytes, group.read)
        self.counters.reads += 1
        self.counters.read_bytes += group.n_bytes

    def _load_temporarily(self, layer: StreamedLayer) -> None:
        """A layer whose place is taken by one that is running around it: right, at the price of memory."""
        index, n_bytes = layer.layer.index, layer.layer.n_bytes
        self.counters.temporary_loads += 1
        self.counters.moved_bytes += n_bytes
        memory = self._device.allocate(n_bytes)
        staging_offset = None if self._group_of[index].staging_offset is None else 0
        self._device.wait(
            self._copy(TransferGroup((layer,), self._store.regions([index]), memory, 0, n_bytes, staging_offset))
        )
        layer.place(memory)
        layer.bind_device()
        layer.running = 1

    def _own(self, output: Any) -> Any:
        """The output, in memory of its own where a layer handed out a view of its weights: those are overwritten."""
        arena = self._arena.untyped_storage().data_ptr()

        def is_lent(tensor: torch.Tensor) -> bool:
            return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() == arena

        if not any(is_lent(tensor) for tensor in tensors_in(output)):
            return output
        return map_tensors(lambda tensor: tensor.clone() if is_lent(tensor) else tensor, output)

    def _evict(self, group: TransferGroup) -> None:
        """Unmodified weights are dropped: there is nothing to copy back. A copy on its way is overtaken in order."""
        group.state = State.ABSENT
        group.ready = None
        group.sample = None
        self._present.remove(group)

    def _abort(self) -> None:
        for layer in self._by_index.values():
            if layer.running:
                layer.bind_rest()
                layer.running = 0
                layer.place(self._group_of[layer.layer.index].place_of(layer))
        for group in set(self._group_of.values()):
            group.running = 0
        self._cursor = 0
        self.recorder.drop_pass()


@contextmanager
def _uncached_autocast(kind: str) -> Iterator[None]:
    """Autocast keeps its copy of every weight until its context ends: all of them, whatever the budget."""
    if not torch.is_autocast_enabled(kind):
        yield
        return
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
