"""Which layers are in the arena: loads them when they are asked for, evicts those whose place is needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor

from autosp.batch import map_tensors, tensors_in
from autosp.devices import Copied, Device
from autosp.partition.tensors import held_by
from autosp.runtime.recorder import Recorder
from autosp.runtime.staging import Staging
from autosp.runtime.streamed_layer import StreamedLayer
from autosp.runtime.transfers import Prefetch, State, TransferGroup, build_groups
from autosp.runtime.updates import Updates
from autosp.schedule.actions import Kind, Schedule
from autosp.tiers import Store

PLAIN = (torch.Tensor, nn.Parameter)
"""Types of tensors that hold their bytes themselves."""


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
    gradient_bytes: int = 0
    """From device to host."""
    offloaded_bytes: int = 0
    """Activations from device to host."""
    restored_bytes: int = 0
    """And back."""
    restore_misses: int = 0
    """Activations that backward needed before they were asked for."""
    offload_buffers: int = 0
    """Runs of host memory that were taken for activations: a steady state takes no more."""


class Loader:
    """The groups of one schedule in one arena."""

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
        self.arena = arena
        self._arena_address = arena.untyped_storage().data_ptr()
        self.staging = Staging(staging, device, self._was_read)
        self.device = device
        self.counters = Counters()
        self.running = 0
        """Calls of layers that are under way."""
        self.recorder = Recorder(device)
        self.updates = Updates(device, self.recorder)
        self._store = store
        self._by_index = {layer.index: layer for layer in layers}
        self._present: list[TransferGroup] = []
        self.groups: Mapping[tuple[int, ...], TransferGroup] = build_groups(schedule, self._by_index, store, arena)
        self.group_of = {index: group for group in self.groups.values() for index in group.indices}
        for layer in layers:
            layer.place(self._place_of(layer))

    # -- what is asked for ahead ----------------------------------------------------------------------------------

    def issue(self, prefetch: Prefetch) -> None:
        """Start a prefetch, if its bytes are not there or on their way."""
        if prefetch.kind is Kind.READ:
            self.staging.read(prefetch.group)
        else:
            self._load(prefetch.group)

    def evict(self, groups: Iterable[TransferGroup]) -> None:
        """Forget these groups' bytes, where they are in the arena."""
        for group in [group for group in groups if group.state is not State.ABSENT]:
            self._evict(group)

    def drop_written(self) -> None:
        """Forget bytes whose weights at rest were written to since they left there."""
        for group in self.staging.ahead():
            if group.written_since(group.read_version):
                group.read = None
        self.evict([group for group in self._present if group.written_since(group.loaded_version)])

    def take_samples(self) -> None:
        """Until the next pass anybody may write to the weights, also where no version counter sees it (`.data`)."""
        with self.updates.inside:  # a layer whose update is under way is found to be written to, and loaded again
            for group in {*self._present, *self.staging.ahead()}:
                group.take_sample()

    # -- what is needed now ---------------------------------------------------------------------------------------

    def acquire(self, layer: StreamedLayer) -> TransferGroup | None:
        """Order compute after the layer's load and bind its tensors. None: it got temporary memory.

        The model may compute on streams of its own, which know of no load that another one waited for: they are joined.
        """
        group = self.group_of[layer.index]
        self.device.join()
        if layer.running:  # a call inside a call of the same layer
            layer.running += 1
            self.running += 1
            return group
        self.updates.finish(layer.index)
        fetched = group.state is State.READY or self.fetch(group)
        if not fetched:
            layer.place(self._load_temporarily(layer))
        layer.bind_device()
        layer.running = 1
        self.running += 1
        if not fetched:
            return None
        group.running += 1
        return group

    def release(self, layer: StreamedLayer, group: TransferGroup | None) -> None:
        """Bring the layer's tensors to rest. `group` is what `acquire` gave."""
        self.running -= 1
        if layer.running > 1:
            layer.running -= 1
            return
        layer.bind_rest()
        layer.running = 0
        if group is not None:
            group.running -= 1
        else:
            layer.place(self._place_of(layer))

    def fetch(self, group: TransferGroup) -> bool:
        """Order compute after the group's load. False if a layer that is running needs the place."""
        if group.state is State.ABSENT:
            self.counters.misses += 1
            if not self._load(group):
                return False
        if group.state is State.LOADING:
            self.counters.waits += 1
            try:
                self.device.wait(group.ready)
            except BaseException:
                self._evict(group)
                raise
            group.state = State.READY
            group.ready = None
        return True

    def need(self, index: int) -> torch.Tensor | None:
        """Have a layer's bytes at their address, without binding its tensors: compute is ordered after their load.

        Where a layer that is running needs the place, they are in the memory that is returned.
        """
        group = self.group_of[index]
        self.device.join()
        if group.state is State.READY or self.fetch(group):
            return None
        layer = self._by_index[index]
        return self._load_temporarily(layer)

    # -- whose memory it is ---------------------------------------------------------------------------------------

    def is_lent(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor, or one that it wraps, is a view of the arena."""
        if type(tensor) in PLAIN and not is_functorch_wrapped_tensor(tensor):
            return self._is_in_arena(tensor)
        return any(True for _ in self._lent(tensor))

    def lender(self, tensor: torch.Tensor) -> int:
        """The layer whose bytes in the arena a lent tensor shows."""
        address = next(self._lent(tensor)).data_ptr()
        return next(
            layer.index
            for group in self._present
            for layer in group.layers
            if 0 <= address - self._place_of(layer).data_ptr() < layer.layer.n_bytes
        )

    def moved(self, tensor: torch.Tensor, index: int, memory: torch.Tensor) -> torch.Tensor:
        """A lent tensor as it is in `memory`, which holds its layer's bytes."""
        begin = (tensor.data_ptr() - self._place_of(self._by_index[index]).data_ptr()) + memory.storage_offset()
        with torch.no_grad():
            return torch.empty(0, dtype=tensor.dtype, device=memory.device).set_(
                memory.untyped_storage(), begin // tensor.element_size(), tensor.size(), tensor.stride()
            )

    def own(self, output: Any) -> Any:
        """The output, in memory of its own where a layer handed out a view of its weights: those are overwritten."""
        for tensor in tensors_in(output):
            if self.is_lent(tensor):
                break
        else:
            return output
        return map_tensors(lambda tensor: tensor.clone() if self.is_lent(tensor) else tensor, output)

    # -- the end --------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Bring every layer to rest, wherever a pass was when it raised: it may have been just binding one."""
        with self.updates.inside:  # a layer whose update is under way is at rest
            for layer in self._by_index.values():
                if layer.running or layer.is_bound():
                    layer.bind_rest()
                    layer.running = 0
                    layer.place(self._place_of(layer))
        for group in set(self.group_of.values()):
            group.running = 0
        self.running = 0

    def close(self) -> None:
        """Let go of the arena, so that its memory is free when this returns. Nothing may be under way."""
        self.staging.close()
        for layer in self._by_index.values():
            layer.leave()
        self._by_index.clear()
        self.group_of.clear()
        self.groups = {}
        self._present.clear()
        self.arena = torch.empty(0, dtype=torch.uint8)
        self._arena_address = 0

    def _lent(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        for _, held in held_by(tensor):
            if self._is_in_arena(held):
                yield held

    def _is_in_arena(self, held: torch.Tensor) -> bool:
        return (
            held.layout is torch.strided
            and held.numel() > 0
            and held.untyped_storage().data_ptr() == self._arena_address
        )

    def _place_of(self, layer: StreamedLayer) -> torch.Tensor:
        return self.group_of[layer.index].place_of(layer)

    def _load(self, group: TransferGroup) -> bool:
        """Start the group's copy if it is not there. False if a layer that is running needs the place."""
        if group.state is not State.ABSENT:
            return True
        begin, end = group.begin, group.end
        rivals = [other for other in self._present if other.begin < end and begin < other.end]
        for rival in rivals:
            if rival.running:
                return False
        for rival in rivals:
            self._evict(rival)
        with self.updates.inside:
            group.loaded_version = group.version()
        group.ready = self._copy(group)
        group.state = State.LOADING
        self._present.append(group)
        self.recorder.loaded(group.indices, group.begin, group.ready, tuple([one.indices for one in rivals]))
        self.counters.loads += 1
        self.counters.moved_bytes += group.n_bytes
        return True

    def _copy(self, group: TransferGroup) -> Copied:
        """To its target, once that is free: what can read the old bytes was launched before this point of compute."""
        free = self.device.record()
        if group.staging_offset is None:
            return self.device.copy(group.regions, group.target, free, self.updates.due(group.indices))
        return self.staging.load(group, free)

    def _was_read(self, group: TransferGroup) -> None:
        self.recorder.was_read(group.indices, group.staging_offset or 0, group.read_bytes, group.read)
        self.counters.reads += 1
        self.counters.read_bytes += group.read_bytes

    def _load_temporarily(self, layer: StreamedLayer) -> torch.Tensor:
        """A layer whose place is taken by one that is running around it: right, at the price of memory."""
        index, n_bytes = layer.index, layer.layer.n_bytes
        self.counters.temporary_loads += 1
        self.counters.moved_bytes += n_bytes
        memory = self.device.allocate(n_bytes)
        staging_offset = None if self.group_of[index].staging_offset is None else 0
        group = TransferGroup((layer,), self._store.regions([index]), memory, 0, n_bytes, staging_offset)
        self.device.wait(self._copy(group))
        return memory

    def _evict(self, group: TransferGroup) -> None:
        """Unmodified weights are dropped: there is nothing to copy back. A copy on its way is overtaken in order."""
        group.state = State.ABSENT
        group.ready = None
        group.sample = None
        self._present.remove(group)
